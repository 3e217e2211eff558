"""How much of the gain is the metric's? Chosen by one feature space and judged by another: `make mini-controls`.

python -m mini.spaces --out ../results/mini    # in mini/: spaces.csv, spaces.md
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from mini.plan import Run, runs, titles
from mini.settings import CHAINS, SPACES
from neon.cli import command_line
from neon.measure.metrics import t_interval
from report.tables import as_csv, markdown, rows_of, write_all

COLUMNS = ["family", "setting", "seed", "chosen_by", "judged_by", "role", "w", "cfg", "fid", "fid_se"]
FIRST, SECOND = "digits", "second"
Names = tuple[str, str]  # of the first features and of the second, in the tables


def judged(run: Run, names: Names) -> dict[tuple[str, str], str]:
    """(chosen by, judged by) → file of final rows."""
    first, second = names
    return {
        (first, first): run.of(run.setting.of).rows("final"),
        (first, second): run.rows("final-second"),
        (second, first): run.rows("final-first"),
        (second, second): run.rows("final"),
    }


def lines(of: Iterable[Run], names: Names) -> Iterator[dict]:
    for run in of:
        for (chosen_by, judged_by), path in judged(run, names).items():
            how = {"setting": run.name, "seed": run.seed, "chosen_by": chosen_by, "judged_by": judged_by}
            yield from ({**row, "cfg": row.get("cfg", row.get("cfg_scale")), **how} for row in rows_of(path, True))


def summary(table: pd.DataFrame, titles: Mapping[str, str], names: Names) -> pd.DataFrame:
    """A line per setting: the gain as each space sees it, by who chose, in per cent of the base, with its interval."""
    fids = table.pivot(index=["setting", "seed", "chosen_by", "judged_by"], columns="role", values="fid")
    share = 100 * (fids["base"] - fids["neon"]) / fids["base"]
    found = []
    for setting in table["setting"].unique():
        line = {"setting": titles[setting], "seeds": table[table["setting"] == setting]["seed"].nunique()}
        for judged_by in names:
            for chosen_by in names:
                gains = share.xs((setting, chosen_by, judged_by), level=("setting", "chosen_by", "judged_by"))
                mean, half = t_interval(gains.to_numpy())
                line[f"judged by {judged_by}, chosen by {chosen_by}"] = f"{mean:.0f} ± {half:.0f} %"
        found.append(line)
    return pd.DataFrame(found)


def write(out: Path, of: Iterable[Run], titles: Mapping[str, str], names: Names = (FIRST, SECOND)) -> None:
    """spaces.csv and spaces.md, which is also printed."""
    table = pd.DataFrame(list(lines(of, names))).reindex(columns=COLUMNS).sort_values("setting", kind="stable")
    tables = {"spaces.csv": as_csv(table), "spaces.md": markdown(summary(table, titles, names))}
    write_all(out, tables)
    print(tables["spaces.md"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    of = [run for name, chain in SPACES.items() for run in runs(name, chain)]
    write(parser.parse_args().out, of, titles(CHAINS))


if __name__ == "__main__":
    command_line(main)
