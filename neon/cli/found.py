"""What `neon search --method surface` writes and prints at its end, and rows that are compared."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from neon import NeonError
from neon.files import atomic, existing
from neon.measure.compare import Difference
from neon.measure.kept import Kept, folder_of
from neon.measure.rows import Rows, need, row_of
from neon.surface import Found, SurfaceSearch


def record(search: SurfaceSearch, found: Found, n: int, grid: int) -> dict:
    """The chosen point, intervals around the lowest point of the surface, and the cost: JSON values.

    n: images of an evaluation; grid: evaluations of the grid that the surface is in place of.
    """
    best, lowest, budgets = found.best, found.lowest, search.space.budgets
    chosen = {"w": best.point.w, **dict(best.point.sampling)}
    result = {}
    for name, value in chosen.items():
        low, high = found.intervals[name]
        result |= {name: value, f"{name}_lo": low, f"{name}_hi": high}
    result |= {"budget": budgets.get(best.point.selftrained, 0)}
    result |= dict(zip(("budget_lo", "budget_hi"), found.budgets))
    return result | {
        "selftrained": best.point.selftrained,
        "fid": best.fid,
        "fid_se": best.se,
        **{f"lowest_{name}": value for name, value in {"w": lowest.w, **dict(lowest.sampling)}.items()},
        "lowest_fid": found.fid,
        "at_edge": found.at_edge,
        "n": n,
        "evaluations": len(search.nodes),
        "images": len(search.nodes) * n,
        "grid_evaluations": grid,
    }


def lines(best: Mapping, options: Sequence[str]) -> list[str]:
    """`record` for people."""
    shown = [_interval(best, name) for name in ("w", *options)]
    if best["budget_lo"] < best["budget_hi"]:
        shown.append(_interval(best, "budget", "B"))
    note = "" if best["w"] else "  (the base: no w > 0 is better)"
    text = [
        f"best: {'  '.join(shown)}  FID {best['fid']:.4g} ± {best['fid_se']:.2g}{note}",
        f"{best['evaluations']} evaluations, {best['images']:,} images; a grid of {best['grid_evaluations']:,} points"
        f" would take {best['grid_evaluations'] * best['n']:,}",
    ]
    if best["at_edge"]:
        text.append("w is at the end of its range: widen -w; if that does not help, change the budget of θ_s")
    return text


def _interval(best: Mapping, name: str, title: str = "") -> str:
    digits = ".0f" if name == "budget" else ".3g"
    return f"{title or name} {best[name]:g} ({best[f'{name}_lo']:{digits}} to {best[f'{name}_hi']:{digits}})"


def verdict(one: str, other: str, difference: Difference) -> str:
    """Which has the lower FID, in words."""
    low, high = difference.interval
    better = (
        f"{one} is better" if high < 0 else f"{other} is better" if low > 0 else "no difference that this many show"
    )
    return f"FID of {one} minus {other}: {difference.value:.4g} ({low:.4g} to {high:.4g}): {better}"


def chosen_row(text: str) -> tuple[dict, Kept]:
    """'x.json', 'x.jsonl:ROLE', 'x.jsonl:best' or 'x.jsonl:NUMBER' → a row and its features. Raises NeonError."""
    path, which = (text, "") if Path(text).exists() or ":" not in text else text.rpartition(":")[::2]
    path = existing(path)
    rows = [row_of(path)] if path.suffix == ".json" else list(Rows(path, write=False).rows.values())
    need(rows, ("fid", "features", "reference"), path)
    known = {str(i): row for i, row in enumerate(rows)} | {row["role"]: row for row in rows if "role" in row}
    finite = [row for row in rows if math.isfinite(row["fid"])]
    known |= {"best": min(finite, key=lambda row: row["fid"])} if finite else {}
    known |= {"": rows[0]} if len(rows) == 1 else {}
    if which not in known:
        raise NeonError(f"{text}: say which row, {path}:NAME with NAME of {', '.join(filter(None, known))}")
    row = known[which]
    if "kept" not in row:
        raise NeonError(f"{text}: measured without keeping its features; measure it again")
    if Path(row["kept"]).name != row["kept"]:
        raise NeonError(f"{text}: its features are {row['kept']!r}, which is no file in {folder_of(path)}")
    return row, Kept(folder_of(path) / row["kept"])


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """Columns are those of the first row; None is an empty field."""
    with atomic(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounded(rows))


def rounded(rows: Iterable[Mapping]) -> Iterable[dict]:
    for row in rows:
        yield {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items()}
