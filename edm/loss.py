"""EDM's denoising loss (Karras et al. 2022, Eq. 8 and Table 1)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from edm.augment import Plan, plan, transform
from edm.augment import draw as augment_draw


class Draws(NamedTuple):
    """The random numbers of a training step of N images."""

    level: torch.Tensor  # (N, 1, 1, 1) standard normal
    augment: Plan | None
    noise: torch.Tensor  # (N, C, H, W) standard normal


def draw(shape: Sequence[int], generator: torch.Generator, p: float = 0.0) -> Draws:
    """Draws for images of that (N, C, H, W), in the order of the fields; p: probability of each augmentation."""
    here = {"generator": generator, "device": generator.device}
    level = torch.randn(shape[0], 1, 1, 1, **here)
    augment = plan(augment_draw(shape[0], generator), p, shape[2:]) if p else None
    return Draws(level, augment, torch.randn(*shape, **here))


def edm_loss(net: Callable, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws) -> torch.Tensor:
    """Weighted squared error of every pixel, (N, C, H, W), at noise levels ln σ ~ N(-1.2, 1.2²), one per image.

    images: (N, C, H, W) in [-1, 1]; labels: (N, label_dim) one-hot or None. EDM trains on the sum / N.
    """
    level, chosen, noise = draws
    augment_labels = None
    if chosen:
        images, augment_labels = transform(images, chosen), chosen.labels.to(images.device)
    return loss_map(net, images, labels, augment_labels, level.to(images.device), noise.to(images.device))


def loss_map(
    net: Callable,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    augment_labels: torch.Tensor | None,
    level: torch.Tensor,
    noise: torch.Tensor,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    sigma_data: float = 0.5,
) -> torch.Tensor:
    """`edm_loss` of given standard normals: level (N, 1, 1, 1), noise (N, C, H, W)."""
    sigma = (P_std * level + P_mean).exp()
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised = net(images + noise * sigma, sigma, labels, augment_labels)
    return weight * (denoised - images) ** 2
