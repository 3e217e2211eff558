"""Between pixels and the latents that IMM models: Stable Diffusion's VAE, and a normalisation per channel.

A VAE here is any object with `dtype`, `encode(pixels) -> (mean, std)` and `decode(latents) -> pixels`, where pixels
are (N, 3, 8 h, 8 w) in [-1, 1], latents, means and standard deviations (N, 4, h, w), all of that dtype. The latents are
the VAE's own: without the factor 0.18215 that Stable Diffusion puts on them.
"""

from typing import Protocol

import torch

from neon import NeonError
from neon.sampling import from_uint8, to_uint8

# Statistics of ImageNet-256 under sd-vae-ft-ema, as the released models were configured; normalised to std 0.5.
MEAN = torch.tensor([0.86488, -0.27787343, 0.21616915, 0.3738409])
STD = torch.tensor([4.85503674, 5.31922414, 3.93725398, 3.9870003])
SCALE = (0.5 / STD)[:, None, None]
BIAS = -MEAN[:, None, None] * SCALE
BATCH = 8  # images that pass the VAE at once, as in the original


class VAE(Protocol):
    dtype: torch.dtype

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) → the posterior's [mean, std], (N, 8, H/8, W/8) float32, not normalised."""
    if images.shape[1] != 3:
        raise NeonError(f"the VAE encodes images of 3 channels, not {images.shape[1]}")
    pixels = from_uint8(images).to(vae.dtype)
    return torch.cat([torch.cat(vae.encode(part), dim=1).float() for part in pixels.split(BATCH)])


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """[mean, std] (N, 8, h, w) and standard normals (N, 4, h, w) → normalised latents (N, 4, h, w), all float32."""
    if moments.shape[1] != 8:
        raise NeonError(f"stored latents have 8 channels [mean, std], not {moments.shape[1]}")
    mean, std = moments.chunk(2, dim=1)
    return (mean + std * noise) * SCALE.to(mean.device) + BIAS.to(mean.device)


@torch.no_grad()
def decode(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (N, 4, h, w), any float dtype → uint8 (N, 3, 8 h, 8 w)."""
    if latents.shape[1] != 4:
        raise NeonError(f"the VAE decodes latents of 4 channels, not {latents.shape[1]}")
    raw = ((latents.float() - BIAS.to(latents.device)) / SCALE.to(latents.device)).to(vae.dtype)
    return torch.cat([to_uint8(vae.decode(part)) for part in raw.split(BATCH)])
