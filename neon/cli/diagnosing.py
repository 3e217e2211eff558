"""`neon diagnose`: the loss gradients on real images and on own samples, before any self-training."""

import os
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from neon import NeonError
from neon.cli.options import loading, processes, sampling_options
from neon.data import ImageSet
from neon.diagnose import Gradients, Images, Sampled, Sizes, alignment, needed, predicted_w, sizes_of
from neon.family import Family, Recipe, get_family, named
from neon.files import existing, progress, sha256, write_json
from neon.measure.candidates import Candidates
from neon.measure.rows import budget_of, digest, images_of_seeds
from neon.sampling import parse_seeds
from neon.selftrain import snapshots


def run_diagnose(args) -> None:
    started, family = time.monotonic(), get_family(args.family)
    recipe = named(family.recipes, args.recipe, "recipe")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise NeonError("neon diagnose is short and runs in one process: start it without torchrun")
    if args.synthetic and args.seeds:
        raise NeonError("S is read or sampled: give --synthetic or --seeds, not both")
    trained = [str(existing(path)) for folder in args.selftrained for path in snapshots(folder)]
    real, synthetic = ImageSet(args.real), args.synthetic and ImageSet(args.synthetic)
    with processes(args, family) as here:
        candidates = Candidates(family, args.base, here.device, **recipe.network, **loading(args, family))
        model = candidates.model
        family.check(model, real.shape, real.labels)
        seeds = args.seeds and parse_seeds(args.seeds)
        sizes = sizes_of(recipe, len(real), _size(synthetic, seeds), args.batches, args.images)
        if not synthetic:
            synthetic = _sampled(args, family, model, torch.arange(needed(sizes)) if seeds is None else seeds)
        family.check(model, synthetic.shape, synthetic.labels)
        with progress(_visits(sizes, args.repeats, len(trained)), "img", "diagnose") as bar:
            how = {"seed": args.seed, "repeats": args.repeats, "micro_batch": args.micro_batch, "seen": bar.update}
            gradients = Gradients(family, model, recipe, here.device, **how)
            found = alignment(gradients, real, synthetic, sizes, args.seed)
            found["selftrained"] = [
                _of_snapshot(path) | predicted_w(gradients, candidates, path, real, sizes, args.seed)
                for path in trained
            ]
        row = _facts(args, candidates, recipe, real, synthetic, sizes) | here.identity() | found
        row["seconds"] = round(time.monotonic() - started, 1)
        print(*lines(row), sep="\n")
        if args.out:
            write_json(args.out, row)


def lines(row: dict) -> list[str]:
    """What was used, the numbers, a predicted w for each snapshot, the verdict."""
    which = "others" if row["apart"] else "the same images"
    text = [
        f"{row['batches']} batches of {row['batch']} real images and as many of S, each image visited"
        f" {row['repeats']} times; Adam's second moment from {row['squares']} batches of {row['squares_batch']} of S,"
        f" {which}"
    ]
    if row["still"]:
        text.append(f"{row['still']:.1%} of the weights get no gradient from S and are left out")
    plain = f"without preconditioner {_interval(row, 'plain_cosine')}"
    text.append(f"s {_interval(row, 's')}  cosine {_interval(row, 'cosine')}, {plain}")
    for one in row["selftrained"]:
        text.append(f"{one['path']}: predicted w {_interval(one, 'w')}")
    return [*text, f"{row['verdict']}  ({row['seconds']:.1f} s)"]


def _interval(row: dict, name: str) -> str:
    if row[name] is None:
        return "none" if name == "w" else "unknown (a gradient that cannot be told from 0)"
    return f"{row[name]:.3g} [{row[f'{name}_lo']:.3g}, {row[f'{name}_hi']:.3g}]"


def _size(synthetic: Images | None, seeds: torch.Tensor | None) -> int | None:
    return len(synthetic) if synthetic else None if seeds is None else len(seeds)


def _sampled(args, family: Family, model: torch.nn.Module, seeds: torch.Tensor) -> Sampled:
    """S in memory, as `neon generate` makes it in float32."""
    draw, parts = partial(images_of_seeds, family, model, **sampling_options(args, family)), []
    with torch.no_grad(), progress(len(seeds), "img", "sample") as bar:
        for part in seeds.split(args.batch_size):
            parts.append(draw(part).cpu())
            bar.update(len(part))
    return Sampled(torch.cat(parts), family.labels(model, seeds))


def _visits(sizes: Sizes, repeats: int, trained: int) -> int:
    """Images that go forward and backward: two sets twice, and the real ones twice for each snapshot."""
    return sizes.squares * sizes.squares_batch + (4 + 2 * trained) * sizes.batches * sizes.batch * repeats


def _of_snapshot(path: str) -> dict:
    return {"path": path, "sha256": digest(path), "budget": budget_of(path)}


def _facts(args, candidates: Candidates, recipe: Recipe, real, synthetic, sizes: Sizes) -> dict:
    """What the numbers depend on."""
    facts = {
        "family": candidates.family.name,
        "base": str(args.base),
        "base_sha256": digest(args.base),
        "vae_sha256": candidates.vae_sha256,
        "recipe": args.recipe,
        "loss": dict(recipe.loss),
        "real": args.real,
        "real_images": len(real),
        "synthetic": args.synthetic,
        "synthetic_images": len(synthetic),
    }
    if not args.synthetic:
        facts["seeds"] = args.seeds or f"0-{len(synthetic) - 1}"
        facts["sampling"] = sampling_options(args, candidates.family)
    elif (record := Path(args.synthetic, "generate.json")).exists():
        facts["synthetic_sha256"] = sha256(record)
    facts |= vars(sizes) | {"repeats": args.repeats, "seed": args.seed}
    return facts | {"versions": {name: version(name) for name in ("torch", "numpy")}}
