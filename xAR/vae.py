"""From images to the latents that xAR models, and back: the KL-16 autoencoder of MAR, or patches of pixels.

Parameter names are those of the released kl16.ckpt.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nets.autoencoder import Decoder, Encoder

LATENT_SCALE = 0.2325  # scales the latents to about unit variance


class AutoencoderKL(nn.Module):
    """channels: of the latent; multipliers: width of each level over `width`, every level but one halves the side."""

    image_channels = 3

    def __init__(
        self,
        channels: int = 16,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        width: int = 128,
        groups: int = 32,
    ):
        super().__init__()
        self.factor = 2 ** (len(multipliers) - 1)
        shape = (width, multipliers, groups)
        self.encoder = Encoder(3, 2 * channels, *shape, fused=False)
        self.decoder = Decoder(channels, 3, *shape, fused=False, attend=False)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] → mean and standard deviation of the latent, (B, channels, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A scaled latent for the transformer, drawn with noise (B, channels, H/f, W/f), standard normal."""
        mean, deviation = self.moments(images)
        return LATENT_SCALE * (mean + deviation * noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, channels, h, w) → images (B, 3, fh, fw), [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(latents / LATENT_SCALE))


class Patches(nn.Module):
    """In place of an autoencoder for images of a few pixels: a latent is a patch of 2×2, exact both ways."""

    factor = 2

    def __init__(self, channels: int):
        super().__init__()
        self.image_channels = channels // 4

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, C, H, W) → (B, 4C, H/2, W/2); the noise is not used."""
        return F.pixel_unshuffle(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, 2)
