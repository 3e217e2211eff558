"""Images that were sampled elsewhere, measured as those of a model are: a row of results without a model."""

import hashlib
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from neon.data import IMAGE_SUFFIXES, ImageSet
from neon.distributed import World
from neon.files import sha256
from neon.measure.evaluate import ALONE, Evaluation, parse_metrics
from neon.measure.features import load_extractor
from neon.measure.kept import Kept
from neon.measure.metrics import Reference


def evaluation_of(
    images: ImageSet,
    features: str,
    reference: Reference,
    metrics: str = "fid",
    batch: int = 64,
    world: World = ALONE,
) -> Evaluation:
    """An evaluation whose seeds are the images' places in the set.

    features: as of --features; metrics: 'fid,kid', or 'auto' or 'all', see parse_metrics. Raises NeonError.
    """
    extractor = load_extractor(features, world.device)
    chosen = parse_metrics(metrics, extractor, reference)
    return Evaluation(torch.arange(len(images)), extractor, reference, chosen, batch, world)


def measure_images(images: ImageSet, evaluation: Evaluation, features: Path | None = None) -> dict:
    """A row of results: what was measured, on what, and the metrics.

    features: a folder that keeps the images' features; those that are in it are not computed again. Raises NeonError.
    """
    started = time.monotonic()
    row = {"images": str(images.path), "images_sha256": set_sha256(images.path)}
    row |= evaluation.identity() | evaluation.world.identity() | {"world": evaluation.world.size}
    keep = None
    if features:
        decides = [row[name] for name in ("images_sha256", "features", *evaluation.world.identity())]
        name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
        keep = Kept(features / f"{name}.npz", logits="is" in evaluation.metrics)
        row["kept"] = keep.path.name
    found = evaluation(lambda places: images.images(places.tolist()), desc="measure", keep=keep)
    row["versions"] = {name: version(name) for name in ("torch", "torch-fidelity", "numpy")}
    return row | found | {"seconds": round(time.monotonic() - started, 1)}


def set_sha256(path: str | Path) -> str:
    """Digest of the files that hold the images of a set, and of their names; of a single file its own."""
    path = Path(path)
    if path.is_file():
        return sha256(path)
    found = {file.relative_to(folder).as_posix(): sha256(file) for folder, file in _files(path)}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> Iterator[tuple[Path, Path]]:
    """(folder, file) of a folder, or of a pattern such as 'train-*.parquet'."""
    folder, pattern = (path, "**/*") if path.is_dir() else (path.parent, path.name)
    kinds = IMAGE_SUFFIXES | {".zip", ".parquet"}
    for file in folder.glob(pattern):
        if file.suffix.lower() in kinds and not file.name.startswith("."):
            yield folder, file
