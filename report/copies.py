"""How many samples copy a training image? A share for base, self-trained model and Neon of every seed.

A sample counts as a copy if it is nearer to some training image than all but 1 % of the held-out real digits are
(Euclidean distance of pixels). So digits that copy nothing score 1 % by construction.

With --features and --ref there is one more column, AuthPct: the per cent of samples that are farther from their nearest
training image than this one is from its nearest other training image, by these features.
"""

import argparse
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from neon import NeonError
from neon.cli import command_line
from neon.data import ImageSet
from neon.files import atomic, existing
from neon.measure.features import load_extractor
from neon.measure.manifold import around_real
from neon.measure.metrics import load_reference
from neon.measure.rows import images_of
from neon.sampling import parse_seeds
from report.tables import rows_of, seed_of


def nearest(images: torch.Tensor, train: torch.Tensor) -> np.ndarray:
    """Distance of each uint8 (N, C, H, W) image to the nearest of `train`, (N,) float64."""
    return torch.cdist(images.flatten(1).double(), train.flatten(1).double()).min(1).values.numpy()


def load_training(path: Path, spec: str) -> torch.Tensor:
    """The features of the training images, (m, d). Raises NeonError if they do not fit those of spec."""
    reference = load_reference(existing(path))
    if reference.features is None:
        raise NeonError(f"{path} has no features, which AuthPct compares with")
    if (found := load_extractor(spec).dim) != len(reference.mu):
        raise NeonError(f"features have {found} dimensions, the reference {reference.name} has {len(reference.mu)}")
    return reference.features


def authpct(images: torch.Tensor, spec: str, training: torch.Tensor) -> float:
    """Per cent of uint8 (N, C, H, W) images that are not copies by the features of spec; training: (m, d)."""
    extractor = load_extractor(spec)
    parts = [extractor(part.expand(-1, 3, -1, -1)).features for part in images.split(500)]
    return around_real(training, torch.cat(parts)).authpct


def shares(
    path: Path, data: Path, seeds: torch.Tensor, spec: str | None = None, training: torch.Tensor | None = None
) -> list[dict]:
    """A line per row of a final evaluation. spec, training: see authpct, which is in the lines if they are given."""
    torch.set_flush_denormal(True)
    train, heldout = (s.images(range(len(s))) for s in map(ImageSet, (data / "train", data / "heldout")))
    limit = np.quantile(nearest(heldout, train), 0.01)
    lines = []
    for row in rows_of(path, final=True):
        images = images_of(row, seeds, 500, "cpu")
        share = float((nearest(images, train) <= limit).mean())
        authentic = {} if training is None else {"authpct": authpct(images, spec, training)}
        lines.append(
            {"family": row["family"], "setting": path.parent.name, "seed": seed_of(path)}
            | {"role": row["role"], "w": row["w"], "copies": share}
            | authentic
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="what `neon final` wrote, named SEED.jsonl")
    parser.add_argument("--seeds", required=True, help="of the samples")
    parser.add_argument("--out", type=Path, required=True, help=".csv")
    parser.add_argument("--features", help="also AuthPct, by these features, as of `neon evaluate`; needs --ref")
    parser.add_argument("--ref", type=Path, help="what `neon reference` wrote of the training images; needs --features")
    args = parser.parse_args()
    if (args.features is None) != (args.ref is None):
        raise NeonError("AuthPct needs both --features and --ref")
    training = load_training(args.ref, args.features) if args.ref else None
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # of the workers, one per core
    with multiprocessing.get_context("spawn").Pool() as pool:
        options = {"data": args.data, "seeds": parse_seeds(args.seeds), "spec": args.features, "training": training}
        found = pool.map(partial(shares, **options), args.rows, chunksize=1)
    table = pd.DataFrame([line for lines in found for line in lines])
    with atomic(args.out) as path:
        table.to_csv(path, index=False, float_format="%.4f")
    for column in table.columns.intersection(["copies", "authpct"]):
        print(table.groupby(["setting", "role"], sort=False)[column].agg(["mean", "max"]))


if __name__ == "__main__":
    command_line(main)
