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
from neon.files import atomic, existing, read_object, reading, regular
from neon.measure.evaluate import title
from neon.measure.metrics import t_interval
from neon.measure.rows import Rows, need, row_of

SUMMARY = [
    *("family", "seeds", "w_star", "w_lo", "w_hi", "cfg_star"),
    *("fid_selftrained", "fid_base", "fid_neon", "gain", "gain_lo", "gain_hi"),
    *("precision_base", "precision_neon", "recall_base", "recall_neon", "density_base", "density_neon"),
    *("coverage_base", "coverage_neon", "kid_base", "kid_neon", "num_images", "seconds"),
]
CURVES = ["family", "setting", "seed", "w", "cfg", "budget", "fid", "fid_se", "precision", "recall", "n"]
MORE = ["density", "coverage", "kid", "authpct", "mind"]  # columns where rows have them
# Metrics for reading next to FID: name, form of a number.
READ = {name: (name, ".3f") for name in ("precision", "recall", "density", "coverage")}
READ |= {"kid": ("KID", ".3g"), "authpct": ("AuthPct", ".1f"), "mind": ("MIND", ".3g")}
PREDICTED = ["family", "setting", "seed", "w", "cfg", "budget", "fid", "fid_se"]
BEST = ["setting", "seed", "w", "w_lo", "w_hi"]
OTHER_NAMES = {"cfg_scale": "cfg"}  # of guidance
ROLES = ["base", "selftrained", "neon"]
IN_WORDS = {"base": "base (w = 0)", "selftrained": "self-trained (w = −1)", "neon": "Neon (w*)"}  # roles


# ---------------------------------------------------------------- rows of files


def rows_of(path: str | Path, final: bool = False) -> list[dict]:
    """The rows that `neon search` or `neon final` wrote, or the one of `neon evaluate`, a .json, as role 'released'.

    final: each must have a role. Raises NeonError if there is no such file, or if it holds something else.
    """
    path = existing(path)
    if path.suffix == ".json":
        row = row_of(path)
        need([row], ("family", "w"), path)
        return [{"role": "released", **row}]
    rows = list(Rows(path, write=False).rows.values())
    need(rows, ("family", "w", "fid"), path)
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


def more(table: pd.DataFrame) -> list[str]:
    """The metrics of MORE that some row holds."""
    return [metric for metric in MORE if metric in table and table[metric].notna().any()]


def read_curves(files: Mapping[Path, Mapping[str, object]]) -> pd.DataFrame:
    """What searches by a surface predict: X.curve.csv next to the rows X.jsonl, as far as there. Columns PREDICTED.

    Raises NeonError if a file holds something else.
    """
    parts = [_curve(path, columns) for path, columns in files.items() if beside(path, "curve.csv").exists()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=PREDICTED)


def _curve(rows: Path, columns: Mapping[str, object]) -> pd.DataFrame:
    path = beside(rows, "curve.csv")
    with reading(path, "holds something other than a predicted curve"):
        curve = pd.read_csv(regular(path)).rename(columns=OTHER_NAMES)
        curve["w"] = curve["w"].astype(float).round(10) + 0.0  # no −0
        curve[["budget", "fid"]] = curve[["budget", "fid"]].astype(float)
    family = next((row["family"] for row in rows_of(rows)), None)
    return curve.assign(family=family, **columns).reindex(columns=PREDICTED)


def read_best(files: Mapping[Path, Mapping[str, object]]) -> pd.DataFrame:
    """Each seed's best w and its interval, from X.best.json next to the rows X.jsonl, as far as there. Columns BEST."""
    found = [
        {**_best(path), **columns} for rows, columns in files.items() if (path := beside(rows, "best.json")).exists()
    ]
    return pd.DataFrame(found).reindex(columns=BEST).dropna()


def _best(path: Path) -> dict:
    found = read_object(path)
    if wrong := [name for name in ("w", "w_lo", "w_hi") if type(found.get(name, 0.0)) not in (int, float)]:
        raise NeonError(f"{path}: its {wrong[0]} is no number")
    return found


def beside(rows: Path, name: str) -> Path:
    """X.jsonl → X.NAME, another file of the same search."""
    return rows.with_name(f"{rows.stem}.{name}")


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
        for metric in ("fid", "precision", "recall", "density", "coverage", "kid"):
            line |= {f"{metric}_base": _mean(base, metric), f"{metric}_neon": _mean(neon, metric)}
        lines.append(line)
    return pd.DataFrame(lines, columns=["setting", *SUMMARY])


def _mean(rows: pd.DataFrame, metric: str) -> float:
    """Over seeds; NaN where nobody measured it."""
    return rows[metric].mean() if metric in rows else math.nan


def chosen(w: Iterable[float]) -> str:
    """The w that the seeds chose, for reading: '1.5' if all agree, otherwise '1–2, median 1'; 'none' for the base.

    If the base is best for some seeds, it counts as w = 0: '0–1, median 0 (none in 3 of 5)'.
    """
    w = np.asarray(list(w), dtype=float)
    none = int((w == 0).sum())
    if none == len(w):
        return "none"
    return spread_in_words(w) + (f" (none in {none} of {len(w)})" if none else "")


def spread_in_words(values: np.ndarray) -> str:
    """'1.5' if all agree, otherwise range and median: '1–2, median 1'."""
    if (values == values[0]).all():
        return f"{values[0]:.3g}"
    return f"{values.min():.3g}–{values.max():.3g}, median {np.median(values):.3g}"


def best_by_budget(search: pd.DataFrame) -> pd.DataFrame:
    """The lowest FID over w >= 0 and γ for every setting, seed, |S| and B; the base has |S| = B = 0.

    Where every merge of a B diverged, its FID is inf.
    """
    keys = ["family", "setting", "seed", "num_synthetic", "budget"]
    rows = search[search["w"] >= 0]
    best = rows["fid"].fillna(math.inf).groupby([rows[key] for key in keys], sort=False).idxmin()
    return search.loc[best].reindex(columns=[*keys, "w", "cfg", "fid", "n"])


def ends(best: pd.DataFrame) -> pd.DataFrame:
    """The first, the best and the last B: mean FID over seeds and w as `chosen` writes it.

    best: of `best_by_budget`. Columns setting, num_synthetic, budget, fid, w.
    """
    keys = ["setting", "num_synthetic"]
    groups = best.groupby([*keys, "budget"], sort=False)
    mean = groups.agg(fid=("fid", "mean"), w=("w", chosen)).reset_index()
    parts = (part.sort_values("budget") for _, part in mean.groupby(keys, sort=False))
    return pd.concat([part.iloc[sorted({0, part["fid"].argmin(), len(part) - 1})] for part in parts])


def ends_table(best: pd.DataFrame, titles: Mapping[str, str] | None = None) -> pd.DataFrame:
    """For reading, `ends` with the settings' titles."""
    shown = ends(best)
    names = {"num_synthetic": "|S|", "budget": "B", "fid": "best FID", "w": "its w"}
    return shown.assign(setting=[titled(name, titles) for name in shown["setting"]]).rename(columns=names)


def copies_table(copies: pd.DataFrame, titles: Mapping[str, str] | None = None) -> pd.DataFrame:
    """For reading: shares of samples that copy a training image, in per cent, mean and greatest over seeds.

    copies: columns setting, role, copies.
    """
    shares = (100 * copies.groupby(["setting", "role"], sort=False)["copies"].agg(["mean", "max"])).reset_index()
    shares = shares.assign(
        setting=[titled(name, titles) for name in shares["setting"]], role=shares["role"].map(IN_WORDS)
    )
    return shares.rename(columns={"role": "model", "mean": "mean, %", "max": "greatest, %"})


def final_table(final: pd.DataFrame, titles: Mapping[str, str] | None = None, guidance: bool = False) -> pd.DataFrame:
    """For reading, a line per setting: FIDs and gain, mean ± half of the 95 % interval; other metrics of base → Neon.

    Precision and recall have a column, those of MORE where some row holds them: means over seeds, empty where a setting
    lacks them. FID is named by its features, if the rows say these. w* as `chosen` writes it; gain is paired within a
    seed; one seed has no interval. guidance: with the γ that the seeds chose for base and Neon. Raises NeonError as
    `summarise`.
    """
    lines, fid = [], title("fid", str(final["features"].iloc[0]) if "features" in final else "")
    for setting, rows in final.groupby("setting", sort=False):
        of = by_role(rows)
        fids = {
            f"{fid} w = −1": of["selftrained"]["fid"],
            f"{fid} base": of["base"]["fid"],
            f"{fid} Neon": of["neon"]["fid"],
            "gain": of["base"]["fid"] - of["neon"]["fid"],
        }
        line = {"setting": titled(setting, titles), "seeds": len(of["base"]), "w*": chosen(of["neon"]["w"])}
        if guidance:
            line |= {f"γ {name}": _guidance(of[role]) for role, name in (("base", "of base"), ("neon", "of Neon"))}
        line |= {name: _interval(values) for name, values in fids.items()}
        lines.append(line | {READ[metric][0]: _moved(of, metric) for metric in ("precision", "recall", *more(final))})
    return pd.DataFrame(lines)


def _moved(of: Mapping[str, pd.DataFrame], metric: str) -> str:
    """'0.876 → 0.955': how the mean moved from the base to Neon."""
    _, form = READ[metric]
    means = [_mean(of[role], metric) for role in ("base", "neon")]
    return "" if any(map(math.isnan, means)) else " → ".join(f"{mean:{form}}" for mean in means)


Model = tuple[str, str]  # a setting and a role


def compared(final: pd.DataFrame, pairs: Iterable[tuple[Model, Model]], titles: Mapping[str, str]) -> pd.DataFrame:
    """For reading: reported FID of two models of different settings or roles, and the difference within a seed.

    It has its 95 % interval over the seeds that both have. Raises NeonError if they have none in common.
    """
    lines = []
    for pair in pairs:
        fids = [fid_of(final, *model) for model in pair]
        names = [f"{titled(setting, titles)}: {IN_WORDS[role]}" for setting, role in pair]
        difference = (fids[0] - fids[1]).dropna()
        values = [f"{fid.mean():.3g}" for fid in fids]
        lines.append([names[0], values[0], names[1], values[1], _interval(difference)])
    return pd.DataFrame(lines, columns=["first", "FID", "second", "FID ", "first − second, paired"])


def fid_of(final: pd.DataFrame, setting: str, role: str) -> pd.Series:
    """Seed → reported FID."""
    rows = final[(final["setting"].astype(str) == setting) & (final["role"] == role)]
    return rows.set_index("seed")["fid"]


def titled(setting: object, titles: Mapping[str, str] | None) -> str:
    """A setting's title; its own name if it has none."""
    return (titles or {}).get(str(setting), str(setting))


def _guidance(rows: pd.DataFrame) -> str:
    return "" if rows["cfg"].isna().any() else spread_in_words(rows["cfg"].to_numpy())


def _interval(values: pd.Series) -> str:
    mean, half = t_interval(values.to_numpy())
    return f"{mean:.3g} ± {half:.2g}" if math.isfinite(half) else f"{mean:.3g}"


# ---------------------------------------------------------------- files of tables


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A GitHub table; floats with `digits` significant digits."""
    cells = table.map(lambda v: f"{v:.{digits}g}" if isinstance(v, float) else str(v)).replace("nan", "")
    cells = cells.map(lambda text: text.replace("|", "\\|"))
    lines = [
        [str(name).replace("|", "\\|") for name in table.columns],
        ["---"] * len(table.columns),
        *cells.to_numpy().tolist(),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_csv(table: pd.DataFrame, columns: Iterable[str] | None = None) -> str:
    """These columns (default: all) with five digits; 'inf' is read back as infinity, an empty field as NaN."""
    return table.reindex(columns=columns).to_csv(index=False, float_format="%.5g")


def write_all(folder: Path, tables: Mapping[str, str]) -> None:
    """Name → text, each written whole or not at all."""
    for name, text in tables.items():
        with atomic(folder / name) as partial:
            partial.write_text(text)


def read_table(path: Path) -> pd.DataFrame | None:
    """A table of results; None if it is not there or has no lines."""
    with reading(path, "not a table"):
        table = pd.read_csv(regular(path)) if path.exists() else pd.DataFrame()
    return None if table.empty else table


def read_titles(path: Path) -> dict[str, str]:
    """Setting → title, in order, from the YAML file's entry `titles`. Raises NeonError."""
    with reading(path, "not YAML with an entry `titles`, setting: title"):
        return dict(yaml.safe_load(regular(path).read_text())["titles"])


def read_ordered(roots: Iterable[Path], kind: str, titles: Mapping[str, str]) -> pd.DataFrame:
    """All rows of that kind under the folders, in the order of the titles. Raises NeonError."""
    table = read_rows(files(roots, kind), kind == "final")
    if missing := sorted(set(table["setting"]) - set(titles)):
        raise NeonError(f"no title for {', '.join(missing)}")
    return in_order(table, titles)


def in_order(table: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """The lines in the order of the titles of their settings."""
    return table.sort_values("setting", key=lambda c: c.map(list(titles).index), kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="folders of searches and final evaluations")
    parser.add_argument("--titles", type=Path, required=True, help="YAML file: `titles` of the settings, in order")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    titles = read_titles(args.titles)
    search, final = (read_ordered(args.rows, kind, titles) for kind in ("search", "final"))
    searched = {path: to for path, to in files(args.rows, "search").items() if to["setting"] in set(final["setting"])}
    shown = search[search["setting"].isin(final["setting"])]  # others vary B and |S| only
    settings = summarise(final)
    tables = {
        "search.csv": as_csv(shown, [*CURVES, *more(shown)]),
        "curves.csv": as_csv(in_order(read_curves(searched), titles)),
        "best.csv": as_csv(in_order(read_best(searched), titles)),
        "final.csv": as_csv(final, ["role", *CURVES, *more(final)]),
        "budget.csv": as_csv(best_by_budget(search)),
        "settings.csv": as_csv(settings),
        "summary.csv": as_csv(settings.drop_duplicates("family"), SUMMARY),  # a family's first setting
        "table.md": markdown(final_table(final, titles)),
        "titles.json": json.dumps(titles, indent=1),
    }
    write_all(args.out, tables)
    print(tables["table.md"])


if __name__ == "__main__":
    command_line(main)
