"""What the calculate_fid.py of every family shares: FID and IS of a checkpoint, sampled and measured in memory."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable

import torch

from neon.cli.options import (
    add_inference,
    add_metrics,
    count,
    loading,
    natural,
    precision_of,
    processes,
    sampling_options,
    say_metrics,
)
from neon.fetch import local
from neon.files import duration, existing, write_json
from neon.measure.candidates import Candidates, Point
from neon.measure.evaluate import Evaluation, parse_metrics, title
from neon.measure.features import Extractor, load_extractor
from neon.measure.metrics import load_reference
from neon.measure.rows import measure


def add_output(p: argparse.ArgumentParser, family) -> None:
    """What to measure, where the row goes, how to compute, and the family's sampling options."""
    p.add_argument("--out", help="JSON file for the row of results")
    add_metrics(p)
    add_inference(p, family)


def add_images(p: argparse.ArgumentParser, batch_size: int = 64) -> None:
    """The reference and the images, as the ImageNet families name them; image_seeds reads them."""
    p.add_argument("--fid_stats", required=True, help="reference statistics: .npz or its URL, kept in fid_stats/")
    p.add_argument("--num_images", "--N", type=count, default=50_000, help="default %(default)s; classes are balanced")
    p.add_argument("--batch_size", type=count, default=batch_size, help="images per forward pass and process")
    p.add_argument("--seed", type=natural, default=0, help="N images have the seeds seed·N … (seed + 1)·N − 1")


def image_seeds(args) -> torch.Tensor:
    return torch.arange(args.num_images) + args.seed * args.num_images


def calculate_fid(
    args,
    family,
    checkpoint: str,
    ref: str,
    seeds: torch.Tensor,
    batch_size: int,
    describe: Callable[[torch.nn.Module], str],
    class_idx: int | None = None,
    **options,
) -> None:
    """Sample one image per seed, print one line of metrics, and write the row to args.out if it is given.

    args: what add_output parsed. describe(model) is the line's words about the model, and may raise NeonError if it is
    not the one that was asked for. class_idx: of all images. options: of family.load.
    """
    started = time.monotonic()
    existing(checkpoint)
    with processes(args, family) as here:
        reference = load_reference(existing(local(ref, "fid_stats")))
        extractor = load_extractor(args.features, here.device)
        if here.device.type == "cpu" and args.device is None and here.rank == 0:
            extractor = _says_how_long(extractor, -(-len(seeds) // here.size))
        metrics = parse_metrics(args.metrics, extractor, reference)
        say_metrics(args, metrics, here)
        evaluation = Evaluation(seeds, extractor, reference, metrics, batch_size, here)
        options = loading(args, family) | options
        precision = precision_of(args, family, here)
        candidates = Candidates(family, checkpoint, here.device, precision, args.compile, **options)
        model = describe(candidates.model)
        row = measure(candidates, evaluation, sampling_options(args, family), Point(), class_idx)
        if here.rank == 0:
            values = "  ".join(f"{title(m, extractor.name)} {row[m]:.4f}" for m in metrics)
            print(f"{values}  ({model}, {row['n']} images, {time.monotonic() - started:.1f} s)")
            if args.out:
                write_json(args.out, row)


def _says_how_long(extractor: Extractor, images: int) -> Extractor:
    """On a CPU that nobody asked for: when the first images arrive, how long so many take, on stderr."""
    started, said = time.monotonic(), []

    def module(batch):
        if not said:
            seconds = time.monotonic() - started
            said.append(
                f"no usable GPU: computing on the CPU; the first {len(batch)} images took {duration(seconds)},"
                f" all take about {duration(seconds / len(batch) * images)}"
            )
            print(said[0], file=sys.stderr, flush=True)
        return extractor.module(batch)

    return dataclasses.replace(extractor, module=module)
