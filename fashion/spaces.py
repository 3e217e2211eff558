"""Chosen by one feature space and judged by the other, for a family: `make fashion-spaces`.

python -m fashion.spaces edm --out ../results/fashion/spaces/edm    # in fashion/: spaces.csv, spaces.md
"""

import argparse
from pathlib import Path

from fashion import settings
from mini.plan import runs, titles
from mini.spaces import write
from neon.cli import command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(settings.CHAINS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    name = f"spaces-{args.family}"
    of = runs(name, settings.SPACES[name], settings)
    write(args.out, of, titles(settings.CHAINS), ("EfficientNet-Lite0", "classifier"))


if __name__ == "__main__":
    command_line(main)
