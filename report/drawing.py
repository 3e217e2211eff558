"""What all figures share: sizes, colours and marks, bands, and how a figure is shown and saved.

A figure is WIDTH inches wide, so that its text can be read where a page shows it 830 pixels wide. Its label, see
`described`, says in words what it shows: it becomes the alt text on a page.
"""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from neon.files import atomic
from neon.measure.metrics import t_interval

WIDTH = 8.3  # inches
DPI = 130
SMALL = 8  # points
LABELS = {"fid": "FID", "is": "IS", "kid": "KID"}
# Colours differ in lightness too, and each has a contrast of 3 or more against white. Marks and dashes differ as well.
COLOURS = ("#0072b2", "#c04a00", "#117733", "#882255", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# Entries of a legend that explain bands.
BAND, PREDICTION = (
    Patch(color="grey", alpha=0.3, lw=0, label=f"95 % {of}") for of in ("over seeds", "of the prediction")
)
HOLLOW = {"mfc": "none", "mec": "black", "mew": 1.2, "path_effects": [withStroke(linewidth=3.2, foreground="white")]}
GOOD, BASE = "crimson", "#555555"  # of Neon's marks, and of the base's


def styles(count: int) -> list[dict]:
    """Of lines without an order, such as sources of S: colour, marker and dashes; after five they repeat."""
    return [_style(COLOURS[i % 5], i) for i in range(count)]


def ordered_styles(count: int) -> list[dict]:
    """Of lines with an order, such as budgets: from lighter to darker."""
    places = np.linspace(0.5, 0.0, count) if count > 1 else [0.25]
    return [_style(colour, i) for i, colour in enumerate(plt.get_cmap("viridis")(places))]


def _style(colour, i: int) -> dict:
    return {"color": colour, "marker": MARKERS[i % 5], "ls": DASHES[i % 5], "ms": 4, "lw": 1.4}


def panels(count: int, columns: int, height: float, width: float = WIDTH, **grid) -> tuple[Figure, list[plt.Axes]]:
    """A figure of `count` panels of that height in inches, at most `columns` in a row. width: of the whole."""
    columns = min(columns, count)
    lines = -(-count // columns)
    size = (width, height * lines)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **grid)
    for ax in axes.flat[count:]:
        ax.axis("off")
    for ax in axes.flat[:count]:
        ax.tick_params(labelsize=SMALL)
    return fig, list(axes.flat[:count])


def measured(table: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """Those of the metrics that some row has: precision and recall need real images."""
    return [metric for metric in metrics if table[metric].notna().any()]


def label_of(metric: str) -> str:
    return LABELS.get(metric, metric)


def images(n: float) -> str:
    """12800 → '12.8k', 3000320 → '3M'."""
    return f"{n / 1e6:.3g}M" if n >= 999_500 else f"{n / 1e3:.3g}k"


def largest(values: pd.Series) -> float:
    """Of the finite ones; 1 if there are none."""
    return values[np.isfinite(values)].max() if np.isfinite(values).any() else 1.0


def spread(values: pd.Series, by: pd.Series) -> pd.DataFrame:
    """Mean and half of the 95 % t-interval of the values of each key: columns mean, half, NaN where not drawn."""
    return values.groupby(by).apply(lambda v: pd.Series(_mean(v.to_numpy()), ["mean", "half"])).unstack()


def _mean(values: np.ndarray) -> tuple[float, float]:
    if not np.isfinite(values).all():
        return math.nan, math.nan
    mean, half = t_interval(values)
    return mean, half if math.isfinite(half) else math.nan


def band(ax: plt.Axes, points: pd.DataFrame, alpha: float = 0.15, **style) -> None:
    """The line of `mean` against the index, ± `half` as a band. A gap where a mean is NaN, no band where a half is."""
    (line,) = ax.plot(points.index, points["mean"], **style)
    low, high = points["mean"] - points["half"], points["mean"] + points["half"]
    ax.fill_between(points.index, low, high, color=line.get_color(), alpha=alpha, lw=0)


def star_at(ax: plt.Axes, x: float, y: float, edge: bool = False, **style) -> None:
    """A star at the best point; hollow where that is at the edge of what was scanned."""
    mark_at(ax, x, y, edge, **{"marker": "*", "ms": 13, "color": GOOD, "mec": "black", **style})


def mark_at(ax: plt.Axes, x: float, y: float, edge: bool = False, **style) -> None:
    """A mark, hollow at the edge of what was scanned."""
    ax.plot([x], [y], **{"ls": "none", "zorder": 5, "mew": 0.8, **style, **(HOLLOW if edge else {})})


def described(fig: Figure, text: str) -> Figure:
    """The figure, with what it shows in words."""
    fig.set_label(text)
    return fig


def show(fig: Figure, folder: str | Path | None = None, names: Iterable[str] = ()) -> None:
    """Show a figure in a notebook, with its description as alt text, and save it under these names in the folder.

    folder: made if it is not there; None: nothing is saved. The same figure gives the same bytes.
    """
    png = _bytes(fig, "png")
    display(Image(png, alt=fig.get_label() or None))
    for path in (Path(folder) / name for name in names if folder):
        with atomic(path) as partial:
            partial.write_bytes(png if path.suffix == ".png" else _bytes(fig, path.suffix[1:]))
    plt.close(fig)


def _bytes(fig: Figure, kind: str) -> bytes:
    """Without the date and the random names that an SVG has by default."""
    file = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "neon"}):
        fig.savefig(file, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()
