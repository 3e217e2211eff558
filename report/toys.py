"""The figures of the Gaussian toy, from what its notebook computes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report.drawing import BAND, GOOD, HOLLOW, SMALL, WIDTH, band, described, spread, star_at, styles


def toy_curves(curves: pd.DataFrame, title: str) -> Figure:
    """Fig. B.2: log Fréchet distance against w, a column per sampler of S, 95 % bands over seeds.

    curves: columns sampler (of S), evaluated (a row of panels each), epochs (of fine-tuning; a line each), seed, w,
    fid. Triangles mark the mean of the seeds' best w.
    """
    samplers, ways = list(curves["sampler"].unique()), list(curves["evaluated"].unique())
    size = (WIDTH, 2.2 * len(ways) + 0.8)
    fig, axes = plt.subplots(len(ways), len(samplers), figsize=size, squeeze=False, layout="constrained", sharex=True)
    texts = []
    for line, evaluated in zip(axes, ways):
        for ax, sampler in zip(line, samplers):
            rows = curves[(curves["sampler"] == sampler) & (curves["evaluated"] == evaluated)]
            groups = list(rows.groupby("epochs"))
            for k, (style, (epochs, part)) in enumerate(zip(styles(len(groups)), groups)):
                best = part.pivot(index="w", columns="seed", values="fid").idxmin().mean()
                style |= {"marker": ""}
                band(ax, spread(np.log10(part["fid"]), part["w"]), alpha=0.2, label=f"{epochs} epochs", **style)
                fill = "white" if best in (part["w"].min(), part["w"].max()) else style["color"]
                place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
                ax.plot([best], [0.04 + 0.08 * k], "^", color=style["color"], mfc=fill, ms=7, **place)
                texts.append(f"S by {sampler}, {evaluated}, {epochs} epochs: best w {best:.2g}")
            ax.axvline(0, color="grey", lw=0.8, ls=":")
            ax.set_title(f"S by {sampler}, {evaluated}", fontsize=9)
            ax.grid(alpha=0.25)
        line[0].set_ylabel("log₁₀ Fréchet distance", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("merge weight w", fontsize=9)
    fig.suptitle(title, fontsize=10)
    mark = {"ls": "none", "marker": "^", "color": "grey"}
    triangles = [Line2D([], [], label="mean of the seeds' best w", **mark)]
    triangles.append(Line2D([], [], mfc="white", label="hollow: all at the edge of the scan", **mark))
    entries = [*axes[0, 0].get_legend_handles_labels()[0], *triangles, BAND]
    fig.legend(handles=entries, fontsize=SMALL, loc="outside lower center", ncols=3)
    return described(fig, f"{title}: distance against w. {'; '.join(texts)}.")


def gradient_cosines(cosines: pd.DataFrame) -> Figure:
    """Fig. B.3: cosine of the real and the synthetic gradient against ζ: a line per seed, the mean and its 95 % band.

    cosines: columns zeta, seed, cosine, narrow (the seed's real data vary less than the target; its line is solid).
    """
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for narrow, style, label in zip((True, False), styles(2), ("data too narrow", "data too wide")):
        table = cosines[cosines["narrow"] == narrow].pivot(index="zeta", columns="seed", values="cosine")
        lines = ax.plot(table.index, table, alpha=0.6, **style | {"ms": 3, "lw": 1})
        for line in lines[:1]:
            line.set_label(f"a seed, {label}")
    mean = spread(cosines["cosine"], cosines["zeta"])
    band(ax, mean, alpha=0.15, color="black", lw=2.5, label="mean over seeds")
    ax.axhline(0, color="grey", lw=0.8, ls=":")
    ax.axvline(1, color="grey", lw=0.8, ls=":")
    ax.set_xlabel("ζ of the sampler of S", fontsize=9)
    ax.set_ylabel("cos(r_d, r_s), Adam's metric", fontsize=9)
    ax.grid(alpha=0.25)
    ax.legend(handles=[*ax.get_legend_handles_labels()[0], BAND], fontsize=SMALL)
    text = ", ".join(f"{y:.2g} at ζ = {x:g}" for x, y in mean["mean"].items())
    return described(fig, f"Cosine of real and synthetic gradient against ζ. Mean: {text}.")


def toy_planes(planes: dict[str, np.ndarray], w: np.ndarray, v: np.ndarray) -> Figure:
    """Fig. 2: a panel per entry, title → log₁₀ distance over (real-data direction v, Neon's direction w)."""
    lines = -(-len(planes) // 2)
    size = (WIDTH, 2.7 * lines + 0.4)
    fig, axes = plt.subplots(lines, min(2, len(planes)), figsize=size, squeeze=False, layout="constrained")
    texts = []
    for ax, (title, plane) in zip(axes.flat, planes.items()):
        shown = ax.contourf(w, v, plane, levels=24, cmap="viridis_r")
        fig.colorbar(shown, ax=ax).set_label("log₁₀ distance", fontsize=SMALL)
        best = plane[np.abs(v).argmin()].argmin()
        ax.plot([0], [0], "o", color="white", mec="black", label="base")
        ax.plot([-1], [0], "X", color="white", mec="black", label="self-trained")
        ax.plot([0], [1], "s", color="white", mec="black", label="more real data")
        star_at(ax, w[best], 0, best in (0, len(w) - 1), mec="white", clip_on=False)
        ax.set_title(title, fontsize=9)
        texts.append(f"{title}: best w {w[best]:.2g}")
    for ax in axes[-1]:
        ax.set_xlabel("w, away from the self-trained model", fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("v, towards more real data", fontsize=9)
    star = {"ls": "none", "marker": "*", "ms": 12}
    stars = [Line2D([], [], color=GOOD, label="Neon, the best w", **star)]
    stars.append(Line2D([], [], label="hollow: at the edge of the scan", **star | HOLLOW))
    entries = [*axes[0, 0].get_legend_handles_labels()[0], *stars]
    fig.legend(handles=entries, fontsize=SMALL, loc="outside lower center", ncols=5)
    return described(fig, f"Distance over the directions of Neon and of more real data. {'; '.join(texts)}.")
