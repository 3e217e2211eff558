"""Rows of results → what `dvc metrics show` and `dvc plots show` read.

python -m report.metrics metrics ROWS OUT.json    role → FID and the other metrics, with w and guidance
python -m report.metrics curve   ROWS OUT.csv     the best row at each w, whatever its B and guidance; ROWS may be the
                                                  .curve.csv of a search by surface
python -m report.metrics summary SUMMARY.csv OUT.json    family → what report.tables found of its first setting
"""

import argparse
from collections.abc import Sequence

import pandas as pd

from neon import NeonError
from neon.cli import command_line
from neon.files import atomic, regular, write_json
from report.tables import rows_of, table_of

SUMMARY = ["fid_base", "fid_neon", "fid_selftrained", "gain", "w_star"]
NUMBERS = ("w", "fid", *SUMMARY)  # columns
METRICS = ("fid", "fid_se", "is", "precision", "recall")


def metrics(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Role (base, selftrained, neon or released) → its metrics, as far as measured."""
    shown = [name for name in (*METRICS, "w", "cfg", "budget") if name in table]
    lines = zip(table["role"], table[shown].to_dict("records"))
    return {role: {name: value for name, value in line.items() if pd.notna(value)} for role, line in lines}


def curve(table: pd.DataFrame) -> pd.DataFrame:
    """The row of the lowest FID at each w, in order of w. A w at which every merge diverged is left out.

    Raises NeonError if none is left.
    """
    finite = table[table["fid"].abs() < float("inf")]
    if finite.empty:
        raise NeonError("no finite FID in these rows")
    best = finite.loc[finite.groupby("w")["fid"].idxmin()]
    return best[[name for name in ("w", *METRICS, "cfg", "budget") if name in best]].dropna(axis="columns", how="all")


def summary(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Family → FIDs, gain and w* of a summary.csv."""
    lines = table.set_index("family")[SUMMARY]
    return {family: line.dropna().to_dict() for family, line in lines.iterrows()}


def read_csv(path: str, columns: Sequence[str]) -> pd.DataFrame:
    """The table of a file that has these columns. Raises NeonError."""
    try:
        table = pd.read_csv(regular(path))
    except NeonError:
        raise
    except Exception:  # of pandas and of decoding
        table = pd.DataFrame()
    if missing := [name for name in columns if name not in table]:
        raise NeonError(f"{path}: no table with a column {missing[0]}")
    if wrong := [name for name in columns if name in NUMBERS and not pd.api.types.is_numeric_dtype(table[name])]:
        raise NeonError(f"{path}: its column {wrong[0]} does not hold numbers")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["metrics", "curve", "summary"])
    parser.add_argument("rows", help="what `neon search`, `neon final`, `neon evaluate` or report.tables wrote")
    parser.add_argument("out", help=".json or .csv")
    args = parser.parse_args()
    if args.kind == "summary" or args.rows.endswith(".csv"):
        table = read_csv(
            args.rows, {"metrics": ["role"], "curve": ["w", "fid"], "summary": ["family", *SUMMARY]}[args.kind]
        )
    else:
        table = table_of(rows_of(args.rows, final=args.kind == "metrics"))
    if args.kind != "curve":
        write_json(args.out, {"metrics": metrics, "summary": summary}[args.kind](table))
    else:
        text = curve(table).to_csv(index=False, float_format="%.6g")
        with atomic(args.out) as partial:
            partial.write_text(text)


if __name__ == "__main__":
    command_line(main)
