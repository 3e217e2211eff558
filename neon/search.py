"""Which w (and which snapshot, guidance, …)?"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from neon import NeonError
from neon.measure.candidates import Point


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
