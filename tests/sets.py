"""Image sets and reference statistics that the tests of the families share."""

import json
from pathlib import Path

import numpy as np
import torch

from neon.data import encode_png, image_name


def write_images(folder: Path, shape, n: int, classes: int, labelled: bool = True) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    for i, image in enumerate(pixels):
        file = folder / image_name(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(torch.from_numpy(image)))
    pairs = [[image_name(i), i % classes] for i in range(n)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs if labelled else None}))
    return folder


def write_reference(path: Path, dim: int = 2048) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu=np.full(dim, 0.4), sigma=0.2 * np.eye(dim))
    return path
