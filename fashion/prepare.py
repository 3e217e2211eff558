"""Fashion-MNIST as two image sets, train.zip and test.zip, from the four files that `neon download fashion` fetches."""

import argparse
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from neon import NeonError
from neon.cli import command_line
from neon.data import encode_png, image_name
from neon.files import atomic
from neon.idx import read_pair

PARTS = {"train": "train", "test": "t10k"}  # of our names, the authors'
CLASSES = 10


def write_zip(path: Path, images: np.ndarray, labels: np.ndarray, side: int) -> None:
    """Images (n, h, w) and labels (n,), uint8 → an uncompressed .zip as neon.data reads it, images in the middle of
    `side` × `side` black pixels. Equal sets are equal bytes. Raises NeonError."""
    if len(labels) and labels.max() >= CLASSES:
        raise NeonError(f"{path}: labels must lie in 0…{CLASSES - 1}, there is a {labels.max()}")
    pixels = padded(torch.from_numpy(images), side)
    pairs = [[image_name(i), int(label)] for i, label in enumerate(labels)]
    with atomic(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for (name, _), image in zip(pairs, pixels):
            archive.writestr(zipfile.ZipInfo(name), encode_png(image[None]))  # no date
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": pairs}))


def padded(images: torch.Tensor, side: int) -> torch.Tensor:
    """(n, h, w) → (n, side, side) with zeros around; odd ones go right and below. Raises NeonError if too small."""
    height, width = images.shape[1:]
    if max(height, width) > side:
        raise NeonError(f"images of {height}x{width} do not fit into {side}x{side}")
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idx", type=Path, required=True, help="folder with the four files, packed (.gz) or not")
    parser.add_argument("--side", type=int, default=28, help="pixels; more than 28 are black borders (default 28)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name, theirs in PARTS.items():
        images, labels = read_pair(args.idx, theirs)
        write_zip(args.out / f"{name}.zip", images, labels, args.side)
        print(f"{name}: {len(images)} images, {args.side}x{args.side}")


if __name__ == "__main__":
    command_line(main)
