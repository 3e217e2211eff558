"""The velocity field: a U-Net with residual blocks and attention, conditioned on time and optionally a class.

Tensor names, shapes and order equal those of torchcfm's public CIFAR-10 checkpoints.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from neon.dropout import Dropout
from nets.embedding import sinusoids


class UNet(nn.Module):
    """v(x, t). Each level of the encoder halves the resolution; the decoder mirrors it with one block more per level.

    dim: (channels, height, width) of the images. channel_mult: widths of the levels in units of num_channels.
    attention_resolutions: heights of the levels whose blocks attend; the deepest always does once. num_classes: 0 for
    an unconditional field. precision: in which `flow.family` samples.
    """

    def __init__(
        self,
        dim: Sequence[int],
        num_channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[int],
        attention_resolutions: Sequence[int] = (),
        num_head_channels: int = 64,
        dropout: float = 0.0,
        num_classes: int = 0,
    ):
        super().__init__()
        self.dim, self.num_channels, self.num_classes = tuple(dim), num_channels, num_classes
        self.precision = "float32"
        emb = 4 * num_channels
        self.time_embed = nn.Sequential(nn.Linear(num_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, emb)

        def blocks(cin: int, cout: int, level: int) -> list[nn.Module]:
            attends = dim[1] >> level in attention_resolutions
            return [ResBlock(cin, cout, emb, dropout), *([Attention(cout, num_head_channels)] if attends else [])]

        widths = [num_channels * mult for mult in channel_mult]
        deepest = len(widths) - 1
        channels = widths[0]
        stages, skips = [Stage(nn.Conv2d(dim[0], channels, 3, padding=1))], [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                stages.append(Stage(*blocks(channels, width, level)))
                channels = width
                skips.append(channels)
            if level < deepest:
                stages.append(Stage(Down(channels)))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(stages)

        self.middle_block = Stage(
            ResBlock(channels, channels, emb, dropout),
            Attention(channels, num_head_channels),
            ResBlock(channels, channels, emb, dropout),
        )

        self.output_blocks = nn.ModuleList()
        for level in range(deepest, -1, -1):
            for block in range(num_res_blocks + 1):
                stage = Stage(*blocks(channels + skips.pop(), widths[level], level))
                channels = widths[level]
                if level and block == num_res_blocks:
                    stage.append(Up(channels))
                self.output_blocks.append(stage)

        self.out = nn.Sequential(group_norm(channels), nn.SiLU(), zero(nn.Conv2d(channels, dim[0], 3, padding=1)))

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, C, H, W) float32; t: (N,) or a scalar in [0, 1], 0 is noise; labels: (N,) int64 → (N, C, H, W)."""
        emb = self.time_embed(sinusoids(t.reshape(-1), self.num_channels))
        if self.num_classes:
            emb = emb + self.label_emb(labels)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


class Stage(nn.Sequential):
    """Layers in a row, of which residual blocks also see the embedding."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions around a shift by the embedding, added to the input; starts as the identity."""

    def __init__(self, cin: int, cout: int, emb: int, dropout: float):
        super().__init__()
        conv = zero(nn.Conv2d(cout, cout, 3, padding=1))
        self.in_layers = nn.Sequential(group_norm(cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, cout))
        self.out_layers = nn.Sequential(group_norm(cout), nn.SiLU(), Dropout(dropout), conv)
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x: (N, cin, H, W); emb: (N or 1, emb) → (N, cout, H, W)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Residual self-attention over the H·W positions, in heads of `head` channels (one head if there are fewer)."""

    def __init__(self, channels: int, head: int):
        super().__init__()
        self.heads = max(channels // head, 1)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))
        # The checkpoints hold q, k, v of the first head, then of the second, …; (N, heads, positions, channels) each.
        q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).transpose(3, 4).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        return x + self.proj_out(attended).view_as(x)


class Down(nn.Module):
    """Half the resolution, by a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Up(nn.Module):
    """Twice the resolution, nearest neighbours and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, fewer where they would have less than 4 channels (only in networks smaller than the public one)."""
    return nn.GroupNorm(min(32, channels // 4), channels)


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
