"""Training in less memory: the blocks of a network, whose inner results the backward pass computes again."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neon import dropout

HELD = 2**30  # bytes of parameters that neon.shard gathers once in a step, not block by block in each micro-batch
SMALLEST = 1000  # times as many parameters as it a network has, for a part to count as a block


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The parts that a network calls one after the other: members of its lists and dicts of modules, the outermost
    ones, without the very small."""
    least = sum(p.numel() for p in network.parameters()) / SMALLEST
    return [part for part in _members(network) if sum(p.numel() for p in part.parameters()) > least]


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and is_called(child):
            yield child
        else:
            yield from _members(child)


def is_called(module: nn.Module) -> bool:
    """Has it a forward of its own? A list of modules has none."""
    return type(module).forward is not nn.Module.forward


def recompute_in(network: nn.Module) -> None:
    """From now on its blocks are computed again in the backward pass, with the same dropout masks. Names of tensors
    stay."""
    for block in blocks_of(network):
        block.forward = _twice(block.forward)


def _twice(forward: Callable) -> Callable:
    @wraps(forward)
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        streams = dropout.copied()
        contexts = lambda: (nullcontext(), dropout.drawn_from(streams))  # noqa: E731
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run
