"""The hours of `neon plan` next to measured ones, for the digits' models on this CPU, sampling and self-training.

    python benchmarks/plan.py [--families edm,flow,var,xar,imm] [--images 512] [--rounds 3]

The plan needs a utilisation. It comes from another run, of another shape: another solver or guidance, half of the
images, larger training steps. The run that is compared is that of the commands: `generate` writes S, `train` reads it.
Weights are initial values.
"""

import argparse
import dataclasses
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from timing import seconds

from neon import cost
from neon.data import ImageSet
from neon.distributed import World, world
from neon.family import Family, Recipe, get_family
from neon.generate import generate
from neon.plan import trained_images
from neon.selftrain import train
from neon.weights.checkpoint import save_safetensors

# Of S, as the mini scale has it; and of the calibration.
SAMPLING = {
    "edm": ({"solver": "heun", "num_steps": 18}, {"solver": "euler", "num_steps": 18}),
    "flow": ({"solver": "heun", "num_steps": 20}, {"solver": "euler", "num_steps": 20}),
    "var": ({"cfg": 0.5, "top_k": 0, "top_p": 0.0}, {"cfg": 0.0, "top_k": 0, "top_p": 0.0}),
    "xar": ({"cfg": 2.0, "flow_steps": 10}, {"cfg": 1.0, "flow_steps": 6}),
    "imm": ({"num_steps": 8, "cfg_scale": 1.0}, {"num_steps": 3, "cfg_scale": 1.5}),
}
SHORT, CALIBRATION = {"budget": 6_400, "snapshot": 6_400}, {"batch": 96, "budget": 2_880, "snapshot": 2_880}


def create(family: Family, folder: Path) -> torch.nn.Module:
    options = {}
    if family.name == "var":
        from VAR.vqvae import VQVAE

        options["vae_ckpt"] = str(folder / "vqvae.safetensors")
        save_safetensors(options["vae_ckpt"], VQVAE(family.networks["digits"]).state_dict(), {})
    return family.create("digits", device="cpu", **options)


def write_set(family: Family, model, options: dict, images: int, out: Path) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(family.Sampling)}

    def sample(seeds):
        return family.sample(model, seeds, family.labels(model, seeds), **{**defaults, **options})

    labels = partial(family.labels, model)
    generate(sample, torch.arange(images), labels, out, identity={}, batch=images, world=World())


def fine_tune(family: Family, model, recipe: Recipe, data: Path, out: Path) -> None:
    train(family, model, ImageSet(data), recipe, out, world=World())


def compare(name: str, peak: float, calibrated: tuple[float, cost.Cost], measured: tuple[float, cost.Cost]) -> float:
    """Print the plan's time for a run next to the measured one; their ratio. Each: (seconds, cost)."""
    spent, known = calibrated
    where = cost.Device("cpu", dict.fromkeys(("float32",), peak), known.total / spent / peak / 1e12)
    planned = where.hours(measured[1]) * 3600
    print(f"{name:16s}{where.utilisation:9.1%}{planned:10.2f} s{measured[0]:10.2f} s{planned / measured[0]:9.2f}")
    return planned / measured[0]


def run(family: Family, images: int, peak: float) -> list[float]:
    full, few = SAMPLING[family.name]
    recipe = dataclasses.replace(family.recipes["digits"], **SHORT)
    small = dataclasses.replace(recipe, **CALIBRATION)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, n = create(family, folder), images // 2
        write_set(family, model, few, 8, folder / "warm")
        device = torch.device("cpu")
        calibrated, measured = (
            (
                seconds(lambda o=o, m=m: write_set(family, model, o, m, folder / f"S{m}"), device),
                cost.sampling(family, "digits", o) * m,
            )
            for o, m in ((few, n), (full, images))
        )
        sampled = compare(f"{family.name} S", peak, calibrated, measured)
        data = folder / f"S{images}"
        calibrated, measured = (
            (
                seconds(lambda r=r: fine_tune(family, model, r, data, folder / f"{r.batch}"), device),
                cost.training(family, "digits", r) * trained_images(r),
            )
            for r in (small, recipe)
        )
        return [sampled, compare(f"{family.name} training", peak, calibrated, measured)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(SAMPLING))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ratios: dict[str, list[list[float]]] = {name: [] for name in args.families.split(",")}
    with world("cpu"):
        for _ in range(args.rounds):
            peak = cost.cpu_tflops()
            threads = torch.get_num_threads()
            print(f"CPU, {threads} threads, {peak * 1e3:.0f} GFLOP/s in products, torch {torch.__version__}")
            print(f"{'':16s}{'utilised':>9s}{'planned':>12s}{'measured':>12s}{'ratio':>9s}")
            for name in ratios:
                torch.manual_seed(0)
                ratios[name].append(run(get_family(name), args.images, peak))
    print("planned / measured, median over rounds:")
    for name, found in ratios.items():
        sampled, trained = (statistics.median(column) for column in zip(*found))
        print(f"{name:6s} S {sampled:.2f}, training {trained:.2f}")


if __name__ == "__main__":
    main()
