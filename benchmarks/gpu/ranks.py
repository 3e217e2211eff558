"""What each process of `torchrun -m benchmarks.gpu.ranks WHAT DEVICE OUT ARGUMENT` does; the first one writes OUT.

all-reduce: sums so many bytes over all processes. train: a few steps of EDM's network for digits, in a folder.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu.targets import build
from benchmarks.gpu.training import images_for
from benchmarks.timing import seconds
from neon.distributed import World, world
from neon.family import get_family
from neon.files import write_json
from neon.selftrain import train


def all_reduce(here: World, size: str) -> dict:
    numbers = torch.zeros(int(size) // 4, device=here.device)

    def run() -> None:
        if here.size > 1:
            dist.all_reduce(numbers)

    run()
    spent = min(seconds(run, here.device) for _ in range(5))
    return {"bytes": 4 * numbers.numel(), "seconds_each": spent}


def few_steps(here: World, out: str) -> dict:
    family = get_family("edm")
    model = build(family, "digits", "cpu").to(here.device)  # the same weights, whatever the device
    recipe = dataclasses.replace(family.recipes["digits"], batch=16, budget=64, snapshot=64)
    images = images_for(family, "digits", model, 64)
    return {"snapshot": str(train(family, model, images, recipe, Path(out), world=here)[-1])}


def main(what: str, device: str, out: str, argument: str) -> None:
    with world(device) as here:
        found = {"all-reduce": all_reduce, "train": few_steps}[what](here, argument)
        if here.rank == 0:
            write_json(out, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
