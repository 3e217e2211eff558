"""Where an evaluation's time goes: the model's forward passes, the features' network, and everything else.

    python benchmarks/overhead.py [--models edm:digits,var:digits,…] [--images 256] [--batch 64]
    python benchmarks/overhead.py --models edm:cifar10_cond --images 4 --batch 4

Weights are initial values: speed does not depend on them. Everything else is random streams, solver state, guidance,
conversion to uint8, statistics of each batch; the FID at the end is computed once, whatever the number of images, and
has a column of its own. Models of 8×8 digits are measured with the digits' features, others with Inception of random
weights.
"""

import argparse
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from mini.features import DigitsCNN, save_digits_cnn
from neon.distributed import World, world
from neon.family import get_family
from neon.measure import metrics
from neon.measure.evaluate import Evaluation
from neon.measure.features import load_extractor
from neon.measure.metrics import Moments, Reference
from neon.measure.rows import images_of_seeds
from neon.weights.checkpoint import save_safetensors
from VAR.configs import CONFIGS
from VAR.vqvae import VQVAE

# Sampling options that are not the family's default.
SAMPLING = {
    "edm:digits": {"num_steps": 18},
    "imm:digits": {"num_steps": 8},
    "var:digits": {"temperature": 0.6, "top_k": 0, "top_p": 0.0},  # as the mini scale draws
}
# What of a model is a forward pass: paths to its methods.
FORWARD = {
    "edm": ["forward"],
    "flow": ["forward"],
    "var": ["transformer.next_scale", "vqvae.quantize.refine", "vqvae.quantize.tokens", "vqvae.decode_latent"],
    "xar": ["transformer.forward", "vae.decode"],
    "imm": ["net.forward"],
}
TARGET = {"edm": 0.10, "flow": 0.10, "var": 0.15, "xar": 0.15, "imm": 0.15}


class Clock:
    """Adds up the wall-clock time inside functions, by the name of their group."""

    def __init__(self, device: torch.device):
        self.device, self.spent = device, Counter()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watched(self, group: str, function):
        def run(*args, **kwargs):
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[group] += self.now() - started

        return run

    def watch(self, group: str, owner, name: str):
        """A context in which owner.name is timed."""
        return mock.patch.object(owner, name, self.watched(group, getattr(owner, name)))


def forward_passes(name: str, model: torch.nn.Module):
    """(owner, method) of each function that is the model's network."""
    for path in FORWARD[name]:
        parts = path.split(".")
        owner = model.get_submodule(".".join(parts[:-1]))
        yield owner, parts[-1]


def model_of(family, network: str, here: World, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {}
    if family.name == "var":
        options["vae_ckpt"] = folder / "vqvae.safetensors"
        save_safetensors(options["vae_ckpt"], VQVAE(CONFIGS[network]).state_dict())
    return family.create(network, device=here.device, **options).requires_grad_(False)


def extractor_of(network: str, here: World, folder: Path):
    if network != "digits":
        return load_extractor("inception:random", here.device)
    torch.manual_seed(0)
    save_digits_cnn(DigitsCNN(), folder / "features.safetensors")
    return load_extractor(f"digits:{folder / 'features.safetensors'}", here.device)


def reference_of(dim: int) -> Reference:
    moments = Moments(dim)
    moments.update(torch.randn(2 * dim, dim, generator=torch.Generator().manual_seed(0)))
    return Reference(moments.mean, moments.cov)


def measure(name: str, images: int, batch: int, here: World, folder: Path) -> Counter:
    """Seconds of one evaluation by group: 'model', 'features', 'fid', 'all'."""
    kind, _, network = name.partition(":")
    family = get_family(kind)
    model, extractor = model_of(family, network, here, folder), extractor_of(network, here, folder)
    sampling = {field.name: field.default for field in fields(family.Sampling)} | SAMPLING.get(name, {})
    reference = reference_of(extractor.dim)
    _ = reference.root
    evaluate = Evaluation(torch.arange(images), extractor, reference, ("fid",), batch, here)
    draw = partial(images_of_seeds, family, model, **sampling)
    extractor(draw(evaluate.seeds[:1]).expand(-1, 3, -1, -1))  # warms up
    clock = Clock(here.device)
    with ExitStack() as stack:
        for owner, method in forward_passes(kind, model):
            stack.enter_context(clock.watch("model", owner, method))
        stack.enter_context(clock.watch("features", extractor.module, "forward"))
        stack.enter_context(clock.watch("fid", metrics, "frechet"))
        clock.watched("all", evaluate)(draw)
    return clock.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default="edm:digits,flow:digits,var:digits,xar:digits,imm:digits", help="FAMILY:NETWORK, …"
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    with world() as here, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        where = (
            torch.cuda.get_device_name() if here.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{args.images} images, batch {args.batch}, {where}, torch {torch.__version__}")
        print(
            f"{'':20s}{'s/image':>10s}{'model':>8s}{'features':>10s}{'the rest':>10s}{'target':>8s}{'FID, once':>11s}"
        )
        for name in args.models.split(","):
            spent = measure(name, args.images, args.batch, here, Path(folder))
            each = spent["all"] - spent["fid"]
            shares = {"model": spent["model"] / each, "features": spent["features"] / each}
            rest, target = 1 - sum(shares.values()), TARGET[name.partition(":")[0]]
            line = f"{name:20s}{each / args.images:10.4f}{shares['model']:8.1%}{shares['features']:10.1%}{rest:10.1%}"
            print(f"{line}{f'< {target:.0%}':>8s}{spent['fid']:9.2f} s", flush=True)


if __name__ == "__main__":
    main()
