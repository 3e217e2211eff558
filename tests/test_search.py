"""The grid and its early stop, lists of numbers, and rows that are measured once."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neon import NeonError
from neon.measure.candidates import Point
from neon.measure.rows import Rows
from neon.search import grid, parse_grid

WEIGHTS = [0.0, 0.5, 1.0, 1.5, 2.0]


def run(curve, snapshots=("a",), weights=WEIGHTS, grids=None, stop=None):
    """The points that grid visits with score = curve(point), after checking that it reports the scores."""
    found = list(grid(curve, snapshots, weights, grids or {}, stop))
    assert all(value == curve(point) for point, value in found)
    return [point for point, _ in found]


# ---------------------------------------------------------------- grid


def test_grid_without_stop_scores_everything_in_order():
    points = run(lambda p: p.w * 100, ("a", "b"), grids={"cfg": [1.0, 2.0], "steps": [4]})
    assert [(p.selftrained or "base", p.w, dict(p.sampling)["cfg"]) for p in points] == [
        (snapshot if w else "base", w, cfg) for snapshot in "ab" for cfg in (1.0, 2.0) for w in WEIGHTS
    ]
    assert all(dict(p.sampling)["steps"] == 4 for p in points)


def test_grid_stops_a_row_after_its_minimum():
    fid = {0.0: 5.0, 0.5: 4.0, 1.0: 4.02, 1.5: 4.2, 2.0: 1.0}
    assert [p.w for p in run(lambda p: fid[p.w], stop=0.03)] == [0.0, 0.5, 1.0, 1.5]
    assert [p.w for p in run(lambda p: fid[p.w], stop=0.01)] == [0.0, 0.5, 1.0]
    assert [p.w for p in run(lambda p: fid[p.w], stop=0.3)] == WEIGHTS
    assert [p.w for p in run(lambda p: fid[p.w])] == WEIGHTS


def test_stop_compares_with_the_best_not_the_last():
    """A curve that rises slowly, each step less than the tolerance, still ends."""
    fid = dict(zip(WEIGHTS, [3.0, 3.02, 3.04, 3.06, 3.08]))
    assert [p.w for p in run(lambda p: fid[p.w], stop=0.03)] == [0.0, 0.5, 1.0]


def test_every_row_stops_by_itself():
    fid = {None: 5.0, "a": 9.0, "b": 4.0}
    points = run(lambda p: fid[p.selftrained], ("a", "b"), stop=0.02)
    assert [(p.selftrained, p.w) for p in points] == [
        (None, 0.0),
        ("a", 0.5),
        (None, 0.0),
        *(("b", w) for w in WEIGHTS[1:]),
    ]


def test_equal_scores_and_nan_do_not_stop():
    assert len(run(lambda p: 1.0, stop=0.0)) == len(WEIGHTS)
    values = iter([math.nan, 2.0, math.nan, 1.0, 1.5])
    assert [p.w for p, _ in grid(lambda p: next(values), ["a"], WEIGHTS, {}, 0.1)] == WEIGHTS


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0, 2))
@settings(deadline=None)
def test_a_stopped_row_is_the_start_of_the_whole_one(scores, stop):
    weights = [float(i) for i in range(len(scores))]
    points = run(lambda p: scores[int(p.w)], weights=weights, stop=stop)
    seen = scores[: len(points)]
    assert [p.w for p in points] == weights[: len(points)]
    late = [i for i in range(1, len(scores)) if scores[i] > min(scores[:i]) + stop]
    assert len(seen) == (late[0] + 1 if late else len(scores))


def test_base_is_one_point_for_all_snapshots():
    points = run(lambda p: 0.0, ("a", "b"), [-1.0, 0.0, 1.0])
    assert points.count(Point(None, 0.0)) == 2 and len(set(points)) == 5


def test_base_is_measured_once(tmp_path):
    rows, measured = Rows(tmp_path / "rows.jsonl"), []

    def score(point):
        return rows.cached(repr(point), lambda: measured.append(point) or {"fid": 1.0})["fid"]

    list(grid(score, ["a", "b", "c"], [0.0, 1.0], {}))
    assert measured == [Point(None, 0.0), Point("a", 1.0), Point("b", 1.0), Point("c", 1.0)]


# ---------------------------------------------------------------- lists of numbers


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0:2:0.25", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        ("0:0.3:0.1", [0.0, 0.1, 0.2, 0.3]),
        ("-1:1:0.5", [-1.0, -0.5, 0.0, 0.5, 1.0]),
        ("2:0:-1", [2.0, 1.0, 0.0]),
        ("1:1:0.5", [1.0]),
        ("-1,0,0.5", [-1.0, 0.0, 0.5]),
        ("1.5", [1.5]),
        ("3, 1", [3.0, 1.0]),
    ],
)
def test_parse_grid(text, wanted):
    assert parse_grid(text) == wanted


@pytest.mark.parametrize("text", ["", "a", "1,", "0:1", "0:1:0", "0:1:0.3", "1:0:0.5", "0:1:0.1:2", "0:b:1", "nan:1:1"])
def test_bad_grids(text):
    with pytest.raises(NeonError, match="not a grid") as caught:
        parse_grid(text)
    assert "\n" not in str(caught.value)


@given(st.integers(-20, 20), st.integers(0, 40), st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 1.0]))
@settings(deadline=None)
def test_grids_are_the_numbers_that_people_write(low, count, step):
    """No 0.30000000000000004, which would be another point than 0.3."""
    numbers = parse_grid(f"{round(low * step, 2)}:{round((low + count) * step, 2)}:{step}")
    assert [repr(x) for x in numbers] == [repr(round((low + i) * step, 2) + 0.0) for i in range(count + 1)]


# ---------------------------------------------------------------- rows


def measure(log, name):
    def compute():
        log.append(name)
        return {"fid": float(len(log)), "name": name}

    return compute


def test_rows_are_measured_once(tmp_path):
    path, log = tmp_path / "sub" / "rows.jsonl", []
    rows = Rows(path)
    first = rows.cached("k", measure(log, "a"))
    assert first == {"fid": 1.0, "name": "a", "key": "k"}
    assert rows.cached("k", measure(log, "again")) == first
    again = Rows(path)
    assert again.cached("k", measure(log, "again")) == first and again.rows == {"k": first}
    assert log == ["a"] and path.read_text() == json.dumps(first) + "\n"


def test_a_row_is_on_disk_as_soon_as_it_is_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    rows.cached("a", lambda: {"fid": 1.0})
    with pytest.raises(KeyboardInterrupt):
        rows.cached("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert list(Rows(path).rows) == ["a"]


def test_numbers_come_back_as_they_were(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"fid": 0.1 + 0.2, "tiny": 5e-324, "labels": None, "text": "é\u2028\n"}
    Rows(path).cached("a", lambda: row)
    Rows(path).cached("b", lambda: {"nan": math.nan})
    found = Rows(path).rows
    assert found["a"] == row | {"key": "a"} and math.isnan(found["b"]["nan"])


def filled(path):
    rows = Rows(path)
    for name in "abc":
        rows.cached(name, measure([], name))
    return path.read_bytes()


def test_a_torn_last_line_is_measured_again_and_the_others_are_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = filled(path)
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        rows, log = Rows(path), []
        for name in "abc":
            rows.cached(name, measure(log, name))
        assert log == ["c"]
        assert path.read_bytes() == whole
        assert list(Rows(path).rows) == ["a", "b", "c"]


def test_only_one_process_writes(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = filled(path)
    path.write_bytes(whole[:-5])
    reader, log = Rows(path, write=False), []
    assert list(reader.rows) == ["a", "b"]
    assert reader.cached("d", measure(log, "d"))["name"] == "d" and log == ["d"]
    assert path.read_bytes() == whole[:-5]
    assert Rows(tmp_path / "none.jsonl", write=False).rows == {} and not (tmp_path / "none.jsonl").exists()


def test_a_row_that_was_written_twice_counts_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"fid": 1, "key": "a"}\n{"fid": 2, "key": "a"}\n')
    assert Rows(path).rows == {"a": {"fid": 2, "key": "a"}}
