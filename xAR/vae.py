"""The KL-16 autoencoder of MAR: images to 16 times smaller latents of 16 channels and back.

Parameter names are those of the released kl16.ckpt.
"""

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_SCALE = 0.2325  # brings the latents to about unit variance


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), conv(channels, out)
        self.norm2, self.conv2 = norm(out), conv(out, out)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, pixels, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))


def downsample(width: int) -> nn.Sequential:
    halve = nn.Conv2d(width, width, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=halve))


def upsample(width: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2, mode="nearest"), conv=conv(width, width)))


def middle(channels: int) -> nn.Sequential:
    first, second = ResBlock(channels, channels), ResBlock(channels, channels)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=Attention(channels), block_2=second))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention or none of them."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(out if i else channels, out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(out) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in itertools.zip_longest(self.block, self.attn):
            x = block(x)
            if attention is not None:
                x = attention(x)
        return x


class Encoder(nn.Module):
    def __init__(self, widths: list[int], out: int):
        super().__init__()
        self.conv_in = conv(3, widths[0])
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            coarsest = i == len(widths) - 1
            level = Level(widths[max(i - 1, 0)], width, blocks=2, attention=coarsest)
            level.downsample = nn.Identity() if coarsest else downsample(width)
            self.down.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths: list[int], channels: int):
        super().__init__()
        self.conv_in = conv(channels, widths[-1])
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()  # finest level first, run from the coarsest
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, len(widths) - 1)], width, blocks=3)
            level.upsample = upsample(width) if i else nn.Identity()
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = conv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """channels: of the latent; multipliers: width of each level over 128, every level but one halves the side."""

    def __init__(self, channels: int = 16, multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)):
        super().__init__()
        widths = [128 * m for m in multipliers]
        self.encoder = Encoder(widths, 2 * channels)
        self.decoder = Decoder(widths, channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] → mean and standard deviation of the latent, (B, channels, H/16, W/16)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A scaled latent for the transformer, drawn with noise (B, channels, H/16, W/16), standard normal."""
        mean, deviation = self.moments(images)
        return LATENT_SCALE * (mean + deviation * noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, channels, h, w) → images (B, 3, 16h, 16w), [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(latents / LATENT_SCALE))


def to_uint8(images: Tensor, *, rounded: bool = False) -> Tensor:
    """Images in [-1, 1] → uint8. Truncated, as for Neon's published numbers; xAR's own evaluation rounds."""
    grey = ((images.float() + 1) / 2 * 255).clamp(0, 255)
    return (grey.round() if rounded else grey).to(torch.uint8)
