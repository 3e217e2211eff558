"""CPU seconds from features to FID, each way as a ratio to torch-fidelity's value alone.

    python benchmarks/fid_statistics.py [--images 10000] [--dim 2048] [--rounds 3] [--no_sqrtm]

Features are random, correlated and not negative, as Inception's are. All ways take turns in every round, and a ratio is
the median over rounds, so that a machine that slows down or is shared slows all of them. Set OMP_NUM_THREADS=1 to
compare work, not threads.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial

import numpy as np
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from neon.measure.metrics import Moments, Reference, frechet, frechet_distance

BATCH = 64  # features are added as they are sampled


def features(n: int, dim: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """(n, dim) float32; the same distribution for every seed, except the scale."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) / dim**0.5
    mix *= torch.logspace(0.5, -1.5, dim)[:, None]
    noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return (scale * noise @ mix - 0.5).relu()


def moments(x: torch.Tensor) -> Moments:
    found = Moments(x.shape[1])
    for batch in x.split(BATCH):
        found.update(batch)
    return found


def with_torch_fidelity(x: torch.Tensor, real: dict) -> float:
    return fid_statistics_to_metric(fid_features_to_statistics(x), real, verbose=False)["frechet_inception_distance"]


def with_sqrtm(x: torch.Tensor, real: dict) -> float:
    """The square root of the product of covariances, as in the original FID and in the released code."""
    x = x.double().numpy()
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    root = scipy.linalg.sqrtm(sigma @ real["sigma"]).real
    return float(np.square(mu - real["mu"]).sum() + np.trace(sigma + real["sigma"] - 2 * root))


def value_and_error(x: torch.Tensor, reference: Reference) -> tuple[float, float]:
    found = moments(x)
    fid = frechet(found.mean, found.cov, reference)
    return fid.value, float(fid.influence(x).std() / len(x) ** 0.5)


def value_alone(x: torch.Tensor, reference: Reference) -> float:
    found = moments(x)
    return frechet_distance(found.mean, found.cov, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_sqrtm", action="store_true", help="skip scipy's square root, which is slow")
    args = parser.parse_args()
    x, real = features(args.images, args.dim, 1, 1.05), fid_features_to_statistics(features(20_000, args.dim, 2))
    published = Reference(torch.from_numpy(real["mu"]).double(), torch.from_numpy(real["sigma"]))
    stored = replace(published, stored_root=published.root)
    _ = stored.root  # checked when the file is read
    ways = {
        "torch-fidelity: value": partial(with_torch_fidelity, x, real),
        "neon: value and error": partial(value_and_error, x, stored),
        "neon: value and error, root not stored": lambda: value_and_error(x, replace(published)),
        "neon: value alone": partial(value_alone, x, stored),
        "scipy's sqrtm: value": partial(with_sqrtm, x, real),
    }
    if args.no_sqrtm:
        del ways["scipy's sqrtm: value"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, run in ways.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
    threads = torch.get_num_threads()
    print(f"{args.images} × {args.dim} features, CPU, {threads} threads, torch {torch.__version__}")
    first = times["torch-fidelity: value"]
    for name, spent in times.items():
        ratio = statistics.median(b / a for a, b in zip(first, spent))
        print(f"{name:40s}{statistics.median(spent):8.2f} CPU s{ratio:7.2f}×")
    value, error = value_and_error(x, stored)
    print(f"FID {with_torch_fidelity(x, real):.6f} of torch-fidelity, {value:.6f} ± {error:.4f} of neon")


if __name__ == "__main__":
    main()
