"""Copy what was measured into README.md and pages of docs, between markers: `python -m mini.readme`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from neon.files import atomic
from report import rivals
from report.claims import documents
from report.tables import compared, markdown, read_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results/mini"
# Does Neon in half the steps reach the base in all of them? And what one step cannot do.
PAIRS = [
    (("imm8", "base"), ("imm4", "neon")),
    (("imm4", "base"), ("imm2", "neon")),
    (("imm1", "base"), ("imm1", "selftrained")),
    (("imm1", "neon"), ("imm1", "selftrained")),
]


def tables() -> dict[str, str]:
    """Name of the markers → Markdown, from the results."""
    titles = json.loads((RESULTS / "titles.json").read_text())
    return {
        **{name: written(f"{name}.md") for name in ("methods", "spaces", "diagnose")},
        **next_to_neon(titles),
        "mini": (RESULTS / "table.md").read_text(),
        "steps": markdown(compared(pd.read_csv(RESULTS / "final.csv"), PAIRS, titles)),
        "sources": (RESULTS / "ablations/cross/table.md").read_text(),
        "fashion": fashion(ROOT / "results/fashion"),
        "fashion-table": fashion(ROOT / "results/fashion", ("table.md",)),
        **documents(ROOT / "results"),
    }


def written(name: str) -> str:
    """A table that a stage wrote; '' if it was not measured."""
    return (RESULTS / name).read_text() if (RESULTS / name).exists() else ""


def next_to_neon(titles: dict[str, str]) -> dict[str, str]:
    """Controls and rivals, and S by GMO."""
    final, gmo = rivals.read_all(RESULTS), read_table(RESULTS / "gmo/final.csv")
    found = {"rivals": markdown(rivals.table(final, rivals.headlines(final, titles)))}
    if gmo is not None:
        found["gmo"] = markdown(rivals.strengths(gmo, json.loads((RESULTS / "gmo/titles.json").read_text())))
    return found


def fashion(folder: Path, names: Sequence[str] = ("table.md", "levels.md", "spaces/*/spaces.md")) -> str:
    """The tables of Fashion-MNIST that are there."""
    found = [path.read_text() for name in names for path in sorted(folder.glob(name))]
    return "\n".join(found) or "Not measured yet.\n"


def filled(text: str, tables: dict[str, str]) -> str:
    """The document with each table between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, if it has these."""
    for name, table in tables.items():
        markers = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(markers, lambda m, table=table: f"{m[1]}{table}{m[2]}", text, flags=re.DOTALL)
    return text


PAGES = ("mini", "choosing-w", "claims", "where-it-fails", "diagnose", "rivals", "gmo", "fashion")
DOCUMENTS = (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in PAGES))

if __name__ == "__main__":
    for document in DOCUMENTS:
        text = filled(document.read_text(), tables())
        with atomic(document) as partial:
            partial.write_text(text)
