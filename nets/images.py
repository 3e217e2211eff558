"""Changes to images in training."""

import torch


def mirror(images: torch.Tensor, mirrored: torch.Tensor | None) -> torch.Tensor:
    """The images (N, C, H, W), some of them flipped left to right; mirrored: (N,) bool, None: none of them."""
    if mirrored is None:
        return images
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
