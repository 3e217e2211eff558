"""FID and IS of an EDM checkpoint, sampled and measured in memory. Alone or under torchrun, on GPUs or CPUs."""

import argparse
import time

import torch

from edm import family
from neon import NeonError
from neon.cli import add_inference, add_metrics, command_line, count, kappa
from neon.distributed import world
from neon.evaluate import Evaluation
from neon.features import load_extractor
from neon.fetch import local
from neon.io import write_json
from neon.metrics import load_reference
from neon.sampling import parse_seeds
from neon.search import Candidates, Point, measure


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--network_pkl", required=True, help="original .pkl or .safetensors")
    p.add_argument("--ref", required=True, help="reference statistics: .npz or its URL, kept in fid_stats/")
    p.add_argument("--seeds", default="0-49999", help="one image per seed (default %(default)s)")
    p.add_argument("--max_batch_size", type=count, default=64, help="images per forward pass and process")
    p.add_argument("--class", dest="class_idx", type=int, help="sample this class only (default: drawn per seed)")
    p.add_argument("--out", help="JSON file for the row of results")
    add_metrics(p)
    add_inference(p, family)
    return p


def main() -> None:
    args = parser().parse_args()
    started, seeds = time.monotonic(), parse_seeds(args.seeds)
    with world(args.device, args.tf32) as here:
        reference = load_reference(local(args.ref, "fid_stats", here))
        extractor = load_extractor(args.features, here.device)
        metrics = tuple(args.metrics.split(","))
        evaluation = Evaluation(seeds, extractor, reference, metrics, args.max_batch_size, here)
        candidates = Candidates(family, args.network_pkl, here.device, args.precision, args.compile)
        labels = None
        if args.class_idx is not None:
            if not 0 <= args.class_idx < candidates.model.label_dim:
                raise NeonError(f"--class {args.class_idx}: the network knows {candidates.model.label_dim} classes")
            labels = torch.full_like(seeds, args.class_idx)
        row = measure(candidates, evaluation, kappa(args, family), Point(), labels)
        if here.rank == 0:
            values = "  ".join(f"{m.upper() if len(m) < 4 else m} {row[m]:.4f}" for m in metrics)
            steps = f"{args.num_steps} {args.solver} steps"
            model = f"EDM {'conditional' if candidates.model.label_dim else 'unconditional'}"
            print(f"{values}  ({model}, {steps}, {row['n']} images, {time.monotonic() - started:.1f} s)")
            if args.out:
                write_json(args.out, row)


if __name__ == "__main__":
    command_line(main)
