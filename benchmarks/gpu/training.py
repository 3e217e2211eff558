"""Self-training on a card, and several processes that train and add up."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu.bench import ROOT, Bench, Measurement
from benchmarks.gpu.card import tf32
from benchmarks.gpu.targets import Target, build
from neon import NeonError, cost
from neon.distributed import World
from neon.family import Family, Recipe
from neon.selftrain import train
from neon.weights.checkpoint import load_weights

STEPS = 4  # the first is not timed
SAME = 1e-4  # relative distance of weights that several processes and one have trained


@dataclasses.dataclass
class Images:
    """Random images in memory, as neon.selftrain.train reads a set."""

    pixels: torch.Tensor  # uint8 (n, C, H, W)
    labels: torch.Tensor | None  # int64 (n,)

    @classmethod
    def random(cls, n: int, shape: Sequence[int], labels: torch.Tensor | None) -> "Images":
        drawn = torch.Generator().manual_seed(0)
        return cls(torch.randint(256, (n, *shape), generator=drawn, dtype=torch.uint8), labels)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices) -> torch.Tensor:
        return self.pixels[list(indices)]


def training(bench: Bench) -> Iterator[Measurement]:
    """Every recipe of the targets at its micro-batch, a few whole steps."""
    for target in bench.targets:
        name = f"{target.name}, {target.recipe}"
        yield Measurement(name, 90, partial(steps, bench, target, target.family.recipes[target.recipe]))


def steps(bench: Bench, target: Target, recipe: Recipe) -> dict:
    """Steps and images per second, and the peak memory. The random images decide no speed."""
    if bench.rehearse:
        recipe = dataclasses.replace(recipe, batch=2 * target.micro_batch)
    budget = STEPS * recipe.batch
    recipe = dataclasses.replace(recipe, budget=budget, snapshot=budget)
    model = build(target.family, target.network, bench.card.device, **recipe.network)
    out = bench.scratch / f"train-{target.name}"
    world = World(device=bench.card.device, tf32=recipe.tf32)
    images = images_for(target.family, target.network, model, recipe.batch)
    with tf32(recipe.tf32):
        train(target.family, model, images, recipe, out, world=world, micro_batch=target.micro_batch)
    rate, peak = images_per_second(out / "log.jsonl"), bench.card.peak_gib()
    for file in out.iterdir():
        file.unlink()  # snapshots of large networks would fill the disk
    each_image = cost.training(target.family, target.network, recipe)
    return {
        "model": target.name,
        "recipe": target.recipe,
        "batch": recipe.batch,
        "micro_batch": target.micro_batch,
        "precision": "tf32" if recipe.tf32 and recipe.precision == "float32" else recipe.precision,
        "images_per_second": rate,
        "steps_per_second": rate / recipe.batch,
        "share_of_products": bench.share(each_image, 1 / rate),
        "peak_gib": peak,
    }


def images_for(family: Family, network: str, model: torch.nn.Module, n: int) -> Images:
    """n random images of the shape and labels that a model is trained on."""
    return Images.random(n, cost.image_shape(family, network), family.labels(model, torch.arange(n)))


def images_per_second(log: Path) -> float:
    """The median of the lines after the first: a line each step, which ends before anything is saved."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return median(line["images_per_second"] for line in lines[1:])


# ---------------------------------------------------------------- several processes


def processes(bench: Bench) -> Iterator[Measurement]:
    """As many as there are cards, with NCCL; in a rehearsal two, with gloo."""
    yield Measurement("all-reduce", 60, partial(all_reduce, bench))
    yield Measurement("self-training", 120, partial(trained_alike, bench))


def all_reduce(bench: Bench) -> dict:
    """Bytes per second that each process sends, if the sum goes round a ring."""
    n = bench.card.count
    found = ranks(bench, n, "all-reduce", bench.scratch / "all-reduce.json", bench.size(2**28, 2**16))
    if n == 1:
        return found | {"not measured": "one card, so one process: it ran, and sent nothing"}
    return found | {"gb_per_second": 2 * (n - 1) / n * found["bytes"] / found["seconds_each"] / 1e9}


def trained_alike(bench: Bench) -> dict:
    """Do as many processes as cards train the weights that one process trains?"""
    n = bench.card.count
    weights = []
    for size in (1, n):
        out = bench.scratch / f"ranks-{size}"
        found = ranks(bench, size, "train", bench.scratch / f"ranks-{size}.json", out)
        weights.append(load_weights(found["snapshot"]))
    one, several = weights
    apart = sum(float((several[name].double() - one[name].double()).square().sum()) for name in one)
    whole = sum(float(tensor.double().square().sum()) for tensor in one.values())
    distance = (apart / whole) ** 0.5
    return {"processes": n, "distance": distance, "tolerance": SAME, "passed": distance <= SAME}


def ranks(bench: Bench, n: int, what: str, out: Path, *words) -> dict:
    """What benchmarks.gpu.ranks writes to `out`, run by torchrun in n processes. Raises NeonError."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "-m", "benchmarks.gpu.ranks"]
    command = [sys.executable, *launch, what, bench.card.kind, str(out), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise NeonError(f"{what} in {n} processes: {' '.join(done.stderr.split())[-250:]}")
    return {"processes": n} | json.loads(out.read_text())
