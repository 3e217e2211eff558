"""Copy the rows of a family from runs/ to results/, where git keeps them: tables are made of all families there.

python -m fashion.keep edm --out ../results/fashion/rows/edm    # in fashion/
"""

import argparse
import shutil
from pathlib import Path

from neon import NeonError
from neon.cli import command_line
from neon.files import atomic

KINDS = {".jsonl", ".csv", ".json"}  # rows; what the search predicts; what it found


def keep(rows: Path, out: Path) -> int:
    """Copy <rows>/{search,final}/<setting>/<seed>… without kept features; how many files. Raises NeonError if none."""
    found = sorted(p for p in rows.glob("*/*/*") if p.suffix in KINDS and p.is_file() and not p.name.startswith("."))
    if not found:
        raise NeonError(f"{rows}: no rows of results")
    with atomic(out) as folder:
        for path in found:
            place = folder / path.relative_to(rows)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="a chain of settings.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(f"{args.out}: {keep(Path('runs/rows', args.family), args.out)} files")


if __name__ == "__main__":
    command_line(main)
