"""How training images are cropped: enlarged by a fixed factor, then cut out at random. They are never flipped."""

import torch
from torch import Tensor


def lanczos_matrix(size: int, enlarged: int) -> Tensor:
    """Weights (enlarged, size) float64 that resample a line of pixels as PIL's Lanczos filter does; enlarged ≥ size."""
    centre = (torch.arange(enlarged, dtype=torch.float64)[:, None] + 0.5) * size / enlarged
    distance = torch.arange(size, dtype=torch.float64) + 0.5 - centre
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return weights / weights.sum(1, keepdim=True)


def room(size: int, factor: float) -> int:
    """By how many pixels an image of that size grows when it is enlarged."""
    return round(factor * size) - size


def draw_corners(n: int, size: int, factor: float, generator: torch.Generator) -> Tensor:
    """Where n crops begin, (n, 2) int64: row and column."""
    return torch.randint(room(size, factor) + 1, (2, n), generator=generator, device=generator.device).T


def enlarged_crops(images: Tensor, factor: float, corners: Tensor) -> Tensor:
    """Crops, of the images' own size, of the images enlarged by `factor`; corners: (B, 2), see draw_corners.

    images: uint8 (B, C, S, S) → uint8 of the same shape. Multiplying by the rows of the resampling matrix that a crop
    needs is resizing and cropping at once. In float64: lower precision (TF32, autocast) would move pixels by a level.
    """
    size = images.shape[-1]
    matrix = lanczos_matrix(size, size + room(size, factor)).to(images.device)
    rows, columns = matrix[corners.T.to(images.device)[..., None] + torch.arange(size, device=images.device)]
    wide = to_levels(images.double() @ columns.mT[:, None])  # the filter runs over lines first, and rounds in between
    return to_levels(rows[:, None] @ wide).to(torch.uint8)


def to_levels(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)
