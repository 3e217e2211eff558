"""How good are the bases? Their distance to the test images next to that of training images and of class means.

python -m fashion.levels --results ../results/fashion    # in fashion/: levels.csv and levels.md, from final.csv
"""

import argparse
from pathlib import Path

import pandas as pd

from neon import NeonError
from neon.cli import command_line
from neon.measure.evaluate import title
from neon.measure.rows import row_of
from report.tables import IN_WORDS, as_csv, markdown, read_table, read_titles, titled, write_all

BASELINES = {"train": "training images", "means": "the mean image of each class"}
METRICS = ["fid", "precision", "recall", "density", "coverage"]
ROLES = ["base", "neon"]


def levels(results: Path, titles: dict[str, str]) -> tuple[pd.DataFrame, str]:
    """A line per image set and per model, means over seeds: columns images, n, METRICS; and the distance's name.

    Raises NeonError if the baselines and the models are not of equally many images.
    """
    rows = {name: row_of(results / f"baselines/{name}.json") for name in BASELINES}
    lines = [{**row, "images": BASELINES[name]} for name, row in rows.items()]
    final = read_table(results / "final.csv")
    if final is not None:
        measured = [metric for metric in METRICS if metric in final]
        found = final.groupby(["setting", "role"], sort=False)[["n", *measured]].mean()
        for setting in final["setting"].unique():
            names = {role: f"{titled(setting, titles)}: {IN_WORDS[role]}" for role in ROLES}
            lines += [{"images": names[role], **found.loc[(setting, role)]} for role in ROLES]
    table = pd.DataFrame(lines).reindex(columns=["images", "n", *METRICS]).astype({"n": int})
    if table["n"].nunique() > 1:
        raise NeonError(f"{results}: distances of {sorted(table['n'].unique())} images do not compare")
    return table, title("fid", rows["train"]["features"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--titles", type=Path, default=Path("runs/plan/fashion.yaml"))
    args = parser.parse_args()
    table, distance = levels(args.results, read_titles(args.titles))
    shown = markdown(table.rename(columns={"fid": distance}))
    write_all(args.results, {"levels.csv": as_csv(table), "levels.md": shown})
    print(shown)


if __name__ == "__main__":
    command_line(main)
