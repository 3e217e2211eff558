"""Rows of results → tables: one line per setting, with intervals over seeds.

In every table Neon is the best w > 0 that the seed's search found, or the base itself where no w > 0 was better (w* is
'none', FID Neon is FID base, gain is 0). The self-trained model, w = −1, stands next to it.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from neon import NeonError
from neon.cli import command_line
from neon.files import atomic, existing, read_json
from neon.measure.metrics import t_interval
from neon.measure.rows import Rows

SUMMARY = [
    *("family", "seeds", "w_star", "w_lo", "w_hi", "cfg_star"),
    *("fid_selftrained", "fid_base", "fid_neon", "gain", "gain_lo", "gain_hi"),
    *("precision_base", "precision_neon", "recall_base", "recall_neon", "num_images", "seconds"),
]
CURVES = ["family", "setting", "seed", "w", "cfg", "budget", "fid", "fid_se", "precision", "recall", "n"]
OTHER_NAMES = {"cfg_scale": "cfg"}  # of guidance
ROLES = ["base", "selftrained", "neon"]


# ---------------------------------------------------------------- rows of files


def rows_of(path: str | Path, final: bool = False) -> list[dict]:
    """The rows that `neon search` or `neon final` wrote, or the one of `neon evaluate`, a .json, as role 'released'.

    final: each must have a role. Raises NeonError if there is no such file, or if it holds something else.
    """
    path = existing(path)
    if path.suffix == ".json":
        row = read_json(path)
        if not (isinstance(row, dict) and {"family", "w"} <= row.keys()):
            raise NeonError(f"{path}: holds something other than a row of results")
        return [{"role": "released", **row}]
    rows = list(Rows(path, write=False).rows.values())
    if final and any("role" not in row for row in rows):
        raise NeonError(f"{path}: not what `neon final` wrote")
    return rows


def table_of(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """A line per row. Guidance is the column cfg in every family. Columns that nobody wrote are empty."""
    table = pd.DataFrame([_renamed(row) for row in rows]).drop(columns=["key", "versions"], errors="ignore")
    return table.reindex(columns=[*table.columns, *(name for name in (*CURVES, "num_synthetic") if name not in table)])


def _renamed(row: Mapping[str, object]) -> dict:
    return {OTHER_NAMES.get(name, name): value for name, value in row.items()}


def read_rows(files: Mapping[Path, Mapping[str, object]], final: bool = False) -> pd.DataFrame:
    """Rows of several files, each with the columns given for its file (say, setting and seed). Raises NeonError."""
    rows = [{**row, **columns} for path, columns in files.items() for row in rows_of(path, final)]
    if not rows:
        raise NeonError("no results yet")
    return table_of(rows)


def files(roots: Iterable[Path], kind: str) -> dict[Path, dict]:
    """<root>/<kind>/<setting>/<seed>.jsonl → its setting and seed, in order of seeds. Raises NeonError."""
    found = sorted((p for root in roots for p in root.glob(f"{kind}/*/*.jsonl")), key=lambda p: (seed_of(p), p))
    return {path: {"setting": path.parent.name, "seed": seed_of(path)} for path in found}


def seed_of(path: Path) -> int:
    """The replicate that a file of rows is named by. Raises NeonError."""
    if not path.stem.isdecimal():
        raise NeonError(f"{path}: a file of rows is named by its seed, say 0.jsonl")
    return int(path.stem)


# ---------------------------------------------------------------- tables of rows


def by_role(final: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Final rows of one setting → base, selftrained and neon, each with one line per seed, the same seeds in order.

    Raises NeonError if a role of a seed is missing or there twice.
    """
    setting, counts = final["setting"].iloc[0], final.groupby(["seed", "role"]).size().unstack(fill_value=0)
    for (seed, role), count in counts.reindex(columns=ROLES, fill_value=0).stack().items():
        if count != 1:
            raise NeonError(f"{setting}, seed {seed}: {count} rows of role {role}, not 1; run `neon final --replace`")
    return {role: part.set_index("seed").sort_index() for role, part in final.groupby("role")}


def summarise(final: pd.DataFrame) -> pd.DataFrame:
    """One line per family and setting from the final rows (base, self-trained, Neon) of its seeds: columns SUMMARY.

    gain is FID(base) − FID(Neon), paired within a seed, with its 95 % t-interval over seeds; one seed has none. w_star
    is the median over seeds of the w that each chose on its search images, w_lo the least, w_hi the greatest of them; 0
    stands for 'none', the base is best. Raises NeonError if a seed's rows are not complete.
    """
    lines = []
    for (family, setting), rows in final.groupby(["family", "setting"], sort=False):
        of = by_role(rows)
        base, trained, neon = of["base"], of["selftrained"], of["neon"]
        gain, half = t_interval((base["fid"] - neon["fid"]).to_numpy())
        half = half if math.isfinite(half) else math.nan
        line = {
            "family": family,
            "setting": setting,
            "seeds": len(base),
            "w_star": neon["w"].median(),
            "w_lo": neon["w"].min(),
            "w_hi": neon["w"].max(),
            "cfg_star": neon["cfg"].median(),
            "fid_selftrained": trained["fid"].mean(),
            "gain": gain,
            "gain_lo": gain - half,
            "gain_hi": gain + half,
            "num_images": int(base["n"].iloc[0]),
            "seconds": rows["seconds"].sum(),
        }
        for metric in ("fid", "precision", "recall"):
            line |= {f"{metric}_base": base[metric].mean(), f"{metric}_neon": neon[metric].mean()}
        lines.append(line)
    return pd.DataFrame(lines, columns=["setting", *SUMMARY])


def chosen(w: Iterable[float]) -> str:
    """The w that the seeds chose, for reading: '1.5' if all agree, otherwise '1–2, median 1'; 'none' for the base.

    If the base is best for some seeds, it counts as w = 0: '0–1, median 0 (none in 3 of 5)'.
    """
    w = np.asarray(list(w), dtype=float)
    if (w == w[0]).all():
        return f"{w[0]:g}" if w[0] else "none"
    none = int((w == 0).sum())
    return f"{w.min():g}–{w.max():g}, median {np.median(w):g}" + (f" (none in {none} of {len(w)})" if none else "")


def with_w(settings: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """The lines of `summarise` with the column 'w*' for reading, see `chosen`, in place of w_star. final: its rows."""
    texts = final[final["role"] == "neon"].groupby("setting")["w"].agg(chosen)
    shown = settings.rename(columns={"w_star": "w*"})
    return shown.assign(**{"w*": settings["setting"].map(texts)})


def best_by_budget(search: pd.DataFrame) -> pd.DataFrame:
    """The lowest FID over w >= 0 and γ for every setting, seed, |S| and B; the base has |S| = B = 0.

    Where every merge of a B diverged, its FID is inf.
    """
    keys = ["family", "setting", "seed", "num_synthetic", "budget"]
    rows = search[search["w"] >= 0]
    best = rows["fid"].fillna(math.inf).groupby([rows[key] for key in keys], sort=False).idxmin()
    return search.loc[best].reindex(columns=[*keys, "w", "cfg", "fid", "n"])


def ends(best: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of fid and w at the first, the best and the last B: index setting, num_synthetic, budget.

    best: of `best_by_budget`.
    """
    keys = ["setting", "num_synthetic"]
    mean = best.groupby([*keys, "budget"], sort=False)[["fid", "w"]].mean()
    groups = (part.sort_index() for _, part in mean.groupby(keys, sort=False))
    return pd.concat([part.iloc[sorted({0, part["fid"].argmin(), len(part) - 1})] for part in groups])


def final_table(final: pd.DataFrame) -> pd.DataFrame:
    """For reading, a line per setting: FIDs and gain, mean ± half of the 95 % interval; means of other metrics.

    w* as `chosen` writes it; gain is paired within a seed; one seed has no interval. Raises NeonError as `summarise`.
    """
    lines = []
    for setting, rows in final.groupby("setting", sort=False):
        of = by_role(rows)
        fids = {
            "FID w = −1": of["selftrained"]["fid"],
            "FID base": of["base"]["fid"],
            "FID Neon": of["neon"]["fid"],
            "gain": of["base"]["fid"] - of["neon"]["fid"],
        }
        line = {"setting": setting, "seeds": len(of["base"]), "w*": chosen(of["neon"]["w"])}
        line |= {name: _interval(values) for name, values in fids.items()}
        for metric in ("precision", "recall"):
            means = [of[role][metric].mean() for role in ("base", "neon")]
            line[metric] = "" if any(map(math.isnan, means)) else " → ".join(map("{:.3f}".format, means))
        lines.append(line)
    return pd.DataFrame(lines)


def _interval(values: pd.Series) -> str:
    mean, half = t_interval(values.to_numpy())
    return f"{mean:.3g} ± {half:.2g}" if math.isfinite(half) else f"{mean:.3g}"


# ---------------------------------------------------------------- files of tables


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A GitHub table; floats with `digits` significant digits."""
    cells = table.map(lambda v: f"{v:.{digits}g}" if isinstance(v, float) else str(v)).replace("nan", "")
    lines = [list(table.columns), ["---"] * len(table.columns), *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_csv(table: pd.DataFrame, columns: Iterable[str] | None = None) -> str:
    """These columns (default: all) with five digits; 'inf' is read back as infinity, an empty field as NaN."""
    return table.reindex(columns=columns).to_csv(index=False, float_format="%.5g")


def write_all(folder: Path, tables: Mapping[str, str]) -> None:
    """Name → text, each written whole or not at all."""
    for name, text in tables.items():
        with atomic(folder / name) as partial:
            partial.write_text(text)


def read_titles(path: Path) -> dict[str, str]:
    """Setting → title, in order, from the YAML file's entry `titles`. Raises NeonError."""
    try:
        return dict(yaml.safe_load(existing(path).read_text())["titles"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise NeonError(f"{path}: not YAML with an entry `titles`, setting: title") from None


def read_ordered(roots: Iterable[Path], kind: str, titles: Mapping[str, str]) -> pd.DataFrame:
    """All rows of that kind under the folders, in the order of the titles. Raises NeonError."""
    table, order = read_rows(files(roots, kind), kind == "final"), list(titles)
    if missing := sorted(set(table["setting"]) - set(order)):
        raise NeonError(f"no title for {', '.join(missing)}")
    return table.sort_values("setting", key=lambda c: c.map(order.index), kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="folders of searches and final evaluations")
    parser.add_argument("--titles", type=Path, required=True, help="YAML file: `titles` of the settings, in order")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    titles = read_titles(args.titles)
    search, final = (read_ordered(args.rows, kind, titles) for kind in ("search", "final"))
    settings = summarise(final)
    tables = {
        "search.csv": as_csv(search[search["setting"].isin(final["setting"])], CURVES),  # others vary B and |S| only
        "final.csv": as_csv(final, ["role", *CURVES]),
        "budget.csv": as_csv(best_by_budget(search)),
        "settings.csv": as_csv(settings),
        "summary.csv": as_csv(settings.drop_duplicates("family"), SUMMARY),  # a family's first setting
        "table.md": markdown(final_table(final.replace({"setting": titles}))),
        "titles.json": json.dumps(titles, indent=1),
    }
    write_all(args.out, tables)
    print(tables["table.md"])


if __name__ == "__main__":
    command_line(main)
