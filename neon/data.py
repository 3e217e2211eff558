"""Image sets on disk, in EDM's convention, and the order in which training sees them.

A set is a folder or an uncompressed .zip with images in numbered subfolders and a `dataset.json`
{"labels": [["00000/img00000000.png", 3], …]} (null for an unlabelled set).
"""

import io
import itertools
import json
import operator
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from neon import NeonError
from neon.io import existing

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
IN_MEMORY = 2**30  # bytes of decoded images that are kept


class ImageSet:
    """Images and labels of a folder or .zip.

    labels: int64 (n,) or None; shape: (C, H, W) of every image. Grey images have one channel, all others three.
    Raises NeonError if there are no images, or labels that do not cover them.
    """

    def __init__(self, path: str | Path):
        self.path = existing(path)
        self._zip = None
        if self.path.is_dir():
            files = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*")]
        else:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile:
                raise NeonError(f"{path}: neither a folder nor a zip file of images") from None
            files = self._zip.namelist()
        images = (f for f in files if Path(f).suffix.lower() in IMAGE_SUFFIXES)
        self.names = sorted(f for f in images if not Path(f).name.startswith("."))
        if not self.names:
            raise NeonError(f"{path}: no images in it")
        self.labels = self._read_labels() if "dataset.json" in files else None
        self.shape = tuple(self._decode(0).shape)
        self._pool = ThreadPoolExecutor(4)
        self._cache: dict[int, torch.Tensor] | None = {} if len(self) * np.prod(self.shape) <= IN_MEMORY else None

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Iterable[int]) -> torch.Tensor:
        """uint8 (N, C, H, W). Raises NeonError, naming the file, if one is damaged or of another size."""
        if self._cache is None:
            return torch.stack(list(self._pool.map(self._decode, indices)))
        return torch.stack(
            [self._cache[i] if i in self._cache else self._cache.setdefault(i, self._decode(i)) for i in indices]
        )

    def _read(self, name: str) -> bytes:
        return self._zip.read(name) if self._zip else (self.path / name).read_bytes()

    def _decode(self, index: int) -> torch.Tensor:
        name = self.names[index]
        try:
            image = Image.open(io.BytesIO(self._read(name)))
            pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
        except Exception as error:  # PIL raises many kinds
            raise NeonError(f"{self.path}: {name} is not a readable image ({error})") from None
        pixels = torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)
        if hasattr(self, "shape") and tuple(pixels.shape) != self.shape:
            raise NeonError(f"{self.path}: {name} is {tuple(pixels.shape)}, the first image {self.shape}")
        return pixels

    def _read_labels(self) -> torch.Tensor | None:
        try:
            labels = json.loads(self._read("dataset.json"))["labels"]
            if labels is None:
                return None
            table = {name: operator.index(label) for name, label in labels}
        except (ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile):
            raise NeonError(f'{self.path}: dataset.json is not {{"labels": [[name, integer], …]}}') from None
        unlabelled = [name for name in self.names if name not in table]
        if unlabelled:
            raise NeonError(f"{self.path}: dataset.json has no label for {unlabelled[0]}")
        return torch.tensor([table[name] for name in self.names])


def check_images(shape: tuple[int, ...], wanted: tuple[int, ...], labels: torch.Tensor | None, classes: int) -> None:
    """Raises NeonError unless a network of `wanted` (C, H, W) and `classes` can be trained on images of that kind."""
    if tuple(shape) != tuple(wanted):
        raise NeonError(f"the images are {shape} (channels, height, width), the network makes {wanted}")
    if classes and labels is None:
        raise NeonError("the network is class-conditional, but the images have no labels")
    if classes and not 0 <= labels.min() <= labels.max() < classes:
        raise NeonError(f"labels run from {labels.min()} to {labels.max()}, the network has {classes} classes")


def image_name(index: int) -> str:
    """Where image `index` lies in a set: '00012/img00012345.png'."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def encode_png(image: torch.Tensor) -> bytes:
    """uint8 (C, H, W), C = 1 or 3 → the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).cpu().numpy()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def window_order(n: int, seed: int) -> Iterator[int]:
    """EDM's endless order: one shuffle, then every index that was used is swapped back by a random distance < n/2."""
    rng = np.random.RandomState(seed)  # the stream of the original
    order = np.arange(n)
    rng.shuffle(order)
    window = int(np.rint(n * 0.5))
    for t in itertools.count():
        i = t % n
        yield int(order[i])
        if window >= 2:
            j = (i - rng.randint(window)) % n
            order[i], order[j] = order[j], order[i]


def epoch_order(n: int, seed: int) -> Iterator[int]:
    """Every image once per epoch, in an order drawn anew from (seed, epoch)."""
    for epoch in itertools.count():
        yield from np.random.default_rng([seed, epoch]).permutation(n).tolist()


ORDERS = {"window": window_order, "epoch": epoch_order}


def batches(
    data: ImageSet, order: Iterator[int], batch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """This rank's part of each global batch: (uint8 images, labels), read one step ahead in a thread."""

    def read():
        indices = list(itertools.islice(order, batch))[rank::world]
        return data.images(indices), None if data.labels is None else data.labels[indices]

    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(read)
        while True:
            current, pending = pending.result(), ahead.submit(read)
            yield current
