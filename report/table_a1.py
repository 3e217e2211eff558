"""Table A.1 of the paper next to what was measured here, and the tables that the notebooks read.

Takes the results that there are; the others are 'not measured'.
"""

import argparse
import json
import math
from pathlib import Path

import pandas as pd
import yaml

from neon.cli import command_line
from report.tables import (
    CURVES,
    ROLES,
    as_csv,
    best_by_budget,
    final_table,
    markdown,
    more,
    read_best,
    read_curves,
    rows_of,
    summarise,
    table_of,
    write_all,
)

ROOT = Path(__file__).parent.parent
TITLES = {
    "cifar10": "(a) CIFAR-10",
    "ffhq64": "(b) FFHQ-64",
    "imagenet256": "(c) ImageNet-256",
    "imagenet512": "(d) ImageNet-512",
}
NOT_MEASURED = "not measured"
RERUN = ["fid_rerun", "fid_rerun_se", "fid_rerun_min"]
METRICS = ["fid", "is", "precision", "recall", "kid"]
KINDS = {"cond": "conditional", "uncond": "unconditional"}
# What a number of the paper does not say by itself: (benchmark, model) → a footnote.
NOTES = {
    ("imagenet256", "VAR-d16"): "At its published guidance. By guidance alone this base reaches 3.01.",
    ("imagenet256", "VAR-d16 + DDO"): "With guidance; 3.12 without (arXiv 2503.01103).",
    (
        "imagenet256",
        "VAR-d30 + DDO",
    ): "Without guidance, next to the guided VAR-d16; 1.73 with guidance (arXiv 2503.01103).",
}
MARKS = dict(zip(NOTES, "¹²³"))


def found(folder: Path, kind: str, params: dict) -> dict[str, list[dict]]:
    """Name → the rows of its files, each with the seed of its fine-tune; names without a file are left out.

    The files of the seeds in params: rows/released/<name>.json, rows/search/<name>/<seed>.jsonl,
    rows/final/<name>/<seed>/<images>.jsonl. Others are of earlier values of these.
    """
    root, seeds = folder / "rows" / kind, params["seeds"]
    sets, rows = [seeds["final"], *seeds["more"].split()], {}
    for name, item in params["released" if kind == "released" else "points"].items():
        for seed in str(seeds["selftrain"]).split():
            files = {
                "released": [f"{name}.json"],
                "search": [f"{name}/{seed}.jsonl"],
                "final": [f"{name}/{seed}/{images}.jsonl" for images in sets[: item.get("sets")]],
            }[kind]
            for file in (root / file for file in files if (root / file).exists()):
                of_file = rows_of(file, final=kind == "final")
                rows.setdefault(name, []).extend({**row, "seed": int(seed)} for row in of_file)
    return rows


def over_sets(rows: pd.DataFrame) -> pd.DataFrame:
    """Final rows of one point → one row per role and fine-tune: means over its sets of images.

    `sets`: how many they are; `fid_min`: the least FID; `fid_se`: the standard error of the mean if they are several.
    """
    numbers = [name for name in METRICS if name in rows]
    groups = rows.groupby(["role", "seed"], sort=False)
    table = groups.first().assign(**groups[numbers].mean(), fid_min=groups["fid"].min(), sets=groups.size())
    return table.assign(fid_se=groups["fid"].sem().fillna(table.get("fid_se", math.nan))).reset_index()


def complete(rows: pd.DataFrame) -> list[dict]:
    """The rows of `over_sets` of fine-tunes that have all roles."""
    return rows[rows.groupby("seed")["role"].transform("nunique") == len(ROLES)].to_dict("records")


def over_seeds(rows: pd.DataFrame) -> dict[str, float | None]:
    """Rows of `over_sets` of one role → the columns of the measured FID.

    The standard error is that over fine-tunes if they are several, else that over sets of images, else None. The
    minimum is the least of a fine-tune's sets, as a mean over fine-tunes; None if they have one set each.
    """
    several = len(rows) > 1 or rows["sets"].max() > 1
    error = rows["fid"].sem() if len(rows) > 1 else rows["fid_se"].iloc[0]
    least = rows["fid_min"].mean() if rows["sets"].max() > 1 else None
    return {"fid_rerun": rows["fid"].mean(), "fid_rerun_se": error if several else None, "fid_rerun_min": least}


def table_a1(paper: pd.DataFrame, params: dict, final: dict, released: dict) -> pd.DataFrame:
    """One line per number of the paper. fid_released: of the released checkpoint; fid_rerun: of the recipe rerun, with
    its standard error and its minimum, see `over_seeds`."""
    lines = paper.melt(["benchmark", "type", "model", "nfe"], ["fid_uncond", "fid_cond"], "kind", "fid_paper")
    lines = lines[lines["fid_paper"].notna()].assign(**dict.fromkeys(["fid_released", *RERUN]))
    lines["kind"] = lines["kind"].str.removeprefix("fid_")
    order = {name: i for i, name in enumerate(zip(paper["benchmark"], paper["model"]))}
    for name, point in params["points"].items():
        place = point["paper"]
        rows = over_sets(pd.DataFrame(final[name])) if name in final else pd.DataFrame(columns=["role"])
        measured = {role: over_seeds(part) for role, part in rows.groupby("role")}
        there = (lines["benchmark"] == place["table"]) & (lines["kind"] == place["kind"])
        for role, model in place["rows"].items():
            where = there & (lines["model"] == model)
            for column, value in measured.get(role, {}).items():
                lines.loc[where, column] = value
            if role == "neon" and name in released:
                lines.loc[where, "fid_released"] = released[name][0]["fid"]
    lines["order"] = [order[name] for name in zip(lines["benchmark"], lines["model"])]
    return lines.sort_values(["order", "kind"]).drop(columns="order").reset_index(drop=True)


def ours(lines: pd.DataFrame, params: dict) -> pd.Series:
    """Which lines this project can measure."""
    known = {
        (p["paper"]["table"], model, p["paper"]["kind"])
        for p in params["points"].values()
        for model in p["paper"]["rows"].values()
    }
    return pd.Series([key in known for key in zip(lines["benchmark"], lines["model"], lines["kind"])], lines.index)


def as_markdown(lines: pd.DataFrame, params: dict) -> str:
    """The four parts for reading; lines of other methods have no entry."""
    lines = lines.assign(nfe=lines["nfe"].map(lambda n: "" if pd.isna(n) else f"{n:g}"), measurable=ours(lines, params))
    shown = {column: lines[column].map(lambda fid: f"{fid:.2f}", na_action="ignore") for column in RERUN}
    shown = {"fid_released": lines["fid_released"].map(lambda fid: f"{fid:.2f}", na_action="ignore")} | shown
    for column, before in (("fid_rerun_se", " ± "), ("fid_rerun_min", ", min ")):
        shown["fid_rerun"] += (before + shown.pop(column)).fillna("")
    for column, texts in shown.items():
        lines[column] = texts.fillna(NOT_MEASURED).where(lines["measurable"], "")
    lines.loc[lines["type"] != "Neon", "fid_released"] = ""
    names = {"fid_paper": "paper", "fid_released": "released checkpoint", "fid_rerun": "recipe rerun"}
    parts = []
    for benchmark, title in TITLES.items():
        part = lines[lines["benchmark"] == benchmark].drop(columns=["benchmark", "measurable", *RERUN[1:]])
        part["fid_paper"] = part["fid_paper"].map("{:.2f}".format)
        part["model"] = [model + MARKS.get((benchmark, model), "") for model in part["model"]]
        parts.append(f"**{title}**, FID\n\n{markdown(part.rename(columns=names))}{notes(benchmark)}")
    return "\n".join(parts)


def notes(benchmark: str) -> str:
    """The footnotes of one part of the table, a paragraph; '' if it has none."""
    found = [f"{MARKS[at]} {note}" for at, note in NOTES.items() if at[0] == benchmark]
    return f"\n{' '.join(found)}\n" if found else ""


def title_of(point: dict) -> str:
    """A model of the paper by name: 'EDM, CIFAR-10, conditional'."""
    place = point["paper"]
    model, data = place["rows"]["neon"].removesuffix(" + Neon"), TITLES[place["table"]].partition(" ")[2]
    return f"{model}, {data}, {KINDS[place['kind']]}"


def reruns(final: pd.DataFrame, titles: dict[str, str]) -> str:
    """What the recipes gave, with the self-trained model, for reading; '' if no final evaluation is finished."""
    return f"\n**Recipes rerun here**\n\n{markdown(final_table(final, titles))}" if len(final) else ""


def all_rows(found: dict[str, list[dict]]) -> pd.DataFrame:
    """The rows of all names as one table."""
    return table_of({**row, "setting": name} for name, rows in found.items() for row in rows)


def main(out: Path) -> None:
    """Write the tables of the folder of results `out`, which has rows/ in it."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    search, final, released = (found(out, kind, params) for kind in ("search", "final", "released"))
    finished = all_rows({name: complete(over_sets(pd.DataFrame(rows))) for name, rows in final.items()})
    lines = table_a1(pd.read_csv(ROOT / "paper" / "table_a1.csv"), params, final, released)
    titles = {name: title_of(point) for name, point in params["points"].items()}
    searched = {
        out / f"rows/search/{name}/{seed}.jsonl": {"setting": name, "seed": seed}
        for name, rows in search.items()
        for seed in {row["seed"]: None for row in rows}
    }
    rows = all_rows(search)
    tables = {
        "table_a1.csv": lines.to_csv(index=False, float_format="%.6g"),
        "table_a1.json": lines.to_json(orient="records", indent=1),
        "table_a1.md": as_markdown(lines, params) + reruns(finished, titles),
        "titles.json": json.dumps(titles, indent=1),
        "search.csv": as_csv(rows, [*CURVES, *more(rows)]),
        "curves.csv": as_csv(read_curves(searched)),
        "best.csv": as_csv(read_best(searched)),
        "budget.csv": as_csv(best_by_budget(rows)),
        "final.csv": as_csv(finished, ["role", *CURVES, *more(finished)]),
        "settings.csv": as_csv(summarise(finished)),
    }
    write_all(out, tables)
    print(tables["table_a1.md"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, with rows/ in it")
    command_line(lambda: main(parser.parse_args().out))
