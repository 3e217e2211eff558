"""Training on several processes in four ways: seconds of a step, memory of a process, difference of the weights.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py [--processes 2] [--steps 12] [--networks edm:digits,imm:deep]

averaged: each process holds all, gradients are averaged after the backward pass (`neon selftrain` under torchrun).
replicated: the same by FSDP2 with one shard (HSDP): gradients are averaged during the backward pass. sharded: FSDP2,
a step gathers the parameters once (`--shard`, a small network). block by block: FSDP2, parameters are gathered for each
block and pass, gradients reduced after each micro-batch (`--shard`, a large network).

Each step has two micro-batches. A step's time is the median over the steps after the first; a ratio is to averaged.
Memory: of the first process, the bytes of its own weights, gradients, two moments and average. Difference: of the
weights at the end from those of averaged, over how far these went.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from neon import shard
from neon.distributed import world
from neon.family import Recipe, get_family
from neon.selftrain import train
from neon.weights.checkpoint import load_weights
from neon.whole import Whole

DEEP = {"hidden_size": 256, "depth": 6, "num_heads": 4, "patch_size": 8}  # 7 M parameters, one token an image
NETWORKS = {"edm:digits": {}, "imm:digits": {}, "imm:deep": DEEP}
RECIPE = Recipe(batch=16, lr=1e-3, budget=0, snapshot=1, eps=1e-4, clip=1.0, ema_decay=0.9)


class Replicated(shard.Sharded):
    """One shard, on all processes."""

    def mesh_of(self, here):
        return init_device_mesh(here.device.type, (here.size, 1), mesh_dim_names=("replicate", "shard"))


WAYS = {"averaged": Whole, "replicated": Replicated, "sharded": shard.Sharded, "block by block": shard.Sharded}


class Images:
    """Random digits with labels, in place of an ImageSet."""

    shape = (1, 8, 8)

    def __init__(self, n: int):
        drawn = torch.Generator().manual_seed(1)
        self.pixels = torch.randint(256, (n, *self.shape), generator=drawn, dtype=torch.uint8)
        self.labels = torch.randint(10, (n,), generator=drawn)

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices) -> torch.Tensor:
        return self.pixels[list(indices)]


def model_of(name: str, device) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, _, config = name.partition(":")
    model = get_family(kind).create(config if config == "digits" else "digits", device=device, **NETWORKS[name])
    with torch.no_grad():  # initial zeros would hide what is behind them
        for p in get_family(kind).weights(model).parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def measure(name: str, way: str, steps: int, out: Path) -> dict[str, float]:
    """Seconds of a step and bytes of this process; the weights at the end are written to `out`."""
    family, times = get_family(name.partition(":")[0]), []

    def loss(*args, **options):
        times.append(time.perf_counter())
        return family.loss(*args, **options)

    watched = SimpleNamespace(**vars(family) | {"loss": loss})
    recipe = replace(RECIPE, budget=steps * RECIPE.batch, snapshot=steps * RECIPE.batch)
    with world("cpu") as here, mock.patch.object(shard, "HELD", 0 if way == "block by block" else shard.HELD):
        place = WAYS[way](watched, lambda device: model_of(name, device), here)
        share = RECIPE.batch // here.size
        train(watched, place.model, Images(64), recipe, out, world=here, place=place, micro_batch=share // 2)
        held = 5 * sum(t.nbytes for t in place.local([*place.params.values()]))
    each = [later - earlier for earlier, later in zip(times[2::2], times[4::2])]  # two micro-batches a step
    return {"seconds": statistics.median(each), "bytes": held}


def process(rank: int, size: int, port: int, name: str, way: str, steps: int, out: Path) -> None:
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    os.environ.update(meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    found = measure(name, way, steps, out)
    if rank == 0:
        (out / "measured.json").write_text(json.dumps(found))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def difference(one: dict, other: dict, start: dict) -> float:
    far = sum((one[key] - start[key]).double().square().sum() for key in one) ** 0.5
    return float(sum((one[key] - other[key]).double().square().sum() for key in one) ** 0.5 / far)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--networks", default="edm:digits,imm:deep", help=", ".join(NETWORKS))
    args = parser.parse_args()
    last = f"snapshot-{args.steps * RECIPE.batch:09d}.safetensors"
    print(f"{args.processes} processes, CPU, gloo, torch {torch.__version__}")
    print(f"{'':12s}{'':16s}{'ms/step':>9s}{'ratio':>8s}{'MB/process':>12s}{'difference':>12s}")
    for name in args.networks.split(","):
        family = get_family(name.partition(":")[0])
        start = family.weights(model_of(name, "cpu")).state_dict()
        print(f"{name}, {sum(t.numel() for t in start.values()) / 1e6:.3g} M values")
        with tempfile.TemporaryDirectory() as scratch:
            found, weights = {}, {}
            for way in WAYS:
                out = Path(scratch, way)
                settings = (args.processes, free_port(), name, way, args.steps, out)
                torch.multiprocessing.spawn(process, settings, nprocs=args.processes)
                found[way], weights[way] = json.loads((out / "measured.json").read_text()), load_weights(out / last)
                seconds, held = found[way]["seconds"], found[way]["bytes"]
                ratio, off = (
                    seconds / found["averaged"]["seconds"],
                    difference(weights["averaged"], weights[way], start),
                )
                print(f"{'':12s}{way:16s}{1e3 * seconds:9.1f}{ratio:8.2f}{held / 1e6:12.3f}{off:12.1e}", flush=True)


if __name__ == "__main__":
    main()
