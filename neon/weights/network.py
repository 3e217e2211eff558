"""Networks that keep their constructor's arguments, and files that record them: EDM's and IMM's .pkl, and our own."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from neon import NeonError
from neon.family import named
from neon.weights.checkpoint import Weights, check_fits, load_into, open_weights


def build(network: type[nn.Module], kwargs: Mapping) -> nn.Module:
    """network(**kwargs), which keeps kwargs as init_kwargs."""
    net = network(**kwargs)
    net.init_kwargs = dict(kwargs)
    return net


def metadata(net: nn.Module) -> dict[str, str]:
    """What `load` needs in addition to the weights; the same keys as neon.weights.checkpoint uses for a .pkl."""
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

    kind: its name in error messages. unrecorded: the constructor's arguments for a file that records none; without them
    that is an error. Raises NeonError also if the file holds another class, or if its tensors do not fit.
    """
    with open_weights(path) as weights:
        net = _recorded(weights, path, network, kind, unrecorded, options)
        check_fits(net, weights, path)
        load_into(net.to_empty(device=device), weights, path)
        return net.eval().requires_grad_(False), weights.metadata


def hollow(
    config: str | Path,
    networks: Mapping[str, Mapping],
    network: type[nn.Module],
    kind: str,
    unrecorded: Mapping | None = None,
    **options,
) -> nn.Module:
    """The network of a name in `networks`, or of a checkpoint as `load` takes it, on the meta device, in eval mode."""
    if isinstance(config, Path):
        with open_weights(config) as weights:
            return _recorded(weights, config, network, kind, unrecorded, options).eval()
    with torch.device("meta"):
        return build(network, {**named(networks, config, f"{kind} network"), **options}).eval()


def _recorded(weights: Weights, path, network, kind: str, unrecorded: Mapping | None, options: Mapping) -> nn.Module:
    """The network that the file's metadata describes, on the meta device: initial values would only be overwritten."""
    try:
        if (found := weights.metadata.get("class_name", network.__name__)) != network.__name__:
            raise NeonError(f"it holds a {found}")
        record = weights.metadata.get("init_kwargs")
        kwargs = json.loads(record) if record else unrecorded
        if kwargs is None:
            raise NeonError("it does not record the network's constructor arguments")
        with torch.device("meta"):
            return build(network, {**kwargs, **options})
    except (NeonError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise NeonError(f"{path}: no {kind} checkpoint ({error})") from None
