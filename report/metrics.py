"""Rows of results → what `dvc metrics show` and `dvc plots show` read.

python -m report.metrics metrics ROWS OUT.json    role → FID and the other metrics, with w and guidance
python -m report.metrics curve   ROWS OUT.csv     the best row at each w, whatever its B and guidance
"""

import json
import sys
from pathlib import Path

import pandas as pd

from neon.files import atomic, write_json
from neon.measure.rows import Rows

METRICS = ("fid", "fid_se", "is", "precision", "recall")


def rows_of(path: Path) -> list[dict]:
    """The rows of `neon search` and `neon final`, or the one of `neon evaluate`, as role 'released'."""
    if path.suffix == ".json":
        return [{"role": "released", **json.loads(path.read_text())}]
    return list(Rows(path, write=False).rows.values())


def metrics(rows: list[dict]) -> dict[str, dict[str, float]]:
    shown = (*METRICS, "w", "cfg", "cfg_scale", "budget")
    return {row["role"]: {name: row[name] for name in shown if name in row} for row in rows}


def curve(rows: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    best = table.loc[table.groupby("w")["fid"].idxmin()]
    return best[[name for name in ("w", *METRICS, "cfg", "cfg_scale", "budget") if name in best]]


if __name__ == "__main__":
    kind, source, out = sys.argv[1:]
    rows = rows_of(Path(source))
    if kind == "metrics":
        write_json(out, metrics(rows))
    else:
        with atomic(out) as partial:
            curve(rows).to_csv(partial, index=False, float_format="%.6g")
