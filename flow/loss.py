"""The flow matching loss: regress the velocity of straight lines from noise to data."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment


class Draws(NamedTuple):
    """The random numbers of a training step of N images."""

    mirrored: torch.Tensor | None  # (N,) bool
    noise: torch.Tensor  # (N, C, H, W) standard normal
    t: torch.Tensor  # (N,) uniform in [0, 1)


def flow_loss(
    velocity: Callable, images: torch.Tensor, labels: torch.Tensor | None, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Squared error of the velocity, (N, C, H, W), at x_t = (1 - t) noise + t image (Tong et al. 2024, Eq. 14, σ = 0).

    velocity(x, t, labels); images: (N, C, H, W) in [-1, 1].
    """
    along = t[:, None, None, None]
    return (velocity(noise + along * (images - noise), t, labels) - (images - noise)) ** 2


def nearest_pairs(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The permutation of `noise` at the least sum of squared distances from `images`, (N,) int64 on their device."""
    cost = torch.cdist(images.flatten(1), noise.flatten(1)) ** 2
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(images.device)
