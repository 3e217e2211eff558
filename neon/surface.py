"""Choose w, guidance and budget by a handful of evaluations and the FID surface through them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch

from neon import NeonError
from neon.measure.candidates import Point
from neon.measure.metrics import Reference
from neon.measure.surface import REACH, Map, Surface, half_width, jackknife_error

TOLERANCE = 0.3  # sampling errors of FID: less than that is no promise and no disagreement
CORNERS = (0.15, 0.85)  # of the range of a sampling option: where the first evaluations are
EXPONENT = 2 / 3  # the best w falls with the drift of a snapshot to this power; on digits 0.55 to 0.8


@dataclass(frozen=True)
class Space:
    """What is searched: w, sampling options with numbers, and snapshots of θ_s.

    w: lowest and highest; options: name → lowest, highest, type (int or float); drift: snapshot → ‖θ_s − θ_r‖, in the
    order of their budgets; budgets: snapshot → B.
    """

    w: tuple[float, float]
    drift: Mapping[str, float]
    budgets: Mapping[str, int]
    options: Mapping[str, tuple[float, float, type]] = field(default_factory=dict)

    def __post_init__(self):
        for name, (low, high, *_) in {"w": self.w, **self.options}.items():
            if not low < high:
                raise NeonError(f"a surface needs a range of {name}, lowest:highest, not {low:g}:{high:g}")
        if self.w[1] <= 0:
            raise NeonError(f"Neon is w > 0: the range of w ends at {self.w[1]:g}")

    @property
    def snapshots(self) -> list[str]:
        return list(self.drift)

    def values(self) -> list[list]:
        """The numbers that each axis may take, in steps that are easy to read; the last axis is the snapshots."""
        w = _values(min(self.w[0], 0.0), self.w[1], 60, float)
        return [w, *(_values(low, high, 30, kind) for low, high, kind in self.options.values()), self.snapshots]

    def point(self, w: float, options: Sequence, snapshot: str) -> Point:
        return Point(snapshot if w else None, w, tuple(zip(self.options, options)))

    def place(self, point: Point) -> tuple[float, ...]:
        """The point's coordinates on a Surface."""
        far = self.scale(self.snapshots[-1]) * self.w[1]
        place = [2 * point.w * (self.scale(point.selftrained) if point.w else 1.0) / far]
        for name, value in point.sampling:
            low, high, _ = self.options[name]
            place.append(2 * (value - low) / (high - low) - 1)
        if len(self.snapshots) > 1:
            place.append(self.height(point.selftrained) if point.w else 0.0)
        return tuple(place)

    def scale(self, snapshot: str) -> float:
        """How far w = 1 goes with that snapshot: equal distances have about equal effects."""
        return self.drift[snapshot] ** EXPONENT

    def height(self, snapshot: str) -> float:
        """log B, scaled to [−1, 1]; the place in the order where budgets are not known; 0 if there is one."""
        if len(self.snapshots) == 1:
            return 0.0
        budgets = [self.budgets[s] for s in self.snapshots]
        known = len(set(budgets)) == len(budgets) and min(budgets) > 0
        logs = np.log(budgets) if known else np.arange(len(budgets))
        at = logs[self.snapshots.index(snapshot)]
        return float(2 * (at - logs[0]) / (logs[-1] - logs[0]) - 1)


@dataclass(frozen=True)
class Node:
    """A measured point: FID, its sampling error, and the features (n, d) of its images; None if they diverged."""

    point: Point
    fid: float
    se: float
    features: torch.Tensor | None


class SurfaceSearch:
    """The evaluations of a search by surface, one after the other.

    Each next point is a function of those measured so far, in their order: a search that was killed continues as if it
    had not been. `share` may spread the work on the surface over processes.
    """

    def __init__(
        self,
        space: Space,
        reference: Reference,
        device: torch.device | str = "cpu",
        share: Map | None = None,
    ):
        self.space, self.reference, self.device, self.share = space, reference, device, share
        self.axes = space.values()
        self.nodes: dict[Point, Node] = {}
        self.surface = self._new_surface()

    def _new_surface(self) -> Surface:
        return Surface(self.reference, self.device, budget=len(self.space.snapshots) > 1)

    def add(self, node: Node) -> None:
        if node.point not in self.nodes:
            self.nodes[node.point] = node
            if node.features is not None:
                self.surface.add(self.space.place(node.point), node.features)

    @property
    def measured(self) -> list[Node]:
        """Those on the surface, in the order in which they were added."""
        return [node for node in self.nodes.values() if node.features is not None]

    @property
    def best(self) -> Node:
        """The lowest measured FID of w >= 0."""
        return min((node for node in self.measured if node.point.w >= 0), key=lambda node: node.fid)

    def next_point(self) -> Point | None:
        """Where to measure next; None if nothing promises more than TOLERANCE sampling errors."""
        return self._design() or self._base() or self._lowest() or self._budget()

    def _design(self) -> Point | None:
        """The first evaluations: base and a middle w, at two values of each option."""
        places = np.array([self.space.place(node.point) for node in self.measured])
        corners = list(product((0, 1), repeat=1 + len(self.space.options)))
        if len(places) and np.linalg.matrix_rank(_multilinear(places[:, : len(corners[0])]), tol=0.1) == len(corners):
            return None
        for far, *high in corners:
            w = _nearest(self.axes[0], self.limit(self.middle) / 2) if far else 0.0
            options = [_nearest(a, a[0] + CORNERS[h] * (a[-1] - a[0])) for a, h in zip(self.axes[1:], high)]
            point = self.space.point(w, options, self.middle)
            if point not in self.nodes:
                return point
        return None

    @property
    def middle(self) -> str:
        """The snapshot to start with."""
        return min(self.space.snapshots, key=lambda s: abs(self.space.height(s)))

    def limit(self, snapshot: str) -> float:
        """The highest w to go to with a snapshot: well below every merge that diverged."""
        broken = [node.point for node in self.nodes.values() if node.features is None and node.point.w > 0]
        gone = [0.9 * p.w * self.space.scale(p.selftrained) / self.space.scale(snapshot) for p in broken]
        return min([self.space.w[1], *gone])

    def _base(self) -> Point | None:
        """The base at its own best options: what a gain is measured against."""
        if not self.space.options:
            return None
        best = min((node for node in self.measured if not node.point.w), key=lambda node: node.fid)
        fid, point = self.minimum([[0.0], *self.axes[1:-1], [self.middle]])
        return point if point not in self.nodes and best.fid - fid > TOLERANCE * best.se else None

    def _lowest(self) -> Point | None:
        """The lowest FID that the surface promises, until it has been confirmed."""
        fid, point = self.minimum([*self.axes[:-1], self.explored])
        agrees = self._agrees(self.best)
        if point in self.nodes:
            return None if agrees else self._between(self.best.point)
        return point if self.best.fid - fid > TOLERANCE * self.best.se or not agrees else None

    def _between(self, point: Point) -> Point | None:
        """Halfway from a point to the next measured w, across the wider gap; None if both are narrow."""
        snapshot = point.selftrained or self.middle
        alike = [p.w for p in self.nodes if p.sampling == point.sampling and p.selftrained in (None, snapshot)]
        above = min((w for w in alike if w > point.w), default=self.limit(snapshot))
        below = max((w for w in alike if w < point.w), default=0.0)
        low, high = max((point.w, above), (below, point.w), key=lambda gap: gap[1] - gap[0])
        w = _nearest(self.axes[0], (low + high) / 2)
        found = self.space.point(w, [value for _, value in point.sampling], snapshot)
        return found if high - low > self.space.w[1] / 10 and found not in self.nodes else None

    def _agrees(self, node: Node) -> bool:
        """Do the other nodes predict what was measured there?"""
        place = self.space.place(node.point)
        others = self.surface.without(self.surface.places.index(place))
        return abs(float(others.fid([place])[0]) - node.fid) < TOLERANCE * node.se

    @property
    def explored(self) -> list[str]:
        """The snapshots to choose among: all, once the first and the last were tried."""
        tried = {node.point.selftrained for node in self.nodes.values()}
        ends = {self.space.snapshots[0], self.space.snapshots[-1]}
        return self.space.snapshots if ends <= tried else [self.middle]

    def _budget(self) -> Point | None:
        """The best point so far, with the first and with the last snapshot, at the same distance from the base."""
        merged = [node for node in self.measured if node.point.w > 0]
        if not merged or self.explored == self.space.snapshots:
            return None
        best = min(merged, key=lambda node: node.fid).point
        tried = {node.point.selftrained for node in self.nodes.values()}
        other = next(s for s in (self.space.snapshots[0], self.space.snapshots[-1]) if s not in tried)
        w = best.w * self.space.scale(best.selftrained) / self.space.scale(other)
        w = max(_nearest(self.axes[0], min(w, self.limit(other))), min(v for v in self.axes[0] if v > 0))
        return self.space.point(w, [value for _, value in best.sampling], other)

    # ---- on the surface

    def predict(self, points: Sequence[Point], surface: Surface | None = None) -> np.ndarray:
        """FID of the points on the surface, (q,)."""
        return (surface or self.surface).fid([self.space.place(point) for point in points], self.share)

    def replicates(self, points: Sequence[Point]) -> np.ndarray:
        """Predictions without each block of the images, (blocks, q)."""
        return np.array([self.predict(points, part) for part in self.surface.jackknife()])

    def minimum(self, axes: Sequence[Sequence]) -> tuple[float, Point]:
        """The lowest predicted FID over the product of the axes where nodes reach, and its point."""

        def point(at):
            w, *options, snapshot = (axis[i] for axis, i in zip(axes, at))
            return self.space.point(w, options, snapshot)

        def fid(many):
            points = [point(at) for at in many]
            near = self.surface.reach([self.space.place(p) for p in points]) <= REACH + 1e-6
            near &= [p.w >= 0 and (not p.w or p.w <= self.limit(p.selftrained) + 1e-9) for p in points]
            values = np.full(len(points), math.inf)
            values[near] = self.predict([p for p, ok in zip(points, near) if ok])
            return values

        value, at = _descend(fid, [len(axis) for axis in axes])
        return value, point(at)


def drifts(measure: Callable[[str], float], budgets: Mapping[str, int]) -> dict[str, float]:
    """‖θ_s − θ_r‖ of each snapshot, in the order of their budgets: measured at the first, the middle and the last.

    Between them it is a power of the budget; a snapshot may be gigabytes to read. measure: of one snapshot.
    """
    order = sorted(budgets, key=budgets.get)
    if len(order) <= 3 or len({*budgets.values(), 0}) <= len(order):  # few, or budgets that say nothing
        return {snapshot: measure(snapshot) for snapshot in order}
    logs = np.log([budgets[s] for s in order])
    middle = int(np.abs(logs - (logs[0] + logs[-1]) / 2).argmin())
    known = sorted({0, middle, len(order) - 1})
    drift = [math.log(measure(order[i])) for i in known]
    return dict(zip(order, np.exp(np.interp(logs, logs[known], drift)).tolist()))


def _descend(values: Callable[[list], np.ndarray], shape: Sequence[int], coarse: int = 7) -> tuple[float, tuple]:
    """The lowest value on a lattice: a coarse lattice first, then neighbours at half the distance, and so on.

    values: (q,) of q places, tuples of indices.
    """
    steps = [max(1, math.ceil((n - 1) / (coarse - 1))) for n in shape]
    known: dict[tuple, float] = {}

    def look(places):
        new = [at for at in dict.fromkeys(places) if at not in known]
        if new:
            known.update(zip(new, map(float, values(new))))
        return min(known, key=known.get)

    best = look(product(*(sorted({*range(0, n, step), n - 1}) for n, step in zip(shape, steps))))
    while True:
        steps = [max(1, step // 2) for step in steps]
        around = product(*({max(0, i - s), i, min(n - 1, i + s)} for i, s, n in zip(best, steps, shape)))
        before, best = best, look(around)
        if best == before and all(step == 1 for step in steps):
            return known[best], best


def _values(low: float, high: float, count: int, kind: type) -> list:
    """From low to high in at least `count` steps of 1, 2 or 5 times a power of ten; integers where kind is int."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough) + 1e-9)
    step = max(s * power for s in (1, 2, 5) if s * power <= rough * (1 + 1e-9))
    if kind is int:
        step = max(1, round(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    inner = [kind(round(i * step, 10)) for i in range(first, last + 1)]
    return sorted({kind(low), *inner, kind(high)})


def _nearest(values: Sequence, wanted: float):
    return min(values, key=lambda value: abs(value - wanted))


def _multilinear(places: np.ndarray) -> np.ndarray:
    """(k, a) → (k, 2^a): products of the coordinates, each to the power 0 or 1."""
    powers = np.array(list(product((0, 1), repeat=places.shape[1])))
    return np.prod(places[:, None, :] ** powers, axis=2)


@dataclass(frozen=True)
class Found:
    """What a search by surface says. Intervals are 95 %, from a jackknife over blocks of the images."""

    best: Node  # the lowest measured FID of w >= 0
    lowest: Point  # where the surface is lowest
    fid: float  # there
    intervals: Mapping[str, tuple[float, float]]  # of w, and of each option, around `lowest`
    budgets: tuple[int, int]  # those that are not worse than the best by more than the sampling error
    at_edge: bool  # the best w is the highest that was allowed
    loss: float  # of FID, if w is at an end of its interval


def conclude(search: SurfaceSearch) -> Found:
    """Intervals of the best w and options, with the best snapshot, and of its budget."""
    best = search.best
    snapshots = [best.point.selftrained] if best.point.w else search.explored
    fid, lowest = search.minimum([*search.axes[:-1], snapshots])
    stencil, points = _stencil(search, lowest)
    rivals = _rivals(search, lowest)
    values, parts = search.predict([*points, *rivals]), search.replicates([*points, *rivals])
    q = len(points)
    intervals, loss = _intervals(search, lowest, stencil, values[:q], parts[:, :q])
    edge = lowest.w > 0 and lowest.w >= search.limit(lowest.selftrained) - 1e-9
    return Found(best, lowest, fid, intervals, _budgets(search, rivals, values[q:], parts[:, q:]), edge, loss)


def _ranges(space: Space) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest w and options, (a,) each."""
    return np.array([(0.0, space.w[1]), *(values[:2] for values in space.options.values())]).T


def _stencil(search: SurfaceSearch, lowest: Point) -> tuple[np.ndarray, list[Point]]:
    """Steps of −1, 0, 1 along w and options, (q, a), and the points there; a step is a twentieth of the range."""
    lows, highs = _ranges(search.space)
    step = (highs - lows) / 20
    at = np.clip([lowest.w, *(value for _, value in lowest.sampling)], lows + step, highs - step)
    stencil = np.array(list(product((-1, 0, 1), repeat=len(step))))
    snapshot = lowest.selftrained or search.middle
    return stencil, [search.space.point(w, options, snapshot) for w, *options in (at + stencil * step).tolist()]


def _intervals(
    search: SurfaceSearch, lowest: Point, stencil: np.ndarray, values: np.ndarray, parts: np.ndarray
) -> tuple[dict, float]:
    """Name → (low, high), and the loss in w: by one Newton step from the minimum for each part of the images.

    values: FID on the stencil, (q,); parts: without each block, (blocks, q).
    """
    lows, highs = _ranges(search.space)
    step, names = (highs - lows) / 20, ["w", *search.space.options]
    gradient, curvature = _derivatives(stencil, values)
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return dict(zip(names, zip(lows.tolist(), highs.tolist()))), math.inf
    moves = [np.linalg.solve(curvature, _derivatives(stencil, part)[0] - gradient) for part in parts]
    half = half_width(jackknife_error(moves))  # in steps
    at = np.array([lowest.w, *(value for _, value in lowest.sampling)], dtype=float)
    bounds = np.stack([np.maximum(lows, at - half * step), np.minimum(highs, at + half * step)], 1).tolist()
    return dict(zip(names, map(tuple, bounds))), float(0.5 * curvature[0, 0] * half[0] ** 2)


def _derivatives(stencil: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (a,) and second derivatives (a, a), per step, of the least-squares quadratic through a stencil."""
    a = stencil.shape[1]
    pairs = [(i, j) for i in range(a) for j in range(i, a)]
    columns = [np.ones(len(stencil)), *stencil.T, *(stencil[:, i] * stencil[:, j] for i, j in pairs)]
    found = np.linalg.lstsq(np.stack(columns, 1), values, rcond=None)[0]
    second = np.zeros((a, a))
    for (i, j), value in zip(pairs, found[1 + a :]):
        second[i, j] += value
        second[j, i] += value
    return found[1 : 1 + a], second


def _rivals(search: SurfaceSearch, lowest: Point) -> list[Point]:
    """The lowest point, and that of every other snapshot with the same options; none if the base is lowest."""
    if not lowest.w:
        return []
    others = [snapshot for snapshot in search.explored if snapshot != lowest.selftrained]
    options = [[value] for _, value in lowest.sampling]
    found = [search.minimum([search.axes[0], *options, [snapshot]])[1] for snapshot in others]
    return [lowest, *(point for point in found if point.w)]


def _budgets(search: SurfaceSearch, rivals: list[Point], values: np.ndarray, parts: np.ndarray) -> tuple[int, int]:
    """The least and the greatest budget that, each at its best w, may be as good as the best."""
    if not rivals:
        return 0, 0
    error = half_width(jackknife_error(parts - parts[:, :1]))
    as_good = [point for point, value, e in zip(rivals, values, error) if value - values[0] <= e]
    budgets = [search.space.budgets[point.selftrained] for point in as_good]
    return min(budgets), max(budgets)


def curve(search: SurfaceSearch, lowest: Point, count: tuple[int, int] = (31, 13)) -> list[dict]:
    """The surface at the best budget, for figures: w, the first option, budget, fid; fid_se on the line of the best.

    fid is None where the nodes do not reach. count: of w, and of values of the first option; further options stay at
    their best.
    """
    space, snapshot = search.space, lowest.selftrained or search.middle
    weights = sorted({0.0, *np.linspace(min(space.w[0], 0.0), space.w[1], count[0]).round(6).tolist()})
    first, *rest = [value for _, value in lowest.sampling] or [None]
    values = [None]
    if space.options:
        low, high, kind = next(iter(space.options.values()))
        values = sorted({kind(v) for v in np.linspace(low, high, count[1]).round(6).tolist()})
    line = _nearest(values, first) if space.options else None
    name, rows = next(iter(space.options), "cfg"), []
    for value in values:
        points = [space.point(w, [value, *rest] if space.options else [], snapshot) for w in weights]
        near = search.surface.reach([space.place(point) for point in points]) <= REACH + 1e-6
        points = [point for point, ok in zip(points, near) if ok]
        fids = dict(zip(points, search.predict(points)))
        errors = {}
        if value == line:
            errors = dict(zip(points, jackknife_error(search.replicates(points))))
        for w in weights:
            point = space.point(w, [value, *rest] if space.options else [], snapshot)
            found = {"fid": fids.get(point), "fid_se": errors.get(point)}
            rows.append({"w": w, name: value, "budget": space.budgets[snapshot], **found})
    return rows
