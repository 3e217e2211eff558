"""The precision in which networks compute."""

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which products run in 'float16' or 'bfloat16'; with 'float32' an enclosing autocast has no effect."""
    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
