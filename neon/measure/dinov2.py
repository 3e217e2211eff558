"""Features of DINOv2 (Oquab et al. 2023), for the Fréchet distance that EDM2 reports as FD_DINOv2.

A vision transformer with patches of 14 pixels and without registers. Its width, depth and table of positions are read
off the weights; names and shapes are those of the published files, such as dinov2_vitl14_pretrain.pth.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from neon import NeonError
from neon.files import sha256
from neon.measure.features import Extractor, load_state

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
PATCH, SIDE, HEAD = 14, 224, 64  # pixels of a patch; of an image, after resizing; channels of an attention head
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Attention(nn.Module):
    """(N, tokens, width) → the same, in heads of HEAD channels."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """(…, width) → the same."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """(N, tokens, width) → the same."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width), LayerScale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), MLP(width), LayerScale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """uint8 (N, 3, H, W) → the normalised class token, (N, width) float32, and None for logits.

    width: a multiple of HEAD; grid: the table of positions has grid × grid entries, and one for the class token.
    """

    def __init__(self, width: int = 1024, depth: int = 24, grid: int = 37):
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of training alone, but in the files
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        patches = self.patch_embed["proj"](prepared(images)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions()
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]), None

    def positions(self) -> torch.Tensor:
        """The table for SIDE / PATCH patches a side, (1, 1 + patches, width), as DINOv2 resizes it: bicubic, without
        antialiasing, and with a grid of samples that is 0.1 patches too fine. A table of that size is left as it is.
        """
        side = SIDE // PATCH
        if self.grid == side:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, scale_factor=(side + 0.1) / self.grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


def prepared(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) → float32 (N, 3, SIDE, SIDE), as EDM2 does: bicubic with antialiasing, not rounded or clipped,
    then with ImageNet's mean and standard deviation.
    """
    x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    mean, std = (x.new_tensor(value)[:, None, None] for value in (MEAN, STD))
    return (x / 255 - mean) / std


def dinov2(path: str | None, device: torch.device | str = "cpu") -> Extractor:
    """The network of a file of published weights; its features have no classes. Raises NeonError."""
    if path is None:
        raise NeonError(f"the DINOv2 extractor is a file: --features dinov2:PATH, say of {URL}")
    state = load_state(Path(path), "DINOv2")
    try:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        width, table = shapes["cls_token"][-1], shapes["pos_embed"][1]
        depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        with torch.device("meta"):  # no random numbers are drawn, and nothing is allocated twice
            module = DINOv2(width, depth, round((table - 1) ** 0.5))
        module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        if width % HEAD:
            raise ValueError
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError):
        raise NeonError(f"{path} does not hold the weights of a DINOv2 with patches of {PATCH}, no registers") from None
    return Extractor(f"dinov2-{sha256(path)[:8]}", width, None, torch.device(device), module.to(device))
