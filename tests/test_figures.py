"""Figures: what is drawn, read off the axes."""

import math
from itertools import product

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from neon import NeonError
from report import drawing, figures

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
    assert ax.get_title(loc="left") == "A, B = 0.064k"
    assert [bar.get_ylabel() for bar in fig.axes[3:]] == ["FID", "precision", "recall"]


def test_lines_against_w_go_through_the_base_and_stay_at_the_best_guidance(search):
    fig = figures.w_curves(search)
    for ax, value in zip(fig.axes, (lambda f: f, lambda f: 0.9 - f / 100, lambda f: 0.5 + f / 100)):
        for label, fids in {"B = 0.064k": (13, 11, 8, 4), "B = 0.128k": (15, 11, 9, 30)}.items():
            x, y = drawn(ax, label)
            assert x == [-1, 0, 0.5, 1] and y == pytest.approx([value(f) for f in fids])
        (x,), (y,) = drawn(ax)
        assert (x, y) == (1, pytest.approx(value(4)))


def test_sources_are_compared_each_at_its_best_budget(search):
    other = search.assign(setting="b", fid=search["fid"].where(search["budget"] != 128, search["fid"] - 8))
    (ax,) = figures.sources(pd.concat([search, other]), {"a": "A", "b": "B"}).axes
    first, second = "A: lowest at w = 1 (edge of the scan)", "B: lowest at w = 0.5"
    assert drawn(ax, first)[0] == [-1, 0, 0.5, 1] and drawn(ax, first)[1] == pytest.approx([13, 11, 8, 4])
    assert drawn(ax, second)[1] == pytest.approx([-5, 10, -1, 2])  # guidance 1, B = 128
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
    assert drawn(fig.axes[0], "lowest at the base") == [[0], [pytest.approx(10)]]
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
    assert labels == ["B = 50k", "B = 750k", "B = 1.75M", "B = 2.25M", "B = 2.95M", "lowest at w = 1.6", BASE]
    assert drawn(ax, "lowest at w = 1.6") == [[1.6], [pytest.approx(3)]]
    x, y = drawn(ax, "B = 2.95M")
    assert len(x) == 14 and np.isnan(y[7:]).all() and np.isfinite(y[:7]).all()
    assert y[0] == pytest.approx(8.04)  # the base at guidance 1.9
    finite(fig)
    assert ax.get_ylim()[0] > 0 and ax.get_ylim()[1] < 25


BASE = "base, FID 8, at its\nbest γ = 1.7"


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
    labels = [text.get_text() for text in fig.axes[-1].get_legend().get_texts()]
    assert labels == ["w = 0", "w = 1.6", "w = 2.4", "w = 4", "w = 5.2", "95 % over seeds"]
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


# ---------------------------------------------------------------- which base


def entries(ax):
    """What the legend of a panel says."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def shared(fig):
    """What the legend of the whole figure says."""
    return [text.get_text() for legend in fig.legends for text in legend.get_texts()]


def test_a_panel_names_its_guidance_and_has_the_base_at_its_own(search):
    """The base is best at guidance 1 (FID 10), Neon at 2, where the base has 11."""
    fig = figures.w_curves(search)
    assert fig.axes[2].get_legend().get_title().get_text() == "all at γ = 2 (edge of the scan)"
    label = "base, FID 10, at its\nbest γ = 1 (edge of the scan)"
    assert label in entries(fig.axes[2])
    for ax, value in zip(fig.axes, (10, 0.8, 0.6)):
        assert drawn(ax, label)[1] == pytest.approx([value, value])


def test_without_guidance_there_is_one_base(search):
    fig = figures.w_curves(search[search["cfg"] == 2].drop(columns="cfg"))
    assert entries(fig.axes[2]) == ["B = 0.064k", "B = 0.128k", "lowest at w = 1 (edge of the scan)"]
    assert not fig.axes[2].get_legend().get_title().get_text()


# ---------------------------------------------------------------- the edge of the scan, marks and colours


def star_of(ax):
    (line,) = [line for line in ax.lines if line.get_marker() == "*"]
    return line


def test_an_optimum_at_the_edge_is_hollow(search):
    beyond = [row("a", seed, 2.0, g, 64, 20.0) for seed in range(3) for g in (1.0, 2.0, 3.0)]
    wider = pd.concat([search, pd.DataFrame(beyond), search[search["cfg"] == 1].assign(cfg=3.0, fid=40.0)])
    for rows, hollow in ((search, True), (wider, False)):
        for figure in (figures.w_curves, figures.landscape):
            fig = figure(rows)
            assert (star_of(fig.axes[0]).get_markerfacecolor() == "none") == hollow, figure
    assert "hollow: at the edge of the scan" in shared(figures.landscape(search))


def test_every_mark_and_band_is_explained(search):
    known = {"lowest mean FID over w ≥ 0", "base at its best γ", "hollow: at the edge of the scan"}
    assert set(shared(figures.landscape(search))) == known
    assert shared(figures.w_curves(search)) == ["95 % over seeds"]
    for ax in (figures.sources(search).axes[0], figures.asymptotes(search).axes[-1]):
        assert "95 % over seeds" in entries(ax)
    final = pd.DataFrame({"setting": "a", "seed": 0, "role": ["base", "selftrained", "neon"], "fid": [8.0, 12, 3]})
    assert shared(figures.before_after(final)) == ["a seed", "mean over seeds"]


def luminance(colour):
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("of", [drawing.styles, drawing.ordered_styles])
@pytest.mark.parametrize("count", range(1, 6))
def test_lines_differ_without_their_colours_and_stand_out_from_white(of, count):
    found = of(count)
    assert len({style["marker"] for style in found}) == len({style["ls"] for style in found}) == count
    assert all(1.05 / (luminance(style["color"]) + 0.05) >= 3 for style in found)


# ---------------------------------------------------------------- predicted planes


def plane(seed, w, g):
    """FID of a seed, lowest over w > 0 at w = 2, γ = 1.5 + w / 4; the base's best γ is 1.5."""
    return 4 + (w - 2) ** 2 + 30 * (g - 1.5 - w / 4) ** 2 + seed / 2


@pytest.fixture
def predicted():
    """A search by a surface of two seeds: nodes (w, γ, FID a tenth above the plane), and the planes."""
    nodes = [(-1, 1.5), (0, 1.5), (0, 2.0), (1, 1.9), (2, 2.05), (2.9, 2.0), (2, 1.2)]
    rows = [
        row("a", s, w + s / 10 * (w != 0), g, 64 * (s + 1) * (w != 0), plane(s, w, g) + 0.1)
        for s in (0, 1)
        for w, g in nodes
    ]
    rows.append(row("a", 0, 1.5, 2.0, 128, 50.0))  # at another budget than the seed's best
    curves = [
        {"setting": "a", "seed": s, "w": w, "cfg": g, "budget": 64 * (s + 1), "fid": plane(s, w, g)}
        | {"fid_se": 0.5 if g == 2 else math.nan}
        for s, w, g in product((0, 1), np.arange(-4, 13) / 4, np.arange(10, 26) / 10)
    ]
    return pd.DataFrame(rows), pd.DataFrame(curves)


LINE = "predicted, each seed's best\nB, 0.064k to 0.128k"


def test_lines_are_the_mean_of_the_predicted_planes(predicted):
    fig = figures.w_curves(predicted[0], curves=predicted[1])
    ax = fig.axes[0]
    x, y = drawn(ax, LINE)
    assert x == list(np.arange(-4, 13) / 4) and y == pytest.approx([plane(0.5, w, 2.0) for w in x])
    assert drawn(ax, "lowest at w = 2") == [[2], [pytest.approx(4.25)]]
    assert drawn(ax, "base, FID 8.25, at its\nbest γ = 1.5")[1] == pytest.approx([8.25, 8.25])
    (band,) = ax.collections[0].get_paths()
    half = 12.706 * np.std([0, 0.5], ddof=1) / math.sqrt(2)
    assert np.ptp(band.vertices[np.isclose(band.vertices[:, 0], 1), 1]) == pytest.approx(2 * half, rel=1e-3)
    finite(fig)


def test_a_grid_of_predictions_that_steps_over_the_base(predicted):
    """-1, -0.75, … without 0: the base is between its neighbours, and the rest stays."""
    rows, curves = predicted
    ax = figures.w_curves(rows, curves=curves[curves["w"] != 0]).axes[0]
    x, y = drawn(ax, LINE)
    assert x == list(np.arange(-4, 13) / 4)
    assert y[4] == pytest.approx((plane(0.5, -0.25, 2.0) + plane(0.5, 0.25, 2.0)) / 2) and y[5] == pytest.approx(
        plane(0.5, 0.25, 2.0)
    )
    assert any(line.get_label().endswith("best γ = 1.5") for line in ax.lines)


def test_dots_are_the_measured_points_near_that_guidance(predicted):
    """γ = 2 within an eighth of the range, 1.5; not those at γ = 1.5 and 1.2, and not those of another budget."""
    fig = figures.w_curves(predicted[0], curves=predicted[1])
    x, y = drawn(fig.axes[0], "measured, γ within 0.19")
    assert sorted(x) == pytest.approx([0, 0, 1, 1.1, 2, 2.1, 2.9, 3.0]) and max(y) < 50
    lines = [line for line in fig.axes[1].lines if line.get_label() == "measured, γ within 0.19"]
    assert [len(line.get_xdata()) for line in lines] == [4, 4]  # of precision: a line per seed
    assert list(lines[1].get_xdata()) == pytest.approx([0, 1.1, 2.1, 3.0])
    assert not [line for line in fig.axes[1].lines if line.get_marker() == "*"]


def test_one_seed_has_the_band_of_its_standard_error(predicted):
    rows, curves = (table[table["seed"] == 0] for table in predicted)
    fig = figures.w_curves(rows, curves=curves)
    (band,) = fig.axes[0].collections[0].get_paths()
    assert shared(fig) == ["w of the star", "95 % of the prediction"] and not shared(figures.w_curves(rows))
    assert np.ptp(band.vertices[np.isclose(band.vertices[:, 0], 1), 1]) == pytest.approx(2 * 1.96 * 0.5)


def test_a_seed_without_a_prediction_leaves_what_was_measured(predicted):
    fig = figures.w_curves(predicted[0], curves=predicted[1][predicted[1]["seed"] == 0])
    assert "B = 0.064k" in entries(fig.axes[2]) and LINE not in entries(fig.axes[2])


def test_the_predicted_landscape_has_dots_and_measures_the_rest_there_alone(predicted):
    fig = figures.landscape(predicted[0], curves=predicted[1])
    plane_of_fid, precision = fig.axes[0], fig.axes[1]
    assert drawn(plane_of_fid) == [[2], [2]] and drawn(precision) == [[2], [2]]
    (cross,) = [line for line in plane_of_fid.lines if line.get_marker() == "X"]
    assert [*map(float, cross.get_xydata()[0])] == [0, 1.5]
    (dots,) = [line for line in plane_of_fid.lines if line.get_marker() == "o"]
    assert len(dots.get_xdata()) == 14 and "measured" in shared(fig)
    points = precision.collections[0]
    assert len(points.get_offsets()) == 14 and points.get_array().max() == pytest.approx(0.9 - 0.0410, abs=1e-3)
    mesh = plane_of_fid.collections[0].get_array()
    assert mesh.shape == (16, 17) and mesh.min() == pytest.approx(4.25) and mesh.max() == pytest.approx(17)
    points = figures.asymptotes(predicted[0], predicted[1]).axes[0].collections[0]
    assert len(points.get_offsets()) == 12 and points.get_array().min() == 0


def test_sources_of_predicted_planes(predicted):
    (ax,) = figures.sources(predicted[0], {"a": "A"}, predicted[1]).axes
    assert drawn(ax, "A: lowest at w = 2")[1] == pytest.approx([plane(0.5, w, 2.0) for w in np.arange(-4, 13) / 4])
    assert "measured (lines are predicted)" in entries(ax)


def test_the_true_grid_of_one_seed_is_next_to_its_prediction(predicted):
    values = product((0, 1.0, 3.0), (1.6, 2.1))
    grid = pd.DataFrame([row("a", 1, w, g, 128 * (w > 0), plane(1, w, g) + 0.3) for w, g in values])
    ax = figures.w_curves(*predicted[:1], curves=predicted[1], grid=grid).axes[0]
    x, y = drawn(ax, "true grid, seed 1, γ = 2.1")
    assert x == [0, 1, 3] and y == pytest.approx([plane(1, w, 2.1) + 0.3 for w in x])
    x, y = drawn(ax, "predicted ± 95 %, seed 1, γ = 2.1")
    assert y == pytest.approx([plane(1, w, 2.1) for w in x], abs=1e-6)
    assert not [
        line for line in figures.w_curves(*predicted[:1], grid=grid).axes[0].lines if "true" in line.get_label()
    ]


def test_each_seeds_interval_of_w(predicted):
    best = pd.DataFrame({"setting": ["a", "b"], "seed": [0, 0], "w": [2.0, 1], "w_lo": [1.7, 0], "w_hi": [2.4, 3]})
    fig = figures.w_curves(predicted[0], curves=predicted[1], best=best)
    assert drawn(fig.axes[0], "each seed's w* and its interval")[0] == [1.7, 2.0, 2.4]
    assert "each seed's w* and its interval" in shared(fig)


# ---------------------------------------------------------------- the headline


def test_the_headline_is_relative_to_the_base_at_its_own_guidance(search, predicted):
    sheets = {name: torch.full((1, 20, 200), value, dtype=torch.uint8) for name, value in (("base", 9), ("neon", 7))}
    for rows, curves, at, ratio in (
        (search, None, 1, np.mean([4 + d for d in (-0.1, 0, 0.1)]) / 10),
        (*predicted, 2, np.mean([4 / 8, 4.5 / 8.5])),
    ):
        fig = figures.overview(rows, {"a": sheets}, {"a": "A (long)"}, curves)
        base, neon, ax = fig.axes
        assert (image(base) == 9).all() and (image(neon) == 7).all() and image(base).shape[1] == 50
        (x,), (y,) = drawn(ax)
        assert x == at and y == pytest.approx(ratio, rel=0.02)
        assert [1, 1] in [list(line.get_ydata()) for line in ax.lines] and base.get_title() == "A"
        assert "γ = 2" in ax.get_title() and shared(fig)[1:] == ["lowest mean FID", "95 % over seeds"]
        width, height = fig.get_size_inches()
        assert width / height > 1.8
        finite(fig)


def test_without_guidance_the_headline_is_one_at_the_base(search):
    alone = search[search["cfg"] == 2].drop(columns="cfg")
    ax = figures.overview(alone, {}).axes[2]
    (line,) = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert line.get_ydata()[1] == 1
    (band,) = ax.collections[0].get_paths()
    assert np.ptp(band.vertices[np.isclose(band.vertices[:, 0], 0), 1]) == pytest.approx(0)


# ---------------------------------------------------------------- shown and saved


def test_a_figure_says_in_words_what_it_shows(search):
    text = figures.w_curves(search, titles={"a": "A"}).get_label()
    assert "A: lowest FID 4 at w = 1, the edge of the scan, base 10" in text and "precision" in text
    assert "lowest FID 4" in figures.landscape(search).get_label()


def test_a_figure_is_saved_only_where_wanted_and_always_the_same(search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(drawing, "display", shown.append)
    drawing.show(figures.sources(search), None, ["a.png"])
    assert list(tmp_path.iterdir()) == [] and shown[0].alt.startswith("FID against the merge weight w")
    for folder in ("one", "two/deep"):
        drawing.show(figures.sources(search), tmp_path / folder, ["a.png", "a.svg"])
    for name in ("a.png", "a.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two/deep" / name).read_bytes()
    assert b"dc:date" not in (tmp_path / "one/a.svg").read_bytes() and not plt.get_fignums()
