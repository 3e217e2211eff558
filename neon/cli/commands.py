"""What each subcommand of `neon` does with its parsed options: a call or two into the library."""

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path

import torch

from neon import NeonError, gmo
from neon.card import card_of, check_repo, check_token, files_of, push, readme
from neon.cli.controls import run_control  # noqa: F401, it is a command
from neon.cli.diagnosing import run_diagnose  # noqa: F401, it is a command
from neon.cli.found import chosen_row, lines, record, verdict, write_csv
from neon.cli.merging import run_extract_lora, run_merge  # noqa: F401, they are commands
from neon.cli.options import (
    OF_A_MODEL,
    loading,
    method_of,
    option_of,
    precision_of,
    processes,
    sampling_options,
    say_metrics,
)
from neon.cli.show import results, summary, terminal_plot
from neon.data import ImageSet, contact_sheet, encode_png
from neon.distributed import world
from neon.family import get_family, named, noise_map_of
from neon.fetch import GROUPS, TABLE, choose, fetch_row, pinned, read_table
from neon.files import atomic, discard, existing, same_file, sha256, write_json
from neon.final import check_made_alike, check_sampled_alike, final_points, in_common
from neon.generate import generate
from neon.images import evaluation_of, measure_images
from neon.lock import writing
from neon.measure.candidates import BY, Candidates, Point
from neon.measure.compare import Difference, fid_difference
from neon.measure.evaluate import SETS, Evaluation, parse_metrics, reference_of
from neon.measure.features import load_extractor
from neon.measure.kept import folder_of
from neon.measure.metrics import load_reference, save_reference
from neon.measure.rows import (
    Rows,
    budget_of,
    digest,
    features_of,
    images_of,
    images_of_seeds,
    key_of,
    measure,
    need,
    sampled_by,
    scorer,
)
from neon.sampling import parse_seeds, whole_batches
from neon.search import Bench, by_surface, grid, parse_grid, parse_range
from neon.selftrain import snapshots, train
from neon.surface import Node, Space, SurfaceSearch, curve, drifts
from neon.weights.checkpoint import open_weights, write_safetensors
from neon.weights.compare import compare
from neon.whole import Whole


def run_download(args) -> None:
    flags = [group for group in ("base", "vae") if getattr(args, group)]
    chosen = choose(read_table(), GROUPS if args.all else [*args.names, *flags] or ("released", "stats"))
    if args.list:
        return _list_downloads(chosen)
    failed = 0
    for row in chosen:
        try:
            print(f"{row['path']} {fetch_row(row)}", flush=True)
        except NeonError as error:
            failed += 1
            print("error:", " ".join(str(error).split()), file=sys.stderr)
    if failed:
        raise NeonError(f"{failed} of {len(chosen)} files of {TABLE} are not there or not whole")


def _list_downloads(rows) -> None:
    for row in rows:
        here = "here" if Path(row["path"]).exists() else "not here"
        fixed = "pinned" if pinned(row) else "not pinned"
        print(f"{row['group']:9s} {row['path']}  {row['source']}  {here}, {fixed}")


def run_inspect(args) -> None:
    if args.other:
        with open_weights(args.file, args.key) as one, open_weights(args.other, args.other_key) as other:
            print(*compare(one, other), sep="\n")
        return
    with open_weights(args.file, args.key) as weights:
        specs = {name: weights.spec(name) for name in weights}
        for name, (dtype, shape) in specs.items():
            print(f"{name}  {str(dtype).removeprefix('torch.')}  {'×'.join(map(str, shape)) or 'scalar'}")
        values = sum(math.prod(shape) for _, shape in specs.values())
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        print(f"\nformat   {weights.format}\nkey      {weights.key or 'none (flat)'}")
        print(f"tensors  {len(specs)}, {values:,} values, {size / 2**20:,.1f} MiB")
        for key, value in weights.metadata.items():
            print(f"{key}  {value}")
    print(f"sha256   {sha256(args.file)}")


def run_convert(args) -> None:
    if Path(args.out).suffix != ".safetensors":
        raise NeonError(f"{args.out}: converted checkpoints are .safetensors")
    with writing(args.out), open_weights(args.file, args.key) as weights:
        write_safetensors(args.out, {name: weights.spec(name) for name in weights}, weights.items(), weights.metadata)
        print(f"{args.out}: from {weights.origin}")


TRAINING = (
    "micro_batch",
    "save_every",
    "save_minutes",
    "tensorboard",
    "raw",
    "replace",
)  # options that change no weights


def run_train(args) -> None:
    family = get_family(args.family)
    recipe = named(family.recipes, args.recipe, "recipe")
    names = ("batch", "lr", "budget", "snapshot", "ramp", "precision")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    recipe = dataclasses.replace(recipe, **changes)
    data = ImageSet(args.data, first=args.max_images)
    tf32 = recipe.tf32 if args.tf32 is None else args.tf32
    with world(args.device, tf32, args.streams, joined=args.shard) as here, writing(args.out, here):
        if here.device.type == "cpu" and not args.precision:
            recipe = dataclasses.replace(recipe, precision="float32")
        recipe = dataclasses.replace(recipe, tf32=here.tf32)
        place = _place(args)(family, partial(_started, args, family, recipe), here, args.recompute)
        origin = {"base": sha256(args.base)} if hasattr(args, "base") else {"network": args.network}
        if vae := place.metadata.get("vae_sha256"):
            origin["vae"] = vae
        if (record := Path(args.data, "generate.json")).exists():
            origin["data"] = sha256(record)
        options = {name: getattr(args, name) for name in TRAINING} | {"origin": origin, "place": place}
        written = train(family, place.model, data, recipe, args.out, world=here, seed=args.seed, **options)
        if here.rank == 0:
            print(f"{len(written)} snapshots in {args.out}, the last is {written[-1].name} ({recipe.precision})")


def _place(args) -> type[Whole]:
    """How the processes hold the network."""
    if not args.shard:
        return Whole
    from neon.shard import Sharded  # here, for it loads more of torch than others need

    return Sharded


def _started(args, family, recipe, device) -> torch.nn.Module:
    """The model that training starts from, on the device."""
    options = {"device": device, **recipe.network, **loading(args, family)}
    if hasattr(args, "base"):
        return family.load(args.base, **options)
    torch.manual_seed(args.seed)
    return family.create(args.network, **options)


def run_generate(args) -> None:
    family, seeds = get_family(args.family), parse_seeds(args.seeds)
    change = _modification(args, family)
    with processes(args, family) as here, writing(args.out, here):
        candidates, options = _candidates(args, args.model, family, here), sampling_options(args, family)
        model = candidates.load(None, 0.0)
        draw, decided = partial(images_of_seeds, family, model, **options), {}
        if args.compile:
            draw = whole_batches(draw, args.batch_size)
        if change:
            noise_map_of(family)(model, seeds[:1], family.labels(model, seeds[:1]), **options)  # its errors first
            draw, decided = partial(gmo.images, family, model, change, **options), change.identity()
            if here.rank == 0:
                print(change, flush=True)
        generate(
            draw,
            seeds,
            partial(family.labels, model),
            args.out,
            identity=sampled_by(candidates, here, options) | {"seeds": args.seeds} | decided,
            batch=args.batch_size,
            world=here,
            replace=args.replace,
            shard=args.shard,
        )


def _modification(args, family) -> gmo.Modification | None:
    """What --gmo asks for. Raises NeonError if the family or the options do not go with it."""
    if change := gmo.modification(vars(args)):
        noise_map_of(family)
        if args.compile:
            raise NeonError("--gmo differentiates the network, which --compile does not allow: leave one out")
    return change


def _candidates(args, base, family, here, by=Candidates.by):
    precision = precision_of(args, family, here)
    return BY[by](family, base, here.device, precision, args.compile, **loading(args, family))


def _rows(args, here):
    """The rows in --out: rank 0 writes them, and all ranks agree on what is left to do."""
    rows = Rows(args.out, write=here.rank == 0)
    rows.rows = here.gather(rows.rows)[0]
    return rows


def _evaluation(args, here):
    reference = load_reference(existing(args.ref))  # first: it costs nothing, and the extractor may be a download
    extractor = load_extractor(args.features, here.device)
    metrics = parse_metrics(args.metrics, extractor, reference)
    say_metrics(args, metrics, here)
    return Evaluation(parse_seeds(args.seeds), extractor, reference, metrics, args.batch_size, here)


def run_evaluate(args) -> None:
    if args.keep_features and not args.out:
        raise NeonError("--keep_features needs --out: they are kept in a folder next to it")
    if args.images:
        return _evaluate_images(args)
    if args.selftrained and args.w is None:
        raise NeonError("--selftrained needs -w: 0 is the base, −1 the self-trained model")
    if args.by == "guidance" and not args.selftrained:
        raise NeonError("--by guidance needs --selftrained, the network to get away from, and -w")
    family = get_family(args.family)
    with processes(args, family) as here, writing(args.out, here):
        evaluation = _evaluation(args, here)
        candidates = _candidates(args, args.base, family, here, args.by)
        point = Point(args.selftrained and str(args.selftrained), args.w or 0.0)
        features = folder_of(args.out) if args.keep_features else None
        result = measure(candidates, evaluation, sampling_options(args, family), point, features=features)
        if here.rank == 0:
            print(summary(result, evaluation.metrics))
            if args.out:
                write_json(args.out, result)


def _evaluate_images(args) -> None:
    given = [name for name in OF_A_MODEL if getattr(args, name) is not None]
    if given := given + ["by"] * (args.by != "merge"):
        raise NeonError(f"--images are measured as they are: leave out {', '.join(map(option_of, given))}")
    images = ImageSet(args.images)
    with world(args.device, bool(args.tf32)) as here, writing(args.out, here):
        reference = load_reference(existing(args.ref))
        evaluation = evaluation_of(images, args.features, reference, args.metrics, args.batch_size, here)
        say_metrics(args, evaluation.metrics, here)
        row = measure_images(images, evaluation, folder_of(args.out) if args.keep_features else None)
        if here.rank == 0:
            print("  ".join([args.images, *results(row, evaluation.metrics)]))
            if args.out:
                write_json(args.out, row)


def run_search(args) -> None:
    if not {"fid", *SETS} & set(args.metrics.split(",")):
        raise NeonError("a search goes by FID: let --metrics begin with fid")
    family = get_family(args.family)
    trained = [str(existing(path)) for folder in args.selftrained for path in snapshots(folder)]
    with processes(args, family) as here, writing(args.out, here):
        evaluation = _evaluation(args, here)
        candidates, rows = _candidates(args, args.base, family, here, args.by), _rows(args, here)
        search = {"grid": _search_by_grid, "surface": _search_by_surface}[method_of(args)]
        search(args, candidates, evaluation, rows, trained)


def _search_by_grid(args, candidates, evaluation, rows, trained) -> None:
    here, family = evaluation.world, candidates.family
    grids = dict(_grid_option(text, family) for text in args.grid)
    score = scorer(candidates, evaluation, sampling_options(args, family), rows, folder_of(args.out))
    seen = {}
    for point, _ in grid(lambda p: score(p)["fid"], trained, parse_grid(args.w), grids, args.stop):
        row = score(point)
        seen[row["key"]] = row
        if here.rank == 0:
            print(summary(row, evaluation.metrics, tuple(grids)), flush=True)
    if args.replace:
        rows.keep(seen)
    finite = [row for row in seen.values() if row["w"] >= 0 and row["fid"] < math.inf]
    if here.rank == 0 and finite:
        terminal_plot(list(seen.values()), "w", "fid", tuple(grids), args.out)
        best, note = min(finite, key=lambda row: row["fid"]), "  (the base: no w > 0 is better)"
        print(f"best: {summary(best, evaluation.metrics, tuple(grids))}{'' if best['w'] else note}")


def _search_by_surface(args, candidates, evaluation, rows, trained) -> None:
    here, family, options = evaluation.world, candidates.family, sampling_options(args, candidates.family)
    ranges = dict(_range_option(text, family) for text in args.grid)
    budgets = {snapshot: budget_of(snapshot) for snapshot in trained}
    space = Space(parse_range(args.w), drifts(candidates.drift, budgets), budgets, ranges)
    bench = Bench(candidates, evaluation, options, rows, folder_of(args.out))
    total = len(evaluation.seeds)
    first = min(total, args.first or max(total // 2, 2 * evaluation.extractor.dim))
    known, n = bench.known(space)

    def measured(point: Point, n: int) -> Node:
        node, row = bench.measure(point, n)
        if here.rank == 0 and row["key"] not in printed:
            if printed and row["n"] > max(seen["n"] for seen in printed.values()):
                print(f"w is too uncertain with {row['n'] // 2:,} images: every point again, with {row['n']:,}")
            print(summary(row, evaluation.metrics, tuple(ranges)), flush=True)
        printed[row["key"]] = row
        return node

    printed: dict[str, dict] = {}
    search, found, n = by_surface(
        lambda: SurfaceSearch(space, evaluation.reference, here.device, here.map),
        measured,
        args.evaluations,
        (max(first, n), total),
        known,
    )
    rows.keep(bench.finished(search.nodes, n, replace=args.replace))
    best, table = record(search, found, n, _grid_size(args, space)), curve(search, found.lowest)
    if here.rank == 0:
        by = {} if candidates.by == "merge" else {"by": candidates.by}
        write_json(Path(args.out).with_suffix(".best.json"), best | by)
        write_csv(Path(args.out).with_suffix(".curve.csv"), table)
        shown = [row for row in table if row["fid_se"] is not None]
        terminal_plot(shown[:: len(shown) // 12 or 1], "w", "fid", path=Path(args.out).with_suffix(".curve.csv"))
        print(*lines(best, list(space.options)), sep="\n")


def _grid_size(args, space: Space) -> int:
    """Evaluations of the grid that the surface is in place of: as it is written, or in usual steps."""
    sizes = [len(parse_grid(args.w)) if args.w.count(":") != 1 else 13]
    sizes += [len(parse_grid(text.partition("=")[2])) if text.count(":") != 1 else 10 for text in args.grid]
    return math.prod(sizes) * len(space.snapshots)


def _range_option(text: str, family) -> tuple[str, tuple[float, float, type]]:
    name, _, values = text.partition("=")
    field = _sampling_field(text, name, values, family)
    if field.type not in (int, float):
        raise NeonError(f"{name} has no numbers in between for a surface; search it with --method grid")
    low, high = map(field.type, parse_range(values))
    return name, (low, high, field.type)


def _sampling_field(text: str, name: str, values: str, family):
    fields = {field.name: field for field in dataclasses.fields(family.Sampling) if field.type is not bool}
    if name not in fields or not values:
        raise NeonError(f"not a grid over a sampling option: {text!r} (write OPTION=GRID; know {', '.join(fields)})")
    return fields[name]


def _grid_option(text: str, family) -> tuple[str, list]:
    name, _, values = text.partition("=")
    kind = _sampling_field(text, name, values, family).type
    if kind in (int, float):
        numbers = [(v, kind(v)) for v in parse_grid(values)]
        if any(v != exact for v, exact in numbers):
            raise NeonError(f"{name} takes integers, not {values}")
        return name, [exact for _, exact in numbers]
    return name, values.split(",")


def run_final(args) -> None:
    family = get_family(args.family)
    searched = list(Rows(existing(args.search), write=False).rows.values())
    if not searched:
        raise NeonError(f"{args.search}: no finished evaluation in it")
    need(searched, ("w", "base", "base_sha256", "fid", "selftrained"), args.search, family.Sampling)
    if searched[0]["base_sha256"] != digest(existing(args.base)):
        raise NeonError(f"{args.search} started from another base, {searched[0]['base']}")
    check_made_alike(searched, args.by)
    points = final_points(searched, [field.name for field in dataclasses.fields(family.Sampling)])
    with processes(args, family) as here, writing(args.out, here):
        evaluation, options = _evaluation(args, here), sampling_options(args, family)
        candidates = _candidates(args, args.base, family, here, args.by)
        now = sampled_by(candidates, here, options)
        if not args.other_features:
            now["features"] = evaluation.extractor.name
        check_sampled_alike(searched, {name: value for name, value in now.items() if name not in here.identity()})
        if here.rank == 0 and (shared := in_common(searched, evaluation.seeds)):
            print(f"warning: the search measured {shared:,} of these images too: a FID on what chose it is too low")
        rows, folder = _rows(args, here), folder_of(args.out)
        searched_over = tuple(name for name, _ in points["base"].sampling)
        measured: dict = {}
        seen = []

        def gains() -> dict:
            """How much higher the FIDs of base and self-trained model are than Neon's, on the same seeds."""
            of = {role: features_of(candidates, evaluation, options, at, folder) for role, at in points.items()}
            found = {role: fid_difference(of[role], of["neon"], evaluation.reference) for role in OTHERS}
            return {f"gain_{role}{end}": v for role, gain in found.items() for end, v in zip(("", "_se"), gain)}

        def compute(role: str, at: Point) -> dict:
            row = measured.get(at) or measure(candidates, evaluation, options, at, features=folder)
            return {"role": role, **row, **(gains() if role == "neon" else {})}

        for role, at in points.items():
            key = f"{role} {key_of(candidates, evaluation, options, at)}"
            result = rows.cached(key, partial(compute, role, at))
            measured[at] = {k: v for k, v in result.items() if k not in ("role", "key")}
            seen.append(result["key"])
            if here.rank == 0:
                print(f"{role:12s}{summary(result, evaluation.metrics, searched_over)}", flush=True)
        if args.replace:
            rows.keep(seen)
        if here.rank == 0 and points["neon"].w:
            for role in OTHERS:
                print(verdict("neon", role, Difference(-result[f"gain_{role}"], result[f"gain_{role}_se"])))


OTHERS = ("base", "selftrained")  # what Neon is compared with


def run_compare(args) -> None:
    reference = load_reference(args.ref)
    (one, a), (other, b) = (chosen_row(text) for text in (args.one, args.other))
    for fact in ("features", "reference"):
        if one[fact] != other[fact]:
            raise NeonError(f"{args.one} and {args.other} differ in {fact}: their FIDs cannot be compared")
    if one["reference"] != reference.sha256:
        raise NeonError(f"{args.ref} is not the reference that {args.one} was measured against")
    (seeds, x), (others, y) = (kept.load() for kept in (a, b))
    n = min(len(seeds), len(others))
    if not torch.equal(seeds[:n], others[:n]):
        raise NeonError(f"{args.one} and {args.other} have no seeds in common: measure both with the same --seeds")
    print(verdict(args.one, args.other, fid_difference(x[:n], y[:n], reference)) + f"; {n:,} seeds")


def run_clean(args) -> None:
    for path in args.rows:
        folder = folder_of(existing(path))
        if not folder.is_dir():
            print(f"{folder}: not there")
            continue
        with writing(path):
            size = sum(file.stat().st_size for file in folder.iterdir())
            discard(folder)
        print(f"{folder}: deleted, {size / 2**20:,.1f} MiB")


def run_card(args) -> None:
    options = {name: getattr(args, name) for name in ("license", "base_model", "dataset", "name")}
    card = card_of(args.model, args.final, **options)
    if args.push_to_hub:
        check_repo(args.push_to_hub)
    folder = card.model if card.model.is_dir() else card.model.parent
    out, text = Path(args.out or folder / "README.md"), readme(card, args.push_to_hub or "")
    if args.dry_run:
        print(text)
        print(f"not written, would be {out}")
        for name, file in files_of(card.model).items() if args.push_to_hub else ():
            print(f"not uploaded, would be {args.push_to_hub}/{name}  {file.stat().st_size / 2**20:,.1f} MiB")
    else:
        if same_file(out, card.model):
            raise NeonError(f"{out}: --out is the file of --model; choose another")
        if out.exists() and not args.replace:
            raise NeonError(f"{out} exists; choose another --out, or replace it with --replace")
        if args.push_to_hub:
            check_token()
        with writing(out), atomic(out) as partial:
            partial.write_text(text)
        print(f"written to {out}")
        if args.push_to_hub:
            print(f"uploaded to {push(card, args.push_to_hub, args.private)}")
    for warning in card.warnings:
        print("warning:", warning, file=sys.stderr)


def run_grid(args) -> None:
    family, seeds = get_family(args.family), parse_seeds(args.seeds)
    rows = Rows(existing(args.final), write=False).rows.values()
    if not rows or any("role" not in row for row in rows):
        raise NeonError(f"{args.final}: not what `neon final` wrote")
    need(rows, ("w", "family", "tf32"), args.final)
    if others := {row["family"] for row in rows} - {family.name}:
        raise NeonError(f"{args.final}: rows of {', '.join(others)}, not of {family.name}")
    streams = {row.get("streams", "torch") for row in rows}
    if streams not in ({"torch"}, {"counter"}):
        raise NeonError(f"{args.final}: rows of --streams {', '.join(sorted(streams))}")
    with world(args.device, any(row["tf32"] for row in rows), *streams) as here, writing(args.out, here):
        options = {"device": here.device, **loading(args, family)}
        drawn = {row["role"]: images_of(row, seeds, args.batch_size, **options) for row in rows}
        if here.rank == 0:
            with atomic(args.out) as folder:
                folder.mkdir()
                for role, images in drawn.items():
                    (folder / f"{role}.png").write_bytes(encode_png(contact_sheet(images, args.columns)))


def run_reference(args) -> None:
    if Path(args.out).suffix != ".npz":
        raise NeonError(f"{args.out}: reference statistics are written as .npz")
    if not (args.images or args.statistics):
        raise NeonError("nothing to make a reference of: give --images, --statistics or both")
    published = load_reference(existing(args.statistics)) if args.statistics else None
    with world(args.device) as here, writing(args.out, here):
        reference = published
        if args.images:
            images, extractor = ImageSet(args.images, args.size), load_extractor(args.features, here.device)
            reference = reference_of(images, extractor, args.batch_size, args.keep, published, here)
        if here.rank == 0:
            save_reference(reference, args.out)
