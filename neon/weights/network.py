"""Networks that keep their constructor's arguments, and files that record them: EDM's and IMM's .pkl, and our own."""

import json
import math
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Union

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from neon import NeonError
from neon.family import named
from neon.files import reason_of
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
    with recorded(weights, path, kind):
        if (found := weights.metadata.get("class_name", network.__name__)) != network.__name__:
            raise ValueError(f"it holds a {found}")
        record = weights.metadata.get("init_kwargs")
        kwargs = json.loads(record) if record else unrecorded
        if kwargs is None:
            raise ValueError("it does not record the network's constructor arguments")
        check_arguments(network, kwargs)
        with torch.device("meta"):
            return build(network, {**kwargs, **options})


@contextmanager
def recorded(weights: Weights, path: str | Path, kind: str) -> Iterator[None]:
    """A network is built in the block from what `weights`, the file at `path`, records of it.

    Whatever that raises becomes one NeonError, which says that it is no checkpoint of that kind. A network that is
    larger than the file is refused while it is built.
    """
    try:
        with no_larger_than(weights):
            yield
    except NeonError as error:
        raise error if str(path) in str(error) else NeonError(f"{path}: no {kind} checkpoint ({error})") from None
    except Exception as error:  # a constructor that is given anything
        raise NeonError(f"{path}: no {kind} checkpoint ({reason_of(error)})") from None


MOST = 10**6  # of a number in a constructor's arguments: sides, widths, depths, classes
LONGEST = 10**3  # of a list or a text in them


def check_arguments(network: Callable, arguments: object) -> None:
    """Raises ValueError unless arguments that a file records are of the types that a constructor's annotations say.

    `network.inner`, if it is there, is the class that gets those which the constructor does not name. What has no
    annotation may be any plain value. Numbers are at most MOST, or infinite.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError("its constructor arguments are no JSON object")
    classes = [getattr(network, "inner", None), network]
    wanted = {name: kind for cls in filter(None, classes) for name, kind in typing.get_type_hints(cls.__init__).items()}
    for name, value in arguments.items():
        if not _plain(value):
            raise ValueError(f"{name} is {_short(value)}, which is no argument of a network")
        if name in wanted and not _is(value, wanted[name]):
            kind = getattr(wanted[name], "__name__", wanted[name])
            raise ValueError(f"{name} is {_short(value)}, not of type {kind}")


def _short(value: object) -> str:
    return repr(value)[:60]


def _plain(value: object) -> bool:
    """A JSON value of sensible size."""
    if isinstance(value, dict | list | tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return len(value) <= LONGEST and all(map(_plain, parts))
    if isinstance(value, int | float):
        return value == math.inf or -MOST <= value <= MOST
    return value is None or (isinstance(value, str) and len(value) <= LONGEST)


def _is(value: object, wanted: object) -> bool:
    """Is a JSON value of an annotated type? Any is of a type that JSON does not have."""
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, UnionType):
        return any(_is(value, part) for part in parts)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_is(item, parts[0]) for item in value)
    if wanted in (int, bool, str, type(None)):
        return type(value) is wanted
    return type(value) in (int, float) if wanted is float else True


@contextmanager
def no_larger_than(weights: Weights) -> Iterator[None]:
    """Networks that are built in the block are not much larger than a file. Raises ValueError as soon as they are.

    They may be twice as large, and more by what lies in another file: an autoencoder.
    """
    names, values = len(weights), sum(math.prod(weights.spec(name)[1]) for name in weights)
    limits = {"modules": 16 * names + 8000, "parameters": 2 * names + 1000, "values": 2 * values + 2**28}
    made = Counter()

    def count(module, name, part):
        if isinstance(part, nn.Parameter):
            made.update(parameters=1, values=part.numel())
        elif part is not None:
            made["modules"] += 1
        if over := [kind for kind, most in limits.items() if made[kind] > most]:
            raise ValueError(f"its constructor arguments make more {over[0]} than its {names:,} tensors have")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
