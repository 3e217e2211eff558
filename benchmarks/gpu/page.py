"""Results of cards as Markdown: the table of one, and docs/gpu.md with all of them.

python -m benchmarks.gpu.page [--results results/gpu] [--page docs/gpu.md]
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.bench import ROOT
from benchmarks.gpu.parity import TOLERANCES
from benchmarks.gpu.targets import presets
from mini.readme import filled
from neon.cli import command_line
from neon.files import atomic, existing, read_object

NOT_MEASURED = "not measured"
Column = tuple[str, str, Callable[[object], str]]  # key of a row, title, and how a value is written


def number(value: object) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def share(value: object) -> str:
    return f"{100 * value:.1f} %"


def times(value: object) -> str:
    return f"{value:.2f}×"


def verdict(value: object) -> str:
    return "yes" if value else "**no**"


NAME: Column = ("name", "", str)
PEAK: Column = ("peak_gib", "GiB at most", number)
RATE: Column = ("images_per_second", "images/s", number)
SHARE: Column = ("share_of_products", "of the matrix products' rate", share)
PASSED: Column = ("passed", "passed", verdict)
DIFFERENCES: list[Column] = [
    NAME,
    ("network", "network", number),
    ("gradient", "gradient", number),
    ("draws", "other codes", share),
    ("levels", "levels", number),
    ("largest_level", "largest", str),
    PASSED,
]
SAMPLED: list[Column] = [
    NAME,
    ("batch", "batch", str),
    RATE,
    ("times_released", "released way", times),
    SHARE,
    PEAK,
]
# Of each section: what it is, and its columns after which an error or a reason may follow.
SECTIONS: dict[str, tuple[str, list[Column]]] = {
    "tests": (
        "Tests marked `cuda`",
        [NAME, ("tests_passed", "passed", str), ("failed", "failed", str), ("skipped", "skipped", str)],
    ),
    "rates": ("Products of large matrices", [NAME, ("tflops", "TFLOP/s", number)]),
    "parity": ("The card next to the CPU in float32, reduced networks", DIFFERENCES),
    "sampling": ("Sampling, at the released batch size", SAMPLED),
    "parts": (
        "Parts of an evaluation",
        [
            NAME,
            ("ms_per_image", "ms/image", number),
            ("seconds_each", "s each", number),
            ("gb_per_second", "GB/s", number),
            ("peak_gib", "GiB at most", number),
        ],
    ),
    "training": (
        "Self-training, at the micro-batch of the preset",
        [
            NAME,
            ("batch", "batch", str),
            ("micro_batch", "micro-batch", str),
            ("precision", "precision", str),
            ("steps_per_second", "steps/s", number),
            RATE,
            SHARE,
            PEAK,
        ],
    ),
    "processes": (
        "Several processes",
        [
            NAME,
            ("processes", "processes", str),
            ("gb_per_second", "GB/s", number),
            ("distance", "apart from one process", number),
            PASSED,
        ],
    ),
    "whole": ("The card next to the CPU in float32, whole networks, one image", DIFFERENCES),
    "parity_compiled": ("Compiled networks next to the CPU in float32", DIFFERENCES),
    "compiled": ("Sampling, compiled", SAMPLED),
}


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line has the titles."""
    title, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([title, "|" + "---|" * len(lines[0]), *rest])


def section(name: str, rows: Sequence[Mapping]) -> str:
    """A heading and the table of its rows; what was not measured or failed says so in the last column."""
    title, columns = SECTIONS[name]
    if not rows:
        return f"## {title}\n\n{NOT_MEASURED.capitalize()}."
    titles = [*(column[1] for column in columns), "note"]
    lines = [[*(write(row[key]) if key in row else "" for key, _, write in columns), note(row)] for row in rows]
    used = [i for i in range(len(titles)) if i == 0 or any(line[i] for line in lines)]
    return f"## {title}\n\n" + grid([[line[i] for i in used] for line in [titles, *lines]])


def note(row: Mapping) -> str:
    text = f"{NOT_MEASURED}: {row[NOT_MEASURED]}" if NOT_MEASURED in row else ""
    failed = f"failed: {row['error']}" if "error" in row else "; ".join(row.get("failures", ()))
    return (text or failed).replace("|", "/").replace("\n", " ")


def one_card(found: Mapping) -> str:
    """The whole table of a card."""
    about = found["environment"]
    facts = grid([["", ""], *([key, str(value)] for key, value in about.items() if value not in (None, ""))])
    parts = [section(name, found["rows"].get(name, ())) for name in SECTIONS]
    return "\n\n".join([f"# {about['card']}", facts, *parts]) + "\n"


# ---------------------------------------------------------------- docs/gpu.md


def tolerances() -> str:
    """How far each precision may be from the CPU's float32."""
    titles = ["precision", "network", "images, mean of levels", "other codes (VAR)", "gradient"]
    shown = {name: (t.network, t.levels, t.draws, t.gradient) for name, t in TOLERANCES.items()}
    lines = [[name, *(f"{value:g}" for value in values)] for name, values in shown.items()]
    return grid([titles, *lines])


def all_cards(cards: Mapping[str, Mapping]) -> str:
    """What docs/gpu.md says of them. cards: name of the file → its JSON."""
    return (
        "\n\n".join(
            [
                _overview(cards),
                "**Sampling**: images/s of the fastest way, and of the released way.",
                _by_model(cards, ("sampling", "compiled"), _fastest),
                "**Self-training**: whole steps of the recipe, at the preset's micro-batch.",
                _by_model(cards, ("training",), _trained),
            ]
        )
        + "\n"
    )


def _overview(cards: Mapping[str, Mapping]) -> str:
    titles = ["card", "driver", "CUDA", "torch", "commit", "date", "tests", "next to the CPU"]
    lines = [_card(name, found) for name, found in cards.items()]
    return grid([titles, *(lines or [[NOT_MEASURED, *[""] * (len(titles) - 1)]])])


def _card(name: str, found: Mapping) -> list[str]:
    about, rows = found["environment"], found["rows"]
    title = f"[{about['cards']} × {about['card']}](../results/gpu/{name}.md)"
    facts = [str(about.get(key) or "") for key in ("driver", "cuda", "torch", "commit", "date")]
    passed = sum(row.get("tests_passed", 0) for row in rows.get("tests", ()))
    failed = sum(row.get("failed", 0) for row in rows.get("tests", ()))
    tests = f"{passed} passed, {failed} failed" if passed or failed else NOT_MEASURED
    verdicts = [
        row["passed"]
        for part in ("parity", "whole", "parity_compiled")
        for row in rows.get(part, ())
        if "passed" in row
    ]
    parity = f"{sum(verdicts)} of {len(verdicts)} within tolerance" if verdicts else NOT_MEASURED
    return [title, *facts, tests, parity]


def _by_model(cards: Mapping[str, Mapping], parts: Sequence[str], cell: Callable[[list[Mapping]], str]) -> str:
    """A line for every target, a column for every card. parts: the sections that the cells are of."""
    titles = ["", *(f"{found['environment']['cards']} × {found['environment']['card']}" for found in cards.values())]
    columns = [[row for part in parts for row in found["rows"].get(part, ())] for found in cards.values()]
    lines = [
        [f"`{target.name}`", *(cell([row for row in rows if row.get("model") == target.name]) for rows in columns)]
        for target in presets()
    ]
    if not cards:
        titles, lines = [*titles, "any card"], [[*line, NOT_MEASURED] for line in lines]
    return grid([titles, *lines])


def _fastest(rows: list[Mapping]) -> str:
    timed = [row for row in rows if "images_per_second" in row and row["way"] != "released"]
    if not timed:
        return NOT_MEASURED
    best = max(timed, key=lambda row: row["images_per_second"])
    text = f"{number(best['images_per_second'])} ({best['way']}, {best['precision']}"
    text += f", {share(best['share_of_products'])} of products)"
    ratio = best.get("times_released")
    return text + (f"; {times(ratio)} of {number(best['images_per_second'] / ratio)}" if ratio else "")


def _trained(rows: list[Mapping]) -> str:
    timed = [row for row in rows if "steps_per_second" in row]
    cells = (
        f"{number(row['steps_per_second'])} steps/s, {number(row['images_per_second'])} images/s,"
        f" {number(row['peak_gib'])} GiB"
        for row in timed
    )
    return "; ".join(cells) or NOT_MEASURED


def read_cards(folder: str | Path) -> dict[str, dict]:
    """Every card's JSON by the name of its file; {} if there is no such folder."""
    return {path.stem: read_object(path) for path in sorted(Path(folder).glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=ROOT / "results/gpu", help="folder of .json files (default %(default)s)")
    parser.add_argument("--page", default=ROOT / "docs/gpu.md", help="page with the markers (default %(default)s)")
    args = parser.parse_args(argv)
    page = existing(args.page)
    text = filled(page.read_text(), {"gpu": all_cards(read_cards(args.results)), "tolerances": tolerances() + "\n"})
    with atomic(page) as partial:
        partial.write_text(text)


if __name__ == "__main__":
    command_line(main)
