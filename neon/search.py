"""Which w (and which snapshot, guidance, …)? By the FID surface through a few evaluations, or by a grid."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from neon import NeonError
from neon.measure.candidates import Candidates, Point
from neon.measure.evaluate import Evaluation
from neon.measure.rows import Rows, features_of, key_of, scorer
from neon.surface import Found, Node, Space, SurfaceSearch, conclude


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


def by_surface(
    new: Callable[[], SurfaceSearch],
    measure: Callable[[Point, int], Node],
    evaluations: int,
    images: tuple[int, int],
    known: Sequence[Point] = (),
) -> tuple[SurfaceSearch, Found, int]:
    """Measure point after point until the surface promises no more, at most so many.

    measure(point, n): with the first n images. n starts at images[0] and doubles, up to images[1], while w at an end of
    its interval would lose more FID than the sampling error; then all points are measured with n images, for they share
    their noise. known: points to begin with. Returns the search, what it says, and n.
    """
    n, points = images[0], list(known)
    while True:
        search = new()
        for point in points:
            search.add(measure(point, n))
        while len(search.nodes) < evaluations and (point := search.next_point()):
            search.add(measure(point, n))
        found = conclude(search)
        if n == images[1] or found.loss <= found.best.se:
            return search, found, n
        n, points = min(2 * n, images[1]), list(search.nodes)


@dataclass(frozen=True)
class Bench:
    """Where a search measures its points: each once, with its row in a file and its features in a folder."""

    candidates: Candidates
    evaluation: Evaluation  # with all images that a point may have
    sampling: Mapping[str, object]
    rows: Rows
    features: Path

    def part(self, n: int) -> Evaluation:
        """With the first n images."""
        return replace(self.evaluation, seeds=self.evaluation.seeds[:n])

    def measure(self, point: Point, n: int) -> tuple[Node, dict]:
        """The point with n images, and its row."""
        part = self.part(n)
        row = scorer(self.candidates, part, self.sampling, self.rows, self.features)(point)
        if "reason" in row:
            return Node(point, math.inf, math.nan, None), row
        features = features_of(self.candidates, part, self.sampling, point, self.features)
        return Node(point, row["fid"], row["fid_se"], features), row

    def known(self, space: Space) -> tuple[list[Point], int]:
        """The points that were measured before with the first n images of these, by any method; and the largest n."""
        points, most = {}, 0
        for key, row in self.rows.rows.items():
            try:
                point = space.point(row["w"], [row[name] for name in space.options], row["selftrained"])
                n = row["n"]
            except KeyError:
                continue
            if (point.w and point.selftrained not in space.drift) or n > len(self.evaluation.seeds):
                continue
            if key == key_of(self.candidates, self.part(n), self.sampling, point):
                points[point], most = None, max(most, n)
        return list(points), most

    def finished(self, points: Iterable[Point], n: int, replace: bool) -> list[str]:
        """The keys to keep at the end: all, except of the same points with fewer images; replace: only the points'."""
        points = list(points)
        keys = [key_of(self.candidates, self.part(n), self.sampling, point) for point in points]
        if replace:
            return keys
        sizes = {row["n"] for row in self.rows.rows.values() if row.get("n", n) < n}
        before = {key_of(self.candidates, self.part(size), self.sampling, p) for size in sizes for p in points}
        return [key for key in self.rows.rows if key not in before]


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


def parse_range(text: str) -> tuple[float, float]:
    """'0:3', or the ends of a grid, '0:3:0.25' or '0,1,3' → lowest, highest. Raises NeonError."""
    if text.count(":") == 1:
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            raise NeonError(f"not a range: {text!r} (write 0:3)") from None
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NeonError(f"not a range: {text!r} (write 0:3)")
        return low, high
    values = parse_grid(text)
    return min(values), max(values)
