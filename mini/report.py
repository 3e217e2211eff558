"""Collect the rows of searches and final evaluations into tables."""

import argparse
import json
from pathlib import Path

import yaml

from neon.io import atomic
from neon.report import CURVES, best_by_budget, final_table, markdown, read_rows, summarise


def files(roots: list[Path], kind: str) -> dict[Path, dict]:
    """<root>/<kind>/<setting>/<seed>.jsonl → its setting and seed."""
    found = sorted((p for root in roots for p in root.glob(f"{kind}/*/*.jsonl")), key=lambda p: int(p.stem))
    return {path: {"setting": path.parent.name, "seed": int(path.stem)} for path in found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="folders of searches and final evaluations")
    parser.add_argument("--titles", type=Path, required=True, help="YAML file: `titles` of the settings, in order")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    titles = yaml.safe_load(args.titles.read_text())["titles"]
    order = list(titles)
    search, final = (
        read_rows(files(args.rows, kind)).sort_values("setting", key=lambda c: c.map(order.index), kind="stable")
        for kind in ("search", "final")
    )
    args.out.mkdir(parents=True, exist_ok=True)
    budget = best_by_budget(search)
    search = search[search["setting"].isin(final["setting"])]  # others vary B and |S| only
    settings = summarise(final)
    summary = settings.drop_duplicates("family").drop(columns="setting")  # a family's first setting
    tables = {
        "search.csv": search.reindex(columns=CURVES).to_csv(index=False, float_format="%.5g"),
        "final.csv": final.reindex(columns=["role", *CURVES]).to_csv(index=False, float_format="%.5g"),
        "budget.csv": budget.to_csv(index=False, float_format="%.5g"),
        "settings.csv": settings.to_csv(index=False, float_format="%.5g"),
        "summary.csv": summary.to_csv(index=False, float_format="%.5g"),
        "table.md": markdown(final_table(final.replace({"setting": titles}))),
        "titles.json": json.dumps(titles, indent=1),
    }
    for name, text in tables.items():
        with atomic(args.out / name) as partial:
            partial.write_text(text)
    print(tables["table.md"])
