"""The paper's figures from tables of results; used by the notebooks."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from neon.data import contact_sheet
from neon.measure.metrics import t_interval

LABELS = {"fid": "FID", "precision": "precision", "recall": "recall"}


def w_curves(
    search: pd.DataFrame, metrics: Sequence[str] = ("fid", "precision", "recall"), titles: dict[str, str] | None = None
) -> Figure:
    """Fig. 4: each metric against w, one row of panels per setting, one line per budget B, 95 % bands over seeds.

    search: columns setting, seed, w, budget and the metrics. The star marks the lowest mean FID of a setting; w = 0,
    the base, belongs to every line. Where guidance was searched, too (a column cfg), it stays at its value at the star.
    """
    settings = list(search["setting"].unique())
    size = (3.4 * len(metrics), 2.5 * len(settings) + 0.4)
    fig, axes = plt.subplots(
        len(settings), len(metrics), figsize=size, squeeze=False, sharex="row", layout="constrained"
    )
    for line, setting in zip(axes, settings):
        rows = search[search["setting"] == setting]
        if "cfg" in rows and rows["cfg"].notna().any():
            rows = rows[rows["cfg"] == rows.groupby(["budget", "w", "cfg"])["fid"].mean().idxmin()[2]]
        base, budgets = rows[rows["w"] == 0], sorted(set(rows["budget"]) - {0})
        mean = rows.groupby(["budget", "w"])["fid"].mean()
        best_budget, best_w = mean.idxmin()
        for ax, metric in zip(line, metrics):
            colours = plt.get_cmap("viridis")(np.linspace(0.75, 0.1, len(budgets)))
            for colour, budget in zip(colours, budgets):
                curve = pd.concat([base, rows[rows["budget"] == budget]]).groupby("w")[metric]
                _band(ax, curve, color=colour, label=f"B = {budget / 1000:g}k")
            star = rows[(rows["budget"] == best_budget) & (rows["w"] == best_w)][metric].mean()
            ax.plot([best_w], [star], "*", ms=13, color="crimson", zorder=5, label=f"w* = {best_w:g}")
            ax.axvline(0, color="grey", lw=0.8, ls=":")
            ax.set_ylabel(LABELS.get(metric, metric))
            ax.grid(alpha=0.25)
        line[0].set_title((titles or {}).get(setting, setting), loc="left", fontsize=10)
        line[0].legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("merge weight w")
    return fig


def _band(ax, curve: pd.core.groupby.SeriesGroupBy, alpha: float = 0.15, **style) -> None:
    """Mean of each group against its key, with the 95 % t-interval as a band."""
    points = curve.apply(lambda v: pd.Series(t_interval(v.to_numpy()), ["mean", "half"])).unstack()
    (line,) = ax.plot(points.index, points["mean"], **{"marker": "o", "ms": 3, **style})
    low, high = points["mean"] - points["half"], points["mean"] + points["half"]
    ax.fill_between(points.index, low, high, color=line.get_color(), alpha=alpha, lw=0)


def sources(search: pd.DataFrame, titles: dict[str, str] | None = None) -> Figure:
    """Fig. 8: FID against w, a line per setting (where S came from), 95 % bands over seeds; stars at each minimum.

    search: columns setting, seed, w, fid; one budget.
    """
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for colour, (setting, rows) in zip(plt.get_cmap("tab10").colors, search.groupby("setting", sort=False)):
        _band(ax, rows.groupby("w")["fid"], color=colour, label=(titles or {}).get(setting, setting))
        mean = rows.groupby("w")["fid"].mean()
        ax.plot([mean.idxmin()], [mean.min()], "*", ms=12, color=colour, mec="black", zorder=5)
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
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
    for ax, metric in zip(axes, ("fid", "recall")):
        for role, name, colour in (("base", "base (w = 0)", "grey"), ("neon", "Neon (w*)", "crimson")):
            rows = final[final["role"] == role]
            _band(ax, rows.groupby(rows["setting"].astype(float))[metric], color=colour, label=name)
        ax.set_xlabel(label)
        ax.set_ylabel(LABELS[metric])
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


def before_after(final: pd.DataFrame, titles: dict[str, str] | None = None) -> Figure:
    """FID of self-trained, base and Neon on the reported images: a panel per setting, four in a row, a line per seed.

    final: columns setting, seed, role, w, fid.
    """
    roles = ["selftrained", "base", "neon"]
    settings = list(final["setting"].unique())
    columns = min(4, len(settings))
    lines = -(-len(settings) // columns)
    size = (2.9 * columns, 2.8 * lines)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(settings) :]:
        ax.axis("off")
    for ax, setting in zip(axes.flat, settings):
        rows = final[final["setting"] == setting]
        for _, part in rows.groupby("seed"):
            values = part.set_index("role")["fid"].reindex(roles)
            ax.plot(roles, values, "o-", color="grey", alpha=0.7, ms=4)
        ax.plot(roles, rows.groupby("role")["fid"].mean().reindex(roles), "_", color="crimson", ms=22, mew=2)
        ax.set_title((titles or {}).get(setting, setting), fontsize=8)
        ax.set_xticks(range(3), ["w = −1", "w = 0", "w*"])
        ax.set(xlim=(-0.3, 2.3), ylim=(0, 1.08 * rows["fid"].max()))
        ax.set_ylabel("FID")
        ax.grid(alpha=0.25)
    return fig


def landscape(
    search: pd.DataFrame, metrics: Sequence[str] = ("fid", "precision", "recall"), titles: dict[str, str] | None = None
) -> Figure:
    """Fig. 6: mean of each metric over the (w, γ) plane, one row of panels per setting.

    search: columns setting, seed, w, cfg and the metrics. Crosses mark the best γ of the base, stars the best (w, γ).
    """
    settings = list(search["setting"].unique())
    size = (3.6 * len(metrics), 2.7 * len(settings))
    fig, axes = plt.subplots(len(settings), len(metrics), figsize=size, squeeze=False, layout="constrained")
    for line, setting in zip(axes, settings):
        mean = search[search["setting"] == setting].groupby(["cfg", "w"])[list(metrics)].mean()
        best_cfg, best_w = mean["fid"].idxmin()
        base_cfg = mean["fid"].xs(0.0, level="w").idxmin()
        for ax, metric in zip(line, metrics):
            table = mean[metric].unstack("w")
            low_is_good = metric == "fid"
            limits = {"vmax": 4 * table.to_numpy().min()} if low_is_good else {}  # far away everything is bad
            shown = ax.imshow(
                table, origin="lower", aspect="auto", cmap="viridis_r" if low_is_good else "viridis", **limits
            )
            fig.colorbar(shown, ax=ax, extend="max" if low_is_good else "neither")
            place = {name: i for i, name in enumerate(table.columns)}, {name: i for i, name in enumerate(table.index)}
            ax.plot(place[0][0.0], place[1][base_cfg], "X", color="white", ms=9, mec="black")
            ax.plot(place[0][best_w], place[1][best_cfg], "*", color="crimson", ms=14, mec="white")
            ax.set_xticks(range(len(table.columns)), [f"{w:g}" for w in table.columns], fontsize=8)
            ax.set_yticks(range(len(table.index)), [f"{cfg:g}" for cfg in table.index], fontsize=8)
            ax.set_title(LABELS.get(metric, metric), loc="left", fontsize=9)
        line[0].set_title((titles or {}).get(setting, setting) + ": FID", loc="left", fontsize=9)
        line[0].set_ylabel("guidance γ")
    for ax in axes[-1]:
        ax.set_xlabel("merge weight w")
    return fig


def asymptotes(search: pd.DataFrame, weights: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> Figure:
    """Fig. 6, right: precision and recall against γ, a line per w, 95 % bands over seeds. search: of one setting."""
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
    weights = [w for w in weights if (search["w"] == w).any()]
    colours = plt.get_cmap("viridis")(np.linspace(0.85, 0.1, len(weights)))
    for ax, metric in zip(axes, ("precision", "recall")):
        for colour, w in zip(colours, weights):
            _band(ax, search[search["w"] == w].groupby("cfg")[metric], color=colour, label=f"w = {w:g}")
        ax.set_xlabel("guidance γ")
        ax.set_ylabel(metric)
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=7)
    return fig


def budget(best: pd.DataFrame, titles: dict[str, str] | None = None) -> Figure:
    """Figs. 3, 5, 7: lowest FID over w (and γ) against B, a panel per setting, a line per |S|, 95 % bands over seeds.

    best: columns setting, seed, num_synthetic, budget and fid. The dotted line is the base's mean, |S| = B = 0.
    """
    settings = list(best["setting"].unique())
    size = (3.9 * len(settings), 3.0)
    fig, axes = plt.subplots(1, len(settings), figsize=size, squeeze=False, layout="constrained")
    for ax, setting in zip(axes[0], settings):
        rows = best[best["setting"] == setting]
        sizes = sorted(set(rows["num_synthetic"]) - {0})
        for colour, n in zip(plt.get_cmap("viridis")(np.linspace(0.8, 0.1, len(sizes))), sizes):
            _band(ax, rows[rows["num_synthetic"] == n].groupby("budget")["fid"], color=colour, label=f"|S| = {n}")
        ax.axhline(rows[rows["budget"] == 0]["fid"].mean(), color="grey", ls=":", label="base")
        ax.set_ylim(0, 1.3 * rows.groupby(["num_synthetic", "budget"])["fid"].mean().max())  # few seeds: wide bands
        ax.set_title((titles or {}).get(setting, setting), loc="left", fontsize=9)
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
