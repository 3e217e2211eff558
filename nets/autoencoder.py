"""Convolutional encoder and decoder of latent diffusion (Rombach et al. 2022), as VAR and MAR use them.

Images (B, C, H, W) ↔ latents (B, c, H/f, W/f), f = 2^(number of levels − 1). Level 0 is the finest.
Options: `groups` of every GroupNorm; `fused`: attention keeps q, k, v in one convolution (VAR) or in
three (MAR's KL-16); `attend` (decoder): attention at the coarsest level, not only in the middle (VAR).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = _norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int, fused: bool):
        super().__init__()
        self.norm = _norm(channels, groups)
        if fused:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        qkv = self.qkv(h).chunk(3, dim=1) if hasattr(self, "qkv") else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.flatten(2).mT.unsqueeze(1) for t in qkv)  # (B, 1, pixels, C)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(y.mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where there is any."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, attention: bool, fused: bool):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(c_out if i else c_in, c_out, groups) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(c_out, groups, fused) for _ in range(blocks * attention))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int, fused: bool):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = PixelAttention(channels, groups, fused)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image (B, c_in, H, W) → (B, c_out, H/f, W/f). Two residual blocks a level, attention at the coarsest."""

    def __init__(
        self, c_in: int, c_out: int, channels: int, multipliers: Sequence[int], groups: int = 32, fused: bool = True
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c_in, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else channels, width, 2, groups, i == last, fused)
            if i < last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups, fused)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down[:-1]:
            x = level.downsample(level(x))
        x = self.mid(self.down[-1](x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent (B, c_in, h, w) → image (B, c_out, f·h, f·w), unclamped. Three residual blocks a level."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        channels: int,
        multipliers: Sequence[int],
        groups: int = 32,
        fused: bool = True,
        attend: bool = True,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c_in, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, fused)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):  # each level starts from the width of the coarser one
            level = Level(widths[min(i + 1, last)], width, 3, groups, attend and i == last, fused)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], c_out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up[1:]):
            x = level.upsample(level(x))
        x = self.up[0](x)
        return self.conv_out(F.silu(self.norm_out(x)))
