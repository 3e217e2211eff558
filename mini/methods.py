"""The search by surface against the whole grid: what each chose, measured on other images. `make mini-methods`.

python -m mini.methods --out ../results/mini    # in mini/: methods.csv, methods.md, grid.csv
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from mini.plan import Run, runs, titles
from mini.settings import ALL, CHAINS, COMPARED
from neon.cli import command_line
from neon.cli.found import chosen_row
from neon.files import read_json
from neon.measure.compare import fid_difference
from neon.measure.metrics import load_reference
from report.tables import CURVES, as_csv, markdown, read_rows, rows_of, write_all

REFERENCE = "runs/ref/heldout.npz"


def pairs() -> Iterator[tuple[Run, Run]]:
    """The same seed of the same setting, searched by surface and by grid."""
    for name in COMPARED:
        of_grid = {(run.name, run.seed): run for run in runs(f"grid-{name}", ALL[f"grid-{name}"])}
        for run in runs(name, ALL[name]):
            if (run.name, run.seed) in of_grid:
                yield run, of_grid[run.name, run.seed]


def line(surface: Run, grid: Run) -> dict:
    """regret: FID of the surface's choice minus that of the grid's, on the images of `final`; paired_se: its error, se:
    that of the FID itself."""
    neon, features = {}, {}
    for method, run in (("surface", surface), ("grid", grid)):
        neon[method], kept = chosen_row(f"{run.rows('final')}:neon")
        features[method] = kept.load()[1]
    found = fid_difference(features["surface"], features["grid"], load_reference(REFERENCE))
    base = next(row for row in rows_of(grid.rows("final"), final=True) if row["role"] == "base")
    best = read_json(Path(surface.rows("search")).with_suffix(".best.json"))
    columns = {
        "setting": surface.name,
        "seed": surface.seed,
        "evaluations_grid": len(rows_of(grid.rows("search"))),
        "evaluations": best["evaluations"],
        "over_guidance": bool(surface.setting.grid),
        "snapshots": len({row["budget"] for row in rows_of(grid.rows("search"))} - {0}),
    }
    for name in ("w", "budget", "fid"):
        columns |= {f"{name}_{method}": row[name] for method, row in neon.items()}
    regret = {"regret": found.value, "paired_se": found.se, "se": neon["grid"]["fid_se"]}
    return columns | {"w_lo": best["w_lo"], "w_hi": best["w_hi"], "fid_base": base["fid"]} | regret


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A line per setting: evaluations, FIDs, regret, and how many regrets are within one and within three errors."""
    lines = []
    for setting, rows in table.groupby("setting", sort=False):
        within = [int((rows["regret"] <= k * rows["se"]).sum()) for k in (1, 3)]
        lines.append(
            {
                "setting": titles(CHAINS)[setting],
                "seeds": len(rows),
                "evaluations": f"{rows['evaluations'].min()}–{rows['evaluations'].max()}",
                "of the grid": f"{rows['evaluations_grid'].max()}",
                "FID base": rows["fid_base"].mean(),
                "by surface": rows["fid_surface"].mean(),
                "by grid": rows["fid_grid"].mean(),
                "regret": f"{rows['regret'].mean():.2f} (worst {rows['regret'].max():.2f})",
                "within 1 SE": f"{within[0]} of {len(rows)}",
                "within 3 SE": f"{within[1]} of {len(rows)}",
            }
        )
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = list(pairs())
    table = pd.DataFrame([line(*pair) for pair in found])
    grids = {Path(grid.rows("search")): {"setting": grid.name, "seed": 0} for _, grid in found if grid.seed == 0}
    tables = {
        "methods.csv": as_csv(table),
        "methods.md": markdown(summary(table)),
        "grid.csv": as_csv(read_rows(grids), CURVES),
    }
    write_all(args.out, tables)
    print(tables["methods.md"])


if __name__ == "__main__":
    command_line(main)
