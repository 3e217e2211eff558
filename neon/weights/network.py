"""Networks that remember their constructor's arguments, and files that record them: EDM's and IMM's .pkl, our own."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from neon import NeonError
from neon.weights.checkpoint import check_fits, load_into, open_weights


def build(network: type[nn.Module], kwargs: Mapping) -> nn.Module:
    """network(**kwargs), which keeps kwargs as init_kwargs."""
    net = network(**kwargs)
    net.init_kwargs = dict(kwargs)
    return net


def metadata(net: nn.Module) -> dict[str, str]:
    """What `load` needs beside the weights, under the names that neon.weights.checkpoint gives to a pickle's record."""
    return {"class_name": type(net).__name__, "init_kwargs": json.dumps(net.init_kwargs)}


def load(
    path: str | Path,
    network: type[nn.Module],
    kind: str,
    device: torch.device | str,
    unrecorded: Mapping | None = None,
    **options,
) -> tuple[nn.Module, dict[str, str]]:
    """(network, metadata) of a checkpoint, in eval mode and without gradients; options override its constructor's.

    kind: what errors call it. unrecorded: the constructor's arguments if the file records none. Raises NeonError if the
    file holds another class or no arguments where it must, or if its tensors do not fit them.
    """
    with open_weights(path) as weights:
        try:
            if (found := weights.metadata.get("class_name", network.__name__)) != network.__name__:
                raise NeonError(f"it holds a {found}")
            record = weights.metadata.get("init_kwargs")
            kwargs = json.loads(record) if record else unrecorded
            if kwargs is None:
                raise NeonError("it does not record the network's constructor arguments")
            with torch.device("meta"):  # no time for initial values that are overwritten
                net = build(network, {**kwargs, **options})
        except (NeonError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            raise NeonError(f"{path}: no {kind} checkpoint ({error})") from None
        check_fits(net, weights, path)
        load_into(net.to_empty(device=device), weights, path)
        return net.eval().requires_grad_(False), weights.metadata
