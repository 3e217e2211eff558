"""The precision in which networks compute: 'float32', 'float16' or 'bfloat16', or two of them, 'NETWORK+DECODER'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
_on_meta = ["float32"]  # of the autocasts that are open on the meta device


def network(precision: str) -> str:
    """'float32+float16' → 'float32', of the network that is trained; 'float16' → 'float16'."""
    return precision.partition("+")[0]


def decoder(precision: str) -> str:
    """'float32+float16' → 'float16', of what makes pixels of its latents; 'float16' → 'float16'."""
    return precision.rpartition("+")[2]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which products run in 'float16' or 'bfloat16'; with 'float32' an enclosing autocast has no effect.

    On the meta device, for which PyTorch has no autocast, `on_meta` says what it would be.
    """
    import torch  # here, since the options of commands need DTYPES and no more

    if device.type == "meta":
        return _noted(precision)

    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def on_meta() -> str:
    """The precision of the innermost `autocast` on the meta device; 'float32' outside of all."""
    return _on_meta[-1]


@contextmanager
def _noted(precision: str) -> Iterator[None]:
    _on_meta.append(precision)
    try:
        yield
    finally:
        _on_meta.pop()
