"""Write the table of presets into docs/FAMILY.md, between its two markers: `python -m paper.docs`."""

import re
from collections.abc import Mapping
from pathlib import Path

from neon.family import FAMILIES, Family, Preset, Recipe, get_family
from neon.files import atomic

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- presets:begin -->\n", "<!-- presets:end -->"


def options(sampling: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sampling.items())


def synthetic(row: Preset) -> str:
    return f"{images(row.synthetic)} images, {options(row.made_with)}" + (f", {row.precision}" if row.precision else "")


def images(count: int) -> str:
    """'7.488 M', '250 k', '0'."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return str(count)


def average(recipe: Recipe) -> str:
    if recipe.ema_halflife:
        return f"half-life {images(round(recipe.ema_halflife))} images"
    return f"decay {recipe.ema_decay} per step" if recipe.ema_decay else "–"


def column(family: Family, name: str, row: Preset) -> dict[str, str]:
    """What the table says of one preset."""
    recipe = family.recipes[row.recipe]
    base, neon = ("–" if fid is None else f"{fid:.2f}" for fid in row.fid)
    return {
        "preset": f"`{name}`",
        "base": f"`{Path(row.base).name}`",
        "S": synthetic(row),
        "recipe": f"`{row.recipe}`",
        "batch, lr": f"{recipe.batch}, {recipe.lr:g}".replace("e-0", "e-"),
        "budget, snapshot every": f"{images(recipe.budget)}, {images(recipe.snapshot)} images",
        "lr rises over": f"{images(recipe.ramp)} images" if recipe.ramp else "–",
        "average": average(recipe),
        "further options": options({**recipe.network, **recipe.loss}) or "–",
        "searched": f"w {row.w}" + (f"; {row.grid.replace('=', ' ')}" if row.grid else ""),
        "evaluated with": options(row.sampling),
        "FID in the paper: base, Neon": f"{base}, {neon}" + (f" at w = {row.best_w:g}" if row.best_w else ""),
    }


def table(family: Family) -> str:
    """Markdown: one column per preset; rows that say nothing are left out."""
    columns = [column(family, name, row) for name, row in family.presets.items()]
    lines = [[title, *(cells[title] for cells in columns)] for title in columns[0]]
    lines = [line for line in lines if set(line[1:]) != {"–"}]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def filled(text: str, family: Family) -> str:
    """The document with the family's table between the markers; unchanged where there are none."""
    return re.sub(f"({BEGIN}).*?({END})", lambda m: m[1] + table(family) + m[2], text, flags=re.DOTALL)


def fill(path: Path, family: Family) -> None:
    text = filled(path.read_text(), family)
    with atomic(path) as partial:
        partial.write_text(text)


if __name__ == "__main__":
    for name in FAMILIES:
        fill(ROOT / "docs" / f"{name}.md", get_family(name))
