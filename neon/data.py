"""Image sets on disk, and the order in which training sees them.

A set is a folder or an uncompressed .zip with images in any subfolders and, in EDM's convention, a `dataset.json`
{"labels": [["00000/img00000000.png", 3], …]} (null for an unlabelled set); or a folder of such .zip files with one
dataset.json, from `neon generate --shard`; or parquet files as the hub lays them out, with a column of encoded images
and maybe one of labels.
"""

import glob
import io
import itertools
import json
import operator
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from neon import NeonError, extra
from neon.archives import open_zip
from neon.files import existing, reading, reason_of, regular
from neon.parquet import rows_of_groups

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
PIXELS = 2**26  # of an image at most: ImageNet's largest have fewer
IN_MEMORY = 2**30  # bytes of decoded images that are kept


class ImageSet:
    """Images and labels of a folder (also of .zip files), .zip, or .parquet files (one, a folder, or a pattern with *).

    labels: int64 (n,) or None; shape: (C, H, W) of every image. Grey images have one channel, all others three.
    size: every image is made RGB, size × size pixels (centre_crop). first: use only so many, in the order of their
    names. Raises NeonError if there are no images (or not so many), or labels that do not cover them.
    """

    def __init__(self, path: str | Path, size: int | None = None, first: int | None = None):
        self.path, self.size = Path(path), size
        self._zip = None
        if parquet := _parquet_files(self.path):
            self._zip = _Parquet(parquet)
            files = self._zip.namelist()
        elif (self.path / "generate.json").exists() and (archives := sorted(self.path.glob("*.zip"))):
            self._zip = _Archives(archives, self.path / "dataset.json")
            files = self._zip.namelist()
        elif existing(self.path).is_dir():
            files = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*")]
        else:
            self._zip = open_zip(self.path, "neither a folder nor a zip file of images")
            files = self._zip.namelist()
        images = (f for f in files if Path(f).suffix.lower() in IMAGE_SUFFIXES)
        self.names = sorted(f for f in images if not Path(f).name.startswith("."))
        if not self.names:
            raise NeonError(f"{path}: no images in it")
        if first and first > len(self.names):
            raise NeonError(f"{path}: {len(self.names)} images, fewer than {first}")
        self.names = self.names[:first]
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
        return self._zip.read(name) if self._zip else regular(self.path / name).read_bytes()

    def _decode(self, index: int) -> torch.Tensor:
        name = self.names[index]
        try:
            image = Image.open(io.BytesIO(self._read(name)))
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            if self.size:
                image = centre_crop(image.convert("RGB"), self.size)
            pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
        except Exception as error:  # PIL raises many kinds
            raise NeonError(f"{self.path}: {name} is not a readable image ({reason_of(error)})") from None
        pixels = torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)
        if hasattr(self, "shape") and tuple(pixels.shape) != self.shape:
            raise NeonError(f"{self.path}: {name} is {tuple(pixels.shape)}, the first image {self.shape}")
        return pixels

    def _read_labels(self) -> torch.Tensor | None:
        with reading(self.path, 'dataset.json is not {"labels": [[name, integer], …]}'):
            labels = json.loads(self._read("dataset.json"))["labels"]
            if labels is None:
                return None
            table = {name: operator.index(label) for name, label in labels}
            if len(table) < len(labels):
                raise ValueError("an image has two labels")
            if wrong := [label for label in table.values() if not 0 <= label < 2**63]:
                raise ValueError(f"label {wrong[0]}")
        unlabelled = [name for name in self.names if name not in table]
        if unlabelled:
            raise NeonError(f"{self.path}: dataset.json has no label for {unlabelled[0]}")
        return torch.tensor([table[name] for name in self.names])


class _Archives:
    """The .zip files of a set and the dataset.json of all of them, read like one .zip. Raises NeonError."""

    def __init__(self, files: list[Path], dataset: Path):
        self._dataset = dataset
        if not dataset.exists():
            raise NeonError(f"{dataset.parent}: .zip files but no dataset.json, so the set is not finished")
        self._file_of: dict[str, zipfile.ZipFile] = {}
        for path in files:
            archive = open_zip(path)
            self._file_of |= dict.fromkeys(archive.namelist(), archive)

    def namelist(self) -> list[str]:
        return [*self._file_of, "dataset.json"]

    def read(self, name: str) -> bytes:
        return regular(self._dataset).read_bytes() if name == "dataset.json" else self._file_of[name].read(name)


def _parquet_files(path: Path) -> list[str]:
    if path.is_dir():
        return sorted(str(p) for p in path.rglob("*.parquet"))
    found = sorted(glob.glob(str(path))) if "*" in path.name else [str(path)]
    return [p for p in found if p.endswith(".parquet") and Path(p).exists()]


class _Parquet:
    """Parquet files read like a zip: one name per row, and dataset.json if there are labels."""

    def __init__(self, files: list[str]):
        with extra("parquet"):
            import pyarrow
            import pyarrow.parquet

        self._lock = threading.Lock()  # the reader of a file is not for several threads
        self._rows: dict[str, tuple[int, int, int]] = {}  # name → file, row group, row
        labels = []
        with reading(files[0], "no parquet file of images"):
            groups = [rows_of_groups(file) for file in files]  # checked before pyarrow reads anything
            self._files = [pyarrow.parquet.ParquetFile(file) for file in files]
            columns = self._files[0].schema_arrow.names
            self._images = next((name for name in columns if name in ("image", "img", "jpg", "png")), columns[0])
            label = next((name for name in columns if name in ("label", "fine_label", "cls")), None)
            for f, file in enumerate(self._files):
                if label and not str(file.schema_arrow.field(label).type).startswith(("int", "uint", "dictionary")):
                    raise NeonError(f"{files[f]}: its labels are {file.schema_arrow.field(label).type}, not integers")
                for group, count in enumerate(groups[f]):
                    for row in range(count):
                        self._rows[f"{len(self._rows):08d}.png"] = f, group, row
                labels += file.read([label])[label].to_pylist() if label else []
        self._labels = json.dumps({"labels": list(zip(self._rows, labels)) or None}).encode()
        self._group = lru_cache(maxsize=4)(self._read_group)

    def namelist(self) -> list[str]:
        return [*self._rows, "dataset.json"]

    def read(self, name: str) -> bytes:
        if name == "dataset.json":
            return self._labels
        f, group, row = self._rows[name]
        with self._lock:
            image = self._group(f, group)[row].as_py()
        return image["bytes"] if isinstance(image, dict) else image

    def _read_group(self, f: int, group: int):
        return self._files[f].read_row_group(group, [self._images])[self._images]


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle at size × size pixels, as ADM prepared ImageNet (Dhariwal & Nichol 2021).

    Halved with a box filter while the shorter side stays at least 2·size, then scaled bicubically to `size`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_name(index: int) -> str:
    """Where image `index` lies in a set: '00012/img00012345.png'."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def encode_png(image: torch.Tensor) -> bytes:
    """uint8 (C, H, W), C = 1 or 3 → the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).cpu().numpy()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def contact_sheet(images: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 (N, C, H, W) → one image (C, H', W') of rows of `columns`, framed in white."""
    framed = F.pad(images, (1, 1, 1, 1), value=255)
    missing = -len(framed) % columns
    framed = torch.cat([framed, framed.new_full((missing, *framed.shape[1:]), 255)])
    rows = framed.unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


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
    """Every image once per epoch, in a new order drawn from (seed, epoch)."""
    for epoch in itertools.count():
        yield from np.random.default_rng([seed, epoch]).permutation(n).tolist()


ORDERS = {"window": window_order, "epoch": epoch_order}


def batches(
    data: ImageSet, order: Iterator[int], batch: int, part: slice = slice(None)
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, Callable[[], torch.Tensor]]]:
    """Of each step of `batch` images, a part that is not empty: (uint8 images, labels), and a function that reads the
    images of the whole step. A thread reads one step ahead."""

    def read():
        step = list(itertools.islice(order, batch))
        own = step[part]
        labels = None if data.labels is None else data.labels[own]
        return data.images(own), labels, lambda: data.images(step)

    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(read)
        while True:
            current, pending = pending.result(), ahead.submit(read)
            yield current
