"""Which w (and which snapshot, guidance, …)? Every evaluation is one row of a file and is never repeated."""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path

import torch

from neon import NeonError
from neon.checkpoint import load_weights, open_weights
from neon.evaluate import Evaluation, row
from neon.family import Family, get_family
from neon.io import atomic, sha256
from neon.merge import is_finite, merge


@dataclass(frozen=True)
class Point:
    """One candidate: a snapshot of θ_s (None: the base itself), w, and the sampling options κ that are searched."""

    selftrained: str | None = None
    w: float = 0.0
    kappa: tuple[tuple[str, object], ...] = ()


class Candidates:
    """A base and its self-trained snapshots: any θ_r − w (θ_s − θ_r), loaded into one network."""

    def __init__(
        self,
        family: Family,
        base: str | Path,
        device: torch.device | str,
        precision: str = "float32",
        compile: bool = False,
        **options,
    ):
        self.family, self.base_path, self.precision = family, Path(base), precision
        self.model = family.load(base, device=device, precision=precision, **options)
        if compile:
            self.model.compile()
        self._read = lru_cache(maxsize=1)(load_weights)

    @cached_property
    def vae_sha256(self) -> str | None:
        """Of the autoencoder that the base decodes with; None if it makes pixels itself."""
        return self.family.metadata(self.model).get("vae_sha256")

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        state = load_weights(self.base_path)
        for name, tensor in state.items():
            if tensor.is_floating_point() and not self.family.is_buffer(name) and not is_finite(tensor):
                raise NeonError(f"{self.base_path}: {name} is not finite")
        return state

    def load(self, selftrained: str | Path | None, w: float) -> torch.nn.Module:
        """The network with merged weights; w = 0 or no snapshot is the base."""
        if w and selftrained is None:
            raise NeonError(f"w = {w} needs a self-trained checkpoint")
        state = dict(merge(self.base, self._read(selftrained), w, self.family.is_buffer)) if w else self.base
        self.family.weights(self.model).load_state_dict(state)
        return self.model


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


def final_points(searched: Sequence[Mapping], options: Sequence[str]) -> dict[str, Point]:
    """The three points to compare on fresh images: base (at its own best κ), self-trained (w = −1), and the best found.

    searched: rows of a finished search; options: names of the family's sampling options. Raises NeonError if the rows
    were not measured alike, or if no self-trained model is among them.
    """
    for fact in ("family", "base_sha256", "vae_sha256", "dtype", "seeds", "features", "reference"):
        if len({json.dumps(row.get(fact)) for row in searched}) > 1:
            raise NeonError(f"the rows of the search differ in {fact}, so their FIDs cannot be compared")
    swept = [name for name in options if len({row[name] for row in searched}) > 1]

    def point(row, w):
        return Point(row["selftrained"] if w else None, w, tuple((name, row[name]) for name in swept))

    best = min(searched, key=lambda row: row["fid"])
    base = min((row for row in searched if row["w"] == 0), key=lambda row: row["fid"], default=best)
    trained = best if best["selftrained"] else next((row for row in searched if row["selftrained"]), best)
    if not trained["selftrained"]:
        raise NeonError("the search holds no self-trained model")
    return {"base": point(base, 0.0), "selftrained": point(trained, -1.0), "neon": point(best, best["w"])}


def check_sampled_alike(searched: Sequence[Mapping], facts: Mapping[str, object]) -> None:
    """facts: sampling options, and how rows are measured, as they are now. Raises NeonError if the search, whose rows
    agree in an option, had another value."""
    for name, now in facts.items():
        then = {json.dumps(row[name]): row[name] for row in searched if name in row}
        if len(then) == 1 and now not in then.values():
            (value,) = then.values()
            raise NeonError(
                f"the search had {name} {value}, this command has {now}: the best w of one is not the other's"
            )


def grid(
    score: Callable[[Point], float],
    snapshots: Sequence[str | Path],
    weights: Sequence[float],
    kappas: Mapping[str, Sequence],
    stop: float | None = None,
) -> Iterator[tuple[Point, float]]:
    """Score every (snapshot, κ) row over w in the given order.

    stop: end a row when its score rises by more than this over its best, as the original scripts do (0.02 to 0.03 for
    FID); None scores the whole grid. w = 0 is the same point for all snapshots.
    """
    for snapshot, values in product(snapshots, product(*kappas.values())):
        best = float("inf")
        for w in weights:
            point = Point(str(snapshot) if w else None, w, tuple(zip(kappas, values)))
            value = score(point)
            yield point, value
            if stop is not None and value > best + stop:
                break
            best = min(best, value)


def parse_grid(text: str) -> list[float]:
    """'0:2:0.25' (both ends included) or '-1,0,0.5' → floats. Raises NeonError."""
    try:
        if ":" not in text:
            values = [float(part) + 0.0 for part in text.split(",")]  # + 0.0: no −0
            if not all(map(math.isfinite, values)):
                raise ValueError
            return values
        low, high, step = (float(part) for part in text.split(":"))
        count = round((high - low) / step)
        if count < 0 or abs(low + count * step - high) > 1e-9:
            raise ValueError
        return [round(low + i * step, 10) + 0.0 for i in range(count + 1)]  # + 0.0: no -0.0
    except (ValueError, ZeroDivisionError, OverflowError):
        raise NeonError(f"not a grid: {text!r} (write 0:2:0.25 or -1,0,0.5)") from None
