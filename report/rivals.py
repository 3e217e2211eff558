"""Neon next to what its gain could also come from, and next to its rivals: one figure and one table for all of them.

Every model is compared with the base of the same seed at the guidance that suits that base best, on images and features
that chose nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from neon.measure.metrics import t_interval
from report.drawing import BASE, COLOURS, GOOD, SMALL, described, panels
from report.tables import read_table, titled

Titles = Mapping[str, str] | None


@dataclass(frozen=True)
class Method:
    """A way to a better model: which rows of `neon final` are its own, and what it costs."""

    title: str
    kind: str  # of COLOUR
    suffix: str = ""  # of the setting's name
    role: str = "neon"
    passes: int = 1  # networks that each step of the sampler calls


METHODS = (
    Method("Neon", "neon"),
    Method("self-training (w = −1)", "control", role="selftrained"),
    Method("fine-tuned on real images", "control", "-real", "selftrained"),
    Method("Neon with real images as S", "control", "-real"),
    Method("Neon with corrupted images as S", "control", "-corrupted"),
    Method("random direction", "control", "-random"),
    Method("own training extrapolated", "control", "-older"),
    Method("SIMS", "rival", "-sims", passes=2),
    Method("autoguidance", "rival", "-auto", passes=2),
    Method("DDO", "rival", "-ddo", "selftrained"),
)
COLOUR = {"neon": GOOD, "control": BASE, "rival": COLOURS[0]}
MARK = {"neon": "*", "control": "o", "rival": "s"}
METRICS = ("precision", "recall", "density", "coverage")


def read_all(results: Path) -> pd.DataFrame:
    """Final rows of the main settings, the controls and the rivals, as far as they were measured."""
    tables = (read_table(results / name / "final.csv") for name in ("", "controls", "rivals"))
    return pd.concat([table for table in tables if table is not None], ignore_index=True)


def headlines(final: pd.DataFrame, titles: Titles = None) -> dict[str, str]:
    """The settings that another method was measured on, each with the first part of its title."""
    names = list(final["setting"].unique())
    tested = [name for name in names if any(m.suffix and name + m.suffix in names for m in METHODS)]
    return {name: titled(name, titles).partition(" (")[0] for name in tested}


def models(final: pd.DataFrame, setting: str) -> Iterator[tuple[Method, pd.DataFrame, pd.DataFrame]]:
    """The methods that were measured on a setting: each with its rows and those of its bases, by seed."""
    for method in METHODS:
        rows = final[final["setting"] == setting + method.suffix].set_index("seed").sort_index()
        own = rows[rows["role"] == method.role]
        if len(own):
            yield method, own, rows[rows["role"] == "base"]


def share(own: pd.DataFrame, base: pd.DataFrame) -> tuple[float, float]:
    """FID in per cent of the base's, paired by seed: mean and half of the 95 % t-interval."""
    return t_interval((100 * own["fid"] / base["fid"]).dropna().to_numpy())


def table(final: pd.DataFrame, settings: Mapping[str, str]) -> pd.DataFrame:
    """For reading: a line per setting and method; metrics are means over seeds, FID in per cent is paired.

    images: B, on how many the method trained, those of S or real ones; passes: networks called at each step.
    """
    lines = []
    for setting, title in settings.items():
        bases = final[(final["setting"] == setting) & (final["role"] == "base")]
        lines.append(_line(title, "base", bases, "100", 0, 1))
        for method, own, base in models(final, setting):
            mean, half = share(own, base)
            images = own["budget"].median()
            lines.append(_line(title, method.title, own, f"{mean:.0f} ± {half:.0f}", images, method.passes))
    return pd.DataFrame(lines)


def _line(setting: str, name: str, rows: pd.DataFrame, share: str, images: float, passes: int) -> dict:
    line = {"setting": setting, "method": name, "seeds": len(rows), "FID": rows["fid"].mean(), "FID, % of base": share}
    line |= {metric: f"{rows[metric].mean():.3f}" for metric in METRICS if metric in rows}
    return line | {"images": f"{images:,.0f}", "passes": f"×{passes}"}


def figure(final: pd.DataFrame, settings: Mapping[str, str], columns: int = 2) -> Figure:
    """A panel per setting, a line per method: FID in per cent of the base's, with its 95 % interval over seeds."""
    fig, axes = panels(len(settings), columns, 3.1, sharex=True)
    words = []
    for ax, (setting, title) in zip(axes, settings.items()):
        found = [(method, *share(own, base)) for method, own, base in models(final, setting)]
        _draw(ax, found)
        ax.set_title(title, fontsize=SMALL + 1)
        words.append(f"{title}: " + ", ".join(f"{method.title} {mean:.0f} %" for method, mean, _ in found))
        ax.tick_params(labelbottom=True)
    for ax in axes[-columns:]:
        ax.set_xlabel("FID, % of the base's (log)", fontsize=SMALL)
    return described(fig, "FID of each method in per cent of the base's. " + "; ".join(words) + ".")


def _draw(ax: plt.Axes, found: list[tuple[Method, float, float]]) -> None:
    ax.axvline(100, color=BASE, lw=0.8, ls="--")
    for y, (method, mean, half) in enumerate(found):
        style = {"color": COLOUR[method.kind], "marker": MARK[method.kind]}
        low = min(half, 0.97 * mean)  # a logarithmic axis has no zero
        ax.errorbar([mean], [y], xerr=[[low], [half]], ms=9 if method.kind == "neon" else 5, capsize=2, **style)
    ax.set_xscale("log")
    ax.set_yticks(range(len(found)), [method.title for method, *_ in found], fontsize=SMALL)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ticks = (25, 50, 100, 200, 400)
    ax.set_xticks(ticks, map(str, ticks), fontsize=SMALL)
    ax.minorticks_off()
    ax.grid(axis="x", alpha=0.3)


def strengths(final: pd.DataFrame, titles: Titles = None) -> pd.DataFrame:
    """For reading, of the settings `X-gmoα` and `X-noiseα`: FID of base, of Neon, and against α = 0, paired."""
    neon = final[final["role"] == "neon"]
    fids = {setting: rows.set_index("seed")["fid"] for setting, rows in neon.groupby("setting", sort=False)}
    bases = final[final["role"] == "base"].groupby("setting", sort=False)["fid"].mean()
    lines = []
    for setting, fid in fids.items():
        plain = fids.get(f"{setting.partition('-')[0]}-gmo0")
        mean, half = (0.0, 0.0) if plain is None else t_interval((fid - plain).dropna().to_numpy())
        rows = neon[neon["setting"] == setting]
        line = {"setting": titled(setting, titles), "seeds": len(fid), "FID base": bases[setting]}
        line |= {"FID Neon": fid.mean(), "minus α = 0, paired": f"{mean:.2g} ± {half:.2g}"}
        line |= {"no w > 0 helps": f"{int((rows['w'] == 0).sum())} of {len(fid)}"}
        lines.append(line | {metric: f"{rows[metric].mean():.3f}" for metric in METRICS if metric in rows})
    return pd.DataFrame(lines)
