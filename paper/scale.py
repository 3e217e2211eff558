"""How the stages of the paper's pipeline divide over cards: the tables of docs/scale.md, from what `neon plan` counts.

`python -m paper.docs` writes them. Hours are computed: FLOPs, a stated utilisation, and whole batches.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from neon.cost import Cost, Device, sizes
from neon.family import get_family, named
from neon.plan import Row, network_of, read_params
from neon.sampling import parse_seeds

CARDS = (1, 8, 64)
LINK = 25e9  # bytes/s of a card's network, 200 Gbit/s; within a machine NVLink has over ten times as much
STAGES = ("released", "generate", "selftrain", "search", "final")


class Split(NamedTuple):
    """What the cards share at a time: images that must all be done before the next step, evaluation or stage."""

    images: int
    batch: int  # a card's

    @property
    def batches(self) -> int:
        """As many cards have one each; more do not make it faster."""
        return math.ceil(self.images / self.batch)

    def time(self, cards: int) -> float:
        """As a part of that of one card: in whole batches, since all wait for the card with the most."""
        return math.ceil(self.batches / cards) / self.batches


class Item(NamedTuple):
    row: Row
    split: Split
    gradients: int = 0  # bytes that a step of training exchanges, float32

    def hours(self, where: Device, cards: int) -> float:
        return where.hours(self.row.cost) * self.split.time(cards)

    def exchange(self, where: Device, cards: int) -> float:
        """Time of a step's exchange as a part of its computing, before the two overlap; 0 for what exchanges none.

        A ring's: each card sends and receives 2 (n − 1) / n of the gradients.
        """
        if not self.gradients or cards == 1:
            return 0.0
        seconds = 2 * (cards - 1) / cards * self.gradients / LINK
        steps = self.row.images / self.split.images
        return seconds / (3600 * self.hours(where, cards) / steps)


def items(rows: Sequence[Row], params: str | Path) -> list[Item]:
    """Those of STAGES, in the order of the pipeline. Raises NeonError."""
    found = read_params(params)
    order = [row for stage in STAGES for row in rows if row.stage == stage]
    return [_item(row, found) for row in order]


def _item(row: Row, params: Mapping) -> Item:
    section = {"released": "released", "search": "points", "final": "points"}.get(row.stage, "models")
    item = params[section][row.name]
    model = params["models"].get(row.model, {})
    item = {**model, **item}
    if row.stage == "generate":
        return Item(row, Split(row.images, item["batch_size"]))
    if row.stage != "selftrain":
        return Item(row, Split(len(parse_seeds(str(params["seeds"][row.stage]))), item["batch_size"]))
    family = get_family(item["family"])
    _, parameters, _ = sizes(family, network_of(family, item["base"], item["recipe"]))
    batch = named(family.recipes, item["recipe"], "recipe").batch
    return Item(row, Split(batch, item["train"]["micro_batch"]), parameters)


def table(found: Sequence[Item], where: Device) -> str:
    """Markdown: an item a line, then the sums of each stage and of all."""
    titles = ["stage", "", "images at a time", "a card's batch", "cards at most", *(f"hours, {n}" for n in CARDS)]
    lines = [titles, ["---", "---", *["--:"] * (len(titles) - 2)]]
    for stage in STAGES:
        part = [item for item in found if item.row.stage == stage]
        for item in part:
            images, batch = item.split
            texts = (f"{images:,}", str(batch), f"{item.split.batches:,}")
            lines.append([stage, item.row.name, *texts, *_hours([item], where)])
        lines.append([f"**{stage}**", "**all**", "", "", "", *_hours(part, where)])
    lines.append(["**all**", "", "", "", "", *_hours(found, where)])
    return _markdown(lines)


def exchanges(found: Sequence[Item], where: Device) -> str:
    """Markdown: of each fine-tune the gradients and how long they take to exchange."""
    many = CARDS[1:]
    titles = ["selftrain", "batch", "gradients, GB", *(f"exchange / computing, {n} cards" for n in many)]
    lines = [titles, ["---", *["--:"] * (len(titles) - 1)]]
    for item in found:
        if item.gradients:
            parts = (f"{item.exchange(where, n):.2f}" for n in many)
            lines.append([item.row.name, f"{item.split.images:,}", f"{item.gradients / 1e9:.2f}", *parts])
    return _markdown(lines)


class TextToImage(NamedTuple):
    """A transformer that makes 1024² images of prompts; what it has in common with public models of that size."""

    parameters: float = 12e9
    blocks: int = 57
    width: int = 3072
    tokens: int = 64 * 64 + 512  # patches of 16 pixels, words
    steps: int = 28  # one pass each: guidance is distilled
    adapters: float = 0.01  # trained part of the weights

    def flops(self) -> float:
        """Of a pass: every weight once for each token, and attention."""
        return 2 * self.parameters * self.tokens + 4 * self.tokens**2 * self.width * self.blocks

    def states(self) -> dict[str, float]:
        """Bytes: frozen weights in bfloat16; of trained ones float32 weights, gradients, two moments and an average."""
        trained = self.adapters * self.parameters
        return {"all weights": 20 * self.parameters, "adapters": 2 * self.parameters + 20 * trained}


IMAGES = {"S": 10_000, "fine-tune": 100_000, "search": 12 * 5_000, "final": 3 * 10_000}


def text_to_image(model: TextToImage, where: Device, cards: Sequence[int] = CARDS) -> str:
    """Markdown: hours of each stage. A fine-tune's image takes three passes, and a fourth to recompute activations."""
    lines = [["stage", "images", "passes an image", "PFLOP", *(f"hours, {n}" for n in cards)]]
    lines.append(["---", *["--:"] * (len(lines[0]) - 1)])
    for stage, images in IMAGES.items():
        passes = 4 if stage == "fine-tune" else model.steps
        flops = images * passes * model.flops()
        hours = where.hours(Cost({"bfloat16": flops}))
        lines.append([stage, f"{images:,}", str(passes), f"{flops / 1e15:,.0f}", *(f"{hours / n:,.1f}" for n in cards)])
    return _markdown(lines)


def states(model: TextToImage, cards: Sequence[int] = CARDS) -> str:
    """Markdown: GB on each card, whole and in shards."""
    lines = [["trained", *(f"GB a card, {n}" for n in cards)]]
    lines.append(["---", *["--:"] * len(cards)])
    lines += [[name, *(f"{size / n / 1e9:,.1f}" for n in cards)] for name, size in model.states().items()]
    return _markdown(lines)


def tables(rows: Sequence[Row], params: str | Path, where: Device) -> dict[str, str]:
    """Name of the markers in docs/scale.md → Markdown."""
    found, model = items(rows, params), TextToImage()
    return {
        "scale": table(found, where),
        "exchange": exchanges(found, where),
        "text-to-image": text_to_image(model, where),
        "states": states(model),
    }


def _hours(part: Sequence[Item], where: Device) -> list[str]:
    totals = [sum(item.hours(where, cards) for item in part) for cards in CARDS]
    return [f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}" for hours in totals]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
