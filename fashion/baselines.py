"""Image sets whose distance to the test images says what a distance means: means.zip, of each class its mean training
image again and again, and train.zip, training images drawn at random. As many of each as there are test images."""

import argparse
from pathlib import Path

import numpy as np
import torch

from fashion.prepare import write_zip
from neon.cli import command_line
from neon.data import ImageSet


def class_means(images: torch.Tensor, labels: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, H, W), int64 (N,) → n images, the rounded mean of each class in turn, and their labels."""
    classes = labels.unique()
    means = torch.stack([images[labels == one].double().mean(0).round().to(torch.uint8) for one in classes])
    places = torch.arange(n) % len(classes)
    return means[places], classes[places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and test.zip")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train, n = ImageSet(args.data / "train.zip"), len(ImageSet(args.data / "test.zip"))
    images = train.images(range(len(train)))[:, 0]
    drawn = torch.from_numpy(np.random.default_rng(0).permutation(len(train))[:n]).sort().values
    sets = {"means": class_means(images, train.labels, n), "train": (images[drawn], train.labels[drawn])}
    for name, (pixels, labels) in sets.items():
        write_zip(args.out / f"{name}.zip", pixels.numpy(), labels.numpy().astype(np.uint8), images.shape[-1])
        print(f"{name}: {len(pixels)} images")


if __name__ == "__main__":
    command_line(main)
