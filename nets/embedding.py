"""Numbers, such as times, as vectors that a network can read."""

import math

import torch


def sinusoids(t: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(…) → (…, width) of that dtype: cosines of t, then sines, at geometric frequencies from 1 towards 1/10000.

    The last of the width / 2 frequencies is one step short of 1/10000.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=dtype, device=t.device))
    angle = t.to(dtype)[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
