"""Result rows → tables: one line per setting, with intervals over seeds."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import yaml

from neon import NeonError
from neon.files import atomic
from neon.measure.metrics import t_interval
from neon.measure.rows import Rows

SUMMARY = [
    *("family", "seeds", "w_star", "cfg_star", "fid_selftrained", "fid_base", "fid_neon", "gain", "gain_lo", "gain_hi"),
    *("precision_base", "precision_neon", "recall_base", "recall_neon", "num_images", "seconds"),
]


CURVES = ["family", "setting", "seed", "w", "cfg", "budget", "fid", "fid_se", "precision", "recall", "n"]


def read_rows(files: Mapping[Path, Mapping[str, object]]) -> pd.DataFrame:
    """Rows of several JSON-lines files, each with the columns given for its file (say, setting and seed)."""
    rows = [{**row, **columns} for path, columns in files.items() for row in Rows(path, write=False).rows.values()]
    if not rows:
        raise NeonError("no results yet")
    return table_of(rows)


def table_of(rows: list[Mapping[str, object]]) -> pd.DataFrame:
    """Guidance is the column cfg, also where a family calls it otherwise. Columns that nobody wrote are empty."""
    table = pd.DataFrame(rows).drop(columns=["key", "versions"], errors="ignore")
    if "cfg_scale" in table:
        table["cfg"] = table.get("cfg", table["cfg_scale"]).fillna(table["cfg_scale"])
    return table.reindex(columns=[*table.columns, *(name for name in (*CURVES, "num_synthetic") if name not in table)])


def summarise(final: pd.DataFrame, by: Iterable[str] = ("family", "setting")) -> pd.DataFrame:
    """One line per setting from the final rows (base, self-trained, Neon) of its seeds; columns SUMMARY after `by`.

    gain is FID(base) − FID(neon), paired within a seed, with its 95 % t-interval over seeds. w_star is the median over
    seeds of the w that each chose on its search images.
    """
    lines = []
    for keys, rows in final.groupby(list(by), sort=False):
        wide = {name: part.set_index("seed").sort_index() for name, part in rows.groupby("role")}
        base, trained, neon = wide["base"], wide["selftrained"], wide["neon"]
        gain, half = t_interval((base["fid"] - neon["fid"]).to_numpy())
        line = dict(zip(by, keys)) | {
            "seeds": len(base),
            "w_star": neon["w"].median(),
            "cfg_star": neon["cfg"].median() if "cfg" in neon else float("nan"),
            "fid_selftrained": trained["fid"].mean(),
            "gain": gain,
            "gain_lo": gain - half,
            "gain_hi": gain + half,
            "num_images": int(base["n"].iloc[0]),
            "seconds": rows["seconds"].sum(),
        }
        for metric in ("fid", "precision", "recall"):
            line |= {f"{metric}_base": base[metric].mean(), f"{metric}_neon": neon[metric].mean()}
        lines.append(line)
    extra = [key for key in by if key not in SUMMARY]
    return pd.DataFrame(lines, columns=[*extra, *SUMMARY])


def best_by_budget(search: pd.DataFrame) -> pd.DataFrame:
    """The lowest FID over w >= 0 and γ for every setting, seed, |S| and B; the base has |S| = B = 0."""
    keys = ["family", "setting", "seed", "num_synthetic", "budget"]
    best = search[search["w"] >= 0].groupby(keys, sort=False)["fid"].idxmin()
    return search.loc[best].reindex(columns=[*keys, "w", "cfg", "fid", "n"])


def final_table(final: pd.DataFrame) -> pd.DataFrame:
    """For reading, a line per setting: FIDs and gain, mean ± half of the 95 % interval; means of other metrics.

    w* lists the values that the seeds chose; gain is paired within a seed.
    """
    lines = []
    for setting, rows in final.groupby("setting", sort=False):
        of = {role: part.set_index("seed").sort_index() for role, part in rows.groupby("role")}
        fids = {
            "FID w = −1": of["selftrained"]["fid"],
            "FID base": of["base"]["fid"],
            "FID Neon": of["neon"]["fid"],
            "gain": of["base"]["fid"] - of["neon"]["fid"],
        }
        line = {"setting": setting, "seeds": len(of["base"])}
        line["w*"] = " ".join(f"{w:g}" for w in sorted(set(of["neon"]["w"])))
        line |= {name: "{:.3g} ± {:.2g}".format(*t_interval(values.to_numpy())) for name, values in fids.items()}
        for metric in ("precision", "recall"):
            line[metric] = " → ".join(f"{of[role][metric].mean():.3f}" for role in ("base", "neon"))
        lines.append(line)
    return pd.DataFrame(lines)


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A GitHub table; floats with `digits` significant digits."""
    cells = table.map(lambda v: f"{v:.{digits}g}" if isinstance(v, float) else str(v)).replace("nan", "")
    lines = [list(table.columns), ["---"] * len(table.columns), *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


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
