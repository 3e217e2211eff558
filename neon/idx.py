"""Idx files, the format of MNIST and Fashion-MNIST, plain or packed with gzip.

A big-endian int32 magic number (2051 images, 2049 labels), the counts, then one byte a pixel or label.
"""

import gzip
from pathlib import Path
from typing import BinaryIO

import numpy as np

from neon import NeonError
from neon.files import reading, regular

DIMENSIONS = {2049: 1, 2051: 3}  # by magic number: labels (n,), images (n, height, width)
GZIP = b"\x1f\x8b"
RATIO = 1032  # deflate packs at most so many bytes into one
MOST = 2**31  # bytes that are read


def read_idx(path: str | Path) -> np.ndarray:
    """uint8 (n,) labels or (n, height, width) images. Raises NeonError, before it allocates what cannot be there."""
    path = regular(path)
    with reading(path, "not an idx file"), path.open("rb") as file:
        packed = file.read(2) == GZIP
        file.seek(0)
        most = path.stat().st_size * (RATIO if packed else 1)
        return _read(gzip.open(file) if packed else file, most, path)


def _read(file: BinaryIO, most: int, path: Path) -> np.ndarray:
    """most: bytes that there can be."""
    magic = int.from_bytes(file.read(4), "big")
    if magic not in DIMENSIONS:
        raise ValueError(f"its magic number is {magic}, not 2049 or 2051")
    head = 4 * DIMENSIONS[magic]
    shape = tuple(np.frombuffer(_exactly(file, head), ">u4").tolist())
    size = int(np.prod(shape, dtype=object))
    if size > min(most - 4 - head, MOST):
        raise NeonError(f"{path}: claims {size:,} values, and cannot hold so many")
    values = _exactly(file, size)
    if file.read(1):
        raise ValueError(f"more than the {size:,} values that it claims")
    return np.frombuffer(values, np.uint8).reshape(shape).copy()  # writable


def _exactly(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) != size:
        raise ValueError(f"it ends {size - len(found):,} bytes early")
    return found


def read_pair(folder: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width) and labels (n,) of a part, 'train' or 't10k', from the files of the authors' names.

    Each file may be packed (.gz). Raises NeonError.
    """
    files = [_file(Path(folder), f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    images, labels = map(read_idx, files)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise NeonError(f"{files[0]} has {images.shape}, {files[1]} has {labels.shape}: not images and their labels")
    return images, labels


def _file(folder: Path, name: str) -> Path:
    """The plain file, or where there is none the packed one."""
    return next((folder / n for n in (name, f"{name}.gz") if (folder / n).exists()), folder / name)
