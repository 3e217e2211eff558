"""Table A.1 of the paper with what was measured here beside it, and the tables that the notebooks read.

Takes what results there are: a model that was not measured is called so.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import yaml

from neon.files import atomic
from report.metrics import rows_of
from report.tables import CURVES, best_by_budget, markdown, summarise, table_of

ROOT = Path(__file__).parent.parent
TITLES = {
    "cifar10": "(a) CIFAR-10",
    "ffhq64": "(b) FFHQ-64",
    "imagenet256": "(c) ImageNet-256",
    "imagenet512": "(d) ImageNet-512",
}
NOT_MEASURED = "not measured"


def found(folder: Path, kind: str, names) -> dict[str, list[dict]]:
    """Name → the rows of its file; names without a file are left out."""
    paths = {name: next(folder.glob(f"rows/{kind}/{name}.json*"), None) for name in names}
    return {name: rows_of(path) for name, path in paths.items() if path}


def table_a1(paper: pd.DataFrame, params: dict, final: dict, released: dict) -> pd.DataFrame:
    """One line per number of the paper. fid_released: of the released checkpoint; fid_rerun: of the recipe run anew."""
    lines = paper.melt(["benchmark", "type", "model", "nfe"], ["fid_uncond", "fid_cond"], "kind", "fid_paper")
    lines = lines[lines["fid_paper"].notna()].assign(fid_released=None, fid_rerun=None)
    lines["kind"] = lines["kind"].str.removeprefix("fid_")
    order = {name: i for i, name in enumerate(zip(paper["benchmark"], paper["model"]))}
    for name, point in params["points"].items():
        told = point["paper"]
        measured = {row["role"]: row["fid"] for row in final.get(name, [])}
        for model, role in zip(told["rows"], ("base", "neon")):
            where = (lines["benchmark"] == told["table"]) & (lines["model"] == model) & (lines["kind"] == told["kind"])
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
        parts.append(f"**{title}**, FID\n\n{markdown(part.rename(columns=names))}")
    return "\n".join(parts)


def main(out: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    search, final = (found(out, kind, params["points"]) for kind in ("search", "final"))
    paper, released = pd.read_csv(ROOT / "paper" / "table_a1.csv"), found(out, "released", params["released"])
    lines = table_a1(paper, params, final, released)
    tables = {
        "table_a1.csv": lines.to_csv(index=False, float_format="%.6g"),
        "table_a1.json": lines.to_json(orient="records", indent=1),
        "table_a1.md": as_markdown(lines, params),
        "titles.json": json.dumps(dict(zip(params["points"], params["points"])), indent=1),
    }
    for kind, rows in (("search", search), ("final", final)):
        table = table_of([{**row, "setting": name, "seed": 0} for name, part in rows.items() for row in part])
        columns = ["role", *CURVES] if kind == "final" else CURVES
        tables[f"{kind}.csv"] = table.reindex(columns=columns).to_csv(index=False, float_format="%.5g")
        if kind == "search":
            tables["budget.csv"] = best_by_budget(table).to_csv(index=False, float_format="%.5g")
    tables["settings.csv"] = summarise(table).to_csv(index=False, float_format="%.5g")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        with atomic(out / name) as partial:
            partial.write_text(text)
    print(tables["table_a1.md"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, with rows/ in it")
    main(parser.parse_args().out)
