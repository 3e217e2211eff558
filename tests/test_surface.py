"""FID between evaluations, and the search that goes by it: on models whose features are known for every w."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neon import NeonError
from neon.measure.candidates import Point
from neon.measure.compare import fid_difference
from neon.measure.metrics import Reference, frechet_distance
from neon.measure.surface import REACH, Surface
from neon.search import by_surface, parse_range
from neon.surface import Node, Space, SurfaceSearch, curve, drifts

D, N = 6, 600
REFERENCE = Reference(torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64))


class Model:
    """Features with known moments: the base is off in mean and too narrow; w moves both, guidance and budget too."""

    def __init__(self, seed=0, best_w=1.5, best_cfg=2.0, jump=None, breaks=math.inf):
        self.noise = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.best_w, self.best_cfg, self.jump, self.breaks, self.seen = best_w, best_cfg, jump, breaks, []

    def features(self, point: Point, n=N) -> torch.Tensor:
        budget = {"a": 0.5, "b": 1.0, "c": 2.0, None: 1.0}[point.selftrained]
        gone = point.w * budget ** (2 / 3) / self.best_w
        cfg = dict(point.sampling).get("cfg", self.best_cfg)
        wide = 0.5 + 0.5 * gone - 0.1 * (cfg - self.best_cfg - 0.3 * (gone - 1))
        shift = 0.6 * (1 - gone) + 0.4 * (cfg - self.best_cfg - 0.3 * (gone - 1)) + 0.2 * (budget - 1) ** 2 * gone
        if self.jump and point.w > self.jump:
            shift += 3.0
        return (wide * self.noise[:n] + shift).float()

    def measure(self, point: Point, n=N) -> Node:
        self.seen.append((point, n))
        if point.w > self.breaks:
            return Node(point, math.inf, math.nan, None)
        return Node(point, fid_of(self.features(point, n)), 0.3, self.features(point, n))


def fid_of(features):
    x = features.double()
    return frechet_distance(x.mean(0), torch.cov(x.T), REFERENCE)


def space(options=False, budgets="b", w=(0.0, 3.0)):
    images = {"a": 1000, "b": 2000, "c": 4000}
    drift = {"a": 0.5, "b": 1.0, "c": 2.0}
    ranges = {"cfg": (1.0, 4.0, float)} if options else {}
    return Space(w, {s: drift[s] for s in budgets}, {s: images[s] for s in budgets}, ranges)


def run(model, where, evaluations=12, images=(N, N), known=()):
    return by_surface(lambda: SurfaceSearch(where, REFERENCE), model.measure, evaluations, images, known)


# ---------------------------------------------------------------- the surface


def test_moments_are_interpolated_not_fid():
    """Features that are linear in w: from three evaluations FID is known everywhere near, and at nodes exactly."""
    model, where = Model(), space()
    surface = Surface(REFERENCE)
    points = [Point("b" if w else None, w) for w in (0.0, 1.0, 2.0)]
    for point in points:
        surface.add(where.place(point), model.features(point))
    there = [Point("b", w) for w in (0.5, 1.4, 1.7, 2.4)]
    predicted, true = surface.fid([where.place(p) for p in there]), [fid_of(model.features(p)) for p in there]
    assert predicted == pytest.approx(true, abs=0.02)
    at_nodes = surface.fid([where.place(p) for p in points])
    assert at_nodes == pytest.approx([fid_of(model.features(p)) for p in points], abs=1e-6)
    two = Surface(REFERENCE)
    for point in points[::2]:
        two.add(where.place(point), model.features(point))
    true, by_fid = fid_of(model.features(points[1])), at_nodes[[0, 2]].mean()
    assert abs(two.fid([where.place(points[1])])[0] - true) < 0.2 * abs(by_fid - true)


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=9, unique=True))
@settings(deadline=None, max_examples=50)
def test_weights_sum_to_one_and_are_one_at_nodes(places):
    if min((math.dist(a, b) for a in places for b in places if a != b), default=1) < 0.05:
        return
    surface = Surface(REFERENCE)
    surface.places = places
    weights = surface.weights(np.array([(0.7, 0.2, -0.3), places[0]]))
    assert weights.sum(1) == pytest.approx([1, 1], abs=1e-6)
    assert weights[1] == pytest.approx([1] + [0] * (len(places) - 1), abs=1e-2)


def test_two_nodes_reach_twice_their_distance():
    surface = Surface(REFERENCE)
    surface.places = [(0.0,), (1.0,)]
    reach = surface.reach(np.array([[0.5], [1.0], [2.0], [2.3]]))
    assert reach[:2] == pytest.approx([1, 1]) and reach[2] <= REACH < reach[3]


def test_a_node_next_to_another_does_not_narrow_the_reach():
    surface = Surface(REFERENCE)
    corners = [(u, g) for u in (0.0, 1.0) for g in (-0.7, 0.7)]
    surface.places = corners
    before = surface.reach(np.array([(0.1, -0.9), (1.8, 0.2)]))
    surface.places = [*corners, (1.0, 0.68), (0.97, 0.7)]
    assert surface.reach(np.array([(0.1, -0.9), (1.8, 0.2)])) == pytest.approx(before, abs=0.1)


def test_a_budget_has_no_effect_at_the_base():
    surface = Surface(REFERENCE, budget=True)
    surface.places = [(0.0, 0.0), (1.0, -1.0), (1.0, 1.0)]
    low, high, far_low, far_high = surface.weights(np.array([(0.0, -1.0), (0.0, 1.0), (1.0, -0.5), (1.0, 0.5)]))
    assert low == pytest.approx(high) and abs(far_low - far_high).max() > 0.3


def test_a_covariance_with_negative_eigenvalues_counts_them_as_zero():
    """Far beyond nodes with fewer images than dimensions."""
    surface = Surface(REFERENCE)
    generator = torch.Generator().manual_seed(0)
    for w in (0.0, 1.0):
        surface.add((w,), torch.randn(4, D, generator=generator))
    assert surface.fid([(1.9,)])[0] > 0


def test_a_surface_without_a_block_is_that_of_the_other_images():
    model, where = Model(), space()
    surface = Surface(REFERENCE)
    points = [Point(None, 0.0), Point("b", 1.0)]
    for point in points:
        surface.add(where.place(point), model.features(point))
    for b, part in enumerate(surface.jackknife()):
        others = [i for i in range(N) if not b * N // 10 <= i < (b + 1) * N // 10]
        wanted = [fid_of(model.features(point)[others]) for point in points]
        assert part.fid(surface.places) == pytest.approx(wanted, abs=1e-6)


# ---------------------------------------------------------------- the search


def lowest(model, where, step=0.05):
    """The best FID over a fine grid."""
    points = [
        where.point(w, [cfg] if where.options else [], snapshot)
        for w in np.arange(0, where.w[1] + 1e-9, step).tolist()
        for cfg in (np.arange(1, 4.001, step).tolist() if where.options else [None])
        for snapshot in where.snapshots
    ]
    return min(fid_of(model.features(p)) for p in points)


@pytest.mark.parametrize("best_w", [0.4, 1.5, 2.6])
def test_w_alone_takes_three_evaluations(best_w):
    model, where = Model(best_w=best_w), space()
    search, found, _ = run(model, where)
    assert len(search.nodes) <= 4 and found.best.fid - lowest(model, where) < 0.3 * found.best.se
    low, high = found.intervals["w"]
    assert low < found.lowest.w < high and high - low < 1.5


@pytest.mark.parametrize("best_cfg", [1.6, 3.0])
def test_w_and_guidance_take_seven(best_cfg):
    model, where = Model(best_cfg=best_cfg), space(options=True)
    search, found, _ = run(model, where)
    assert len(search.nodes) <= 7 and found.best.fid - lowest(model, where) < 0.3 * found.best.se
    bases = [node for node in search.measured if not node.point.w]
    best_base = min(fid_of(model.features(Point(None, 0.0, (("cfg", c),)))) for c in np.arange(1, 4.01, 0.1).tolist())
    assert min(node.fid for node in bases) - best_base < 0.3 * found.best.se  # the gain is over this one


def test_budgets_are_compared_with_few_evaluations():
    model, where = Model(), space(budgets="abc")
    search, found, _ = run(model, where)
    assert {node.point.selftrained for node in search.measured} == {None, "a", "b", "c"} and len(search.nodes) <= 7
    assert found.best.fid - lowest(model, where) < 0.3 * found.best.se
    assert found.budgets[0] <= where.budgets[found.best.point.selftrained] <= found.budgets[1]


def test_no_gain_is_said():
    """Where moving away from the self-trained model only hurts, the base is best."""
    model, where = Model(best_w=-1.5), space()
    _, found, _ = run(model, where)
    assert found.best.point == Point(None, 0.0) and found.lowest.w <= 0.1


def test_a_curve_that_jumps_is_measured_again():
    """Above w = 1 the merged model breaks: predictions fail there, and the best that was measured is reported."""
    model, where = Model(jump=1.0), space()
    search, found, _ = run(model, where)
    assert found.best.point.w <= 1.0 and len(search.nodes) > 3
    assert found.best.fid == min(node.fid for node in search.measured)


def test_a_merge_that_diverges_bounds_the_search():
    model, where = Model(breaks=1.0, best_w=0.8), space()
    search, found, _ = run(model, where)
    assert [node.point.w for node in search.nodes.values() if node.features is None] == [1.5]
    assert 0 < found.best.point.w < 1.0 and found.best.fid < fid_of(model.features(Point(None, 0.0)))


def test_the_edge_of_the_range_is_said():
    _, found, _ = run(Model(best_w=2.5), space(w=(0.0, 1.0)))
    assert found.at_edge and found.best.point.w == 1.0
    assert not run(Model(best_w=0.5), space(w=(0.0, 1.0)))[1].at_edge


@pytest.mark.parametrize("options", [False, True])
def test_a_search_continues_as_if_it_had_not_been_killed(options):
    """After any number of evaluations the next ones are the same."""
    where = space(options, budgets="abc")
    whole = Model()
    run(whole, where)
    points = [point for point, _ in whole.seen]
    for done in range(1, len(points)):
        again = Model()
        run(again, where, known=points[:done])
        assert [point for point, _ in again.seen] == points


def test_evaluations_are_bounded():
    model = Model()
    search, _, _ = run(model, space(options=True, budgets="abc"), evaluations=5)
    assert len(search.nodes) == len(model.seen) == 5


def test_images_grow_only_where_w_is_uncertain():
    """FIDs of few images leave w open; with more of them it is not. All points then have as many."""
    model, where = Model(), space()
    search, found, n = run(model, where, images=(60, N))
    assert n in (60, 120, 240, 480, N) and {len(node.features) for node in search.measured} == {n}
    assert n == N or found.loss <= found.best.se

    class Certain(Model):
        def measure(self, point, n):
            node = super().measure(point, n)
            return Node(point, node.fid, 100.0, node.features)

    assert run(Certain(), where, images=(60, N))[2] == 60


def test_the_interval_of_w_is_its_spread_over_seeds():
    """Independent noise: the best w moves about as much as one search says."""
    where = space()
    found = [run(Model(seed=seed), where)[1] for seed in range(12)]
    halves = [(f.intervals["w"][1] - f.intervals["w"][0]) / 2 / 2.26 for f in found]
    spread = np.std([f.lowest.w for f in found], ddof=1)
    assert 0.4 * spread < np.median(halves) < 2.5 * spread


def test_the_curve_is_a_regular_grid_with_errors_on_the_line_of_the_best():
    model, where = Model(), space(options=True)
    search, found, _ = run(model, where)
    rows = curve(search, found.lowest)
    assert sorted({row["w"] for row in rows}) == pytest.approx(np.linspace(0, 3, 31).tolist())
    values = sorted({row["cfg"] for row in rows})
    assert values == pytest.approx(np.linspace(1, 4, 13).tolist()) and len(rows) == 31 * 13
    lines = {row["cfg"] for row in rows if row["fid_se"] is not None}
    assert lines == {min(values, key=lambda v: abs(v - dict(found.lowest.sampling)["cfg"]))}
    at = min((row for row in rows if row["fid"] is not None), key=lambda row: row["fid"])
    assert sum(row["fid"] is None for row in rows) < len(rows) / 4  # where no node reaches
    assert at["fid"] == pytest.approx(fid_of(model.features(where.point(at["w"], [at["cfg"]], "b"))), abs=0.2)


# ---------------------------------------------------------------- parts


def test_drifts_of_many_snapshots_are_read_of_three():
    read = []

    def measure(snapshot):
        read.append(snapshot)
        return int(snapshot) ** 0.5

    budgets = {str(b): b for b in range(1000, 60_000, 1000)}
    found = drifts(measure, budgets)
    assert len(read) == 3 and list(found) == list(budgets)
    assert found == pytest.approx({b: int(b) ** 0.5 for b in budgets})
    assert drifts(measure, {"3": 0, "5": 0, "7": 0, "9": 0}) == pytest.approx({s: int(s) ** 0.5 for s in "3579"})


@pytest.mark.parametrize("w", [(1.0, 1.0), (3.0, 0.0), (-2.0, -1.0)])
def test_ranges_that_are_none(w):
    with pytest.raises(NeonError):
        space(w=w)


def test_parse_range():
    assert parse_range("0:3") == (0, 3) and parse_range("0:3:0.25") == (0, 3) and parse_range("-1,0,2") == (-1, 2)
    for text in ("0:", "a:b", "0:inf", "", "0:1:2:3"):
        with pytest.raises(NeonError):
            parse_range(text)


def test_a_difference_on_common_seeds_has_a_smaller_error():
    """Twins differ by a known amount in every image: what they share is no error; strangers have all of it."""
    x = Model(seed=1).features(Point("b", 1.0))
    y, z = x + 0.05, Model(seed=2).features(Point("b", 1.0)) + 0.05
    paired, independent = fid_difference(x, y, REFERENCE), fid_difference(x, z, REFERENCE)
    assert paired.value == pytest.approx(fid_of(x) - fid_of(y)) and paired.se < 0.3 * independent.se
    assert fid_difference(x, x, REFERENCE) == (0, 0)
    draws = [fid_difference(m(0.0), m(0.05), REFERENCE) for m in map(_twins, range(40))]
    assert np.std([d.value for d in draws], ddof=1) == pytest.approx(np.mean([d.se for d in draws]), rel=0.35)


def _twins(seed):
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(100 + seed))
    return lambda shift: 0.9 * noise * (1 + shift) + shift


def test_a_search_at_the_papers_size():
    """59 snapshots, w and guidance: twelve evaluations at most, three checkpoints read for their drift."""

    class Large(Model):
        def features(self, point, n=N):
            budget = int(point.selftrained or 0) / 3_000_000
            gone = point.w * budget**0.6 / self.best_w
            cfg = dict(point.sampling)["cfg_scale"]
            turn = 0.3 * math.log(budget / 0.7) ** 2 * gone if point.w else 0
            wide = 0.5 + 0.5 * gone - 0.1 * (cfg - 1.8 - 0.3 * (gone - 1))
            return (wide * self.noise[:n] + 0.6 * (1 - gone) + 0.4 * (cfg - 1.8 - 0.3 * (gone - 1)) + turn).float()

    read = []
    budgets = {str(i * 102_400): i * 102_400 for i in range(1, 60)}
    drift = drifts(lambda s: read.append(s) or int(s) ** 0.6, budgets)
    where = Space((0.0, 5.2), drift, budgets, {"cfg_scale": (1.0, 3.0, float)})
    model = Large(best_w=2.5)
    search, found, _ = run(model, where)
    assert len(read) == 3 and len(search.nodes) <= 12
    snapshots = list(budgets)[::4]
    grid = [
        fid_of(model.features(where.point(w, [cfg], s)))
        for w in np.arange(0, 5.3, 0.4).tolist()
        for cfg in np.arange(1, 3.01, 0.2).tolist()
        for s in snapshots
    ]
    base = min(
        fid_of(model.features(where.point(0.0, [cfg], snapshots[0]))) for cfg in np.arange(1, 3.01, 0.1).tolist()
    )
    assert found.best.fid - min(grid) < 0.05 * (base - min(grid))
