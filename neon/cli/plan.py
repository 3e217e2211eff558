"""`neon plan`, and what `--dry_run` prints: a command's part of the cost. Nothing is written, no weights are read."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from neon.cli.options import method_of, sampling_options
from neon.cost import Device, device, features, training
from neon.data import ImageSet
from neon.distributed import rank
from neon.family import Family, Recipe, get_family, named
from neon.files import existing
from neon.plan import (
    DIM,
    ROLES,
    Row,
    as_json,
    base_evaluations_of,
    costliest,
    describe,
    evaluations_of,
    measured,
    network_of,
    passes_of,
    plan,
    sampled,
    snapshots_of,
    summed,
    synthetic_bytes,
    text,
    trained_images,
    training_bytes,
)
from neon.sampling import parse_seeds
from neon.selftrain import snapshots


def run_plan(args) -> None:
    where = device(args.device, args.tflops, args.utilisation)
    rows = plan(args.params)
    print(json.dumps(as_json(rows, where, args.gpus), indent=1) if args.json else text(rows, where, args.gpus))


def run_generate(args) -> None:
    family, images = get_family(args.family), len(parse_seeds(args.seeds))
    network = network_of(family, args.model, preset=args.preset)
    each = sampled(
        family, network, sampling_options(args, family), *_exactness(args, family), passes=passes_of(vars(args))
    )
    disk = synthetic_bytes(family, network, images)
    _say(args, f"would write {images:,} images of {args.model} to {args.out}", Row("", "", "", 0, images, each, disk))


def run_train(args) -> None:
    """`neon train` and `neon selftrain`."""
    family = get_family(args.family)
    recipe = _recipe(args, family)
    if hasattr(args, "base"):
        network, start = network_of(family, args.base, args.recipe, args.preset), f"from {args.base}"
    else:
        network, start = args.network, f"a new {args.network}"
    written, state = training_bytes(family, network, recipe, getattr(args, "raw", True))
    row = Row("", "", "", 0, trained_images(recipe), training(family, network, recipe), written + state)
    _say(args, f"would train {start} on {args.data} and write {snapshots_of(recipe)} snapshots to {args.out}", row)


def run_evaluate(args) -> None:
    if args.images:
        images = ImageSet(args.images)
        row = Row("", "", "", 1, len(images), features(args.features, images.shape))
        return _say(args, f"would measure the images in {args.images}", row)
    _say(args, f"would evaluate {args.base}", _evaluations(args, 1, {}, alone=0 if args.w else 1))


def run_search(args) -> None:
    family, method = get_family(args.family), method_of(args)
    found = evaluations_of(args.w, args.grid, method, args.evaluations, _trained(args, family))
    network = network_of(family, args.base, preset=args.preset)
    options = costliest(family, network, sampling_options(args, family), args.grid)
    row = _evaluations(args, found, options, base_evaluations_of(args.w, args.grid, method))
    kind = "a surface of" if method == "surface" else "without its early stop, a grid of"
    _say(args, f"would write {args.out}: {kind} at most {found} evaluations", row._replace(disk=row.images * DIM * 4))


def run_final(args) -> None:
    _say(args, f"would write {args.out}: at most {ROLES} evaluations", _evaluations(args, ROLES, {}, alone=1))


def _evaluations(args, count: int, options: Mapping[str, object], alone: int) -> Row:
    """Of count models. options: what differs from the arguments'. alone: how many are the base, so one network."""
    family, images = get_family(args.family), count * len(parse_seeds(args.seeds))
    network = network_of(family, args.base, preset=args.preset)
    chosen = {**sampling_options(args, family), **options}
    guided = 1 - alone / count if args.by == "guidance" else 0.0
    each = measured(family, network, chosen, *_exactness(args, family), args.features, guided)
    return Row("", "", "", count, images, each)


def _trained(args, family: Family) -> int:
    """How many snapshots a search reads; of a folder that is not there yet, as many as the preset's recipe writes."""
    found = 0
    for path in map(Path, args.selftrained):
        if args.preset and not path.exists() and path.suffix != ".safetensors":
            found += snapshots_of(family.recipes[named(family.presets, args.preset, "preset").recipe])
        else:
            found += len(snapshots(path if path.suffix == ".safetensors" else existing(path)))
    return found


def _recipe(args, family: Family) -> Recipe:
    """The recipe with the changes that the arguments make to it."""
    names = ("batch", "lr", "budget", "snapshot", "ramp", "precision", "tf32")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if _on_cpu(args):
        changes = {"precision": "float32"} | changes | {"tf32": False}
    return dataclasses.replace(named(family.recipes, args.recipe, "recipe"), **changes)


def _on_cpu(args) -> bool:
    return "cpu" in (args.device, args.dry_run)


def _exactness(args, family: Family) -> tuple[str, bool]:
    """The precision in which the command would sample, and whether with TensorFloat-32."""
    if _on_cpu(args):
        return args.precision or "float32", False
    return args.precision or family.released_precision, family.released_tf32 if args.tf32 is None else args.tf32


def _say(args, what: str, row: Row) -> None:
    """What the command would do, and its cost."""
    if rank():
        return
    where, gpus = _device(args.dry_run), int(os.environ.get("WORLD_SIZE", 1))
    total = summed([row], where, gpus)
    print(what)
    print(
        f"images       {row.images:,}, {row.each.passes:,.0f} network passes and {row.each.total / 1e12:.4g} TFLOP each"
    )
    print(f"evaluations  {row.evaluations:,}\n" * bool(row.evaluations), end="")
    print(f"compute      {total['flops'] / 1e15:,.4g} PFLOP")
    print(
        f"time         {total['gpu_hours']:,.3g} hours of {describe(where)}; {total['hours']:,.3g} with {gpus} at once"
    )
    print(f"disk         at most {row.disk / 1e9:,.3g} GB")


def _device(name: str) -> Device:
    """Of --dry_run: a name, or a measured rate in TFLOP/s."""
    try:
        return device("", tflops=float(name))
    except ValueError:
        return device(name)
