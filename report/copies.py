"""How many samples copy a training image? A share for base, self-trained model and Neon of every seed.

A sample counts as a copy if it is nearer to some training image than all but 1 % of the held-out real digits are
(Euclidean distance of pixels). So digits that copy nothing score 1 % by construction.
"""

import argparse
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from neon.cli import command_line
from neon.data import ImageSet
from neon.files import atomic
from neon.measure.rows import images_of
from neon.sampling import parse_seeds
from report.tables import rows_of, seed_of


def nearest(images: torch.Tensor, train: torch.Tensor) -> np.ndarray:
    """Distance of each uint8 (N, C, H, W) image to the nearest of `train`, (N,) float64."""
    return torch.cdist(images.flatten(1).double(), train.flatten(1).double()).min(1).values.numpy()


def shares(path: Path, data: Path, seeds: torch.Tensor) -> list[dict]:
    """A line per row of a final evaluation."""
    torch.set_flush_denormal(True)
    train, heldout = (s.images(range(len(s))) for s in map(ImageSet, (data / "train", data / "heldout")))
    limit = np.quantile(nearest(heldout, train), 0.01)
    lines = []
    for row in rows_of(path, final=True):
        images = images_of(row, seeds, 500, "cpu")
        share = float((nearest(images, train) <= limit).mean())
        lines.append(
            {"family": row["family"], "setting": path.parent.name, "seed": seed_of(path)}
            | {"role": row["role"], "w": row["w"], "copies": share}
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="what `neon final` wrote, named SEED.jsonl")
    parser.add_argument("--seeds", required=True, help="of the samples")
    parser.add_argument("--out", type=Path, required=True, help=".csv")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # of the workers, one per core
    with multiprocessing.get_context("spawn").Pool() as pool:
        found = pool.map(partial(shares, data=args.data, seeds=parse_seeds(args.seeds)), args.rows, chunksize=1)
    table = pd.DataFrame([line for lines in found for line in lines])
    with atomic(args.out) as path:
        table.to_csv(path, index=False, float_format="%.4f")
    print(table.groupby(["setting", "role"], sort=False)["copies"].agg(["mean", "max"]))


if __name__ == "__main__":
    command_line(main)
