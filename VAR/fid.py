"""FID and IS of a VAR checkpoint, sampled and measured in memory. Alone or under torchrun, on GPUs or CPUs."""

import argparse
import time

import torch

from neon import NeonError
from neon.cli import add_inference, add_metrics, command_line, count, kappa, loading, natural
from neon.distributed import world
from neon.evaluate import Evaluation
from neon.features import load_extractor
from neon.fetch import local
from neon.io import write_json
from neon.metrics import load_reference
from neon.search import Candidates, Point, measure
from VAR import family


def parser(network: str, cfg: float) -> argparse.ArgumentParser:
    config = family.networks[network]
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--var_ckpt", required=True, help=".pth, as released or nested, or .safetensors")
    p.add_argument("--fid_stats", required=True, help="reference statistics: .npz or its URL, kept in fid_stats/")
    p.add_argument("--num_images", "--N", type=count, default=50_000, help="default %(default)s; classes are balanced")
    p.add_argument("--batch_size", type=count, default=64, help="images per forward pass and process")
    p.add_argument("--seed", type=natural, default=0, help="N images have the seeds seed·N … (seed + 1)·N − 1")
    p.add_argument("--img_size", type=count, default=config.image_side, help="checked against the model")
    p.add_argument("--depth", type=count, default=config.depth, help="blocks (default %(default)s)")
    p.add_argument("--out", help="JSON file for the row of results")
    add_metrics(p)
    add_inference(p, family)
    p.set_defaults(cfg=cfg)
    return p


def calculate_fid(network: str, cfg: float) -> None:
    """The command line of one model: the name of its configuration and the default guidance."""
    args = parser(network, cfg).parse_args()
    started = time.monotonic()
    with world(args.device, args.tf32) as here:
        reference = load_reference(local(args.fid_stats, "fid_stats", here))
        extractor = load_extractor(args.features, here.device)
        metrics = tuple(args.metrics.split(","))
        seeds = torch.arange(args.num_images) + args.seed * args.num_images
        evaluation = Evaluation(seeds, extractor, reference, metrics, args.batch_size, here)
        options = loading(args, family) | {"depth": args.depth}
        candidates = Candidates(family, args.var_ckpt, here.device, args.precision, args.compile, **options)
        if (side := candidates.model.config.image_side) != args.img_size:
            raise NeonError(f"{args.var_ckpt} makes images of {side} pixels, not {args.img_size}")
        row = measure(candidates, evaluation, kappa(args, family), Point())
        if here.rank == 0:
            values = "  ".join(f"{m.upper() if len(m) < 4 else m} {row[m]:.4f}" for m in metrics)
            model = f"VAR d{args.depth}, {side} px, cfg {args.cfg:g}"
            print(f"{values}  ({model}, {row['n']} images, {time.monotonic() - started:.1f} s)")
            if args.out:
                write_json(args.out, row)


def run(network: str, cfg: float) -> None:
    command_line(lambda: calculate_fid(network, cfg))
