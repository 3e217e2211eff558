"""A classifier of Fashion-MNIST whose features are the second ones, trained on the training images alone.

The network of mini/features.py at 28×28: `python -m fashion.features --data runs/data --out features.safetensors`.
"""

import dataclasses
import os

import torch

from mini.features import digits, main
from neon.measure.features import Extractor


def cnn(path: str | os.PathLike | None, device: torch.device | str = "cpu") -> Extractor:
    """Extractor from a file that this command wrote. Raises NeonError."""
    found = digits(path, device)
    return dataclasses.replace(found, name=f"cnn-{found.name.partition('-')[2]}")


if __name__ == "__main__":
    main("train.zip", "test.zip", epochs=3, what="images")
