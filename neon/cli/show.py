"""Results for people: one line per row, a plot on a terminal, else a table. Rows are those of neon.measure.rows."""

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path

from neon import NeonError, extra
from neon.measure.evaluate import title

MARKERS = "o*+x#@"
WIDTH, HEIGHT = 78, 20  # of a plot, in characters


def summary(row: Mapping, metrics: Sequence[str], varying: Sequence[str] = ()) -> str:
    """'w 1.5  B 20000  cfg 2  FID 12.3 ± 0.4  …'. varying: sampling options that not all rows share."""
    shown = [f"w {row['w']:g}", f"B {row['budget']}"] if row["selftrained"] else ["w 0"]
    shown += [f"by {row['by']}"] if "by" in row else []
    shown += [f"{name} {_short(row[name])}" for name in varying]
    if "reason" in row:
        return "  ".join([*shown, f"diverged: {row['reason']}"])
    return "  ".join([*shown, *results(row, metrics)])


def results(row: Mapping, metrics: Sequence[str]) -> list[str]:
    """['FID 12.3 ± 0.4', …, 'n 5000', '3.2 s']."""
    named = (f"{title(m, row.get('features', ''))} {with_error(row, m)}" for m in metrics)
    return [*named, f"n {row['n']}", f"{row['seconds']:.1f} s"]


def with_error(row: Mapping, metric: str) -> str:
    """'12.3 ± 0.4', rounded as the standard error allows; '12.34' where there is none."""
    value, error = row[metric], row.get(f"{metric}_se", 0.0)
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:.4g}"
    lead = math.floor(math.log10(error))
    digits = max(1 - lead if error / 10**lead < 2 else -lead, 0)  # 0.14 keeps two digits, 0.4 one
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def terminal_plot(
    rows: Sequence[Mapping], x: str, y: str, series: Sequence[str] = (), path: str | Path | None = None
) -> None:
    """Print y against x, with the errors y_se that rows have; a line for each combination of what `series` name.

    On a terminal a plot, if plotext of the extra `terminal` is installed, else a table. path: where the rows are, named
    below. Rows without a finite y are in the table only.
    """
    rows = sorted(rows, key=lambda row: (*(str(row[name]) for name in series), row[x]))
    finite = [row for row in rows if math.isfinite(row[y])]
    text = _plot(finite, x, y, series) if finite and sys.stdout.isatty() else None
    print(text or _table(rows, x, y, series), flush=True)
    if path:
        print(f"all rows: {path}", flush=True)


def _plot(rows: Sequence[Mapping], x: str, y: str, series: Sequence[str]) -> str | None:
    try:
        with extra("terminal"):
            import plotext
    except NeonError:
        return None
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(WIDTH, HEIGHT)
    lines = groupby(rows, key=lambda row: tuple(row[name] for name in series))
    for marker, (values, line) in zip(cycle(MARKERS), lines):
        xs, ys, bars = zip(*((row[x], row[y], 2 * row.get(f"{y}_se", 0.0)) for row in line))  # bars from end to end
        signal = figure.signal(xs, ys, marker=marker)
        signal.lines()
        if series:
            signal.label("  ".join(f"{name} {_short(value)}" for name, value in zip(series, values)))
        figure.draw(figure.error(xs, ys, bars))
        figure.draw(signal)
    figure.label(x)
    figure.label(title(y), axis="y")
    return figure.build().string().rstrip()


def _table(rows: Sequence[Mapping], x: str, y: str, series: Sequence[str]) -> str:
    """Aligned columns; the smallest y is marked."""
    best = min((row[y] for row in rows), default=math.inf)
    head = [*series, x, title(y), ""]
    lines = [
        [*(_short(row[name]) for name in (*series, x)), with_error(row, y), "← best" if row[y] == best else ""]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in [head, *lines])


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
