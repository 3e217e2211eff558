"""Table A.1 of the paper next to what was measured here, and the tables that the notebooks read.

Takes the results that there are; the others are 'not measured'.
"""

import argparse
import json
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


def found(folder: Path, kind: str, names) -> dict[str, list[dict]]:
    """Name → the rows of its file; names without a file are left out."""
    paths = {name: next(folder.glob(f"rows/{kind}/{name}.json*"), None) for name in names}
    return {name: rows_of(path, final=kind == "final") for name, path in paths.items() if path}


def table_a1(paper: pd.DataFrame, params: dict, final: dict, released: dict) -> pd.DataFrame:
    """One line per number of the paper. fid_released: of the released checkpoint; fid_rerun: of the recipe rerun."""
    lines = paper.melt(["benchmark", "type", "model", "nfe"], ["fid_uncond", "fid_cond"], "kind", "fid_paper")
    lines = lines[lines["fid_paper"].notna()].assign(fid_released=None, fid_rerun=None)
    lines["kind"] = lines["kind"].str.removeprefix("fid_")
    order = {name: i for i, name in enumerate(zip(paper["benchmark"], paper["model"]))}
    for name, point in params["points"].items():
        place = point["paper"]
        measured = {row["role"]: row["fid"] for row in final.get(name, [])}
        there = (lines["benchmark"] == place["table"]) & (lines["kind"] == place["kind"])
        for model, role in zip(place["rows"], ("base", "neon")):
            where = there & (lines["model"] == model)
            if role in measured:
                lines.loc[where, "fid_rerun"] = measured[role]
            if role == "neon" and name in released:
                lines.loc[where, "fid_released"] = released[name][0]["fid"]
    lines["order"] = [order[name] for name in zip(lines["benchmark"], lines["model"])]
    return lines.sort_values(["order", "kind"]).drop(columns="order").reset_index(drop=True)


def ours(lines: pd.DataFrame, params: dict) -> pd.Series:
    """Which lines this project can measure."""
    known = {
        (p["paper"]["table"], m, p["paper"]["kind"]) for p in params["points"].values() for m in p["paper"]["rows"]
    }
    return pd.Series([key in known for key in zip(lines["benchmark"], lines["model"], lines["kind"])], lines.index)


def as_markdown(lines: pd.DataFrame, params: dict) -> str:
    """The four parts for reading; lines of other methods have no entry."""
    lines = lines.assign(nfe=lines["nfe"].map(lambda n: "" if pd.isna(n) else f"{n:g}"), measurable=ours(lines, params))
    for column in ("fid_released", "fid_rerun"):
        shown = lines[column].map(lambda fid: NOT_MEASURED if pd.isna(fid) else f"{fid:.2f}")
        lines[column] = shown.where(lines["measurable"], "")
    lines.loc[lines["type"] != "Neon", "fid_released"] = ""
    names = {"fid_paper": "paper", "fid_released": "released checkpoint", "fid_rerun": "recipe rerun"}
    parts = []
    for benchmark, title in TITLES.items():
        part = lines[lines["benchmark"] == benchmark].drop(columns=["benchmark", "measurable"])
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
    model, data = place["rows"][1].removesuffix(" + Neon"), TITLES[place["table"]].partition(" ")[2]
    return f"{model}, {data}, {KINDS[place['kind']]}"


def reruns(final: pd.DataFrame, titles: dict[str, str]) -> str:
    """What the recipes gave, with the self-trained model, for reading; '' if no final evaluation is finished."""
    return f"\n**Recipes rerun here**\n\n{markdown(final_table(final, titles))}" if len(final) else ""


def all_rows(found: dict[str, list[dict]]) -> pd.DataFrame:
    """The rows of all names as one table; the paper has one seed."""
    return table_of({**row, "setting": name, "seed": 0} for name, rows in found.items() for row in rows)


def main(out: Path) -> None:
    """Write the tables of the folder of results `out`, which has rows/ in it."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    search, final = (found(out, kind, params["points"]) for kind in ("search", "final"))
    finished = all_rows({name: rows for name, rows in final.items() if {row["role"] for row in rows} >= set(ROLES)})
    paper, released = pd.read_csv(ROOT / "paper" / "table_a1.csv"), found(out, "released", params["released"])
    lines = table_a1(paper, params, final, released)
    titles = {name: title_of(point) for name, point in params["points"].items()}
    searched = {out / f"rows/search/{name}.jsonl": {"setting": name, "seed": 0} for name in search}
    tables = {
        "table_a1.csv": lines.to_csv(index=False, float_format="%.6g"),
        "table_a1.json": lines.to_json(orient="records", indent=1),
        "table_a1.md": as_markdown(lines, params) + reruns(finished, titles),
        "titles.json": json.dumps(titles, indent=1),
        "search.csv": as_csv(all_rows(search), CURVES),
        "curves.csv": as_csv(read_curves(searched)),
        "best.csv": as_csv(read_best(searched)),
        "budget.csv": as_csv(best_by_budget(all_rows(search))),
        "final.csv": as_csv(finished, ["role", *CURVES]),
        "settings.csv": as_csv(summarise(finished)),
    }
    write_all(out, tables)
    print(tables["table_a1.md"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, with rows/ in it")
    command_line(lambda: main(parser.parse_args().out))
