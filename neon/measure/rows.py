"""Rows of results: what a number depends on, and files in which every evaluation stands once."""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import torch

from neon import Diverged, NeonError
from neon.distributed import World
from neon.family import Family, get_family
from neon.files import atomic, filling, from_json, read_json, reading, regular, sha256, to_json
from neon.guidance import NETWORKS
from neon.measure.candidates import BY, Candidates, Point, by_of
from neon.measure.evaluate import Evaluation
from neon.measure.kept import Kept
from neon.sampling import whole_batches
from neon.weights.checkpoint import open_weights


def measure(
    candidates: Candidates,
    evaluation: Evaluation,
    sampling: Mapping[str, object],
    point: Point,
    class_idx: int | None = None,
    features: Path | None = None,
) -> dict:
    """Merge, sample and measure one point: a row of results.

    class_idx: the class of all images; None: the family's own choice for each. features: a folder that keeps the
    features of the images; those that are in it already are not sampled. Raises NeonError, Diverged.
    """
    started = time.monotonic()
    options = {**sampling, **dict(point.sampling)}
    model = candidates.load(point.selftrained, point.w)
    draw = partial(images_of_seeds, candidates.family, model, class_idx=class_idx, **options)
    if candidates.compiles:
        draw = whole_batches(draw, evaluation.batch)
    found = provenance(candidates, evaluation, sampling, point, class_idx)
    keep = kept_of(candidates, evaluation, sampling, point, features, class_idx=class_idx) if features else None
    result = evaluation(draw, desc=f"w = {point.w:g}", keep=keep)
    if keep:
        found["kept"] = keep.path.name
    return {**found, **result, "seconds": round(time.monotonic() - started, 1)}


def provenance(candidates: Candidates, evaluation: Evaluation, sampling: Mapping, point: Point, class_idx=None) -> dict:
    """What a row says of where its numbers come from: what they depend on, files, and software."""
    return {
        **facts(candidates, evaluation, sampling, point, class_idx),
        "base": str(candidates.base_path),
        "selftrained": point.selftrained,
        "budget": budget_of(point.selftrained),
        "num_synthetic": num_synthetic(point.selftrained),
        "world": evaluation.world.size,
        **({} if candidates.by == "merge" else {"networks": NETWORKS if point.w else 1}),
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "numpy")},
    }


def diverged(candidates: Candidates, evaluation: Evaluation, sampling: Mapping, point: Point, reason: str) -> dict:
    """The row of a merge without finite images: no metrics, fid = inf, and why."""
    return {
        **provenance(candidates, evaluation, sampling, point),
        "fid": math.inf,
        "reason": reason,
        "seconds": 0.0,
    }


def images_of_seeds(family: Family, model, seeds: torch.Tensor, class_idx: int | None = None, **sampling):
    """One image per seed, uint8 (N, C, H, W), of the family's classes or all of one."""
    labels = family.labels(model, seeds) if class_idx is None else torch.full_like(seeds, class_idx)
    return family.sample(model, seeds, labels, **sampling)


def facts(
    candidates: Candidates,
    evaluation: Evaluation,
    sampling: Mapping[str, object],
    point: Point,
    class_idx: int | None = None,
) -> dict:
    """All that the numbers of a row depend on, JSON values. Batch size and number of processes change nothing."""
    model = {
        "w": point.w,
        "selftrained_sha256": digest(point.selftrained) if point.selftrained else None,
    }
    options = {**sampling, **dict(point.sampling)}
    return sampled_by(candidates, evaluation.world, options, class_idx) | model | evaluation.identity()


def sampled_by(
    candidates: Candidates, world: World, sampling: Mapping[str, object], class_idx: int | None = None
) -> dict:
    """All that decides which image a seed of the base is: rows and sets S have it in their identity."""
    return {
        "family": candidates.family.name,
        "base_sha256": digest(candidates.base_path),
        "vae_sha256": candidates.vae_sha256,
        **sampling,
        **({} if candidates.by == "merge" else {"by": candidates.by}),
        "class_idx": class_idx,
        "dtype": candidates.precision,
        **world.identity(),
    }


def key_of(
    candidates: Candidates, evaluation: Evaluation, sampling: Mapping[str, object], point: Point, **options
) -> str:
    """Digest of `facts`: rows of one key have the same numbers."""
    text = json.dumps(facts(candidates, evaluation, sampling, point, **options), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_of(
    candidates: Candidates,
    evaluation: Evaluation,
    sampling: Mapping[str, object],
    point: Point,
    folder: Path,
    **options,
) -> Kept:
    """Where the features of a point's images are kept in a folder: one file for any number of images."""
    known = facts(candidates, evaluation, sampling, point, **options)
    decides = {name: value for name, value in known.items() if name not in ("n", "seeds", "reference", "metrics")}
    text = json.dumps(decides | {"first": int(evaluation.seeds[0])}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Kept(folder / f"{name}.npz", logits="is" in evaluation.metrics)


def features_of(
    candidates: Candidates, evaluation: Evaluation, sampling: Mapping[str, object], point: Point, folder: Path
) -> torch.Tensor:
    """The features of a point's images, (n, d) float32: kept in the folder, or measured again if they were deleted."""
    kept = kept_of(candidates, evaluation, sampling, point, folder)
    found = kept.read(evaluation.seeds, evaluation.world)
    if found is None or len(found.features) < len(evaluation.seeds):
        measure(candidates, evaluation, sampling, point, features=folder)
        found = kept.read(evaluation.seeds, evaluation.world)
    return found.features


OF_A_MODEL = ("w", "base", "base_sha256", "vae_sha256", "selftrained", "dtype", "class_idx")  # of its images


def images_of(row: Mapping, seeds: torch.Tensor, batch: int, device: torch.device | str, **options) -> torch.Tensor:
    """What the model of a row of results draws for other seeds, sampled as then: uint8 (N, C, H, W) on the CPU.

    options: of family.load, where the checkpoint needs further files. Raises NeonError if a file is not what it was.
    """
    need([row], ("family", *OF_A_MODEL), "rows")
    family = get_family(row["family"])
    need([row], (), "rows", family.Sampling)
    candidates = BY[by_of(row)](family, row["base"], device, row["dtype"], **options)
    found = {"base_sha256": digest(row["base"]), "vae_sha256": candidates.vae_sha256}
    if row["selftrained"]:
        found["selftrained_sha256"] = digest(row["selftrained"])
    for fact, now in found.items():
        if row[fact] != now:
            raise NeonError(f"{row['base']} at w = {row['w']:g}: its {fact} is not what it was when it was measured")
    model = candidates.load(row["selftrained"], row["w"])
    sampling = {field.name: row[field.name] for field in dataclasses.fields(family.Sampling)}
    draw = partial(images_of_seeds, family, model, class_idx=row["class_idx"], **sampling)
    return torch.cat([draw(part).cpu() for part in seeds.split(batch)])


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
    return int(digits) if digits.isdecimal() else 0


def num_synthetic(snapshot: str | None) -> int:
    """|S|, the number of images that our snapshots record in their header; 0 for the base and for other files."""
    if snapshot is None or Path(snapshot).suffix != ".safetensors":
        return 0
    with open_weights(snapshot) as weights, reading(snapshot, "its header has a data_images that is no number"):
        return int(weights.metadata.get("data_images", 0))


NUMBER, TEXT, WHOLE = (int, float), (str,), (int,)
PERHAPS = (type(None),)
# What fields of rows are; others, such as sampling options, are plain values. Old rows lack some.
FIELDS = {
    **dict.fromkeys(("w", "fid", "is", "kid", "precision", "recall", "seconds"), NUMBER),
    **dict.fromkeys(("density", "coverage", "authpct", "mind", "fid_se", "is_std", "kid_std"), NUMBER),
    **dict.fromkeys(("gain_base", "gain_base_se", "gain_selftrained", "gain_selftrained_se"), NUMBER),
    **dict.fromkeys(("key", "role", "family", "dtype", "device", "features", "base", "base_sha256"), TEXT),
    **dict.fromkeys(("kept", "reason", "by", "streams"), TEXT),
    **dict.fromkeys(("selftrained", "selftrained_sha256", "vae_sha256", "reference"), (*TEXT, *PERHAPS)),
    **dict.fromkeys(("n", "budget", "num_synthetic", "world", "networks"), WHOLE),
    "class_idx": (*WHOLE, *PERHAPS),
    "tf32": (bool,),
    "seeds": (*TEXT, list),
    "metrics": (list,),
    "versions": (dict,),
}
PLAIN = (str, int, float, bool, type(None))  # any other field


def checked(row: object) -> dict:
    """The row, whose fields are of the types of FIELDS. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("a line that is no object")
    for name, value in row.items():
        if type(value) not in FIELDS.get(name, PLAIN):
            raise ValueError(f"{name} is {repr(value)[:60]}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is too large a number")
    parts = [*(row["seeds"] if isinstance(row.get("seeds"), list) else []), *row.get("metrics", [])]
    if not all(type(part) in PLAIN for part in parts) or not math.isfinite(row.get("w", 0.0)):
        raise ValueError("seeds, metrics or w hold what they cannot")
    for name in ("n", "budget", "num_synthetic"):
        if row.get(name, 0) < 0:
            raise ValueError(f"{name} is {row[name]}")
    return row


def row_of(path: str | Path) -> dict:
    """The row that `neon evaluate` wrote. Raises NeonError."""
    with reading(path, "holds something other than a row of results"):
        return checked(read_json(path))


def need(rows: Iterable[Mapping], names: Iterable[str], path: str | Path, options: type | None = None) -> None:
    """Raises NeonError if a row lacks one of the fields, or a sampling option, or has one of another type.

    options: a family's Sampling.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(options)} if options else {}
    for row in rows:
        if missing := [name for name in (*names, *kinds) if name not in row]:
            raise NeonError(f"{path}: a row has no {missing[0]}")
        for name, kind in kinds.items():
            allowed = (int, float) if kind is float else (kind,) if kind in (int, bool, str) else (str,)
            if type(row[name]) not in allowed:
                raise NeonError(f"{path}: a row has {name} {repr(row[name])[:60]}, which is no value of it")


class Rows:
    """A JSON-lines file of results, each with the key of what it depends on; a line torn by a kill is dropped.

    Raises NeonError if the file holds anything else.
    """

    def __init__(self, path: str | Path, write: bool = True):
        self.path, self.write = Path(path), write
        self.rows: dict[str, dict] = {}
        if os.path.lexists(self.path):
            whole, newline, torn = regular(self.path).read_bytes().rpartition(b"\n")
            start = b'{"key": "'
            with reading(path, "holds something other than rows of results"):
                self.rows = {row["key"]: row for row in map(checked, map(from_json, whole.splitlines()))}
                if torn[: len(start)] != start[: len(torn)]:
                    raise ValueError("a last line that is no row")
            if write and torn:
                os.truncate(self.path, len(whole + newline))

    def cached(self, key: str, compute: Callable[[], dict]) -> dict:
        """The row of that key, computed and appended at once if it is not there."""
        if key not in self.rows:
            self.rows[key] = {"key": key, **compute()}
            if self.write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with filling(self.path), self.path.open("a") as f:
                    f.write(to_json(self.rows[key]) + "\n")
        return self.rows[key]

    def keep(self, keys: Iterable[str]) -> None:
        """Drop all other rows, from the file too."""
        self.rows = {key: self.rows[key] for key in keys}
        if self.write:
            with atomic(self.path) as partial:
                partial.write_text("".join(to_json(row) + "\n" for row in self.rows.values()))


def scorer(
    candidates: Candidates,
    evaluation: Evaluation,
    sampling: Mapping[str, object],
    rows: Rows,
    features: Path | None = None,
) -> Callable[[Point], dict]:
    """point → its row, from the file if it was measured before under the same conditions.

    features: see `measure`. A merge that diverges is measured once, too: its row has fid = inf and the reason. The base
    must not diverge.
    """

    def compute(point: Point) -> dict:
        try:
            return measure(candidates, evaluation, sampling, point, features=features)
        except Diverged as error:
            if not point.w:
                raise
            return diverged(candidates, evaluation, sampling, point, str(error))

    def score(point: Point) -> dict:
        return rows.cached(key_of(candidates, evaluation, sampling, point), lambda: compute(point))

    return score
