"""Rows of results → what `dvc metrics show` and `dvc plots show` read.

python -m report.metrics metrics ROWS OUT.json    role → FID and the other metrics, with w and guidance
python -m report.metrics curve   ROWS OUT.csv     the best row at each w, whatever its B and guidance; ROWS may be the
                                                  .curve.csv of a search by surface
"""

import argparse

import pandas as pd

from neon import NeonError
from neon.cli import command_line
from neon.files import atomic, write_json
from report.tables import rows_of, table_of

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["metrics", "curve"])
    parser.add_argument("rows", help="what `neon search`, `neon final` or `neon evaluate` wrote")
    parser.add_argument("out", help=".json or .csv")
    args = parser.parse_args()
    surface = args.rows.endswith(".csv")
    table = pd.read_csv(args.rows) if surface else table_of(rows_of(args.rows, final=args.kind == "metrics"))
    if args.kind == "metrics":
        write_json(args.out, metrics(table))
    else:
        text = curve(table).to_csv(index=False, float_format="%.6g")
        with atomic(args.out) as partial:
            partial.write_text(text)


if __name__ == "__main__":
    command_line(main)
