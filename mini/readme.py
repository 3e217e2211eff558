"""Copy the measured table into the README, between its two markers."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def filled(readme: str, table: str) -> str:
    """The README's text with the table between the markers."""
    return re.sub(
        r"(<!-- mini:begin -->\n).*?(<!-- mini:end -->)", lambda m: f"{m[1]}{table}{m[2]}", readme, flags=re.DOTALL
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), (ROOT / "results/mini/table.md").read_text()))
