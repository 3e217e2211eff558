"""`neon plan`, and what `--dry_run` prints: a command's part of the cost. Nothing is written, no weights are read."""

import argparse
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr
from pathlib import Path
from typing import NamedTuple

from neon import NeonError
from neon.cli.options import method_of, sampling_options
from neon.cli.parser import parse
from neon.cost import Device, device, features, training, training_memory
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
from neon.stages import Stage, stages_of


def run_plan(args) -> None:
    where = device(args.device, args.tflops, args.utilisation)
    rows, more = plan_of(args.pipeline) if args.pipeline else (plan(args.params), ())
    found = (as_json if args.json else text)(rows, where, args.gpus, more)
    print(json.dumps(found, indent=1) if args.json else found)


# ---------------------------------------------------------------- one command


class Made(NamedTuple):
    """What a command that has not run yet will have trained."""

    network: str | Path
    snapshots: int


Making = Mapping[str, Made]  # by the folder that it is written to
NOTHING: Making = {}


def run_generate(args) -> None:
    row = generated(args)
    _say(args, f"would write {row.images:,} images of {args.model} to {args.out}", row)


def run_train(args) -> None:
    """`neon train` and `neon selftrain`."""
    start = f"from {args.base}" if hasattr(args, "base") else f"a new {args.network}"
    written = made_by(args, NOTHING).snapshots
    _say(args, f"would train {start} on {args.data} and write {written} snapshots to {args.out}", trained(args))
    _say_memory(args)


def run_evaluate(args) -> None:
    what = f"measure the images in {args.images}" if args.images else f"evaluate {args.base}"
    _say(args, f"would {what}", evaluated(args))


def run_search(args) -> None:
    row = searched(args)
    kind = "a surface of" if method_of(args) == "surface" else "without its early stop, a grid of"
    _say(args, f"would write {args.out}: {kind} at most {row.evaluations} evaluations", row)


def run_final(args) -> None:
    _say(args, f"would write {args.out}: at most {ROLES} evaluations", compared(args))


def generated(args, made: Making = NOTHING) -> Row:
    family, images = get_family(args.family), len(parse_seeds(args.seeds))
    network = _network(args, args.model, made)
    each = sampled(
        family, network, sampling_options(args, family), *_exactness(args, family), passes=passes_of(vars(args))
    )
    disk = synthetic_bytes(family, network, images)
    return Row("", "", "", 0, images, each, disk, disk)


def trained(args, made: Making = NOTHING) -> Row:
    family = get_family(args.family)
    recipe, network = _recipe(args, family), made_by(args, made).network
    written, state = training_bytes(family, network, recipe, getattr(args, "raw", True))
    return Row("", "", "", 0, trained_images(recipe), training(family, network, recipe), written + state, written)


def made_by(args, made: Making) -> Made:
    """What `neon train` or `neon selftrain` writes."""
    network = _network(args, args.base, made, args.recipe) if hasattr(args, "base") else args.network
    return Made(network, snapshots_of(_recipe(args, get_family(args.family))))


def evaluated(args, made: Making = NOTHING) -> Row:
    if args.images:
        images = ImageSet(args.images)
        return Row("", "", "", 1, len(images), features(args.features, images.shape))
    return _evaluations(args, made, 1, {}, alone=0 if args.w else 1)


def searched(args, made: Making = NOTHING) -> Row:
    family, method = get_family(args.family), method_of(args)
    found = evaluations_of(args.w, args.grid, method, args.evaluations, _trained(args, family, made))
    options = costliest(family, _network(args, args.base, made), sampling_options(args, family), args.grid)
    row = _evaluations(args, made, found, options, base_evaluations_of(args.w, args.grid, method))
    return row._replace(disk=row.images * DIM * 4)


def compared(args, made: Making = NOTHING) -> Row:
    return _evaluations(args, made, ROLES, {}, alone=1)


def _evaluations(args, made: Making, count: int, options: Mapping[str, object], alone: int) -> Row:
    """Of count models. options: what differs from the arguments'. alone: how many are the base, so one network."""
    family, images = get_family(args.family), count * len(parse_seeds(args.seeds))
    chosen = {**sampling_options(args, family), **options}
    guided = 1 - alone / count if args.by == "guidance" else 0.0
    how = *_exactness(args, family), args.features, guided
    return Row("", "", "", count, images, measured(family, _network(args, args.base, made), chosen, *how))


def _network(args, checkpoint: Path, made: Making, recipe: str = "") -> str | Path:
    if str(checkpoint) in made:
        return made[str(checkpoint)].network
    return network_of(get_family(args.family), checkpoint, recipe, args.preset or "")


def _trained(args, family: Family, made: Making) -> int:
    """How many snapshots a search reads; of a folder that is not there yet, as many as the preset's recipe writes."""
    found = 0
    for path in map(Path, args.selftrained):
        if str(path) in made:
            found += made[str(path)].snapshots
        elif args.preset and not path.exists() and path.suffix != ".safetensors":
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


def _say_memory(args) -> None:
    """Of each process, in training."""
    if rank():
        return
    family, processes = get_family(args.family), int(os.environ.get("WORLD_SIZE", 1))
    network, recipe = made_by(args, NOTHING).network, _recipe(args, family)
    held, added = training_memory(family, network, recipe, processes, args.shard, args.recompute)
    whose = f"a process of {processes}" if processes > 1 else "the process"
    print(f"memory       {held / 1e9:,.3g} GB of {whose}, {added / 1e9:,.3g} GB more within a step, and activations")


def _device(name: str) -> Device:
    """Of --dry_run: a name, or a measured rate in TFLOP/s."""
    try:
        return device("", tflops=float(name))
    except ValueError:
        return device(name)


# ---------------------------------------------------------------- a pipeline

PRICES = {
    "train": trained,
    "generate": generated,
    "selftrain": trained,
    "search": searched,
    "final": compared,
    "evaluate": evaluated,
}


def plan_of(path: str | Path) -> tuple[list[Row], list[str]]:
    """A row for every stage and kind of command in a pipeline, and what the rows leave out. Raises NeonError.

    path: a dvc.yaml, or its folder.
    """
    stages = stages_of(path)
    if not any(stage.commands for stage in stages):
        raise NeonError(f"{path}: no `neon` command in its stages")
    parsed = [(stage, words[0], _parsed(stage, words)) for stage in stages for words in stage.commands if priced(words)]
    made: dict[str, Made] = {}
    for stage, command, args in sorted(parsed, key=lambda one: list(PRICES).index(one[1])):
        if command in ("train", "selftrain"):
            with _of(stage):
                made[args.out] = made_by(args, made)
    rows: dict[tuple, Row] = {}
    for stage, command, args in parsed:
        with _of(stage):
            row = _named(stage, command, args, PRICES[command](args, made))
        key = row.stage, row.name, str(row.each)
        rows[key] = _both(rows[key], row) if key in rows else row
    left = sorted({words[0] for stage in stages for words in stage.commands if not priced(words)})
    return list(rows.values()), [f"not counted: {', '.join(left)}"] if left else []


def priced(words: Sequence[str]) -> bool:
    return words[0] in PRICES


def _parsed(stage: Stage, words: Sequence[str]) -> argparse.Namespace:
    """The arguments; without a --preset, that of the base's, if it has one: it stands for files that are not there."""
    said = io.StringIO()
    with _of(stage):
        try:
            with redirect_stderr(said):
                args = parse(words, "neon")
        except SystemExit:
            raise NeonError(said.getvalue().strip().rpartition("\n")[2]) from None
    if args.run != "run_evaluate" and hasattr(args, "base") and not args.preset:
        presets = get_family(args.family).presets
        args.preset = next((name for name, row in presets.items() if row.base == str(args.base)), None)
    return args


@contextmanager
def _of(stage: Stage) -> Iterator[None]:
    """In the stage's folder; errors name the stage."""
    with chdir(stage.folder):
        try:
            yield
        except NeonError as error:
            raise NeonError(f"{stage.name}: {error}") from None


def _named(stage: Stage, command: str, args, row: Row) -> Row:
    """The row of a stage, with its outputs in DVC's cache if DVC copies them there."""
    kept = any(Path(str(args.out)).is_relative_to(out) for out in stage.cached)
    name = stage.name.removeprefix(f"{command}@")
    return row._replace(stage=command, name=name, copied=row.copied if kept else 0)


def _both(one: Row, other: Row) -> Row:
    """Two rows of which an image costs the same."""
    fields = ("evaluations", "images", "disk", "copied")
    return one._replace(**{name: getattr(one, name) + getattr(other, name) for name in fields})
