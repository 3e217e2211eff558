"""Which w (and which snapshot, guidance, …)?"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from neon import NeonError
from neon.measure.candidates import Point

# Facts of rows whose FIDs can be compared.
ALIKE = (
    "family",
    "base_sha256",
    "vae_sha256",
    "dtype",
    "device",
    "tf32",
    "class_idx",
    "seeds",
    "features",
    "reference",
)


def final_points(searched: Sequence[Mapping], options: Sequence[str]) -> dict[str, Point]:
    """The three points to compare on fresh images, by their roles: base, selftrained, neon.

    base: w = 0 with the sampling options that suit it best. neon: the lowest FID over w > 0 if it is below the base's;
    otherwise the base itself, so never w < 0. selftrained: w = −1 with the snapshot and the sampling options of the
    best w > 0, or of the best w < 0 if no w > 0 was searched. A FID that is not finite never wins.

    searched: rows of a finished search; options: names of the family's sampling options. Raises NeonError if the rows
    were not measured alike, if no FID is finite, or if no self-trained model is among them.
    """
    for fact in ALIKE:
        if len({json.dumps(row.get(fact)) for row in searched}) > 1:
            raise NeonError(f"the rows of the search differ in {fact}, so their FIDs cannot be compared")
    finite = sorted((row for row in searched if math.isfinite(row["fid"])), key=lambda row: row["fid"])
    if not finite:
        raise NeonError("the search holds no finite FID")
    swept = [name for name in options if len({row[name] for row in searched}) > 1]

    def best(of, default):
        return next((row for row in finite if of(row["w"])), default)

    def point(row, w):
        return Point(row["selftrained"] if w else None, w, tuple((name, row[name]) for name in swept))

    merged = best(lambda w: w > 0, None)
    base = best(lambda w: w == 0, None)
    trained = merged or best(bool, next((row for row in searched if row["w"]), None))
    if trained is None:
        raise NeonError("the search holds no self-trained model")
    at_base = point(base or merged or finite[0], 0.0)
    helps = merged and (base is None or merged["fid"] < base["fid"])
    return {
        "base": at_base,
        "selftrained": point(trained, -1.0),
        "neon": point(merged, merged["w"]) if helps else at_base,
    }


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
    grids: Mapping[str, Sequence],
    stop: float | None = None,
) -> Iterator[tuple[Point, float]]:
    """Score every (snapshot, sampling options) row over w in the given order.

    stop: end a row when its score rises by more than this over its best, as the original scripts do (0.02 to 0.03 for
    FID); None scores the whole grid. w = 0 is the same point for all snapshots.
    """
    for snapshot, values in product(snapshots, product(*grids.values())):
        best = float("inf")
        for w in weights:
            point = Point(str(snapshot) if w else None, w, tuple(zip(grids, values)))
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
