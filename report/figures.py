"""The paper's figures from tables of results; used by the notebooks.

A search goes over w, guidance γ and the budget B, with several seeds. What is drawn is a mean over seeds at one B, the
best B if the figure does not compare them. The base, w = 0, belongs to every B. Where a merge diverged, FID is inf and
a line has a gap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from neon import NeonError
from neon.data import contact_sheet
from neon.measure.metrics import t_interval

LABELS = {"fid": "FID", "is": "IS", "kid": "KID"}


@dataclass(frozen=True)
class Star:
    """The best (w, γ, B) of a search: the lowest mean FID over w > 0 if it is below the base's; otherwise the base.

    w: 0 if the base is best; then B is the one of the best w ≠ 0. guidance: NaN if none was searched.
    """

    w: float
    guidance: float
    budget: int

    @property
    def label(self) -> str:
        return f"w* = {self.w:g}" if self.w else "w* = none"


def star(rows: pd.DataFrame) -> Star:
    """Of the rows of one setting: columns seed, w, budget, fid and perhaps cfg.

    Only points that the most seeds have count: means over different seeds do not compare. Raises NeonError if no FID
    of w >= 0 is finite.
    """
    rows = rows.assign(cfg=rows.get("cfg", math.nan))
    fid = rows.groupby(["w", "cfg", "budget"], dropna=False)["fid"].agg(["mean", "count"]).reset_index()
    fid = fid[(fid["count"] == fid["count"].max()) & np.isfinite(fid["mean"])].sort_values("mean", kind="stable")
    if not (fid["w"] >= 0).any():
        raise NeonError("the search holds no finite FID of w >= 0")
    best = fid[fid["w"] >= 0].iloc[0]
    merged = pd.concat([fid[fid["w"] > 0], fid[fid["w"] < 0], fid]).iloc[0]
    return Star(best["w"], best["cfg"], int(merged["budget"]))


def at_budget(rows: pd.DataFrame, budget: int) -> pd.DataFrame:
    """The rows of that B and of the base."""
    return rows[(rows["budget"] == budget) | (rows["w"] == 0)]


def at_guidance(rows: pd.DataFrame, guidance: float) -> pd.DataFrame:
    """The rows of that γ; all of them if it is NaN."""
    return rows if math.isnan(guidance) else rows[rows["cfg"] == guidance]


def few(values: Sequence[float], best: float, count: int = 5) -> list[float]:
    """At most `count` of sorted values: the first, the last, and evenly spread between, the best of them included."""
    if len(values) <= count:
        return list(values)
    places = [round(i * (len(values) - 1) / (count - 1)) for i in range(count)]
    if best in values and (at := list(values).index(best)) not in places:
        nearest = min(range(1, count - 1), key=lambda i: abs(places[i] - at))
        places[nearest] = at
    return [values[i] for i in places]


def measured(table: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """Those of the metrics that some row has: precision and recall need real images."""
    return [metric for metric in metrics if table[metric].notna().any()]


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[plt.Axes]]:
    """A figure of `count` panels of that size in inches, at most `columns` in a row."""
    columns = min(columns, count)
    lines = -(-count // columns)
    size = (width * columns, height * lines)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[count:]:
        ax.axis("off")
    return fig, list(axes.flat[:count])


def table_of_panels(settings: int, metrics: int, width: float, height: float) -> tuple[Figure, list[list[plt.Axes]]]:
    """For each setting, a panel per metric: a row of them, or a part of a row where there is one metric."""
    fig, axes = panels(settings * metrics, 3 if metrics == 1 else metrics, width, height)
    return fig, [axes[i : i + metrics] for i in range(0, len(axes), metrics)]


def _title(titles: Mapping[str, str] | None, setting: object) -> str:
    return (titles or {}).get(setting, str(setting))


def _label(metric: str) -> str:
    return LABELS.get(metric, metric)


def _images(n: float) -> str:
    """12800 → '12.8k', 3000320 → '3M'."""
    return f"{n / 1e6:.3g}M" if n >= 999_500 else f"{n / 1e3:.3g}k"


def w_curves(
    search: pd.DataFrame,
    metrics: Sequence[str] = ("fid", "precision", "recall"),
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Fig. 4: each metric against w, one row of panels per setting, one line per budget B, 95 % bands over seeds.

    search: columns setting, seed, w, budget, the metrics and perhaps cfg. The star is at the best point, see Star, and
    guidance is held there. Of many budgets a few are drawn, the best among them.
    """
    settings, metrics = list(search["setting"].unique()), measured(search, metrics)
    fig, axes = table_of_panels(len(settings), len(metrics), 3.7, 2.5)
    for line, setting in zip(axes, settings):
        rows = search[search["setting"] == setting]
        best = star(rows)
        rows = at_guidance(rows, best.guidance)
        budgets = few(sorted(set(rows[rows["w"] != 0]["budget"])), best.budget)
        for ax, metric in zip(line, metrics):
            colours = plt.get_cmap("viridis")(np.linspace(0.75, 0.1, len(budgets)))
            for colour, budget in zip(colours, budgets):
                curve = at_budget(rows, budget).groupby("w")[metric]
                _band(ax, curve, color=colour, label=f"B = {_images(budget)}")
            point = at_budget(rows, best.budget).groupby("w")[metric].mean().get(best.w, math.nan)
            ax.plot([best.w], [point], "*", ms=13, color="crimson", zorder=5, label=best.label)
            ax.axvline(0, color="grey", lw=0.8, ls=":")
            ax.set_ylabel(_label(metric))
            ax.grid(alpha=0.25)
        line[0].set_title(_title(titles, setting), loc="left", fontsize=10)
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.supxlabel("merge weight w", fontsize=10)
    return fig


def _band(ax, curve: pd.core.groupby.SeriesGroupBy, alpha: float = 0.15, **style) -> None:
    """Mean of each group against its key, with the 95 % t-interval as a band.

    A gap where a value is not finite; no band where there is one seed.
    """
    points = curve.apply(lambda v: pd.Series(_mean(v.to_numpy()), ["mean", "half"])).unstack()
    (line,) = ax.plot(points.index, points["mean"], **{"marker": "o", "ms": 3, **style})
    low, high = points["mean"] - points["half"], points["mean"] + points["half"]
    ax.fill_between(points.index, low, high, color=line.get_color(), alpha=alpha, lw=0)


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width, each NaN where it cannot be drawn."""
    if not np.isfinite(values).all():
        return math.nan, math.nan
    mean, half = t_interval(values)
    return mean, half if math.isfinite(half) else math.nan


def sources(search: pd.DataFrame, titles: Mapping[str, str] | None = None) -> Figure:
    """Fig. 8: FID against w at the best B, a line per setting (where S came from), 95 % bands over seeds, stars.

    search: columns setting, seed, w, budget, fid and perhaps cfg, which is held at the star.
    """
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for i, (setting, rows) in enumerate(search.groupby("setting", sort=False)):
        best, colour = star(rows), f"C{i}"
        curve = at_budget(at_guidance(rows, best.guidance), best.budget).groupby("w")["fid"]
        _band(ax, curve, color=colour, label=_title(titles, setting))
        ax.plot([best.w], [curve.mean()[best.w]], "*", ms=12, color=colour, mec="black", zorder=5)
    ax.axvline(0, color="grey", lw=0.8, ls=":")
    ax.set_xlabel("merge weight w")
    ax.set_ylabel("FID")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7)
    return fig


def against(final: pd.DataFrame, label: str) -> Figure:
    """Figs. 9 and 10: reported FID and recall of base and Neon against a number, 95 % bands over seeds.

    final: columns setting (a number), seed, role, fid, recall. label: what the number is.
    """
    metrics = measured(final, ("fid", "recall"))
    fig, axes = panels(len(metrics), 2, 3.75, 2.9)
    for ax, metric in zip(axes, metrics):
        for role, name, colour in (("base", "base (w = 0)", "grey"), ("neon", "Neon (w*)", "crimson")):
            rows = final[final["role"] == role]
            _band(ax, rows.groupby(rows["setting"].astype(float))[metric], color=colour, label=name)
        ax.set_xlabel(label)
        ax.set_ylabel(_label(metric))
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=7)
    return fig


def image_grid(groups: dict[str, torch.Tensor], columns: int = 20) -> Figure:
    """Rows of images under a title each: name → uint8 (N, C, H, W)."""
    return sheets({title: contact_sheet(images, columns) for title, images in groups.items()})


def sheets(named: dict[str, torch.Tensor]) -> Figure:
    """Images of one size under a title each: name → uint8 (C, H, W)."""
    _, height, width = next(iter(named.values())).shape
    fig, axes = plt.subplots(len(named), 1, figsize=(9, len(named) * (9 * height / width + 0.35)), squeeze=False)
    for ax, (title, sheet) in zip(axes[:, 0], named.items()):
        ax.imshow(sheet.permute(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        ax.set_title(title, loc="left", fontsize=9)
        ax.axis("off")
    fig.tight_layout()
    return fig


def before_after(final: pd.DataFrame, titles: Mapping[str, str] | None = None) -> Figure:
    """FID of self-trained, base and Neon on the reported images: a panel per setting, four in a row, a line per seed.

    final: columns setting, seed, role, w, fid.
    """
    roles = ["selftrained", "base", "neon"]
    settings = list(final["setting"].unique())
    fig, axes = panels(len(settings), 4, 2.9, 2.8)
    for ax, setting in zip(axes, settings):
        rows = final[final["setting"] == setting]
        for _, part in rows.groupby("seed"):
            values = part.set_index("role")["fid"].reindex(roles)
            ax.plot(roles, values, "o-", color="grey", alpha=0.7, ms=4)
        ax.plot(roles, rows.groupby("role")["fid"].mean().reindex(roles), "_", color="crimson", ms=22, mew=2)
        ax.set_title(_title(titles, setting), fontsize=8)
        ax.set_xticks(range(3), ["w = −1", "w = 0", "w*"])
        ax.set(xlim=(-0.3, 2.3), ylim=(0, 1.08 * _largest(rows["fid"])))
        ax.set_ylabel("FID")
        ax.grid(alpha=0.25)
    return fig


def _largest(values: pd.Series) -> float:
    """Of the finite ones; 1 if there are none."""
    return values[np.isfinite(values)].max() if np.isfinite(values).any() else 1.0


def landscape(
    search: pd.DataFrame,
    metrics: Sequence[str] = ("fid", "precision", "recall"),
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Fig. 6: mean of each metric over the (w, γ) plane at the best B, one row of panels per setting.

    search: columns setting, seed, w, cfg, budget and the metrics. Crosses mark the best γ of the base, stars the best
    (w, γ), see Star. Cells without a value are white. FIDs above four times the lowest, inf too, have one colour.
    """
    settings, metrics = list(search["setting"].unique()), measured(search, metrics)
    fig, axes = table_of_panels(len(settings), len(metrics), 4, 2.9)
    for line, setting in zip(axes, settings):
        rows = search[search["setting"] == setting]
        best = star(rows)
        mean = at_budget(rows, best.budget).groupby(["cfg", "w"])[list({"fid", *metrics})].mean()
        at_base = mean["fid"][np.isfinite(mean["fid"]) & (mean.index.get_level_values("w") == 0)]
        for ax, metric in zip(line, metrics):
            table = mean[metric].unstack("w")
            _plane(fig, ax, table, metric)
            place = {name: i for i, name in enumerate(table.columns)}, {name: i for i, name in enumerate(table.index)}
            if len(at_base):
                ax.plot(place[0][0.0], place[1][at_base.idxmin()[0]], "X", color="white", ms=9, mec="black")
            ax.plot(place[0][best.w], place[1][best.guidance], "*", color="crimson", ms=14, mec="white")
            ax.set_title(_label(metric), loc="left", fontsize=9)
        first = f"{_title(titles, setting)}, B = {_images(best.budget)}: {_label(metrics[0])}"
        line[0].set_title(first, loc="left", fontsize=9)
        line[0].set_ylabel("guidance γ")
    fig.supxlabel("merge weight w", fontsize=10)
    return fig


def _plane(fig: Figure, ax, table: pd.DataFrame, metric: str) -> None:
    """An image of a (γ, w) table with its colour bar and its values as ticks."""
    low_is_good = metric == "fid"
    if low_is_good:  # far away everything is bad
        table = table.clip(upper=4 * table.min().min())
    shown = ax.imshow(table, origin="lower", aspect="auto", cmap="viridis_r" if low_is_good else "viridis")
    fig.colorbar(shown, ax=ax, extend="max" if low_is_good else "neither")
    many = len(table.columns) > 10
    ax.set_xticks(range(len(table.columns)), [f"{w:g}" for w in table.columns], fontsize=8, rotation=90 * many)
    ax.set_yticks(range(len(table.index)), [f"{cfg:g}" for cfg in table.index], fontsize=8)


def asymptotes(search: pd.DataFrame) -> Figure:
    """Fig. 6, right: precision and recall against γ at the best B, a line per w ≥ 0, 95 % bands over seeds.

    search: of one setting, columns seed, w, cfg, budget, fid, precision, recall. Of many w a few are drawn, w* among
    them. Raises NeonError if neither precision nor recall was measured.
    """
    metrics, best = measured(search, ("precision", "recall")), star(search)
    if not metrics:
        raise NeonError("neither precision nor recall was measured")
    fig, axes = panels(len(metrics), 2, 3.75, 2.8)
    rows = at_budget(search, best.budget)
    weights = few(sorted(set(rows["w"][rows["w"] >= 0])), best.w)
    colours = plt.get_cmap("viridis")(np.linspace(0.85, 0.1, len(weights)))
    for ax, metric in zip(axes, metrics):
        for colour, w in zip(colours, weights):
            _band(ax, rows[rows["w"] == w].groupby("cfg")[metric], color=colour, label=f"w = {w:g}")
        ax.set_xlabel("guidance γ")
        ax.set_ylabel(metric)
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=7)
    return fig


def budget(best: pd.DataFrame, titles: Mapping[str, str] | None = None) -> Figure:
    """Figs. 3, 5, 7: lowest FID over w (and γ) against B, a panel per setting, a line per |S|, 95 % bands.

    best: columns setting, seed, num_synthetic, budget and fid. The dotted line is the base's mean, |S| = B = 0.
    """
    settings = list(best["setting"].unique())
    fig, axes = panels(len(settings), 4, 3.9, 3.0)
    for ax, setting in zip(axes, settings):
        rows = best[best["setting"] == setting]
        sizes = sorted(set(rows["num_synthetic"]) - {0})
        for colour, n in zip(plt.get_cmap("viridis")(np.linspace(0.8, 0.1, len(sizes))), sizes):
            _band(ax, rows[rows["num_synthetic"] == n].groupby("budget")["fid"], color=colour, label=f"|S| = {n}")
        ax.axhline(rows[rows["budget"] == 0]["fid"].mean(), color="grey", ls=":", label="base")
        means = rows.groupby(["num_synthetic", "budget"])["fid"].mean()
        ax.set_ylim(0, 1.3 * _largest(means))  # few seeds: wide bands
        ax.set_title(_title(titles, setting), loc="left", fontsize=9)
        ax.xaxis.set_major_formatter(lambda n, _: _images(n) if n else "0")
        ax.set_xlabel("budget B (images seen)")
        ax.set_ylabel("best FID over w")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.25)
    return fig


def toy_curves(curves: pd.DataFrame, title: str) -> Figure:
    """Fig. B.1: log Fréchet distance against w, a column per sampler of S, 95 % bands over seeds.

    curves: columns sampler (of S), evaluated (a row of panels each), epochs (of fine-tuning; a line each), seed, w,
    fid. Triangles mark the mean of the seeds' best w.
    """
    samplers, ways = list(curves["sampler"].unique()), list(curves["evaluated"].unique())
    size = (3.6 * len(samplers), 2.4 * len(ways) + 0.3)
    fig, axes = plt.subplots(len(ways), len(samplers), figsize=size, squeeze=False, layout="constrained", sharex=True)
    for line, evaluated in zip(axes, ways):
        for ax, sampler in zip(line, samplers):
            rows = curves[(curves["sampler"] == sampler) & (curves["evaluated"] == evaluated)]
            for colour, (epochs, part) in zip(("tab:orange", "tab:blue"), rows.groupby("epochs")):
                table = part.pivot(index="w", columns="seed", values="fid")
                logs = np.log10(part["fid"]).groupby(part["w"])
                _band(ax, logs, alpha=0.2, color=colour, marker="", label=f"{epochs} epochs")
                ax.plot([table.idxmin().mean()], [0.02], "^", color=colour, transform=ax.get_xaxis_transform())
            ax.axvline(0, color="grey", lw=0.8, ls=":")
            ax.set_title(f"S by {sampler}, {evaluated}", fontsize=9)
            ax.grid(alpha=0.25)
        line[0].set_ylabel("log₁₀ Fréchet distance")
    axes[0, 0].legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("merge weight w")
    fig.suptitle(title, fontsize=10)
    return fig


def gradient_cosines(cosines: pd.DataFrame) -> Figure:
    """Fig. B.2: cosine of the real and the synthetic gradient against ζ: a line per seed, the mean and its 95 % band.

    cosines: columns zeta, seed, cosine, narrow (the seed's real data vary less than the target; its line is green).
    """
    fig, ax = plt.subplots(figsize=(4.6, 3), layout="constrained")
    for narrow, colour, label in ((True, "tab:green", "data too narrow"), (False, "tab:purple", "data too wide")):
        table = cosines[cosines["narrow"] == narrow].pivot(index="zeta", columns="seed", values="cosine")
        lines = ax.plot(table.index, table, color=colour, alpha=0.5, lw=1)
        for line in lines[:1]:
            line.set_label(label)
    _band(ax, cosines.groupby("zeta")["cosine"], alpha=0.12, color="black", label="mean")
    ax.axhline(0, color="grey", lw=0.8, ls=":")
    ax.axvline(1, color="grey", lw=0.8, ls=":")
    ax.set_xlabel("ζ of the sampler of S")
    ax.set_ylabel("cos(r_d, r_s), Adam's metric")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7)
    return fig


def toy_planes(planes: dict[str, np.ndarray], w: np.ndarray, v: np.ndarray) -> Figure:
    """Fig. 2: a panel per entry, title → log₁₀ distance over (real-data direction v, Neon's direction w)."""
    fig, axes = plt.subplots(1, len(planes), figsize=(3.3 * len(planes), 3), squeeze=False, layout="constrained")
    for ax, (title, plane) in zip(axes[0], planes.items()):
        shown = ax.contourf(w, v, plane, levels=24, cmap="viridis_r")
        fig.colorbar(shown, ax=ax)
        along = plane[np.abs(v).argmin()]
        ax.plot([0], [0], "o", color="white", mec="black", label="base")
        ax.plot([-1], [0], "X", color="white", mec="black", label="self-trained")
        ax.plot([w[along.argmin()]], [0], "*", color="crimson", ms=13, mec="white", label="Neon")
        ax.plot([0], [1], "s", color="white", mec="black", label="more real data")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("w, away from the self-trained model")
    axes[0, 0].set_ylabel("v, towards more real data")
    fig.legend(*ax.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return fig
