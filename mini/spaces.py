"""How much of the gain is the metric's? Chosen by one feature space and judged by another: `make mini-controls`.

python -m mini.spaces --out ../results/mini    # in mini/: spaces.csv, spaces.md
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from mini.plan import Run, runs, titles
from mini.settings import CHAINS, SPACES
from neon.cli import command_line
from neon.measure.metrics import t_interval
from report.tables import as_csv, markdown, rows_of, write_all

COLUMNS = ["family", "setting", "seed", "chosen_by", "judged_by", "role", "w", "cfg", "fid", "fid_se"]
FIRST, SECOND = "digits", "second"


def judged(run: Run) -> dict[tuple[str, str], str]:
    """(chosen by, judged by) → file of final rows."""
    return {
        (FIRST, FIRST): run.of(run.setting.of).rows("final"),
        (FIRST, SECOND): run.rows("final-second"),
        (SECOND, FIRST): run.rows("final-first"),
        (SECOND, SECOND): run.rows("final"),
    }


def lines() -> Iterator[dict]:
    for name, chain in SPACES.items():
        for run in runs(name, chain):
            for (chosen_by, judged_by), path in judged(run).items():
                how = {"setting": run.name, "seed": run.seed, "chosen_by": chosen_by, "judged_by": judged_by}
                yield from ({**row, "cfg": row.get("cfg", row.get("cfg_scale")), **how} for row in rows_of(path, True))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A line per setting: the gain as each space sees it, by who chose, in per cent of the base, with its interval."""
    fids = table.pivot(index=["setting", "seed", "chosen_by", "judged_by"], columns="role", values="fid")
    share = 100 * (fids["base"] - fids["neon"]) / fids["base"]
    found = []
    for setting in table["setting"].unique():
        line = {"setting": titles(CHAINS)[setting], "seeds": table[table["setting"] == setting]["seed"].nunique()}
        for judged_by in (FIRST, SECOND):
            for chosen_by in (FIRST, SECOND):
                gains = share.xs((setting, chosen_by, judged_by), level=("setting", "chosen_by", "judged_by"))
                mean, half = t_interval(gains.to_numpy())
                line[f"judged by {judged_by}, chosen by {chosen_by}"] = f"{mean:.0f} ± {half:.0f} %"
        found.append(line)
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    table = pd.DataFrame(list(lines())).reindex(columns=COLUMNS).sort_values("setting", kind="stable")
    tables = {"spaces.csv": as_csv(table), "spaces.md": markdown(summary(table))}
    write_all(args.out, tables)
    print(tables["spaces.md"])


if __name__ == "__main__":
    command_line(main)
