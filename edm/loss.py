"""EDM's denoising loss (Karras et al. 2022, Eq. 8 and Table 1)."""

from collections.abc import Callable

import torch


def edm_loss(
    net: Callable,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    generator: torch.Generator,
    augment: Callable | None = None,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    sigma_data: float = 0.5,
) -> torch.Tensor:
    """Weighted squared error of every pixel, (N, C, H, W), at noise levels ln σ ~ N(P_mean, P_std²), one per image.

    images: (N, C, H, W) in [-1, 1]; labels: (N, label_dim) one-hot or None. augment: (images, generator) →
    (images, augmentation labels). Drawn, in this order: levels, augmentation, noise. EDM trains on the sum / N.
    """
    level = torch.randn(len(images), 1, 1, 1, generator=generator, device=generator.device)
    images, augment_labels = augment(images, generator) if augment else (images, None)
    noise = torch.randn(images.shape, generator=generator, device=generator.device)
    level, noise = level.to(images.device), noise.to(images.device)
    return loss_map(net, images, labels, augment_labels, level, noise, P_mean, P_std, sigma_data)


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
