"""The paper's figures from tables of results; used by the notebooks.

A search goes over w, guidance γ and the budget B, with several seeds. What is drawn is a mean over seeds at one B, the
best B if the figure does not compare them. The base, w = 0, belongs to every B. Where a merge diverged, FID is inf and
a line has a gap. If a search predicts FID between the points it measured (report/searches.py), lines and bands are of
the predictions and the measured points are dots.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, MultipleLocator, NullLocator
from PIL import Image

from neon import NeonError
from neon.data import contact_sheet
from report.drawing import (
    BAND,
    BASE,
    GOOD,
    HOLLOW,
    PREDICTION,
    SMALL,
    WIDTH,
    band,
    described,
    images,
    label_of,
    largest,
    mark_at,
    measured,
    ordered_styles,
    panels,
    spread,
    star_at,
    styles,
)
from report.searches import EDGE, Search, Star, at_budget, at_guidance, best_base, searches, star
from report.tables import IN_WORDS, titled

Titles = Mapping[str, str] | None  # setting → title
Table = pd.DataFrame | None


def few(values: Sequence[float], best: float, count: int = 5) -> list[float]:
    """At most `count` of sorted values: the first, the last, and evenly spread between, the best of them included."""
    if len(values) <= count:
        return list(values)
    places = [round(i * (len(values) - 1) / (count - 1)) for i in range(count)]
    if best in values and (at := list(values).index(best)) not in places:
        nearest = min(range(1, count - 1), key=lambda i: abs(places[i] - at))
        places[nearest] = at
    return [values[i] for i in places]


def spread_of(fids: pd.DataFrame) -> pd.DataFrame:
    """Mean and half-width of FID over seeds at each w. Of one seed: 1.96 of the standard errors of its predictions."""
    points = spread(fids["fid"], fids["w"])
    if fids["seed"].nunique() == 1 and "predicted_se" in fids:
        points["half"] = 1.96 * fids.groupby("w")["predicted_se"].first()
    return points


# ---------------------------------------------------------------- against w


def w_curves(
    search: pd.DataFrame,
    metrics: Sequence[str] = ("fid", "precision", "recall"),
    titles: Titles = None,
    curves: Table = None,
    grid: Table = None,
    best: Table = None,
) -> Figure:
    """Fig. 4: each metric against w, one row of panels per setting, 95 % bands over seeds.

    search: columns setting, seed, w, budget, the metrics and perhaps cfg. The star is at the best point, see Star, and
    guidance is held there; the dashed line is the base at the guidance that suits it. A line per budget B (of many, a
    few), or, with `curves` (see `searches`), the predicted FID at the best B, with the measured points as dots.
    grid: the rows of a true grid of one seed, drawn as open marks. best: columns setting, seed, w, w_lo, w_hi: each
    seed's w* and its interval, drawn as ticks.
    """
    found, metrics = searches(search, curves), measured(search, metrics)
    wide = {"width_ratios": [1.5] + [1] * (len(metrics) - 1)} if len(metrics) > 1 else {}
    fig, axes = panels(len(found) * len(metrics), len(metrics), 1.75, WIDTH if wide else 5.5, sharex="row", **wide)
    texts = []
    for i, (setting, of) in enumerate(found.items()):
        line = axes[i * len(metrics) : (i + 1) * len(metrics)]
        _row(line, of, metrics, _rows_of(grid, setting), _rows_of(best, setting))
        line[0].set_title(titled(setting, titles), loc="left", fontsize=9)
        texts.append(f"{titled(setting, titles)}: {_in_words(of, star(of.fids))}")
    _below(axes[-len(metrics) :], "merge weight w")
    shared = {label: mark for label, mark in _entries(axes).items() if label in SHARED}
    if handles := [*shared.values(), *_bands(found)]:
        fig.legend(handles=handles, fontsize=SMALL, loc="outside lower center", ncols=3)
    return described(fig, f"{', '.join(map(label_of, metrics))} against the merge weight w. {'; '.join(texts)}.")


def _row(axes: Sequence[plt.Axes], of: Search, metrics: Sequence[str], grid: pd.DataFrame, best: pd.DataFrame) -> None:
    """A setting's panels, and its legend next to the last. grid, best: the lines of `w_curves`' tables."""
    at = star(of.fids)
    for ax, metric in zip(axes, metrics):
        (_predicted if of.predicted else _budgets)(ax, of, metric, at)
        _base_line(ax, of, metric)
        ax.axvline(0, color="grey", lw=0.8, ls=":")
        ax.set_ylabel(label_of(metric), fontsize=SMALL)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.grid(alpha=0.25)
    _true_grid(axes[0], of, at, grid)
    _intervals(axes[0], best)
    own = {label: mark for label, mark in _entries(axes).items() if label not in SHARED}
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 7, "title_fontsize": 7}
    heading = at.guidance_label and f"all at {at.guidance_label}"
    axes[-1].legend(own.values(), own.keys(), title=heading, **beside)


def _below(axes: Sequence[plt.Axes], label: str) -> None:
    for ax in axes:
        ax.set_xlabel(label, fontsize=9)


def _rows_of(table: Table, setting: str) -> pd.DataFrame:
    return pd.DataFrame() if table is None else table[table["setting"].astype(str) == str(setting)]


SEEDS = "each seed's w* and its interval"
STAR_W = "w of the star"
SHARED = (SEEDS, STAR_W)  # entries that mean the same in every panel


def _entries(axes: Sequence[plt.Axes]) -> dict[str, Line2D]:
    """What the panels' legends would say, each once: label → its mark."""
    return dict(pair for ax in axes for pair in zip(*reversed(ax.get_legend_handles_labels())))


def _bands(found: Mapping[str, Search]) -> list[Patch]:
    """The entry that explains the bands of these searches; none where there are none."""
    if any(of.fids["seed"].nunique() > 1 for of in found.values()):
        return [BAND]
    return [PREDICTION] if any(of.predicted for of in found.values()) else []


def _in_words(of: Search, at: Star) -> str:
    """'lowest FID 3.1 at w = 1.5, base 10.5'."""
    base = best_base(of.fids)
    text = f"lowest FID {at.fid:.3g} at w = {at.w:.3g}{EDGE_WORDS * at.w_at_edge}"
    return text + (f", base {base.fid:.3g}" if base else "")


EDGE_WORDS = ", the edge of the scan"


def _budgets(ax: plt.Axes, of: Search, metric: str, at: Star) -> None:
    """What was measured: a line per budget, and the star."""
    rows = at_guidance(of.fids, at.guidance)
    budgets = few(sorted(set(rows[rows["w"] != 0]["budget"])), at.budget)
    for style, budget in zip(ordered_styles(len(budgets)), budgets):
        points = at_budget(rows, budget)
        band(ax, spread(points[metric], points["w"]), label=f"B = {images(budget)}", **style)
    point = at_budget(rows, at.budget).groupby("w")[metric].mean().get(at.w, math.nan)
    star_at(ax, at.w, point, at.w_at_edge, label=at.label)


def _predicted(ax: plt.Axes, of: Search, metric: str, at: Star) -> None:
    """FID: the predicted line, its band and the measured points. Others: the measured points, joined within a seed."""
    near, distance = of.near(at.guidance)
    dots = {"color": ordered_styles(1)[0]["color"], "ms": 3, "mfc": "none", "alpha": 0.7, "marker": "o"}
    dots["label"] = "measured" + (f", γ within {distance:.2g}" if distance else "")
    if metric != "fid":
        for _, rows in near.sort_values("w").groupby("seed"):
            ax.plot(rows["w"], rows[metric], lw=0.7, **dots)
        ax.axvline(at.w, color=GOOD, lw=1, ls=(0, (4, 2)), label=STAR_W)
        return
    label = f"predicted, {of.budget_label}"
    band(ax, spread_of(at_guidance(of.fids, at.guidance)), color=dots["color"], lw=1.6, label=label)
    ax.plot(near["w"], near["fid"], ls="none", **dots)
    star_at(ax, at.w, at.fid, at.w_at_edge, label=at.label)


def _base_line(ax: plt.Axes, of: Search, metric: str) -> None:
    """The base at the guidance that suits it best, where guidance was searched and this was measured there."""
    base = best_base(of.fids)
    if base is None or not base.guidance_label:
        return
    if metric == "fid":
        value = base.fid
    else:
        rows = of.near(base.guidance)[0] if of.predicted else at_guidance(of.measured, base.guidance)
        value = rows[rows["w"] == 0][metric].mean()
    label = f"base, FID {base.fid:.3g}, at its\nbest {base.guidance_label}"
    ax.axhline(value, color=BASE, lw=1.2, ls="--", label=label)


def _true_grid(ax: plt.Axes, of: Search, at: Star, grid: pd.DataFrame) -> None:
    """One seed's true grid at its γ nearest to the star's, and what was predicted there for this seed."""
    if grid.empty or not of.predicted or (seed := grid["seed"].iloc[0]) not in of.budgets:
        return
    guidance = _nearest(grid["cfg"], at.guidance)
    where = f"seed {seed}" + ("" if math.isnan(guidance) else f", γ = {guidance:.3g}")
    rows = grid[(grid["budget"] == of.budgets[seed]) | (grid["w"] == 0)]
    rows = at_guidance(rows, guidance).sort_values("w")
    curve = _along(of.fids[of.fids["seed"] == seed], guidance)
    band(ax, curve, color="black", lw=0.8, ls=":", alpha=0.12, label=f"predicted ± 95 %, {where}")
    ax.plot(rows["w"], rows["fid"], "s", ms=4, mfc="none", color="black", mew=0.8, label=f"true grid, {where}")


def _nearest(values: pd.Series, wanted: float) -> float:
    return math.nan if math.isnan(wanted) else float(values.iloc[(values - wanted).abs().argmin()])


def _along(rows: pd.DataFrame, guidance: float) -> pd.DataFrame:
    """One seed's predicted FID against w at any γ, linear between the lines of the grid: columns mean, half."""
    if math.isnan(guidance):
        return spread_of(rows)
    table = rows.pivot(index="w", columns="cfg", values="fid")
    mean = [np.interp(guidance, table.columns, line) for line in table.to_numpy()]
    return pd.DataFrame({"mean": mean, "half": 1.96 * rows.groupby("w")["predicted_se"].max()}, index=table.index)


def _intervals(ax: plt.Axes, best: pd.DataFrame) -> None:
    """Each seed's w* and its interval, one under the other at the top of the panel."""
    style = {"transform": ax.get_xaxis_transform(), "color": GOOD, "ms": 4, "lw": 1, "markevery": [1]}
    for i, line in enumerate(best.to_dict("records")):
        x, y = [line["w_lo"], line["w"], line["w_hi"]], [0.97 - 0.035 * i] * 3
        ax.plot(x, y, "|-", label=SEEDS, **style)


def sources(search: pd.DataFrame, titles: Titles = None, curves: Table = None) -> Figure:
    """Fig. 8: FID against w at the best B, a line per setting (where S came from), 95 % bands over seeds, stars.

    search: columns setting, seed, w, budget, fid and perhaps cfg, which is held at the star. curves: of `searches`.
    """
    fig, (ax,) = panels(1, 1, 3.6, width=6.5)
    found, texts = searches(search, curves), []
    for style, (setting, of) in zip(styles(len(found)), found.items()):
        at, name = star(of.fids), titled(setting, titles)
        points = spread_of(at_budget(at_guidance(of.fids, at.guidance), at.budget))
        if of.predicted:
            near, _ = of.near(at.guidance)
            ax.plot(near["w"], near["fid"], ls="", marker=style["marker"], ms=3, color=style["color"], alpha=0.5)
            style = style | {"marker": ""}
        band(ax, points, label=f"{name}: {at.label}", **style)
        star_at(ax, at.w, at.fid, at.w_at_edge, color=style["color"], mec="white")
        texts.append(f"{name}: {_in_words(of, at)}")
    ax.axvline(0, color="grey", lw=0.8, ls=":")
    ax.set_xlabel("merge weight w")
    ax.set_ylabel("FID")
    ax.grid(alpha=0.25)
    notes = [_mark("*", "lowest mean FID", color="grey", mec="white", ms=12)]
    if any(of.predicted for of in found.values()):
        notes.append(_mark("o", "measured (lines are predicted)", ms=3))
    ax.legend(handles=[*_entries([ax]).values(), *notes, *_bands(found)], fontsize=SMALL)
    return described(fig, f"FID against the merge weight w for each source of S. {'; '.join(texts)}.")


def _mark(marker: str, label: str, **style) -> Line2D:
    """An entry of a legend that explains a mark."""
    return Line2D([], [], ls="none", marker=marker, label=label, **{"color": "white", "mec": "black", **style})


# ---------------------------------------------------------------- the headline


def overview(
    search: pd.DataFrame,
    samples: Mapping[str, Mapping[str, torch.Tensor]],
    titles: Titles = None,
    curves: Table = None,
) -> Figure:
    """Samples of base and Neon above FID against w, a column per setting.

    FID is in units of the base's at its own best guidance, within a seed; guidance is held at the star. search, curves:
    as for `w_curves`. samples: setting → base and neon → a sheet, uint8 (C, H, W), of the same seeds.
    """
    found = {setting: of for setting, of in searches(search, curves).items() if best_base(of.fids)}
    size = {"figsize": (WIDTH, 4.1), "height_ratios": [1, 1, 2.6]}
    fig, axes = plt.subplots(3, len(found), squeeze=False, layout="constrained", **size)
    texts = []
    for i, (column, (setting, of)) in enumerate(zip(axes.T, found.items())):
        for ax, role, name in zip(column, ("base", "neon"), ("base", "Neon")):
            _sheet(ax, samples.get(setting, {}).get(role), name if i == 0 else "")
        ratio = _ratio(column[2], of, first=i == 0)
        column[0].set_title(textwrap.fill(titled(setting, titles).partition(" (")[0], 17), fontsize=9)
        texts.append(f"{titled(setting, titles)}: {ratio:.2g} of the base's FID, {star(of.fids).label}")
    _below([axes[2, len(found) // 2]], "merge weight w   (−1: self-trained, 0: base)")
    line = Line2D([], [], color=BASE, ls="--", label="base, at its best γ if it has any")
    marks = [line, _mark("*", "lowest mean FID", color=GOOD, ms=11), *_bands(found)]
    fig.legend(handles=marks, fontsize=SMALL, loc="outside lower center", ncols=3)
    return described(fig, f"Samples of base and Neon from the same seeds, above FID against w. {'; '.join(texts)}.")


def _ratio(ax: plt.Axes, of: Search, first: bool) -> float:
    """A panel of FID over the base's, against w. first: it has the labels of all. Gives the ratio at the star."""
    at, base = star(of.fids), best_base(of.fids)
    points = relative(of, at, base)
    band(ax, points, alpha=0.2, color=ordered_styles(1)[0]["color"], lw=1.6)
    star_at(ax, at.w, points["mean"][at.w], at.w_at_edge)
    ax.axhline(1, color=BASE, lw=1.2, ls="--")
    ax.axvline(0, color="grey", lw=0.8, ls=":")
    ax.set(yscale="log", ylim=(0.2, 4.5))  # halves and doubles, the same for all panels
    ax.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MultipleLocator(1))
    ax.set_yticklabels(["¼", "½", "1", "2", "4"] if first else [])
    ax.set_ylabel("FID / FID of base" if first else "", fontsize=9)
    ax.tick_params(labelsize=SMALL)
    ax.grid(alpha=0.25)
    ax.set_title("\n".join(filter(None, (at.label, at.guidance_label))).replace(EDGE, "\nat the edge"), fontsize=SMALL)
    return points["mean"][at.w]


def relative(of: Search, at: Star, base: Star) -> pd.DataFrame:
    """FID at each w over that of the base at its best guidance, within a seed: columns mean, half."""
    rows = at_budget(at_guidance(of.fids, at.guidance), at.budget)
    own = at_guidance(of.fids, base.guidance)
    own = own[(own["w"] == 0) & (own["budget"] == base.budget)].groupby("seed")["fid"].first()
    unit = rows["seed"].map(own)
    errors = {name: rows[name] / unit for name in ("predicted_se",) if name in rows}
    return spread_of(rows.assign(fid=rows["fid"] / unit, **errors))


def _sheet(ax: plt.Axes, sheet: torch.Tensor | None, name: str, columns: int = 20, shown: int = 5) -> None:
    """The first images of a sheet's rows of `columns`."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_ylabel(name, fontsize=9)
    if sheet is not None:
        part = sheet[..., : sheet.shape[-1] * shown // columns]
        ax.imshow(part.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)


# ---------------------------------------------------------------- reported numbers


def against(final: pd.DataFrame, label: str) -> Figure:
    """Figs. 9 and 10: reported FID and recall of base and Neon against a number, 95 % bands over seeds.

    final: columns setting (a number), seed, role, fid, recall. label: what the number is.
    """
    metrics = measured(final, ("fid", "recall"))
    fig, axes = panels(len(metrics), 2, 2.7)
    texts = []
    for ax, metric in zip(axes, metrics):
        for role, style in (("base", ("s", "--", BASE)), ("neon", ("o", "-", GOOD))):
            rows = final[final["role"] == role]
            points = spread(rows[metric], rows["setting"].astype(float))
            band(ax, points, **dict(zip(("marker", "ls", "color"), style)), ms=5, label=IN_WORDS[role])
            values = ", ".join(f"{y:.3g} at {x:g}" for x, y in points["mean"].items())
            texts.append(f"{label_of(metric)} of {IN_WORDS[role]}: {values}")
        ax.set_xlabel(label, fontsize=9)
        ax.set_ylabel(label_of(metric), fontsize=9)
        ax.grid(alpha=0.25)
    axes[0].legend(handles=[*_entries(axes[:1]).values(), BAND], fontsize=SMALL)
    return described(fig, f"Against the {label}. {'; '.join(texts)}.")


ROLES = {"selftrained": "w = −1", "base": "w = 0", "neon": "w*"}


def before_after(final: pd.DataFrame, titles: Titles = None) -> Figure:
    """FID of self-trained, base and Neon on the reported images: a panel per setting, four in a row, a line per seed.

    final: columns setting, seed, role, w, fid.
    """
    settings, texts = list(final["setting"].unique()), []
    fig, axes = panels(len(settings), 4, 2.1)
    for ax, setting in zip(axes, settings):
        rows = final[final["setting"] == setting]
        for _, part in rows.groupby("seed"):
            values = part.set_index("role")["fid"].reindex(ROLES)
            ax.plot(list(ROLES), values, "o-", color=BASE, alpha=0.7, ms=4, label="a seed")
        means = rows.groupby("role")["fid"].mean().reindex(ROLES)
        ax.plot(list(ROLES), means, "_", color=GOOD, ms=22, mew=2, label="mean over seeds")
        ax.set_title(textwrap.fill(titled(setting, titles), 26), fontsize=SMALL)
        ax.set_xticks(range(3), list(ROLES.values()))
        ax.set(xlim=(-0.3, 2.3), ylim=(0, 1.08 * largest(rows["fid"])))
        ax.grid(alpha=0.25)
        texts.append(f"{titled(setting, titles)}: " + ", ".join(f"{means[r]:.3g} at {ROLES[r]}" for r in ROLES))
    fig.supylabel("FID", fontsize=9)
    fig.legend(handles=_entries(axes[:1]).values(), fontsize=SMALL, loc="outside lower center", ncols=2)
    return described(fig, f"Reported FID of self-trained model, base and Neon. {'; '.join(texts)}.")


# ---------------------------------------------------------------- over w and guidance


def landscape(
    search: pd.DataFrame,
    metrics: Sequence[str] = ("fid", "precision", "recall"),
    titles: Titles = None,
    curves: Table = None,
) -> Figure:
    """Fig. 6: mean of each metric over the (w, γ) plane at the best B, one row of panels per setting.

    search: columns setting, seed, w, cfg, budget and the metrics. Crosses mark the best γ of the base, stars the best
    (w, γ), see Star; hollow ones are at the edge of the scan. Cells without a value are white. FIDs above four times
    the lowest, inf too, have one colour. With `curves` (see `searches`) the plane of FID is predicted, with a dot at
    each measured point, and the other metrics are shown at these points alone.
    """
    found, metrics = searches(search, curves), measured(search, metrics)
    fig, axes = panels(len(found) * len(metrics), len(metrics), 2.15, width=WIDTH if len(metrics) > 1 else 4)
    texts = []
    for i, (setting, of) in enumerate(found.items()):
        line, at, base = axes[i * len(metrics) : (i + 1) * len(metrics)], star(of.fids), best_base(of.fids)
        for ax, metric in zip(line, metrics):
            place = (_plane if of.predicted else _cells)(fig, ax, of, metric, at)
            if base:
                mark_at(ax, *place(base), base.at_edge, marker="X", ms=9, color="white", mec="black")
            star_at(ax, *place(at), at.at_edge, mec="white")
            ax.set_title(label_of(metric), loc="right", fontsize=SMALL)
        budget = of.budget_label if of.predicted else f"B = {images(at.budget)}"
        line[0].set_title(f"{titled(setting, titles).partition(' (')[0]}, {budget}", loc="left", fontsize=SMALL)
        line[0].set_title("", loc="right")
        line[0].set_ylabel("guidance γ", fontsize=9)
        texts.append(f"{titled(setting, titles)}: {_in_words(of, at)}, {at.guidance_label}")
    _below(axes[-len(metrics) :], "merge weight w")
    marks = [_mark("*", "lowest mean FID over w ≥ 0", color=GOOD, ms=12), _mark("X", "base at its best γ", ms=8)]
    marks.append(_mark("*", "hollow: at the edge of the scan", ms=11, **HOLLOW))
    if any(of.predicted for of in found.values()):
        marks.append(_mark("o", "measured", color="black", ms=3))
    fig.legend(handles=marks, fontsize=SMALL, loc="outside lower center", ncols=4)
    return described(fig, f"{', '.join(map(label_of, metrics))} over w and guidance. {'; '.join(texts)}.")


DOTS = {"s": 22, "edgecolors": "grey", "lw": 0.4}  # measured points whose colour is a value


def _colours(metric: str) -> dict:
    return {"cmap": "viridis_r" if metric == "fid" else "viridis"}


def _bar(fig: Figure, ax: plt.Axes, shown, metric: str) -> None:
    bar = fig.colorbar(shown, ax=ax, extend="max" if metric == "fid" else "neither")
    bar.set_label(label_of(metric), fontsize=SMALL)
    bar.ax.tick_params(labelsize=7)


def _near_best(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """FID far away is bad everywhere: at most four times the lowest."""
    return table.clip(upper=4 * table.min().min()) if metric == "fid" else table


def _cells(fig: Figure, ax: plt.Axes, of: Search, metric: str, at: Star):
    """A cell per point that was measured, its values as ticks. Gives where a star is: at its cell."""
    table = at_budget(of.fids, at.budget).groupby(["cfg", "w"])[metric].mean().unstack("w")
    shown = ax.imshow(_near_best(table, metric), origin="lower", aspect="auto", **_colours(metric))
    _bar(fig, ax, shown, metric)
    many = len(table.columns) > 7
    ax.set_xticks(range(len(table.columns)), [f"{w:g}" for w in table.columns], fontsize=7, rotation=90 * many)
    ax.set_yticks(range(len(table.index)), [f"{cfg:g}" for cfg in table.index], fontsize=7)
    columns, index = list(table.columns), list(table.index)
    return lambda point: (columns.index(point.w), index.index(point.guidance))


def _plane(fig: Figure, ax: plt.Axes, of: Search, metric: str, at: Star):
    """The predicted plane of FID, or another metric at the measured points. Gives where a star is: at its values."""
    points = of.at_best_budget()
    if metric == "fid":
        table = _near_best(of.fids.groupby(["cfg", "w"])["fid"].mean().unstack("w"), metric)
        shown = ax.pcolormesh(table.columns, table.index, table, shading="nearest", rasterized=True, **_colours(metric))
        ax.plot(points["w"], points["cfg"], "o", ms=2.5, color="black", alpha=0.7)
    else:
        shown = ax.scatter(points["w"], points["cfg"], c=points[metric], **DOTS, **_colours(metric))
    _bar(fig, ax, shown, metric)
    margin = 0.04
    for values, limits in ((of.fids["w"], ax.set_xlim), (of.fids["cfg"], ax.set_ylim)):
        limits(values.min() - margin * np.ptp(values), values.max() + margin * np.ptp(values))
    return lambda point: (point.w, point.guidance)


def asymptotes(search: pd.DataFrame, curves: Table = None) -> Figure:
    """Fig. 6, right: precision and recall against γ at the best B, a line per w ≥ 0, 95 % bands over seeds.

    search: of one setting, columns seed, w, cfg, budget, fid, precision, recall. Of many w a few are drawn, w* among
    them. With `curves`: the measured points, w as their colour. Raises NeonError if neither precision nor recall was
    measured.
    """
    metrics = measured(search, ("precision", "recall"))
    if not metrics:
        raise NeonError("neither precision nor recall was measured")
    (of,) = searches(search.assign(setting="") if "setting" not in search else search, curves).values()
    fig, axes = panels(len(metrics), 2, 2.7)
    for ax, metric in zip(axes, metrics):
        (_points_over_guidance if of.predicted else _lines_over_guidance)(fig, ax, of, metric)
        ax.set_xlabel("guidance γ", fontsize=9)
        ax.set_ylabel(metric, fontsize=9)
        ax.grid(alpha=0.25)
    if not of.predicted:
        entries = [*_entries(axes).values(), BAND]
        axes[-1].legend(handles=entries, fontsize=SMALL, loc="center left", bbox_to_anchor=(1, 0.5))
    return described(fig, f"{' and '.join(metrics).capitalize()} against guidance, for several merge weights w.")


def _lines_over_guidance(fig: Figure, ax: plt.Axes, of: Search, metric: str) -> None:
    at = star(of.fids)
    rows = at_budget(of.fids, at.budget)
    weights = few(sorted(set(rows["w"][rows["w"] >= 0])), at.w)
    for style, w in zip(ordered_styles(len(weights)), weights):
        part = rows[rows["w"] == w]
        band(ax, spread(part[metric], part["cfg"]), label=f"w = {w:g}", **style)


def _points_over_guidance(fig: Figure, ax: plt.Axes, of: Search, metric: str) -> None:
    rows = of.at_best_budget()
    rows = rows[rows["w"] >= 0]
    shown = ax.scatter(rows["cfg"], rows[metric], c=rows["w"], cmap="viridis_r", **DOTS)
    fig.colorbar(shown, ax=ax).set_label("w of a measured point", fontsize=SMALL)


# ---------------------------------------------------------------- against the budget


def budget(best: pd.DataFrame, titles: Titles = None) -> Figure:
    """Figs. 3, 5, 7: lowest FID over w (and γ) against B, a panel per setting, a line per |S|, 95 % bands.

    best: columns setting, seed, num_synthetic, budget and fid. The dashed line is the base's mean, |S| = B = 0. Bands
    that are higher than the panel are cut off.
    """
    settings, texts = list(best["setting"].unique()), []
    fig, axes = panels(len(settings), 2, 2.6)
    for ax, setting in zip(axes, settings):
        rows = best[best["setting"] == setting]
        sizes = sorted(set(rows["num_synthetic"]) - {0})
        for style, n in zip(ordered_styles(len(sizes)), sizes):
            part = rows[rows["num_synthetic"] == n]
            band(ax, spread(part["fid"], part["budget"]), label=f"|S| = {n}", **style)
        base = rows[rows["budget"] == 0]["fid"].mean()
        ax.axhline(base, color=BASE, ls="--", label="base (w = 0)")
        means = rows.groupby(["num_synthetic", "budget"])["fid"].mean()
        ax.set_ylim(0, 1.3 * largest(means))  # few seeds: wide bands
        ax.set_title(titled(setting, titles), loc="left", fontsize=9)
        ax.xaxis.set_major_formatter(lambda n, _: images(n) if n else "0")
        ax.set_xlabel("budget B (images seen)", fontsize=9)
        ax.set_ylabel("best FID over w", fontsize=9)
        ax.legend(handles=[*_entries([ax]).values(), BAND], fontsize=7, loc="lower right", ncols=2)
        ax.grid(alpha=0.25)
        lowest = f"lowest {means.min():.3g} at B = {images(means.idxmin()[1])}"
        texts.append(f"{titled(setting, titles)}: base {base:.3g}, {lowest}")
    return described(fig, f"Best FID against the budget B. {'; '.join(texts)}.")


# ---------------------------------------------------------------- images


def read_sheet(path: Path) -> torch.Tensor:
    """An image file, uint8 (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(Image.open(path)))).permute(2, 0, 1)


def image_grid(groups: dict[str, torch.Tensor], columns: int = 20) -> Figure:
    """Rows of images under a title each: name → uint8 (N, C, H, W)."""
    return sheets({title: contact_sheet(images, columns) for title, images in groups.items()})


def sheets(named: dict[str, torch.Tensor]) -> Figure:
    """Images of one size under a title each: name → uint8 (C, H, W)."""
    _, height, width = next(iter(named.values())).shape
    size = (WIDTH, len(named) * (WIDTH * height / width + 0.35))
    fig, axes = plt.subplots(len(named), 1, figsize=size, squeeze=False)
    for ax, (title, sheet) in zip(axes[:, 0], named.items()):
        ax.imshow(sheet.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        ax.set_title(title, loc="left", fontsize=9)
        ax.axis("off")
    fig.tight_layout()
    return described(fig, f"Samples: {'; '.join(named)}.")
