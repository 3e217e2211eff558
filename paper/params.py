"""Write what follows from the presets into params.yaml, of the root and of the folders here: `python -m paper.params`.

The part above the marker is written by hand and stays.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from neon import NeonError
from neon.cli import command_line
from neon.family import FAMILIES, Preset, get_family
from neon.fetch import read_table
from neon.files import atomic
from neon.search import parse_grid

ROOT = Path(__file__).parent.parent
MARKER = "# Below: written by `python -m paper.params` from PRESETS of the families. Change numbers there.\n"
MODELS = """\
# θ_r → S → θ_s. `decoder`: what turns latents into pixels; for models of pixels, their own file. `batch_size`: images
# per forward pass and process. `synthetic`: the seeds of S. `compute`, `train`: further options of `neon generate` and
# of `neon selftrain`; batch, lr, budget, … in `train` would change the recipe. `snapshot`: images between the snapshots
# that are kept.
"""
POINTS = """\
# θ_r, θ_s → the best w (and guidance) → FID. `values`: the grid of w (and of guidance); its ends are the range in which
# the surface looks. `sets`: how many of the sets of images in `seeds` are measured. `paper`: what the paper reports,
# and its lines in Table A.1.
"""
ABLATIONS = """\
# The models that the ablations vary. `made_with`: the usual sampling of S; `sampling`, `values`: of evaluations.
"""
CONTROLS = """\
# The models that have controls. `sampling`, `values`: of evaluations.
"""
GUIDED = """\
# The points whose sampler a second network can guide; S and θ_s are those of the main pipeline.
"""
GMO = """\
# Every S by GMO, then θ_s, w and FID. `made_with`: the sampling of S; `change`: what GMO does to it; `sampling`,
# `values`: of evaluations.
"""
RELEASED = """\
# The released checkpoints, with the options behind the paper's number; _readme: with those of the released README,
# where they differ.
"""


def presets() -> dict[str, tuple[str, Preset]]:
    """Name → its family's name and the preset."""
    rows = ((family, name, row) for family in FAMILIES for name, row in get_family(family).presets.items())
    return {name: (family, row) for family, name, row in rows}


def model_of(name: str, row: Preset) -> str:
    """The entry of `models` whose S and θ_s a row uses."""
    return row.trained_as or name


def models(rows: Mapping[str, tuple[str, Preset]]) -> dict[str, dict]:
    return {
        model_of(name, row): {
            "family": family,
            "base": row.base,
            "decoder": row.vae or row.base,
            "reference": row.reference,
            "batch_size": row.batch_size,
            "synthetic": row.seeds,
            "sampling": dict(row.made_with),
            "compute": {"precision": row.precision} if row.precision else {},
            "recipe": row.recipe,
            "train": {"micro_batch": row.micro_batch} | ({"snapshot": row.snapshot} if row.snapshot else {}),
        }
        for name, (family, row) in rows.items()
    }


def points(rows: Mapping[str, tuple[str, Preset]]) -> dict[str, dict]:
    return {
        name: {
            **sampled(family, row),
            "base": row.base,
            "decoder": row.vae or row.base,
            "model": model_of(name, row),
            "sampling": row.fixed,
            "values": values(row),
            "sets": row.sets,
            "paper": known(
                base=row.fid[0],
                neon=row.fid[1],
                w=row.best_w,
                guidance=row.sampling.get(row.searched),
                table=row.reference,
                kind=row.kind,
                rows=known(base=row.rows[0], neon=row.rows[1]),
            ),
        }
        for name, (family, row) in rows.items()
    }


def sampled(family: str, row: Preset) -> dict[str, object]:
    """What evaluations of a base, of its merges and of a released model have in common."""
    return {"family": family, "reference": row.reference, "batch_size": row.batch_size}


def values(row: Preset) -> dict[str, str]:
    """The grid as the command line takes it. Lists, for YAML 1.1 reads 0:3:0.25 without quotes as a time of day."""
    option, _, grid = row.grid.partition("=")
    return {"w": listed(row.w)} | ({"grid": f"{option}={listed(grid)}"} if grid else {})


def listed(grid: str) -> str:
    return ",".join(f"{value:g}" for value in parse_grid(grid))


def known(**fields) -> dict[str, object]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


def released(rows: Mapping[str, tuple[str, Preset]]) -> dict[str, dict]:
    """The evaluation of each released checkpoint."""
    return {
        name + suffix: sampled(family, row)
        | {"model": model_of(name, row), "checkpoint": row.released, "decoder": row.vae or row.released}
        | {"sampling": dict(sampling)}
        for name, (family, row) in rows.items()
        for suffix, sampling in (("", row.sampling), ("_readme", row.readme))
        if row.released and sampling
    }


def files(rows: Mapping[str, tuple[str, Preset]], references: Mapping[str, Mapping]) -> dict[str, str]:
    """Everything that stages fetch, by the name of its stage. A folder stands for what downloads.csv lists in it."""
    known = [row["path"] for row in read_table(ROOT / "downloads.csv")]
    named = {model_of(name, row): row.base for name, (_, row) in rows.items()}
    for path, family in {row.vae: family for family, row in rows.values() if row.vae}.items():
        for file in (file for file in known if file == path or file.startswith(f"{path}/")):
            named[f"vae_{family}" + ("_config" if file.endswith("/config.json") else "")] = file
    named |= {f"neon_{model_of(name, row)}": row.released for name, (_, row) in rows.items() if row.released}
    return named | {f"stats_{name}": reference["statistics"] for name, reference in references.items()}


def like(name: str) -> dict[str, object]:
    """What pipelines of their own need of a point and of its model. `made_with`: the usual sampling of S."""
    rows = presets()
    model, point = models(rows)[model_of(name, rows[name][1])], points(rows)[name]
    return {
        **{key: model[key] for key in ("base", "decoder", "batch_size", "synthetic", "compute")},
        "made_with": model["sampling"],
        **{key: model[key] for key in ("recipe", "train")},
        **{key: point[key] for key in ("sampling", "values")},
    }


def ablations() -> dict[str, dict]:
    """What the ablations need of their models."""
    needed = {"edm_uncond": "edm_cifar10_uncond", "edm_cond": "edm_cifar10_cond", "var": "var_d16"}
    return {own: like(name) for own, name in needed.items()}


CONTROLLED = ("edm_cifar10_cond", "flow_cifar10")  # points with controls


def controls() -> dict[str, dict]:
    point = points(presets())
    return {name: {key: point[name][key] for key in ("family", "reference")} | like(name) for name in CONTROLLED}


def guided() -> dict[str, dict]:
    """The points whose sampler a second network can guide."""
    rows = presets()
    shared = ("family", "reference", "batch_size", "base", "decoder", "model", "sampling", "values")
    return {
        name: {key: point[key] for key in shared}
        for name, point in points(rows).items()
        if get_family(point["family"]).guidable
    }


# S by GMO: setting → the point, and its sampling with few steps, of S and of evaluations.
FEW_STEPS = {
    "imm_t1": ("imm_t1", {"num_steps": 1}),
    "imm_t2": ("imm_t2", {"num_steps": 2}),
    "imm_t4": ("imm_t4", {"num_steps": 4}),
    "edm_euler10": ("edm_cifar10_cond", {"solver": "euler", "num_steps": 10}),
    "flow_euler4": ("flow_cifar10", {"solver": "euler", "num_steps": 4}),
}
CHANGES = {
    "gmo0": {},
    **{f"gmo{alpha}": {"gmo": alpha} for alpha in (0.05, 0.1, 0.2)},
    "noise0.1": {"gmo": 0.1, "gmo_control": "noise"},
}
CHANGED_IMAGES = "0-29999"  # the seeds of S there


def modified() -> dict[str, dict]:
    """Every S by GMO, its controls, and what is made of it."""
    return {
        f"{setting}-{change}": modified_as(name, few, options)
        for setting, (name, few) in FEW_STEPS.items()
        for change, options in CHANGES.items()
    }


def modified_as(name: str, few: Mapping, change: Mapping) -> dict[str, object]:
    point, whole = points(presets())[name], like(name)
    return {
        **{key: point[key] for key in ("family", "reference")},
        **whole,
        "synthetic": CHANGED_IMAGES,
        "made_with": {**whole["made_with"], **few},
        "sampling": {**whole["sampling"], **few},
        "change": dict(change),
    }


def section(comment: str, name: str, items: Mapping[str, Mapping]) -> str:
    """A section of the file as DVC writes YAML: what `dvc exp run -S` does not change stays as it is, line by line.

    No anchors: DVC would merge them back into a value that -S has changed.
    """
    text = yaml.safe_dump({name: plain(items)}, allow_unicode=True, width=10**6, sort_keys=False)
    return f"\n{comment}{text}"


def plain(value):
    """Nested mappings and sequences as dicts and lists."""
    return json.loads(json.dumps(value, default=dict))


def of_paper(head: str) -> str:
    """The sections files, models, points and released. head: the text above them."""
    rows, references = presets(), yaml.safe_load(head)["references"]
    fetched = "".join(f"  {name}: {path}\n" for name, path in files(rows, references).items())
    return (
        f"\n# Fetched one by one as stages need them.\nfiles:\n{fetched}"
        + section(MODELS, "models", models(rows))
        + section(POINTS, "points", points(rows))
        + section(RELEASED, "released", released(rows))
    )


def of_ablations(head: str) -> str:
    """The section `like`."""
    return section(ABLATIONS, "like", ablations())


def of_controls(head: str) -> str:
    """The section `like`."""
    return section(CONTROLS, "like", controls())


def of_rivals(head: str) -> str:
    """The sections guided and gmo."""
    return section(GUIDED, "guided", guided()) + section(GMO, "gmo", modified())


def filled(text: str, generated: Callable[[str], str] = of_paper) -> str:
    """The text of a params.yaml with its generated part written again. Raises NeonError if the marker is not in it."""
    head, marker, _ = text.partition(MARKER)
    if not marker:
        raise NeonError(f"params.yaml has lost the line that its generated part starts with: {MARKER}")
    return head + marker + generated(head)


FILES = {
    ROOT / "params.yaml": of_paper,
    ROOT / "paper" / "ablations" / "params.yaml": of_ablations,
    ROOT / "paper" / "controls" / "params.yaml": of_controls,
    ROOT / "paper" / "rivals" / "params.yaml": of_rivals,
}


def main() -> None:
    for path, generated in FILES.items():
        text = filled(path.read_text(), generated)
        with atomic(path) as partial:
            partial.write_text(text)


if __name__ == "__main__":
    command_line(main)
