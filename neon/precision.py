"""The precision in which networks compute: 'float32', 'float16' or 'bfloat16', or two of them, 'NETWORK+DECODER'."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def network(precision: str) -> str:
    """'float32+float16' → 'float32', of the network that is trained; 'float16' → 'float16'."""
    return precision.partition("+")[0]


def decoder(precision: str) -> str:
    """'float32+float16' → 'float16', of what makes pixels of its latents; 'float16' → 'float16'."""
    return precision.rpartition("+")[2]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which products run in 'float16' or 'bfloat16'; with 'float32' an enclosing autocast has no effect."""
    import torch  # here, since the options of commands need DTYPES and no more

    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
