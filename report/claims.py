"""The ledger: each claim of paper/claims.yaml, judged from the tables of results by the rules of report/checks.py.

python -m report.claims results/mini results/paper            # prints the verdicts
python -m report.claims results/mini results/paper --write    # and writes claims.csv into each folder
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import yaml

from neon import NeonError
from neon.cli import command_line
from neon.files import atomic, read_json
from report.checks import CHECKS, NOT_MEASURED, VERDICTS, Tables, each, evidence, over_seeds, verdict
from report.tables import as_csv, by_role, markdown, titled

PAPER = Path(__file__).parent.parent / "paper"
COLUMNS = ["id", "claim", "source", "kind", "verdict", "evidence"]
TABLE_A1 = {"cifar10": "(a)", "ffhq64": "(b)", "imagenet256": "(c)", "imagenet512": "(d)"}
# A number of neon_results.csv: its column in a settings.csv, and in words.
MEASURED_AS = {
    "base_fid": ("fid_base", "FID of the base"),
    "neon_fid": ("fid_neon", "FID of Neon"),
    "w": ("w_star", "best w"),
    "cfg": ("cfg_star", "best γ"),
}
SAME = {"fashion": "mini"}  # scales judged by the claims of another, where their settings have its names
NOT_NEON = ("controls", "rivals")  # folders whose role 'neon' is another model


# ---------------------------------------------------------------- the ledger


def claims(folder: Path = PAPER) -> list[dict]:
    """The entries of claims.yaml, and one for each number of the paper's tables next to it. Raises NeonError."""
    try:
        entries = yaml.safe_load((folder / "claims.yaml").read_text())
        stated = [{"kind": "paper", "scale": "mini", "tolerance": 0.0} | entry for entry in entries["claims"]]
        if unknown := {entry["check"]["name"] for entry in stated} - set(CHECKS):
            raise NeonError(f"{folder}/claims.yaml: no check is called {', '.join(sorted(unknown))}")
        return [*stated, *of_table_a1(folder, entries), *of_results(folder, entries)]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise NeonError(f"{folder}/claims.yaml: not a list of claims ({error})") from None


def of_table_a1(folder: Path, entries: dict) -> Iterator[dict]:
    """A claim for each FID of Table A.1."""
    table = pd.read_csv(folder / "table_a1.csv").melt(["benchmark", "model"], ["fid_cond", "fid_uncond"], "kind", "fid")
    for line in table.dropna().to_dict("records"):
        fid, where = line.pop("fid"), line | {"kind": line["kind"].removeprefix("fid_")}
        check = {"table": "table_a1", "where": where, "columns": ["fid_rerun", "fid_released"], "paper": fid}
        name = f"FID of {line['model']}, {line['benchmark']}, {where['kind']}"
        yield of_number(name, f"Table A.1 {TABLE_A1[line['benchmark']]}", check, entries["tolerances"]["fid"])


def of_results(folder: Path, entries: dict) -> Iterator[dict]:
    """A claim for each FID, w and γ of the paper's main results."""
    for line in pd.read_csv(folder / "neon_results.csv").to_dict("records"):
        place = {"table": "settings", "setting": line["model"]} | entries["elsewhere"].get(line["model"], {})
        for name, (column, words) in MEASURED_AS.items():
            if pd.notna(line[name]):
                check = {"table": place["table"], "where": {"setting": place["setting"]}, "columns": [column]}
                tolerance = entries["tolerances"]["fid" if "fid" in name else name]
                yield of_number(f"{words}, {line['model']}", line["source"], check | {"paper": line[name]}, tolerance)


def of_number(name: str, source: str, check: dict, tolerance: float) -> dict:
    """The entry of a number of the paper."""
    key = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("γ", "cfg")).strip("-")
    facts = {"kind": "number", "scale": "paper", "tolerance": tolerance, "check": {"name": "number"} | check}
    return {"id": key, "claim": f"{name}: {check['paper']:g}.", "source": source} | facts


def ledger(folder: Path, paper: Path = PAPER) -> pd.DataFrame:
    """A folder of results, named by its scale → a line per claim of that scale: columns COLUMNS. Raises NeonError."""
    name, tables = folder.resolve().name, Tables(folder)
    stated = [entry for entry in claims(paper) if entry["scale"] == SAME.get(name, name)]
    if not stated:
        raise NeonError(
            f"{folder}: no claim is of this scale; a folder of results is named by it: mini, fashion, paper"
        )
    lines = [entry | judged(tables, entry) for entry in stated]
    return pd.DataFrame(lines).reindex(columns=COLUMNS)


def judged(tables: Tables, entry: Mapping) -> dict[str, str]:
    """Verdict and evidence of a claim. Raises NeonError if a table is broken."""
    check = dict(entry["check"])
    name = check.pop("name")
    try:
        cases = each([""], lambda _: CHECKS[name](tables, entry["tolerance"], **check))
    except ValueError as error:
        raise NeonError(f"{tables.folder}: a table of the claim {entry['id']} is broken ({error})") from None
    return {"verdict": verdict(cases), "evidence": evidence(cases)}


# ---------------------------------------------------------------- for reading


def in_words(table: pd.DataFrame) -> str:
    """How many claims have each verdict, one line."""
    found = {name: list(table["id"][table["verdict"].str.startswith(name)]) for name in VERDICTS}
    failed = ", ".join(f"`{name}`" for name in found["not reproduced"]) or "none"
    counts = f"{len(found['mixed'])} mixed; {len(found[NOT_MEASURED])} {NOT_MEASURED}; not reproduced: {failed}"
    return f"{len(found['reproduced'])} of {len(table)} claims reproduced on digits; {counts}"


def of_numbers(table: pd.DataFrame) -> str:
    """How many of the paper's numbers were measured, and agree."""
    measured = table[table["verdict"] != NOT_MEASURED]
    if measured.empty:
        return f"the paper's {len(table)} numbers: not measured here"
    agreeing = (measured["verdict"] == "reproduced").sum()
    return f"the paper's {len(table)} numbers: {len(measured)} measured, {agreeing} of them reproduced"


def documents(results: Path) -> dict[str, str]:
    """Name of the markers → Markdown, from the folder with claims.csv of mini, paper and maybe fashion."""
    mini, paper = (verdicts(results / scale) for scale in ("mini", "paper"))
    if (results / "fashion/claims.csv").exists():
        fashion = verdicts(results / "fashion").set_index("id")["verdict"]
        mini = mini.assign(fashion=mini["id"].map(fashion).fillna(NOT_MEASURED))
    by_kind = {f"ledger-{kind}": as_table(mini[mini["kind"] == kind]) for kind in ("paper", "objection")}
    measured = paper[paper["verdict"] != NOT_MEASURED]
    numbers = f"{of_numbers(paper).capitalize()}.\n" + (f"\n{as_table(measured)}" if len(measured) else "")
    against = mini[mini["verdict"].str.startswith(("mixed", "not reproduced"))]
    return by_kind | {
        "claims": f"{in_words(mini)}; {of_numbers(paper)}.\n",
        "ledger-number": numbers,
        "fails-settings": markdown(failures(results / "mini")),
        "fails-claims": as_table(against),
    }


def verdicts(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "claims.csv", keep_default_na=False)


def as_table(lines: pd.DataFrame) -> str:
    """For reading; with the verdict on Fashion-MNIST, if the lines have one."""
    shown = lines.assign(id=[f"`{name}`" for name in lines["id"]], verdict=[f"**{name}**" for name in lines["verdict"]])
    columns = ["id", "claim", "source", "verdict", *(["fashion"] if "fashion" in lines else []), "evidence"]
    return markdown(shown[columns])


def failures(folder: Path) -> pd.DataFrame:
    """The settings where Neon did not surely lower FID, lowered recall, or raised precision, from every final.csv.

    Each number is the mean of Neon − base within a seed, with its 95 % interval; of FID, base − Neon.
    """
    lines = []
    for path in sorted(folder.rglob("final.csv"), key=lambda path: (len(path.parts), path)):
        if path.relative_to(folder).parts[0] not in NOT_NEON:
            titles = read_json(file) if (file := path.with_name("titles.json")).exists() else {}
            finals = Tables(path.parent)("final").groupby("setting", sort=False)
            lines += [line for setting, rows in finals if (line := failure(titled(setting, titles), by_role(rows)))]
    return pd.DataFrame(lines).drop_duplicates()


def failure(title: str, of: Mapping[str, pd.DataFrame]) -> dict[str, object]:
    """A line of `failures`; {} if Neon did what the paper says."""
    signs = {"gain": ("fid", -1), "recall": ("recall", 1), "precision": ("precision", 1)}
    changes = {
        name: over_seeds("", (sign * (of["neon"][column] - of["base"][column])).dropna())
        for name, (column, sign) in signs.items()
    }
    reasons = {
        "no sure gain": not changes["gain"].agrees,
        "recall fell": changes["recall"].hi < 0,
        "precision rose": changes["precision"].lo > 0,
    }
    found = ", ".join(name for name, there in reasons.items() if there)
    return {"setting": title, "what": found} | {name: case.text for name, case in changes.items()} if found else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders of results, each named by its scale")
    parser.add_argument("--write", action="store_true", help="write claims.csv into each of them")
    args = parser.parse_args()
    found = {folder: ledger(folder) for folder in args.results}
    for folder, table in found.items():
        if args.write:
            with atomic(folder / "claims.csv") as partial:
                partial.write_text(as_csv(table))
        for line in table.to_dict("records"):
            print(f"{line['verdict']:16} {line['id']}: {line['claim']} {line['evidence']}".rstrip())
        print(f"{folder}: {table['verdict'].str.partition(' (')[0].value_counts().to_dict()}")


if __name__ == "__main__":
    command_line(main)
