"""The `neon` command. Each subcommand reads its options and makes one call into the library."""

import argparse
import dataclasses
import math
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from neon import NeonError, __version__

PRECISIONS = ["float32", "float16", "bfloat16"]


def main(argv: Sequence[str] | None = None, prog: str = "neon") -> None:
    """Run a command of the `neon` program."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def run():
        args = _parser(prog, _peek_family(argv)).parse_args(argv)
        args.run(args)

    command_line(run)


def command_line(run: Callable[[], None]) -> None:
    """Call `run` as a program: what the user can mend becomes one line on stderr and exit status 1."""
    try:
        run()
    except NeonError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename2 or error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: str) -> typing.NoReturn:
    """One line on stderr, exit status 1."""
    from neon.distributed import rank

    if rank():
        time.sleep(2)  # the same error on every rank: let rank 0 say it, whereupon torchrun stops the others
    print("error:", " ".join(error.split()), file=sys.stderr)
    sys.exit(1)


def family_script(command: str, family: str, *defaults: str) -> None:
    """What edm/selftrain.py and its like run: `neon COMMAND --family FAMILY …`; defaults precede the user's words."""
    main([command, "--family", family, *defaults, *sys.argv[1:]])


def _peek_family(argv: list[str]):
    """The family named on the command line, whose options join the parser's; None if there is none."""
    from neon.family import get_family

    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--family")
    name = peek.parse_known_args(argv)[0].family
    return get_family(name) if name else None


def _parser(prog: str, family) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Neon: negative extrapolation from self-training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    p = command("download", run_download, "bring the checkpoints and statistics listed in downloads.csv")
    p.add_argument(
        "names", nargs="*", metavar="NAME", help="file or group: released, stats, base, vae (default: the first two)"
    )
    p.add_argument("--base", action="store_true", help="the bases that the recipes need")
    p.add_argument("--vae", action="store_true", help="the autoencoders of VAR, xAR and IMM")
    p.add_argument("--all", action="store_true", help="everything")
    p.add_argument("--list", action="store_true", help="show what there is to download, and download nothing")

    p = command("merge", run_merge, "write θ_r − w (θ_s − θ_r) in the base's format")
    p.add_argument(
        "--base", type=checkpoint, required=True, help="checkpoint of θ_r: .safetensors, .pth, .pt, .ckpt or .pkl"
    )
    p.add_argument("--selftrained", type=checkpoint, required=True, help="checkpoint of θ_s, any of the formats")
    p.add_argument("-w", type=float, required=True, help="strength; 0 is the base, −1 the self-trained model")
    p.add_argument("--out", required=True)
    p.add_argument("--key", help="where the state dict lies in a nested base, such as trainer.var_wo_ddp")
    p.add_argument("--selftrained_key", help="the same for θ_s")
    p.add_argument("--family", help="the family knows which tensors are buffers")

    p = command("train", run_train, "train a base from nothing")
    p.add_argument("--network", required=True, help="named network configuration of the family")
    _add_training(p, family)

    p = command("selftrain", run_train, "fine-tune a base briefly on its own samples: θ_r → θ_s")
    p.add_argument("--base", type=checkpoint, required=True, help="checkpoint, or training folder for its last")
    _add_training(p, family)

    p = command("generate", run_generate, "write the synthetic set S: one PNG per seed and dataset.json")
    p.add_argument("--model", type=checkpoint, required=True, help="checkpoint, or training folder for its last")
    p.add_argument("--out", required=True, help="folder; an interrupted run goes on")
    add_replace(p)
    _add_sampling(p, family)

    p = command("evaluate", run_evaluate, "FID and other metrics of a model, or of a merge made in memory")
    p.add_argument("--model", "--base", dest="base", type=checkpoint, required=True, help="θ_r, or any model")
    p.add_argument("--selftrained", type=checkpoint, help="θ_s; with -w")
    p.add_argument("-w", type=float, default=0.0)
    p.add_argument("--out", help="JSON file for the row of results")
    _add_sampling(p, family)
    _add_evaluation(p)

    p = command("search", run_search, "evaluate a grid of w, snapshots and sampling options")
    p.add_argument("--base", type=checkpoint, required=True, help="checkpoint, or training folder for its last")
    p.add_argument(
        "--selftrained", nargs="+", required=True, help="snapshots of θ_s, or training folders for all in them"
    )
    p.add_argument("-w", default="0:3:0.25", help="grid: 0:3:0.25 or --w=-1,0,0.5 (default %(default)s)")
    p.add_argument("--w", dest="w", help=argparse.SUPPRESS)
    p.add_argument("--grid", action="append", default=[], metavar="OPTION=GRID", help="also over a sampling option")
    p.add_argument("--stop", type=float, help="end a row when FID exceeds its best by this much (default: never)")
    p.add_argument("--out", required=True, help="JSON-lines file; what it holds already is not measured again")
    add_replace(p)
    _add_sampling(p, family)
    _add_evaluation(p)

    p = command("final", run_final, "evaluate base, self-trained model and the best point of a search on fresh seeds")
    p.add_argument("--base", type=checkpoint, required=True, help="checkpoint, or training folder for its last")
    p.add_argument("--search", required=True, help="what `neon search` wrote")
    p.add_argument("--out", required=True, help="JSON-lines file")
    add_replace(p)
    _add_sampling(p, family)
    _add_evaluation(p)

    p = command("grid", run_grid, "contact sheets of the models that `neon final` compared, from the same seeds")
    _add_family(p)
    p.add_argument("--final", required=True, help="what `neon final` wrote")
    p.add_argument("--seeds", default="0-39", help="images by seed (default %(default)s)")
    p.add_argument("--columns", type=count, default=20)
    p.add_argument("--batch_size", type=count, default=64)
    p.add_argument("--out", required=True, help="folder for base.png, selftrained.png, neon.png")
    p.add_argument("--device", choices=["cpu", "cuda"])
    if family:
        _add_fields(p, family.Loading)

    p = command("page", run_page, "one self-contained HTML page of executed notebooks")
    p.add_argument("notebooks", nargs="+", help="executed .ipynb files, in order")
    p.add_argument("--title", default="Neon: results")
    p.add_argument("--out", required=True, help=".html")

    p = command("inspect", run_inspect, "what a checkpoint holds, without executing anything in it")
    p.add_argument("file", type=checkpoint)
    p.add_argument("--key", help="where the state dict lies in a nested file")

    p = command("convert", run_convert, "rewrite a checkpoint of any format as .safetensors")
    p.add_argument("file", type=checkpoint)
    p.add_argument("out")
    p.add_argument("--key", help="where the state dict lies in a nested file")

    p = command("reference", run_reference, "statistics of real images, for FID, KID, precision and recall")
    p.add_argument("--images", help="folder, .zip, or .parquet files (a folder of them, or 'train-*.parquet')")
    p.add_argument("--size", type=count, help="crop the middle and scale to so many pixels, as ADM did with ImageNet")
    p.add_argument("--statistics", help=".npz with published mu and sigma to keep; the images then add features alone")
    p.add_argument("--keep", type=count, default=50_000, help="images whose features are kept (default %(default)s)")
    p.add_argument("--features", default="inception", help="feature extractor (default %(default)s)")
    p.add_argument("--out", required=True, help=".npz")
    p.add_argument("--batch_size", type=count, default=256)
    p.add_argument("--device", choices=["cpu", "cuda"])
    return parser


def _add_family(p: argparse.ArgumentParser) -> None:
    from neon.family import FAMILIES

    p.add_argument("--family", required=True, help=", ".join(FAMILIES))


def add_replace(p: argparse.ArgumentParser) -> None:
    p.add_argument("--replace", action="store_true", help="what --out holds of a run with other options is deleted")


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    p.add_argument("--tf32", action="store_true", help="allow TensorFloat-32 in float32 products (default: no)")


def add_inference(p: argparse.ArgumentParser, family) -> None:
    """Where and how exactly to compute, and the family's sampling options κ."""
    add_device(p)
    p.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the network (default %(default)s)")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    _add_fields(p.add_argument_group(f"sampling options of {family.name}"), family.Sampling)
    _add_fields(p, family.Loading)


def _add_fields(p, options: type) -> None:
    """One option per field of a dataclass."""
    for field in dataclasses.fields(options):
        choices = typing.get_args(field.type) or None
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": str if choices else field.type, "choices": choices}
        p.add_argument(f"--{field.name}", **how, default=field.default, help="%(default)s")


def add_metrics(p: argparse.ArgumentParser) -> None:
    p.add_argument("--features", default="inception", help="inception[:PATH], inception:random, digits:PATH")
    p.add_argument(
        "--metrics",
        default="fid,is",
        help="of fid, is, kid, precision, recall (default %(default)s); all: what the reference and features allow",
    )


def _add_training(p: argparse.ArgumentParser, family) -> None:
    _add_family(p)
    add_device(p)
    p.add_argument(
        "--recipe", required=True, help=", ".join(family.recipes) if family else "named recipe of the family"
    )
    p.add_argument("--data", required=True, help="image set: folder or .zip with dataset.json")
    p.add_argument("--max_images", type=count, help="train on the first so many of them (default: all)")
    p.add_argument("--out", required=True, help="folder for snapshots and state; an interrupted run goes on")
    p.add_argument("--seed", type=natural, default=0)
    add_replace(p)
    p.add_argument("--micro_batch", type=count, help="images per forward pass and process")
    p.add_argument("--save_every", type=count, help="images between saved states (default: at snapshots)")
    if family:
        _add_fields(p, family.Loading)
    changes = p.add_argument_group("changes to the recipe")
    for name, kind in (("batch", count), ("lr", rate), ("budget", count), ("snapshot", count), ("ramp", natural)):
        changes.add_argument(f"--{name}", type=kind)
    changes.add_argument("--precision", choices=PRECISIONS)


def _add_sampling(p: argparse.ArgumentParser, family) -> None:
    _add_family(p)
    p.add_argument("--seeds", required=True, help="images by seed: 0-49999 or 1,5-9")
    p.add_argument("--batch_size", type=count, default=64, help="per process; changes nothing but speed")
    if family:
        add_inference(p, family)


def _add_evaluation(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ref", required=True, help="reference statistics, .npz with mu and sigma")
    add_metrics(p)


def natural(text: str) -> int:
    """'6M', '500k', '50176', '0' → int. Raises ValueError, as argparse expects."""
    factor = {"k": 1000, "M": 1_000_000}.get(text[-1:], 1)
    number = float(text if factor == 1 else text[:-1]) * factor
    if not 0 <= number < float("inf"):
        raise ValueError
    return round(number)


def count(text: str) -> int:
    """The same, but not 0."""
    if number := natural(text):
        return number
    raise ValueError


def rate(text: str) -> float:
    """A finite number > 0."""
    if 0 < (number := float(text)) < float("inf"):
        return number
    raise ValueError


def checkpoint(text: str) -> Path:
    """A file, or a training folder, which stands for its last snapshot."""
    from neon.selftrain import snapshots

    return snapshots(text)[-1]


def kappa(args, family) -> dict:
    """The family's sampling options among the arguments."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(family.Sampling)}


def loading(args, family) -> dict:
    """The family's options of load and create among the arguments."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(family.Loading)}


def run_download(args) -> None:
    from neon.fetch import GROUPS, TABLE, bring, choose, read_table, write_table

    rows = read_table()
    flags = [group for group in ("base", "vae") if getattr(args, group)]
    chosen = choose(rows, GROUPS if args.all else [*args.names, *flags] or ("released", "stats"))
    failed = 0
    for row in chosen:
        if args.list:
            there = "here" if Path(row["path"]).exists() else "not here"
            print(f"{row['group']:9s} {row['path']}  {row['source']}  {there}")
            continue
        try:
            print(f"{row['path']} {bring(row, lambda: write_table(rows))}", flush=True)
        except NeonError as error:
            failed += 1
            print("error:", " ".join(str(error).split()), file=sys.stderr)
    if failed:
        raise NeonError(f"{failed} of {len(chosen)} files of {TABLE} are not there or not whole")


def run_merge(args) -> None:
    from neon.checkpoint import open_weights, write_weights
    from neon.family import get_family
    from neon.merge import merge

    buffers = {"is_buffer": get_family(args.family).is_buffer} if args.family else {}
    with open_weights(args.base, args.key) as base, open_weights(args.selftrained, args.selftrained_key) as selftrained:
        write_weights(args.out, base, merge(base, selftrained, args.w, **buffers))


def run_inspect(args) -> None:
    from neon.checkpoint import open_weights
    from neon.io import sha256

    with open_weights(args.file, args.key) as weights:
        specs = {name: weights.spec(name) for name in weights}
        for name, (dtype, shape) in specs.items():
            print(f"{name}  {str(dtype).removeprefix('torch.')}  {'×'.join(map(str, shape)) or 'scalar'}")
        values = sum(math.prod(shape) for _, shape in specs.values())
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        print(f"\nformat   {weights.format}\ntensors  {len(specs)}, {values:,} values, {size / 2**20:,.1f} MiB")
        for key, value in weights.metadata.items():
            print(f"{key}  {value}")
    print(f"sha256   {sha256(args.file)}")


def run_convert(args) -> None:
    from neon.checkpoint import open_weights, write_safetensors

    if Path(args.out).suffix != ".safetensors":
        raise NeonError(f"{args.out}: converted checkpoints are .safetensors")
    with open_weights(args.file, args.key) as weights:
        write_safetensors(args.out, {name: weights.spec(name) for name in weights}, weights.items(), weights.metadata)


def run_train(args) -> None:
    import torch

    from neon.data import ImageSet
    from neon.distributed import world
    from neon.family import get_family, named
    from neon.io import sha256
    from neon.selftrain import train

    family = get_family(args.family)
    recipe = named(family.recipes, args.recipe, "recipe")
    names = ("batch", "lr", "budget", "snapshot", "ramp", "precision")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    recipe = dataclasses.replace(recipe, **changes)
    data = ImageSet(args.data, first=args.max_images)
    with world(args.device, args.tf32) as here:
        if hasattr(args, "base"):
            model = family.load(args.base, device=here.device, **recipe.network, **loading(args, family))
            origin = {"base": sha256(args.base)}
        else:
            torch.manual_seed(args.seed)
            model = family.create(args.network, device=here.device, **recipe.network, **loading(args, family))
            origin = {"network": args.network}
        if (record := Path(args.data, "generate.json")).exists():
            origin["data"] = sha256(record)
        options = {name: getattr(args, name) for name in ("micro_batch", "save_every", "replace")} | {"origin": origin}
        snapshots = train(family, model, data, recipe, args.out, world=here, seed=args.seed, **options)
        if here.rank == 0:
            print(f"{len(snapshots)} snapshots in {args.out}, the last is {snapshots[-1].name}")


def run_generate(args) -> None:
    from neon.distributed import world
    from neon.family import get_family
    from neon.generate import generate
    from neon.io import sha256
    from neon.sampling import parse_seeds

    family, seeds = get_family(args.family), parse_seeds(args.seeds)
    with world(args.device, args.tf32) as here:
        model = _candidates(args, args.model, family, here).load(None, 0.0)
        options = kappa(args, family)
        identity = {"model": sha256(args.model), "seeds": args.seeds, "precision": args.precision, **options}
        generate(
            lambda s, y: family.sample(model, s, y, **options),
            seeds,
            family.labels(model, seeds),
            args.out,
            identity=identity,
            batch=args.batch_size,
            world=here,
            replace=args.replace,
        )


def _candidates(args, base, family, here):
    from neon.search import Candidates

    return Candidates(family, base, here.device, args.precision, args.compile, **loading(args, family))


def _rows(args, here):
    """The rows in --out: rank 0 writes them, and all ranks agree on what is left to do."""
    from neon.search import Rows

    rows = Rows(args.out, write=here.rank == 0)
    rows.rows = here.gather(rows.rows)[0]
    return rows


def _evaluation(args, here):
    from neon.evaluate import Evaluation, parse_metrics
    from neon.features import load_extractor
    from neon.metrics import load_reference
    from neon.sampling import parse_seeds

    extractor, reference = load_extractor(args.features, here.device), load_reference(args.ref)
    metrics = parse_metrics(args.metrics, extractor, reference)
    return Evaluation(parse_seeds(args.seeds), extractor, reference, metrics, args.batch_size, here)


def run_evaluate(args) -> None:
    from neon.distributed import world
    from neon.family import get_family
    from neon.io import write_json
    from neon.search import Point, measure

    family = get_family(args.family)
    with world(args.device, args.tf32) as here:
        evaluation = _evaluation(args, here)
        candidates = _candidates(args, args.base, family, here)
        result = measure(
            candidates, evaluation, kappa(args, family), Point(args.selftrained and str(args.selftrained), args.w)
        )
        if here.rank == 0:
            print(summary(result, evaluation.metrics))
            if args.out:
                write_json(args.out, result)


def run_search(args) -> None:
    from neon.distributed import world
    from neon.family import get_family
    from neon.io import existing
    from neon.search import grid, parse_grid, scorer
    from neon.selftrain import snapshots

    if not {"fid", "all"} & set(args.metrics.split(",")):
        raise NeonError("a search goes by FID: let --metrics begin with fid")
    family = get_family(args.family)
    grids = dict(_grid_option(text, family) for text in args.grid)
    trained = [existing(path) for folder in args.selftrained for path in snapshots(folder)]
    with world(args.device, args.tf32) as here:
        evaluation = _evaluation(args, here)
        rows = _rows(args, here)
        score = scorer(
            _candidates(args, args.base, family, here),
            evaluation,
            kappa(args, family),
            rows,
        )
        best, seen = None, {}
        for point, fid in grid(lambda p: score(p)["fid"], trained, parse_grid(args.w), grids, args.stop):
            if here.rank == 0:
                print(summary(score(point), evaluation.metrics), flush=True)
            best = min(best or (fid, point), (fid, point), key=lambda pair: pair[0])
            seen[score(point)["key"]] = None
        if args.replace:
            rows.keep(seen)
        if here.rank == 0:
            print(f"best: {summary(score(best[1]), evaluation.metrics)}")


def _grid_option(text: str, family) -> tuple[str, list]:
    from neon.search import parse_grid

    name, _, values = text.partition("=")
    fields = {field.name: field for field in dataclasses.fields(family.Sampling) if field.type is not bool}
    if name not in fields or not values:
        raise NeonError(f"not a grid over a sampling option: {text!r} (write OPTION=GRID; know {', '.join(fields)})")
    kind = fields[name].type
    if kind in (int, float):
        numbers = [(v, kind(v)) for v in parse_grid(values)]
        if any(v != exact for v, exact in numbers):
            raise NeonError(f"{name} takes integers, not {values}")
        return name, [exact for _, exact in numbers]
    return name, values.split(",")


def run_final(args) -> None:
    from neon.distributed import world
    from neon.family import get_family
    from neon.io import existing
    from neon.search import Rows, check_sampled_alike, digest, final_points, key_of, measure

    family = get_family(args.family)
    searched = list(Rows(existing(args.search), write=False).rows.values())
    if not searched:
        raise NeonError(f"{args.search}: no finished evaluation in it")
    if searched[0]["base_sha256"] != digest(existing(args.base)):
        raise NeonError(f"{args.search} started from another base, {searched[0]['base']}")
    points = final_points(searched, [field.name for field in dataclasses.fields(family.Sampling)])
    with world(args.device, args.tf32) as here:
        evaluation, options = _evaluation(args, here), kappa(args, family)
        check_sampled_alike(searched, {**options, "dtype": args.precision, "features": evaluation.extractor.name})
        candidates = _candidates(args, args.base, family, here)
        rows = _rows(args, here)
        measured: dict = {}
        seen = []
        for role, at in points.items():
            result = rows.cached(
                f"{role} {key_of(candidates, evaluation, options, at)}",
                lambda at=at, role=role: {
                    "role": role,
                    **(measured.get(at) or measure(candidates, evaluation, options, at)),
                },
            )
            measured[at] = {k: v for k, v in result.items() if k not in ("role", "key")}
            seen.append(result["key"])
            if here.rank == 0:
                print(f"{role:12s}{summary(result, evaluation.metrics)}", flush=True)
        if args.replace:
            rows.keep(seen)


def run_grid(args) -> None:
    import torch

    from neon.data import contact_sheet, encode_png
    from neon.distributed import world
    from neon.family import get_family
    from neon.io import atomic, existing
    from neon.sampling import parse_seeds
    from neon.search import Candidates, Rows

    family, seeds = get_family(args.family), parse_seeds(args.seeds)
    rows = Rows(existing(args.final), write=False).rows.values()
    if not rows or any("role" not in row for row in rows):
        raise NeonError(f"{args.final}: not what `neon final` wrote")
    sheets = {}
    with world(args.device) as here:
        for row in rows:
            options = {field.name: row[field.name] for field in dataclasses.fields(family.Sampling)}
            candidates = Candidates(family, row["base"], here.device, row["dtype"], **loading(args, family))
            model = candidates.load(row["selftrained"], row["w"])
            labels = family.labels(model, seeds)
            parts = torch.arange(len(seeds)).split(args.batch_size)
            images = [family.sample(model, seeds[i], labels if labels is None else labels[i], **options) for i in parts]
            sheets[row["role"]] = contact_sheet(torch.cat(images).cpu(), args.columns)
        if here.rank == 0:
            with atomic(args.out) as folder:
                folder.mkdir()
                for role, sheet in sheets.items():
                    (folder / f"{role}.png").write_bytes(encode_png(sheet))


def run_page(args) -> None:
    from neon.io import atomic
    from neon.page import page

    html = page(args.notebooks, args.title)
    with atomic(args.out) as partial:
        partial.write_text(html)


def run_reference(args) -> None:
    from neon.data import ImageSet
    from neon.distributed import world
    from neon.evaluate import reference_of
    from neon.features import load_extractor
    from neon.metrics import load_reference, save_reference

    if Path(args.out).suffix != ".npz":
        raise NeonError(f"{args.out}: reference statistics are written as .npz")
    if not (args.images or args.statistics):
        raise NeonError("nothing to make a reference of: give --images, --statistics or both")
    published = load_reference(args.statistics) if args.statistics else None
    with world(args.device) as here:
        reference = published
        if args.images:
            images, extractor = ImageSet(args.images, args.size), load_extractor(args.features, here.device)
            reference = reference_of(images, extractor, args.batch_size, args.keep, published, here)
        if here.rank == 0:
            save_reference(reference, args.out)


def summary(row: dict, metrics: Sequence[str]) -> str:
    """'w 1.5  B 20000  FID 12.34  …' for people."""
    shown = [f"w {row['w']:g}", f"B {row['budget']}"] if row["selftrained"] else ["w 0"]
    shown += [f"{m.upper() if len(m) < 4 else m} {row[m]:.4g}" for m in metrics]
    return "  ".join([*shown, f"n {row['n']}", f"{row['seconds']:.1f} s"])


if __name__ == "__main__":
    main()
