"""scikit-learn's bundled handwritten digits as two image sets: one to train on, one held out to be compared with.

1797 images, 8×8 grey; pixel values 0…16 are scaled to 0…255.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from neon.data import encode_png, image_name
from neon.files import atomic


def write_set(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """pixels (n, 8, 8) uint8, labels (n,) → folder of PNG files with dataset.json."""
    with atomic(path) as folder:
        for i, image in enumerate(pixels):
            file = folder / image_name(i)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(torch.from_numpy(image)[None]))
        pairs = [[image_name(i), int(label)] for i, label in enumerate(labels)]
        (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, required=True, help="images to train on; the rest is held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, held = train_test_split(
        np.arange(len(pixels)), train_size=args.train, stratify=digits.target, random_state=args.seed
    )
    for name, chosen in (("train", np.sort(train)), ("heldout", np.sort(held))):
        write_set(args.out / name, pixels[chosen], digits.target[chosen])
        print(f"{name}: {len(chosen)} images")
