"""Rows of results: what a number depends on, and files in which every evaluation stands once."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from neon import NeonError
from neon.family import get_family
from neon.files import atomic, sha256
from neon.measure.candidates import Candidates, Point
from neon.measure.evaluate import Evaluation
from neon.weights.checkpoint import open_weights


def measure(
    candidates: Candidates,
    evaluation: Evaluation,
    kappa: Mapping[str, object],
    point: Point,
    labels: torch.Tensor | None = None,
) -> dict:
    """Merge, sample and measure one point: a row of results. labels: (n,) int64, default the family's."""
    started = time.monotonic()
    family, options = candidates.family, {**kappa, **dict(point.kappa)}
    model = candidates.load(point.selftrained, point.w)
    if labels is None:
        labels = family.labels(model, evaluation.seeds)
    result = evaluation(lambda s, y: family.sample(model, s, y, **options), labels, desc=f"w = {point.w:g}")
    return row(family.name, evaluation, options, result, started, **identity(candidates, point))


def images_of(row: Mapping, seeds: torch.Tensor, batch: int, device: torch.device | str, **options) -> torch.Tensor:
    """What the model of a row of results draws for other seeds, sampled as then: uint8 (N, C, H, W) on the CPU.

    options: of family.load, where the checkpoint needs further files. Raises NeonError if a file is not what it was.
    """
    family = get_family(row["family"])
    candidates = Candidates(family, row["base"], device, row["dtype"], **options)
    model = candidates.load(row["selftrained"], row["w"])
    for fact, now in identity(candidates, Point(row["selftrained"], row["w"])).items():
        if row[fact] != now:
            raise NeonError(f"{row['base']} at w = {row['w']:g}: its {fact} is not what it was when it was measured")
    kappa = {field.name: row[field.name] for field in dataclasses.fields(family.Sampling)}
    parts = (family.sample(model, part, family.labels(model, part), **kappa).cpu() for part in seeds.split(batch))
    return torch.cat(list(parts))


def identity(candidates: Candidates, point: Point) -> dict:
    """Which weights a point stands for, JSON values."""
    return {
        "w": point.w,
        "base": str(candidates.base_path),
        "base_sha256": digest(candidates.base_path),
        "vae_sha256": candidates.vae_sha256,
        "selftrained": point.selftrained,
        "selftrained_sha256": digest(point.selftrained) if point.selftrained else None,
        "budget": budget_of(point.selftrained),
        "num_synthetic": num_synthetic(point.selftrained),
        "dtype": candidates.precision,
    }


def digest(path: str | Path) -> str:
    """sha256 of a file, computed once for as long as the file stays as it is."""
    stat = os.stat(path)
    return _digest(Path(path).absolute(), stat.st_mtime_ns, stat.st_size)


@lru_cache
def _digest(path: Path, modified: int, size: int) -> str:
    return sha256(path)


def budget_of(snapshot: str | None) -> int:
    """B, the images a snapshot was trained on, read off its name; 0 for the base."""
    digits = Path(snapshot).stem.rpartition("-")[2] if snapshot else "0"
    return int(digits) if digits.isdigit() else 0


def num_synthetic(snapshot: str | None) -> int:
    """|S|, the number of images that our snapshots record in their header; 0 for the base and for other files."""
    if snapshot is None or Path(snapshot).suffix != ".safetensors":
        return 0
    with open_weights(snapshot) as weights:
        return int(weights.metadata.get("data_images", 0))


class Rows:
    """A JSON-lines file of results, each with the key of what it depends on; a line torn by a kill is dropped.

    Raises NeonError if the file holds anything else.
    """

    def __init__(self, path: str | Path, write: bool = True):
        self.path, self.write = Path(path), write
        self.rows: dict[str, dict] = {}
        if self.path.exists():
            whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
            start = b'{"key": "'
            try:
                self.rows = {row["key"]: row for row in map(json.loads, whole.splitlines())}
                if torn[: len(start)] != start[: len(torn)]:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise NeonError(f"{path}: holds something other than rows of results") from None
            if write and torn:
                os.truncate(self.path, len(whole + newline))

    def cached(self, key: str, compute: Callable[[], dict]) -> dict:
        """The row of that key, computed and appended at once if it is not there."""
        if key not in self.rows:
            self.rows[key] = {"key": key, **compute()}
            if self.write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as f:
                    f.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]

    def keep(self, keys: Iterable[str]) -> None:
        """Drop all other rows, from the file too."""
        self.rows = {key: self.rows[key] for key in keys}
        if self.write:
            with atomic(self.path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))


def key_of(candidates: Candidates, evaluation: Evaluation, kappa: Mapping[str, object], point: Point) -> str:
    """Digest of everything a row depends on: weights by their digests, not their paths."""
    facts = identity(candidates, point) | {"base": None, "selftrained": None, "budget": None}
    del facts["num_synthetic"]  # like the others, implied by the digests
    facts |= {**kappa, **dict(point.kappa)} | evaluation.identity() | {"family": candidates.family.name}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def scorer(
    candidates: Candidates, evaluation: Evaluation, kappa: Mapping[str, object], rows: Rows
) -> Callable[[Point], dict]:
    """point → its row, from the file if it was measured before under the same conditions."""

    def score(point: Point) -> dict:
        key = key_of(candidates, evaluation, kappa, point)
        return rows.cached(key, lambda: measure(candidates, evaluation, kappa, point))

    return score


def row(family: str, evaluation: Evaluation, kappa: Mapping, result: Mapping, started: float, **model) -> dict:
    """One line of results: which model, how sampled, how measured, what came out, with what software."""
    return {
        "family": family,
        **model,
        **kappa,
        **evaluation.identity(),
        **result,
        "seconds": round(time.monotonic() - started, 1),
        "world": evaluation.world.size,
        "device": str(evaluation.world.device).partition(":")[0],
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "numpy")},
    }
