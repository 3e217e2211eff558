"""Figures: what is drawn, read off the axes."""

import math
from itertools import product

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from neon import NeonError
from report import figures

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("error")

BEST = {"w": 1.0, "cfg": 2.0, "budget": 64}
FIDS = {  # (budget, w) → FID at guidance 1 and 2; over both budgets the mean is lowest elsewhere than at BEST
    (0, 0.0): (10, 11),
    (64, -1.0): (12, 13),
    (64, 0.5): (7, 8),
    (64, 1.0): (9, 4),
    (128, -1.0): (3, 15),  # lower than BEST, but no Neon
    (128, 0.5): (7, 9),
    (128, 1.0): (10, 30),
}


def row(setting, seed, w, cfg, budget, fid):
    other = {"precision": 0.9 - fid / 100, "recall": 0.5 + fid / 100} if math.isfinite(fid) else {}
    return {"setting": setting, "seed": seed, "w": w, "cfg": cfg, "budget": budget, "fid": fid, **other}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def search():
    """Two budgets, two guidances, three seeds; the seeds' FIDs are a tenth apart, the second's are FIDS."""
    points = product(range(3), FIDS.items(), (0, 1))
    rows = [row("a", seed, w, i + 1.0, B, fids[i] + (seed - 1) / 10) for seed, ((B, w), fids), i in points]
    return pd.DataFrame(rows)


def paper():
    """As the paper's: 59 budgets, 14 guidances, 13 weights, one seed; far merges diverge. The best is known."""
    budgets, guidances, weights = range(50_016, 59 * 50_016 + 1, 50_016), np.arange(13, 27) / 10, np.arange(1, 14) * 0.4
    rows = [row("imm", 0, 0.0, g, 0, 8 + (g - 1.7) ** 2) for g in guidances]
    for i, w, g in product(range(59), weights, guidances):
        fid = 3 + (w - 1.6) ** 2 + 5 * (g - 1.9) ** 2 + ((i - 34) / 20) ** 2
        rows.append(row("imm", 0, round(w, 1), g, budgets[i], math.inf if w * (i + 1) > 150 else fid))
    return pd.DataFrame(rows)


def drawn(ax, label=None):
    """x and y of the line of that label, or of the star."""
    (line,) = [x for x in ax.lines if (x.get_label() == label if label else x.get_marker() == "*")]
    return [list(map(float, values)) for values in line.get_data()]


def image(ax):
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


def ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def finite(fig):
    """Every axis has limits, and what is drawn is inside."""
    fig.canvas.draw()
    for ax in fig.axes:
        assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()
        for band in ax.collections:
            assert all(np.isfinite(path.vertices).all() for path in band.get_paths())


# ---------------------------------------------------------------- at the best budget


def test_the_landscape_is_that_of_the_best_budget(search):
    fig = figures.landscape(search, titles={"a": "A"})
    ax = fig.axes[0]
    assert ticks(ax.xaxis) == ["-1", "0", "0.5", "1"] and ticks(ax.yaxis) == ["1", "2"]
    np.testing.assert_allclose(image(ax), [[12, 10, 7, 9], [13, 11, 8, 4]])
    assert drawn(ax) == [[3], [1]]
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert [*map(list, cross.get_data())] == [[1], [0]]
    np.testing.assert_allclose(image(fig.axes[1])[1], [0.77, 0.79, 0.82, 0.86])
    assert ax.get_title(loc="left") == "A, B = 0.064k: FID"


def test_lines_against_w_go_through_the_base_and_stay_at_the_best_guidance(search):
    fig = figures.w_curves(search)
    for ax, value in zip(fig.axes, (lambda f: f, lambda f: 0.9 - f / 100, lambda f: 0.5 + f / 100)):
        for label, fids in {"B = 0.064k": (13, 11, 8, 4), "B = 0.128k": (15, 11, 9, 30)}.items():
            x, y = drawn(ax, label)
            assert x == [-1, 0, 0.5, 1] and y == pytest.approx([value(f) for f in fids])
        (x,), (y,) = drawn(ax, "w* = 1")
        assert (x, y) == (1, pytest.approx(value(4)))


def test_sources_are_compared_each_at_its_best_budget(search):
    other = search.assign(setting="b", fid=search["fid"].where(search["budget"] != 128, search["fid"] - 8))
    (ax,) = figures.sources(pd.concat([search, other]), {"a": "A", "b": "B"}).axes
    assert drawn(ax, "A")[0] == [-1, 0, 0.5, 1] and drawn(ax, "A")[1] == pytest.approx([13, 11, 8, 4])
    assert drawn(ax, "B")[1] == pytest.approx([-5, 10, -1, 2])  # guidance 1, B = 128
    stars = [[float(v[0]) for v in line.get_data()] for line in ax.lines if line.get_marker() == "*"]
    assert stars == [[1, pytest.approx(4)], [0.5, pytest.approx(-1)]]


def test_asymptotes_are_those_of_the_best_budget(search):
    for ax, at in zip(figures.asymptotes(search).axes, (lambda f: 0.9 - f / 100, lambda f: 0.5 + f / 100)):
        assert len(ax.lines) == 3
        for w, fids in {"w = 0": (10, 11), "w = 0.5": (7, 8), "w = 1": (9, 4)}.items():
            x, y = drawn(ax, w)
            assert x == [1, 2] and y == pytest.approx([at(f) for f in fids])


def test_bands_are_over_seeds_alone(search):
    """A tenth between seeds: ± 4.303 × 0.1 / √3. Two budgets as if they were seeds would give another one."""
    (band,) = figures.sources(search).axes[0].collections[0].get_paths()
    at_star = band.vertices[np.isclose(band.vertices[:, 0], 1), 1]
    assert np.ptp(at_star) == pytest.approx(2 * 4.3027 * 0.1 / math.sqrt(3), rel=1e-3)


def test_where_the_base_is_best_the_star_is_there(search):
    search.loc[search["w"] > 0, "fid"] += 20
    fig = figures.w_curves(search, ["fid"])
    assert drawn(fig.axes[0], "w* = none") == [[0], [pytest.approx(10)]]
    ax = figures.landscape(search, ["fid"]).axes[0]
    assert drawn(ax) == [[1], [0]]
    np.testing.assert_allclose(image(ax)[1], [13, 11, 28, 24])  # the best w > 0, so B = 64


def test_a_point_that_only_one_seed_has_is_no_star(search):
    lucky = row("a", 0, 2.0, 2.0, 64, 0.5)
    ax = figures.landscape(pd.concat([search, pd.DataFrame([lucky])], ignore_index=True)).axes[0]
    assert drawn(ax) == [[3], [1]] and ticks(ax.xaxis)[-1] == "2"
    assert np.isnan(image(ax)[0, 4]) and image(ax)[1, 4] == 0.5


def test_snapshots_whose_names_have_no_number(search):
    """Their budget is 0, like the base's."""
    search = search[search["budget"] != 128].assign(budget=0)
    assert drawn(figures.w_curves(search, ["fid"]).axes[0], "B = 0k")[1] == pytest.approx([13, 11, 8, 4])
    assert drawn(figures.landscape(search).axes[0]) == [[3], [1]]


# ---------------------------------------------------------------- the paper's size


def test_of_many_budgets_a_few_are_drawn():
    fig = figures.w_curves(paper())
    ax = fig.axes[0]
    labels = [text.get_text() for text in fig.axes[2].get_legend().get_texts()]
    assert labels == ["B = 50k", "B = 750k", "B = 1.75M", "B = 2.25M", "B = 2.95M", "w* = 1.6"]
    assert drawn(ax, "w* = 1.6") == [[1.6], [pytest.approx(3)]]
    x, y = drawn(ax, "B = 2.95M")
    assert len(x) == 14 and np.isnan(y[7:]).all() and np.isfinite(y[:7]).all()
    assert y[0] == pytest.approx(8.04)  # the base at guidance 1.9
    finite(fig)
    assert ax.get_ylim()[0] > 0 and ax.get_ylim()[1] < 25


def test_few():
    numbers = list(range(59))
    assert figures.few(numbers, 34) == [0, 14, 34, 44, 58]
    assert figures.few(numbers, 0) == figures.few(numbers, 58) == [0, 14, 29, 44, 58]
    for best in numbers:
        found = figures.few(numbers, best)
        assert len(found) == 5 and found == sorted(set(found)) and {0, best, 58} <= set(found)
    assert figures.few([1, 2, 3], 2) == [1, 2, 3] and figures.few([], 0) == []


def test_a_landscape_with_diverged_merges():
    search = paper()
    fig = figures.landscape(search)
    ax = fig.axes[0]
    assert drawn(ax) == [[4], [6]] and ticks(ax.xaxis)[4] == "1.6" and ticks(ax.yaxis)[6] == "1.9"
    assert image(ax).shape == (14, 14) and ax.images[0].get_clim() == pytest.approx((3, 12))
    assert image(ax)[6, 13] == pytest.approx(12) and search["fid"].max() == math.inf
    assert np.isnan(image(fig.axes[1])[:, 11:]).all()  # no precision where the merge diverged
    finite(fig)


def test_a_row_that_ended_early_leaves_cells_white():
    search = paper()
    early = (search["w"] > 2.5) & (search["cfg"] < 1.6)
    cells = image(figures.landscape(search[~early], ["fid"]).axes[0])
    assert np.isnan(cells[:3, 7:]).all() and np.isfinite(cells[3:]).all()


def test_asymptotes_of_many_weights():
    fig = figures.asymptotes(paper())
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert labels == ["w = 0", "w = 1.6", "w = 2.4", "w = 4", "w = 5.2"]
    x, y = drawn(fig.axes[0], "w = 1.6")
    assert len(x) == 14 and y[6] == pytest.approx(0.87)
    finite(fig)


def test_fid_against_many_budgets_and_one_seed():
    best = paper().groupby("budget", as_index=False)["fid"].min().assign(setting="imm", seed=0, num_synthetic=90_000)
    best.loc[best["budget"] == 0, "num_synthetic"] = 0
    best.loc[40, "fid"] = math.inf
    fig = figures.budget(pd.concat([best.assign(setting=f"imm{i}") for i in range(9)]))
    ax = fig.axes[0]
    x, y = drawn(ax, "|S| = 90000")
    assert len(x) == 59 and np.isnan(y[39]) and np.isfinite(y).sum() == 58 and min(x) == 50_016
    assert ax.get_ylim() == (0, pytest.approx(1.3 * 8.0)) and list(ax.lines[1].get_ydata()) == pytest.approx([8, 8])
    width, height = fig.get_size_inches()
    assert width < 20 and height < 20
    finite(fig)
    assert "1M" in ticks(ax.xaxis)


def test_before_and_after_of_one_seed():
    final = pd.DataFrame({"setting": "imm", "seed": 0, "role": ["base", "selftrained", "neon"], "fid": [8.0, 12, 3]})
    fig = figures.before_after(final)
    assert list(fig.axes[0].lines[0].get_ydata()) == [12, 8, 3] and fig.axes[0].get_ylim() == (0, pytest.approx(12.96))
    fig = figures.before_after(final.replace(12, math.inf))
    assert fig.axes[0].get_ylim() == (0, pytest.approx(8.64))
    finite(fig)


def test_against_a_number_with_one_seed():
    part = pd.DataFrame({"role": ["base", "selftrained", "neon"], "fid": [8.0, 12, 3], "seed": 0})
    fig = figures.against(pd.concat([part.assign(setting=n, recall=n / 2000) for n in (150, 600)]), "images")
    assert drawn(fig.axes[0], "Neon (w*)") == [[150, 600], [3, 3]]
    assert drawn(fig.axes[1], "base (w = 0)")[1] == pytest.approx([0.075, 0.3])
    finite(fig)
    assert len(figures.against(pd.concat([part.assign(setting=1, recall=math.nan)]), "images").axes) == 1


# ---------------------------------------------------------------- what was not measured


def test_metrics_that_nobody_measured_have_no_panel(search):
    search = search.assign(precision=math.nan, recall=math.nan)
    assert len(figures.w_curves(search).axes) == 1
    assert len(figures.landscape(search).axes) == 2  # and its colour bar
    with pytest.raises(NeonError, match="neither precision nor recall"):
        figures.asymptotes(search)


def test_precision_of_one_setting_alone(search):
    other = search.assign(setting="b", precision=math.nan, recall=math.nan)
    both = pd.concat([search, other], ignore_index=True)
    finite(figures.landscape(both))
    fig = figures.w_curves(both)
    finite(fig)
    assert len(fig.axes) == 6 and drawn(fig.axes[3], "B = 0.064k")[1] == pytest.approx([13, 11, 8, 4])


def test_no_finite_fid_at_all(search):
    for figure in (figures.w_curves, figures.landscape, figures.sources, figures.asymptotes):
        with pytest.raises(NeonError, match="no finite FID"):
            figure(search.assign(fid=math.inf))
