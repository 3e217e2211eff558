"""The flow matching loss: regress the velocity of straight lines from noise to data."""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment


def flow_loss(
    velocity: Callable,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    generator: torch.Generator,
    coupling: str = "independent",
) -> torch.Tensor:
    """Squared error of the velocity, (N, C, H, W), at x_t = (1 - t) noise + t image (Tong et al. 2024, Eq. 14, σ = 0).

    velocity(x, t, labels); images: (N, C, H, W) in [-1, 1]. coupling: 'independent', or 'ot', which pairs the batch's
    images with its noise at the least sum of squared distances. Drawn, in this order: noise, times.
    """
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)
    t = torch.rand(len(images), generator=generator, device=generator.device).to(images.device)
    if coupling == "ot":
        noise = noise[nearest_pairs(images, noise)]
    along = t[:, None, None, None]
    return (velocity(noise + along * (images - noise), t, labels) - (images - noise)) ** 2


def nearest_pairs(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The permutation of `noise` at the least sum of squared distances from `images`, (N,) int64 on their device."""
    cost = torch.cdist(images.flatten(1), noise.flatten(1)) ** 2
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(images.device)
