"""How many samples copy a training image? For base and Neon of every seed, beside what chance would give.

A sample counts as a copy if it is nearer to some training image than all but 1 % of the held-out real digits are
(Euclidean distance of pixels), so real digits that nobody has copied score 1 % by construction.
"""

import argparse
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from neon.data import ImageSet
from neon.measure.rows import images_of
from neon.sampling import parse_seeds


def nearest(images: torch.Tensor, train: torch.Tensor) -> np.ndarray:
    """Distance of each uint8 (N, C, H, W) image to the nearest of `train`, (N,) float64."""
    return torch.cdist(images.flatten(1).double(), train.flatten(1).double()).min(1).values.numpy()


def shares(path: Path, data: Path, seeds: torch.Tensor) -> list[dict]:
    """A line per row of a final evaluation."""
    torch.set_flush_denormal(True)
    train, heldout = (s.images(range(len(s))) for s in map(ImageSet, (data / "train", data / "heldout")))
    limit = np.quantile(nearest(heldout, train), 0.01)
    lines = []
    for row in map(json.loads, path.read_text().splitlines()):
        images = images_of(row, seeds, 500, "cpu")
        share = float((nearest(images, train) <= limit).mean())
        lines.append(
            {"family": row["family"], "setting": path.parent.name, "seed": int(path.stem)}
            | {"role": row["role"], "w": row["w"], "copies": share}
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="what `neon final` wrote")
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # of the workers, one per core
    with multiprocessing.get_context("spawn").Pool() as pool:
        found = pool.map(partial(shares, data=args.data, seeds=parse_seeds(args.seeds)), args.rows, chunksize=1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([line for lines in found for line in lines])
    table.to_csv(args.out, index=False, float_format="%.4f")
    print(table.groupby(["setting", "role"], sort=False)["copies"].agg(["mean", "max"]))
