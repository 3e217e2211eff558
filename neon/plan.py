"""What the pipeline's stages will cost, from the numbers in params.yaml: evaluations, images, FLOPs, hours, bytes."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from neon import NeonError, extra
from neon.cost import TF32, Cost, Device, features, image_shape, sampling, sizes, training
from neon.family import Family, Recipe, get_family, named
from neon.fetch import TABLE, read_table
from neon.files import existing, reading, regular
from neon.gmo import modification
from neon.sampling import parse_seeds
from neon.search import parse_grid

STAGES = (
    *("fetch", "reference", "released", "train", "generate", "selftrain", "search", "final", "evaluate", "samples"),
)
RECIPE = ("generate", "selftrain", "search", "final", "samples")  # of one model, after what is downloaded
EVALUATIONS = 12  # of a surface, if nothing says how many
ROLES = 3  # that a final evaluation compares: base, self-trained model, Neon
KEPT = 50_000  # features of real images in a reference
DIM = 2048  # of Inception's features
ASSUMPTIONS = (
    "FLOPs: matrix products, convolutions and attention, a multiply-add is two; autoencoder and features are included",
    "search: at most; a surface has no more evaluations than given, a grid is counted without its early stop",
    "final: at most; roles that are the same point are measured once",
    "dopri5, whose steps depend on the image: as many passes as Tong et al. (2024) report for OT-CFM on CIFAR-10",
    "generate with --gmo: at most; passes as neon/gmo.py counts them, J v as three and Jᵀ w as one",
    "disk: at most; PNGs as large as their pixels, a state of each training, features of every search in float32,"
    " DVC's copy of what it caches (none with reflinks)",
    "not counted: element-wise work, the optimizer, reading and writing, metrics, notebooks; the utilisation allows for"
    " them",
)


class Row(NamedTuple):
    """One item of a stage."""

    stage: str
    name: str
    model: str = ""  # whose recipe it belongs to
    evaluations: int = 0
    images: int = 0
    each: Cost = Cost()  # of an image
    disk: int = 0  # bytes, without DVC's copy
    copied: int = 0  # bytes of that which DVC copies to its cache

    @property
    def cost(self) -> Cost:
        return self.each * self.images


# ---------------------------------------------------------------- one command


def network_of(family: Family, checkpoint: str | Path, recipe: str = "", preset: str = "") -> str | Path:
    """What family.hollow takes to build a checkpoint's network: the name of a configuration, or the file itself.

    A checkpoint of a preset has its network, whether the file is there or not. Raises NeonError if nothing says what
    the network is and there is no such file.
    """
    rows = family.presets.values()
    for row in rows:
        if str(checkpoint) in (row.base, row.released):
            return row.network
    if Path(checkpoint).exists():
        return Path(checkpoint)
    if preset:
        return named(family.presets, preset, "preset").network
    alike = [row.network for row in rows if row.recipe == recipe]
    return alike[0] if alike else recipe if recipe in family.networks else existing(checkpoint)


def sampled(
    family: Family,
    network: str | Path,
    options: Mapping[str, object],
    precision: str,
    tf32: bool,
    guided: bool = False,
    passes: int = 1,
) -> Cost:
    return sampling(family, network, options, precision, guided, passes).with_precision(TF32 if tf32 else {})


def passes_of(options: Mapping[str, object]) -> int:
    """The work of `neon generate` an image, in passes of the sampler. options: --gmo and its like among them."""
    change = modification(options)
    return change.passes if change else 1


def measured(
    family: Family,
    network: str | Path,
    options: Mapping,
    precision: str,
    tf32: bool,
    spec: str,
    guided: float = 0.0,
) -> Cost:
    """Of an image that is sampled and whose features are taken. guided: the share of images that two networks make."""
    found = features(spec, image_shape(family, network)).with_precision(TF32 if tf32 else {})
    each, how = Cost(), (family, network, options, precision, tf32)
    if guided < 1:
        each += sampled(*how) * (1 - guided)
    if guided > 0:
        each += sampled(*how, guided=True) * guided
    return each + found


def synthetic_bytes(family: Family, network: str | Path, images: int) -> int:
    """Of a set of images; PNG compresses, so at most."""
    channels, height, width = image_shape(family, network)
    return images * channels * height * width


def trained_images(recipe: Recipe) -> int:
    """The budget in whole steps."""
    return -(-recipe.budget // recipe.batch) * recipe.batch


def snapshots_of(recipe: Recipe) -> int:
    """How many a training writes: at steps that reach a multiple of recipe.snapshot, and after the last."""
    return (trained_images(recipe) - recipe.batch) // max(recipe.snapshot, recipe.batch) + 1


def training_bytes(family: Family, network: str | Path, recipe: Recipe, raw: bool) -> tuple[int, int]:
    """Of the snapshots, and of the state while it trains: weights, two moments and the average, if there is one."""
    checkpoint, parameters, _ = sizes(family, network)
    average = recipe.ema_beta() is not None
    return snapshots_of(recipe) * checkpoint * (2 if raw and average else 1), parameters * (3 + average)


def evaluations_of(w: str, grids: Sequence[str], method: str, evaluations: int, snapshots: int) -> int:
    """Of a search, at most. grids: OPTION=GRID. A surface has a given number; a grid has every point."""
    if method == "surface":
        return evaluations
    weights, rows = parse_grid(w), 1
    for text in grids:
        rows *= _values(text.partition("=")[2])
    base = 0.0 in weights  # the same for all snapshots
    return rows * (snapshots * (len(weights) - base) + base)


def base_evaluations_of(w: str, grids: Sequence[str], method: str) -> int:
    """How many of these are of the base alone, w = 0. Of a surface none is counted: it may be."""
    return evaluations_of("0", grids, method, 0, 1) if method == "grid" and 0.0 in parse_grid(w) else 0


def _values(text: str) -> int:
    """How many a grid has."""
    return len(parse_grid(text)) if re.fullmatch(r"[-+.\d:,e]*", text) else len(text.split(","))


def costliest(family: Family, network: str | Path, options: Mapping, grids: Sequence[str]) -> dict[str, object]:
    """The options with the value of each grid that costs most: guidance costs twice as much as none."""
    chosen = dict(options)
    for text in grids:
        name, _, values = text.partition("=")
        tried = [{**chosen, name: value} for value in _ends(family, name, values)]
        chosen = max(tried, key=lambda one: sampling(family, network, one).total)
    return chosen


def _ends(family: Family, name: str, values: str) -> list:
    """The least and the greatest of a grid of numbers; every value of another."""
    kinds = {field.name: field.type for field in dataclasses.fields(family.Sampling)}
    kind = named(kinds, name, f"sampling option of {family.name}")
    if kind not in (int, float):
        return values.split(",")
    try:
        numbers = [kind(float(part)) for part in re.split("[:,]", values)[: 2 if ":" in values else None]]
    except ValueError:
        raise NeonError(f"not a grid: {values!r} (write 0:2:0.25, 0:2 or 1,1.5,2)") from None
    return [min(numbers), max(numbers)]


# ---------------------------------------------------------------- the pipeline


def read_params(path: str | Path) -> dict:
    """params.yaml. Raises NeonError."""
    with extra("pipeline"):
        import yaml

    with reading(path, "not YAML"):
        found = yaml.safe_load(regular(path).read_text())
    if not isinstance(found, dict) or not isinstance(found.get("models"), dict):
        raise NeonError(f"{path}: no `models` in it, as params.yaml of the pipeline has")
    return found


def plan(path: str | Path) -> list[Row]:
    """A row for every item of the stages in a params.yaml that cost anything. Raises NeonError."""
    params = read_params(path)
    try:
        return list(_Plan(params).rows())
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise NeonError(f"{path}: not the parameters of the pipeline ({type(error).__name__}: {error})") from None


class _Plan:
    """The parameters, and what stages have in common."""

    def __init__(self, params: Mapping):
        self.params, self.models = params, params["models"]
        self.features = params.get("features", "inception")
        self.on_cpu = params.get("device") == "cpu"

    def rows(self) -> Iterator[Row]:
        yield from self.fetched()
        for name, reference in (self.params.get("references") or {}).items():
            yield self.reference(name, reference)
        for name, item in self.items("released"):
            yield self.evaluated("released", name, item, item["checkpoint"], 1, item.get("sampling"), alone=1)
        for name, item in self.items("models"):
            yield self.generated(name, item)
            yield self.trained(name, item)
        for name, item in self.items("points"):
            yield self.searched(name, item)
            yield self.compared(name, item)
            yield self.shown(name, item)

    def items(self, section: str) -> Iterator[tuple[str, dict]]:
        """Each with what it takes from its model."""
        for name, item in (self.params.get(section) or {}).items():
            model = self.models.get(item.get("model", name), {})
            yield name, {**model, **item}

    def seeds(self, stage: str) -> int:
        return len(parse_seeds(str(self.params["seeds"][stage])))

    def fine_tunes(self) -> int:
        """Of each model; searched and evaluated one by one."""
        return len(str(self.params["seeds"].get("selftrain", 0)).split())

    def search(self, item: Mapping) -> dict:
        """Options of a point's search: those of all, and its own."""
        return {**(self.params.get("search") or {}), **(item.get("search") or {}), **(item.get("values") or {})}

    def model_of(self, item: Mapping) -> str:
        return item.get("model") or next(
            (name for name, model in self.models.items() if model["base"] == item.get("base")), ""
        )

    def network(self, item: Mapping, checkpoint: str) -> tuple[Family, str | Path]:
        family = get_family(item["family"])
        return family, network_of(family, checkpoint, item.get("recipe", ""))

    def precision(self, family: Family) -> str:
        return "float32" if self.on_cpu else family.released_precision

    def tf32(self, family: Family) -> bool:
        return family.released_tf32 and not self.on_cpu

    def guided(self, item: Mapping) -> dict:
        """The point's sampling options, with the searched one that costs most."""
        return costliest(*self.network(item, item["base"]), item.get("sampling") or {}, _grids(self.search(item)))

    def evaluated(self, stage, name, item, checkpoint, evaluations, options, alone=0) -> Row:
        """alone: how many of the evaluations need one network also where the search goes by guidance."""
        family, network = self.network(item, checkpoint)
        guided = 1 - alone / evaluations if self.search(item).get("by") == "guidance" else 0.0
        how = self.precision(family), self.tf32(family), self.features, guided
        each = measured(family, network, options or {}, *how)
        return Row(stage, name, self.model_of(item), evaluations, evaluations * self.seeds(stage), each)

    def searched(self, name: str, item: Mapping) -> Row:
        search, recipe = self.search(item), self.recipe(item)
        method, most = search.get("method", "surface"), int(search.get("evaluations", EVALUATIONS))
        each = evaluations_of(str(search.get("w", "")), _grids(search), method, most, snapshots_of(recipe))
        evaluations = each * self.fine_tunes()
        alone = self.fine_tunes() * base_evaluations_of(str(search.get("w", "")), _grids(search), method)
        row = self.evaluated("search", name, item, item["base"], evaluations, self.guided(item), alone)
        return row._replace(disk=row.images * DIM * 4)

    def compared(self, name: str, item: Mapping) -> Row:
        """The final evaluation, on as many sets of new images as the point asks for."""
        seeds = self.params["seeds"]
        sets = [str(seeds["final"]), *str(seeds.get("more") or "").split()][: int(item.get("sets", 1))]
        roles = ROLES * self.fine_tunes()
        count = roles * len(sets)
        row = self.evaluated("final", name, item, item["base"], count, self.guided(item), count // ROLES)
        return row._replace(images=roles * sum(len(parse_seeds(part)) for part in sets))

    def generated(self, name: str, item: Mapping) -> Row:
        family, network = self.network(item, item["base"])
        compute = item.get("compute") or {}
        precision = compute.get("precision") or self.precision(family)
        each = sampled(
            family, network, item.get("sampling") or {}, precision, self.tf32(family), passes=passes_of(compute)
        )
        images = len(parse_seeds(str(item["synthetic"])))
        disk = synthetic_bytes(family, network, images)
        return Row("generate", name, name, 0, images, each, disk, disk)

    def recipe(self, item: Mapping) -> Recipe:
        """With the changes in `train`."""
        recipe = named(get_family(item["family"]).recipes, item["recipe"], "recipe")
        fields = {field.name for field in dataclasses.fields(Recipe)}
        changes = {name: value for name, value in (item.get("train") or {}).items() if name in fields}
        return dataclasses.replace(
            recipe, **changes, **({"precision": "float32", "tf32": False} if self.on_cpu else {})
        )

    def trained(self, name: str, item: Mapping) -> Row:
        (family, network), recipe = self.network(item, item["base"]), self.recipe(item)
        snapshots, state = training_bytes(family, network, recipe, bool((item.get("train") or {}).get("raw")))
        each = training(family, network, recipe)
        snapshots, images = (self.fine_tunes() * part for part in (snapshots, trained_images(recipe)))
        return Row("selftrain", name, name, 0, images, each, snapshots + state, snapshots)

    def shown(self, name: str, item: Mapping) -> Row:
        family, network = self.network(item, item["base"])
        each = sampled(family, network, self.guided(item), self.precision(family), self.tf32(family))
        images = ROLES * self.seeds("samples")
        disk = synthetic_bytes(family, network, images)
        return Row("samples", name, self.model_of(item), 0, images, each, disk, disk)

    def reference(self, name: str, reference: Mapping) -> Row:
        """Published statistics cost nothing; features of real images, if there are any, are those of KEPT of them."""
        images = KEPT if reference.get("real") else 0
        each = features(self.features, (3, 64, 64)) if images else Cost()
        disk = statistics_bytes() + images * DIM * 4
        return Row("reference", name, "", 0, images, each, disk, disk)

    def fetched(self) -> Iterator[Row]:
        """Sizes are those of downloads.csv, or of the network's weights in float32."""
        known = {row["path"]: int(row["size"]) for row in read_table() if row["size"]} if Path(TABLE).exists() else {}
        counted = self.file_bytes()
        for name, path in (self.params.get("files") or {}).items():
            folder = str(Path(path).parent) if Path(path).suffix == ".safetensors" else path
            disk = known.get(path) or counted.get(path) or counted.get(folder) or 0
            disk = disk or (statistics_bytes() if path.endswith(".npz") else 0)
            yield Row("fetch", name, "", disk=disk, copied=disk)

    def file_bytes(self) -> dict[str, int]:
        """Checkpoint, or file or folder of an autoencoder → bytes."""
        found = {}
        for section, key in (("models", "base"), ("released", "checkpoint")):
            for _, item in self.items(section):
                checkpoint, _, autoencoder = sizes(*self.network(item, item[key]))
                found |= {item.get("decoder"): autoencoder, item[key]: checkpoint}
        return found


def _grids(search: Mapping) -> list[str]:
    grid = search.get("grid") or []
    return [grid] if isinstance(grid, str) else list(grid)


def statistics_bytes() -> int:
    """Mean and covariance of features, float64."""
    return (DIM + DIM**2) * 8


# ---------------------------------------------------------------- what is printed


def summed(rows: Sequence[Row], device: Device, gpus: int = 1) -> dict:
    """Totals of rows, JSON values."""
    hours = sum(device.hours(row.cost) for row in rows)
    return {
        "evaluations": sum(row.evaluations for row in rows),
        "images": sum(row.images for row in rows),
        "passes": sum(row.cost.passes for row in rows),
        "flops": sum(row.cost.total for row in rows),
        "gpu_hours": hours,
        "hours": hours / gpus,
        "disk_bytes": sum(row.disk + row.copied for row in rows),
        "dvc_copy_bytes": sum(row.copied for row in rows),
    }


def as_json(rows: Sequence[Row], device: Device, gpus: int = 1, more: Sequence[str] = ()) -> dict:
    """Everything, JSON values; counts, bytes and hours are upper bounds where ASSUMPTIONS say 'at most'.

    more: further assumptions.
    """
    stages = {stage: [row for row in rows if row.stage == stage] for stage in STAGES}
    search = stages["search"]
    return {
        "device": device.name,
        "tflops": dict(device.tflops),
        "utilisation": device.utilisation,
        "gpus": gpus,
        "search_evaluations": sum(row.evaluations for row in search),
        "search_images": sum(row.images for row in search),
        **summed(rows, device, gpus),
        "stages": {stage: summed(part, device, gpus) for stage, part in stages.items() if part},
        "rows": [
            {"stage": row.stage, "name": row.name, "model": row.model}
            | {"passes_per_image": row.each.passes, "flops_per_image": row.each.total}
            | summed([row], device, gpus)
            for row in rows
        ],
        "assumptions": [*ASSUMPTIONS, *more],
    }


TITLES = ("stage", "", "evaluations", "images", "passes/image", "TFLOP/image", "PFLOP", "GPU hours", "GB of disk")


def cells(stage: str, name: str, rows: Sequence[Row], device: Device) -> list[str]:
    """One line of the table, of one row or of several; '' where it says nothing."""
    total = summed(rows, device)
    each = rows[0].each if len(rows) == 1 else Cost()
    texts = (
        f"{total['evaluations']:,}",
        f"{total['images']:,}",
        f"{each.passes:,.0f}",
        f"{each.total / 1e12:.3g}",
        f"{total['flops'] / 1e15:,.3g}" if total["flops"] < 1e18 else f"{total['flops'] / 1e15:,.0f}",
        f"{total['gpu_hours']:,.2f}" if total["gpu_hours"] < 10 else f"{total['gpu_hours']:,.0f}",
        f"{total['disk_bytes'] / 1e9:,.1f}",
    )
    return [stage, name, *("" if re.fullmatch(r"[0.]*", text) else text for text in texts)]


def table(rows: Sequence[Row], device: Device) -> list[list[str]]:
    """Titles, then a line per item of the stages that compute much, and a total per stage and of all."""
    lines = [list(TITLES)]
    for stage in STAGES:
        part = [row for row in rows if row.stage == stage]
        if stage not in ("fetch", "reference", "samples"):
            lines += [cells(stage, row.name, [row], device) for row in part]
        if part:
            lines.append(cells(stage, "all", part, device))
    return [*lines, cells("total", "", rows, device)]


def text(rows: Sequence[Row], device: Device, gpus: int = 1, more: Sequence[str] = ()) -> str:
    """The table and what it assumes, for a terminal."""
    lines = table(rows, device)
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = (
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )
    total = as_json(rows, device, gpus, more)
    return "\n".join(
        [
            *(line.rstrip() for line in aligned),
            "",
            f"search: at most {total['search_evaluations']:,} evaluations, {total['search_images']:,} images",
            f"time: {total['gpu_hours']:,.1f} hours of {describe(device)}; {total['hours']:,.1f} on {gpus} at once",
            f"disk: at most {total['disk_bytes'] / 1e9:,.1f} GB; DVC's copies are {total['dvc_copy_bytes'] / 1e9:,.1f}",
            *(f"- {line}" for line in total["assumptions"]),
        ]
    )


def describe(device: Device) -> str:
    """'A100 at 35 % of its dense peak'."""
    if device.utilisation == 1:
        return device.name
    return f"{device.name} at {device.utilisation * 100:.3g} % of its dense peak"
