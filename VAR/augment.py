"""How training images are cropped: enlarged by a fixed factor, then cut out at random. They are never flipped."""

import torch
from torch import Tensor


def lanczos_matrix(size: int, enlarged: int) -> Tensor:
    """Weights (enlarged, size) float64 that resample a line of pixels as PIL's Lanczos filter does; enlarged ≥ size."""
    centre = (torch.arange(enlarged, dtype=torch.float64)[:, None] + 0.5) * size / enlarged
    distance = torch.arange(size, dtype=torch.float64) + 0.5 - centre
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return weights / weights.sum(1, keepdim=True)


def enlarged_crops(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Random crops, of the images' own size, of the images enlarged by `factor`.

    images: uint8 (B, C, S, S) → uint8 of the same shape. One position per image, from the generator. Multiplying by
    the rows of the resampling matrix that a crop needs is resizing and cropping at once; float64, since lower
    precision (TF32, autocast) would move pixels by a level.
    """
    size = images.shape[-1]
    room = round(factor * size) - size
    matrix = lanczos_matrix(size, size + room).to(images.device)
    corners = torch.randint(room + 1, (2, len(images)), generator=generator, device=generator.device)
    rows, columns = matrix[corners.to(images.device)[..., None] + torch.arange(size, device=images.device)]
    wide = to_levels(images.double() @ columns.mT[:, None])  # the filter runs over lines first, and rounds in between
    return to_levels(rows[:, None] @ wide).to(torch.uint8)


def to_levels(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)
