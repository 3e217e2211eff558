"""Write tables of presets and costs into the docs and the README, between their markers: `python -m paper.docs`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from neon.cli.plan import plan_of
from neon.cost import device
from neon.family import FAMILIES, Family, Preset, Recipe, get_family
from neon.fetch import LICENSE, TABLE, read_table
from neon.files import atomic
from neon.plan import ASSUMPTIONS, RECIPE, Row, cells, describe, plan, summed
from neon.plan import table as costs
from paper.scale import tables

ROOT = Path(__file__).parent.parent
RELEASED = "https://huggingface.co/sinaalemohammad/Neon/resolve/main"
DATA = {"cifar10": "CIFAR-10", "ffhq64": "FFHQ-64", "imagenet256": "ImageNet-256", "imagenet512": "ImageNet-512"}
DEVICE, MODEL = "A100", "var_d16"  # of the table of costs, and whose recipe the README names
PIPELINES = ("ablations", "controls", "rivals")  # in paper/, each a pipeline of its own
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
        "snapshot kept every": f"{images(row.snapshot)} images" if row.snapshot else "–",
        "lr rises over": f"{images(recipe.ramp)} images" if recipe.ramp else "–",
        "EMA": average(recipe),
        "further options": options({**recipe.network, **recipe.loss}) or "–",
        "searched": f"w {row.w}" + (f"; {row.grid.replace('=', ' ')}" if row.grid else ""),
        "evaluated with": options(row.sampling),
        "FID in the paper: base, Neon": f"{base}, {neon}" + (f" at w = {row.best_w:g}" if row.best_w else ""),
    }


def released() -> str:
    """Markdown: one line per released checkpoint, and per model of the paper without one."""
    lines = [
        "| preset | data set | released checkpoint | FID of base → Neon in the paper | more |",
        "|---|---|---|---|---|",
    ]
    for family in map(get_family, FAMILIES):
        for name, row in family.presets.items():
            if row.trained_as and not row.released:
                continue  # the checkpoint of another row, sampled in fewer steps
            file = Path(row.released).name
            link = f"[{file}]({RELEASED}/{file})" if row.released else "none"
            fid = " → ".join(f"{value:.2f}" for value in row.fid)
            more = f"[docs/{family.name}.md](docs/{family.name}.md)"
            lines.append(f"| `{name}` | {DATA[row.reference]} | {link} | {fid} | {more} |")
    return "\n".join(lines) + "\n"


def table(family: Family) -> str:
    """Markdown: one column per preset; rows that say nothing are left out."""
    columns = [column(family, name, row) for name, row in family.presets.items()]
    lines = [[title, *(cells[title] for cells in columns)] for title in columns[0]]
    lines = [line for line in lines if set(line[1:]) != {"–"}]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def cost_table(rows: Sequence[Row]) -> str:
    """Markdown: what `neon plan` prints, on its usual device."""
    where = device(DEVICE)
    titles, *lines = costs(rows, where)
    lines = [[f"**{cell}**" if cell else "" for cell in line] if line[1] in ("all", "") else line for line in lines]
    lines = [titles, ["---", "---", *["--:"] * (len(titles) - 2)], *lines]
    said = "".join(f"- {line}\n" for line in (f"hours: of one {describe(where)}", *ASSUMPTIONS))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n" + said


def cost_line(rows: Sequence[Row]) -> str:
    """The released checkpoints, one model's recipe, everything."""
    where = device(DEVICE)

    def hours_and_disk(part: Sequence[Row]) -> tuple[str, str]:
        total = summed(part, where)
        return f"{total['gpu_hours']:,.0f} hours", f"{total['disk_bytes'] / 1e12:.2g} TB"

    evaluated, _ = hours_and_disk([row for row in rows if row.stage == "released"])
    one = " and ".join(hours_and_disk([row for row in rows if row.model == MODEL and row.stage in RECIPE]))
    return (
        f"`neon plan` says what this costs before it runs ([table](docs/pipeline.md#cost)): on one {describe(where)},\n"
        f"at most {evaluated} for `dvc repro released`, {one} for the recipe of `{MODEL}`, and"
        f" {' and '.join(hours_and_disk(rows))} for everything.\nComputed, not measured.\n"
    )


def pipeline_table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: what the stages of each pipeline cost together, α of GMO and its control in one line."""
    where, lines = device(DEVICE), []
    for pipeline, found in rows.items():
        groups: dict[str, list[Row]] = {}
        for row in found:
            groups.setdefault(re.sub("-.*", "-*", row.name), []).append(row)
        lines += [cells(pipeline, f"`{name}`", part, where) for name, part in groups.items()]
        lines.append([f"**{cell}**" if cell else "" for cell in cells(pipeline, "all", found, where)])
    titles = ["pipeline", "stages", "evaluations", "images", "PFLOP", "GPU hours", "GB of disk"]
    lines = [line[:4] + line[6:] for line in lines]  # an image costs another amount in every command
    return "".join(f"| {' | '.join(line)} |\n" for line in [titles, ["---", "---", *["--:"] * 5], *lines])


def licenses() -> str:
    """Markdown: who publishes the files of downloads.csv, and under which licence; one line for files that agree."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in read_table(ROOT / TABLE):
        if row["group"] != "stats":
            groups.setdefault((publisher(row["source"]), row[LICENSE]), []).append(f"`{Path(row['path']).name}`")
    lines = [
        "| files | from | licence |\n|---|---|---|\n",
        *(f"| {', '.join(files)} | {source} | {license} |\n" for (source, license), files in groups.items()),
    ]
    return "".join(lines)


def publisher(source: str) -> str:
    """'hf://sinaalemohammad/Neon@main/x.pth' → a link to the repository; of another address, to its server."""
    if source.startswith("hf://"):
        repo = "/".join(source.removeprefix("hf://").split("/")[:2]).partition("@")[0]
        return f"[{repo}](https://huggingface.co/{repo})"
    parts = source.split("/")
    return f"[{'/'.join(parts[3:5])}]({'/'.join(parts[:5])})" if parts[2] == "github.com" else parts[2]


def filled(text: str, table: str, name: str = "presets") -> str:
    """The document with the table between the markers of that name; unchanged where there are none."""
    begin, end = (mark.replace("presets", name) for mark in (BEGIN, END))
    return re.sub(f"({begin}).*?({end})", lambda m: m[1] + table + m[2], text, flags=re.DOTALL)


def documents() -> dict[Path, str]:
    """Each document with markers → its table."""
    families = [family for family in map(get_family, FAMILIES) if family.presets]  # the paper's
    of_families = {ROOT / "docs" / f"{family.name}.md": table(family) for family in families}
    return {ROOT / "README.md": released()} | of_families


def licensed() -> dict[Path, str]:
    """The document with markers of `licenses` → its table."""
    return {ROOT / "docs" / "publishing.md": licenses()}


def planned(rows: Sequence[Row] | None = None) -> dict[Path, str]:
    """Each document with markers of `plan` → its part. rows: those of the root's params.yaml, if they are known."""
    rows = rows or plan(ROOT / "params.yaml")
    return {ROOT / "docs" / "pipeline.md": cost_table(rows), ROOT / "README.md": cost_line(rows)}


def scaled(rows: Sequence[Row] | None = None) -> dict[str, str]:
    """Name of the markers in docs/scale.md → its table."""
    params = ROOT / "params.yaml"
    return tables(rows or plan(params), params, device(DEVICE))


def pipelines() -> dict[str, list[Row]]:
    """Pipeline → its rows."""
    return {name: plan_of(ROOT / "paper" / name)[0] for name in PIPELINES}


def fill(path: Path, table: str, name: str = "presets") -> None:
    text = filled(path.read_text(), table, name)
    with atomic(path) as partial:
        partial.write_text(text)


if __name__ == "__main__":
    for path, text in documents().items():
        fill(path, text)
    for path, text in licensed().items():
        fill(path, text, "licenses")
    rows = plan(ROOT / "params.yaml")
    for path, text in planned(rows).items():
        fill(path, text, "plan")
    for name, text in scaled(rows).items():
        fill(ROOT / "docs" / "scale.md", text, name)
    fill(ROOT / "docs" / "pipeline.md", pipeline_table(pipelines()), "pipelines")
