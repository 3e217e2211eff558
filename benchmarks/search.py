"""Seconds of k points of a search in one process, against a process for each point, and against the released way.

    python benchmarks/search.py [--points 3] [--images 32] [--features inception:random]
    python benchmarks/search.py --memory 500

One process: both checkpoints read once, merged in place. A process each: `neon merge`, then calculate_fid.py. The
released way, with this project's code: a process that merges, samples and writes PNG files, reads them again, and
takes the matrix square root of scipy. Weights are initial values of EDM's network for digits: it is small, so that what
is compared is mostly everything except its forward passes. Each way starts its own processes.

--memory: instead, the peak memory of a merge in place, and of one through a merged copy, for a network of so many MB.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from edm import family
from neon.data import ImageSet, encode_png, image_name
from neon.measure.candidates import Candidates, Point
from neon.measure.evaluate import Evaluation
from neon.measure.features import load_extractor
from neon.measure.metrics import Moments, Reference, load_reference, save_reference
from neon.measure.rows import images_of_seeds, measure
from neon.merge import merge
from neon.weights.checkpoint import load_weights, save_safetensors

ROOT = Path(__file__).resolve().parent.parent
SAMPLING = {field.name: field.default for field in fields(family.Sampling)} | {"num_steps": 18}
BASE, TRAINED, REFERENCE = "base.safetensors", "trained.safetensors", "reference.npz"
BATCH = 64


def prepare(folder: Path, network: str, features: str = "", **options) -> None:
    """A base, a self-trained model a little away from it, and a reference for the features (none: '')."""
    torch.manual_seed(0)
    net = family.create(network, device="cpu", **options)
    state, facts = net.state_dict(), family.metadata(net)
    save_safetensors(folder / BASE, state, facts)
    for tensor in state.values():
        tensor.add_(1e-3 * torch.randn_like(tensor))
    save_safetensors(folder / TRAINED, state, facts)
    if features:
        moments = Moments(load_extractor(features).dim)
        moments.update(torch.rand(2 * len(moments.mean), len(moments.mean)))
        save_reference(Reference(moments.mean, moments.cov), folder / REFERENCE)


# What a process of each way does. strengths: of the merge.


def in_one_process(folder: Path, features: str, images: int, strengths: list[float]) -> None:
    extractor, reference = load_extractor(features), load_reference(folder / REFERENCE)
    evaluation = Evaluation(torch.arange(images), extractor, reference, ("fid",), BATCH)
    candidates = Candidates(family, folder / BASE, "cpu")
    for w in strengths:
        print(measure(candidates, evaluation, SAMPLING, Point(str(folder / TRAINED), w))["fid"])


def as_released(folder: Path, features: str, images: int, strengths: list[float]) -> None:
    import scipy.linalg

    model = family.load(folder / BASE, device="cpu")
    base, trained = load_weights(folder / BASE), load_weights(folder / TRAINED)
    (w,) = strengths
    model.load_state_dict({name: (1 + w) * base[name] - w * trained[name] for name in base})
    pngs = folder / f"png-{w}"
    pngs.mkdir()
    for seeds in torch.arange(images).split(BATCH):
        for seed, image in zip(seeds.tolist(), images_of_seeds(family, model, seeds, **SAMPLING)):
            (pngs / Path(image_name(seed)).name).write_bytes(encode_png(image))
    stored, extractor = ImageSet(pngs), load_extractor(features)
    found = [
        extractor(stored.images(part.tolist()).expand(-1, 3, -1, -1)).features
        for part in torch.arange(images).split(BATCH)
    ]
    x = torch.cat(found).double().numpy()
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    real = load_reference(folder / REFERENCE)
    mu_real, sigma_real = real.mu.numpy(), real.sigma.numpy()
    root = scipy.linalg.sqrtm(sigma @ sigma_real).real
    print(float(np.square(mu - mu_real).sum() + np.trace(sigma + sigma_real - 2 * root)))


def peak() -> int:
    """Bytes of this process's largest resident set, on Linux. (getrusage would count the parent's.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(folder: Path, whole: bool) -> None:
    """Peak of two merges beyond what the process had before, in sizes of the network."""
    started, size = peak(), (folder / BASE).stat().st_size
    candidates = Candidates(family, folder / BASE, "cpu")
    for w in (0.5, 1.0):
        if whole:
            state = dict(merge(candidates.base, candidates._read(str(folder / TRAINED)), w, family.is_buffer))
            candidates.model.load_state_dict(state)
            del state
        else:
            candidates.load(folder / TRAINED, w)
    print(f"{(peak() - started) / size:.2f}")


def child(*args) -> str:
    """What a new process of this file prints for them."""
    return run(__file__, "--child", *args)


def run(*command) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def a_process_each(folder: Path, features: str, images: int, w: float) -> None:
    merged = folder / f"merged-{w}.safetensors"
    run("-m", "neon.cli", "merge", "--base", folder / BASE, "--selftrained", folder / TRAINED, "-w", w, "--out", merged)
    options = ("--network_pkl", merged, "--ref", folder / REFERENCE, "--features", features, "--metrics", "fid")
    run("edm/calculate_fid.py", *options, "--num_steps", 18, "--seeds", f"0-{images - 1}", "--device", "cpu")


def compare(points: int, images: int, features: str) -> None:
    strengths = [0.5 * (i + 1) for i in range(points)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, "digits", features)
        ways = {
            "one process": lambda: child("in_one_process", folder, features, images, *strengths),
            "a process each": lambda: [a_process_each(folder, features, images, w) for w in strengths],
            "the released way": lambda: [child("as_released", folder, features, images, w) for w in strengths],
        }
        threads = torch.get_num_threads()
        print(f"{points} points, {images} images, {features}, CPU, {threads} threads, torch {torch.__version__}")
        first = None
        for way, start in ways.items():
            started = time.perf_counter()
            start()
            spent = time.perf_counter() - started
            first = first or spent
            print(f"{way:20s}{spent:8.1f} s{spent / first:8.2f}×", flush=True)


def compare_memory(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        width = round((megabytes / 223) ** 0.5 * 8) * 16  # 128 channels have 223 MB
        prepare(folder, "cifar10_cond", model_channels=width)
        size = (folder / BASE).stat().st_size
        print(f"peak memory of two merges of {size / 1e6:.0f} MB, in copies of the network, on a CPU")
        for way, whole in {"in place": False, "through a merged copy": True}.items():
            print(f"{way:24s}{child('memory', folder, int(whole))}", flush=True)


def main() -> None:
    if "--child" in sys.argv[1:2]:
        way, folder, *rest = sys.argv[2:]
        if way == "memory":
            return memory(Path(folder), bool(int(rest[0])))
        features, images, *strengths = rest
        known = {"in_one_process": in_one_process, "as_released": as_released}
        return known[way](Path(folder), features, int(images), list(map(float, strengths)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--features", default="inception:random")
    parser.add_argument("--memory", type=int, metavar="MB", help="compare peak memory instead, with such a network")
    args = parser.parse_args()
    if args.memory:
        compare_memory(args.memory)
    else:
        compare(args.points, args.images, args.features)


if __name__ == "__main__":
    main()
