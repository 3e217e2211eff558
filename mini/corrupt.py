"""Corrupted copies of an image set, as a control in place of S: every image gets one of four corruptions, at random.

They are of the kinds of CIFAR-10-C (Hendrycks and Dietterich 2019): noise, blur, low contrast, pixels in blocks.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from mini.prepare import write_set
from neon.data import ImageSet

Images = torch.Tensor  # (n, 1, H, W) float32 in [0, 255]


def noise(images: Images, generator: torch.Generator) -> Images:
    return images + 50 * torch.randn(images.shape, generator=generator)


def blur(images: Images, _) -> Images:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def contrast(images: Images, _) -> Images:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + 0.4 * (images - mean)


def blocks(images: Images, _) -> Images:
    return F.avg_pool2d(images, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


CORRUPTIONS = (noise, blur, contrast, blocks)


def corrupted(images: torch.Tensor, seed: int) -> torch.Tensor:
    """uint8 (n, 1, H, W) of even height and width → the same, each with the corruption drawn for it."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(CORRUPTIONS), (len(images),), generator=generator)
    every = torch.stack([corrupt(images.float(), generator) for corrupt in CORRUPTIONS])
    return every[kind, torch.arange(len(images))].round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    real = ImageSet(args.images)
    made = corrupted(real.images(range(len(real))), args.seed)
    write_set(args.out, made[:, 0].numpy(), real.labels.numpy())
    print(f"{len(made)} corrupted images")
