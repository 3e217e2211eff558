"""The paper's pipeline: what params.yaml says, and `dvc repro` from end to end with every number turned down."""

import copy
import dataclasses
import difflib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pickle_writer import EDM_CLASSES, write_persistent_pickle
from processes import BIN, ROOT, free_port

from neon import NeonError
from neon.cli.options import sampling_options
from neon.cli.parser import parse
from neon.data import ImageSet
from neon.family import FAMILIES, get_family
from neon.fetch import choose, read_table
from neon.sampling import parse_seeds
from neon.search import parse_grid

sys.path += [str(ROOT), *(str(ROOT / "tests" / family) for family in ("edm", "flow", "var", "xar", "imm"))]
from paper.params import FILES, MARKER, filled, models

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
MODELS, POINTS, RELEASED = PARAMS["models"], PARAMS["points"], PARAMS["released"]
PRESETS = {name: (family, row) for family in map(get_family, FAMILIES) for name, row in family.presets.items()}
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}


def dvc(*words, cwd=ROOT, check=True, timeout=280):
    done = subprocess.run(
        [BIN / "dvc", *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


# ---------------------------------------------------------------- the table of the paper


@pytest.mark.parametrize("path", FILES, ids=str)
def test_params_are_what_the_generator_writes(path):
    text = path.read_text()
    assert filled(text, FILES[path]) == text


def test_the_hand_written_part_of_params_stays():
    """Another launcher and a reference more: they stay, and the statistics of the reference can be fetched."""
    text = (ROOT / "params.yaml").read_text()
    mine = text.replace("launch: torchrun", "launch: mpirun").replace(
        "references:\n", "references:\n  own: { statistics: own.npz, real: {} } # mine\n"
    )
    changed = re.sub("micro_batch: 64", "micro_batch: 1", mine)
    again = filled(changed)
    assert again.partition(MARKER)[0] == mine.partition(MARKER)[0]
    with pytest.raises(NeonError, match="has lost the line"):
        filled(text.replace(MARKER, ""))
    found = yaml.safe_load(again)
    assert found == yaml.safe_load(mine) | {"files": PARAMS["files"] | {"stats_own": "own.npz"}}


def test_both_pipelines_parse_and_know_nothing_of_each_other():
    paper = dvc("stage", "list", "--name-only").stdout.split()
    wanted = {f"generate@{model}" for model in MODELS} | {f"released@{name}" for name in RELEASED} | {"tables"}
    assert wanted <= set(paper) and len(paper) == len(set(paper))
    mini = dvc("stage", "list", "--name-only", cwd=ROOT / "mini").stdout.split()
    assert "base@edm" in mini and "base@edm" not in paper
    graph = dvc("dag", "--dot").stdout
    edges = re.findall(r'"(.*)" -> "(.*)";', graph)
    assert ("selftrain@imm", "search@imm_t1") in edges
    assert all(start.startswith("mini/") == end.startswith("mini/") for start, end in edges)


@pytest.fixture(scope="module")
def stages():
    """Name → stage of the paper's pipeline and its ablations, as DVC resolves them."""
    from dvc.repo import Repo

    found = {stage.addressing: stage for stage in Repo(ROOT).index.stages}
    return {name: stage for name, stage in found.items() if not name.startswith(("mini/", "fashion/"))}


def commands(stage) -> list[list[str]]:
    """What follows `neon` in the commands of a stage; of a loop over fine-tunes, the first."""
    lines = stage.cmd if isinstance(stage.cmd, list) else [stage.cmd]
    found = [re.search(r"-m neon\.cli (.*?)( \|\| exit.*)?$", line) for line in lines]
    return [shlex.split(match[1].replace("$seed", "0")) for match in found if match]


def test_the_ablations_stand_on_the_main_graph(stages):
    folder = ROOT / "paper" / "ablations"
    params = yaml.safe_load((folder / "params.yaml").read_text())
    named = {f"{figure}@{name}" for figure in ("cross", "part", "guidance") for name in params[figure]}
    assert {f"paper/ablations/dvc.yaml:{name}" for name in named} <= stages.keys()
    assert {name.partition("@")[2] for name in named} == set(params["titles"])
    assert all(path["S"].removeprefix("runs/S/") in MODELS for path in params["cross"].values())
    graph = set(re.findall(r'"(.*)" -> "(.*)";', dvc("dag", "--dot", cwd=folder).stdout))
    assert ("../../dvc.yaml:generate@flow_cifar10", "cross@flow") in graph
    assert ("../../dvc.yaml:reference@imagenet256", "guidance@2") in graph


def test_the_ablations_run_as_their_models_do(stages):
    """Every option but those that an ablation varies, and where things lie."""
    varied = {"out", "selftrained", "data", "search", "base", "model", "chosen", "preset"}
    for name, stage in stages.items():
        figure, _, item = name.rpartition(":")[2].partition("@")
        models = {"cross": "edm_cifar10_uncond", "part": "edm_cifar10_cond", "guidance": "var_d16"}
        if "ablations" not in name or figure not in models:
            continue
        also = {"guidance": {"cfg", "seeds"}, "part": {"w", "seeds"}, "cross": {"w", "seeds"}}[figure]
        for words in commands(stage):
            if words[0] == "train":
                continue
            (like,) = commands(stages[f"{words[0]}@{models[figure]}"])
            found, wanted = (vars(parse(argv, "neon")) for argv in (words, like))
            differ = {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)}
            assert differ <= varied | also, (name, words[0], differ)
            if words[0] == "generate" and figure == "guidance":
                assert found["cfg"] == float(item) and found["seeds"] == "0-89999"


EVERY = {"launch=python", "search.evaluations=6", "seeds.selftrain='0 1'"}  # each of these changes many commands
OVERRIDES = {  # what -S sets → the stages whose commands it changes
    "launch=python": {"generate@imm", "reference@cifar10", "samples@imm_t1", "search@xar_b"},
    "search.evaluations=6": {"search@imm_t1", "search@edm_ffhq64"},
    "seeds.selftrain='0 1'": {"selftrain@imm", "search@imm_t1", "final@imm_t1"},
    "+references.cifar10.real.images=mine.zip": {"reference@cifar10"},
    "models.imm.train.micro_batch=8": {"selftrain@imm"},
    "models.var_d16.sampling.cfg=1.5": {"generate@var_d16"},
    "points.var_d16.sampling.top_k=600": {"search@var_d16", "final@var_d16"},
    "points.xar_b.values.w='0,1'": {"search@xar_b"},
    "released.xar_l.batch_size=1": {"released@xar_l"},
    "files.var_d36=checkpoints/mine.pth": {"fetch@var_d36"},
}


@pytest.mark.parametrize("overrides", [*([key] for key in sorted(EVERY)), sorted(OVERRIDES.keys() - EVERY)], ids=len)
def test_dvc_exp_run_changes_what_it_should(stages, tmp_path, overrides):
    """`dvc exp run -S KEY=VALUE`: these commands change, no others, and one line of params.yaml for each key."""
    from dvc.repo import Repo
    from dvc.utils.hydra import apply_overrides

    changed = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", changed)
    apply_overrides(changed, overrides)
    lines = [path.read_text().splitlines() for path in (ROOT / "params.yaml", changed)]
    removed = [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if re.match(r"-(?!--)", line)]
    assert len(removed) == len(overrides)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    now = {stage.name: stage.cmd for stage in Repo.init(tmp_path, no_scm=True).index.stages}
    found = {name for name, command in now.items() if command != stages[name].cmd}
    wanted = set().union(*(OVERRIDES[override] for override in overrides))
    assert found == wanted or (found > wanted and overrides[0] in EVERY)


def test_no_code_is_a_dependency_of_what_is_measured(stages):
    """An edited comment must not repeat what took GPU hours; tables and pages are cheap."""
    packages = {path.name for path in ROOT.iterdir() if list(path.glob("*.py"))}
    for name, stage in stages.items():
        code = {d.def_path for d in stage.deps if d.def_path.endswith(".py") or d.def_path in packages}
        if name.rpartition(":")[2].partition("@")[0] in ("tables", "report", "page", "notebook"):
            code = {path for path in code if not path.startswith("report/")}
        assert not code, name


def test_a_checkpoint_is_fetched_only_for_what_needs_it():
    """The evaluation of a released model of pixels needs neither its base nor an autoencoder."""
    graph = re.findall(r'"(.*)" -> "(.*)";', dvc("dag", "--dot", "released@edm_ffhq64").stdout)
    assert {start for start, _ in graph} == {"fetch@neon_edm_ffhq64", "fetch@stats_ffhq64", "reference@ffhq64"}
    graph = re.findall(r'"(.*)" -> "(.*)";', dvc("dag", "--dot", "generate@imm").stdout)
    assert {start for start, _ in graph} == {"fetch@imm", "fetch@vae_imm", "fetch@vae_imm_config"}


def test_every_file_can_be_fetched_and_every_dependency_has_a_stage():
    rows = read_table(ROOT / "downloads.csv")
    assert all(len(choose(rows, [path])) == 1 for path in PARAMS["files"].values())
    made = {*PARAMS["files"].values(), *(r["statistics"] for r in PARAMS["references"].values())}
    for item in (*MODELS.values(), *POINTS.values(), *RELEASED.values()):
        assert item["reference"] in PARAMS["references"]
        assert item.get("checkpoint") in made or item["base"] in made
        decoder = item["decoder"]
        assert decoder in made or any(path.startswith(decoder + "/") for path in made)
    assert {r["path"] for r in rows if r["group"] == "released"} == {r["checkpoint"] for r in RELEASED.values()}
    assert {r["path"] for r in rows if r["group"] != "fashion"} == set(PARAMS["files"].values())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_exists(name):
    family, preset = PRESETS[name]
    fields = {field.name: field.type for field in dataclasses.fields(family.Sampling)}
    for sampling in (preset.made_with, preset.sampling, preset.readme):
        for option, value in sampling.items():
            assert isinstance(value, fields[option] if fields[option] in (int, float) else str), option
    assert preset.network in family.networks
    recipe = family.recipes[preset.recipe]
    assert recipe.budget > 1_000_000 and recipe.batch % 8 == 0 and preset.synthetic > 1000
    assert preset.precision in ("", "float32", "float16", "bfloat16")
    ((model, item),) = models({name: (family.name, preset)}).items()
    assert MODELS[model] == item  # rows that share S and θ_s say the same of them


NONE = (0, 0)
RANGES = {  # of w and of γ in the paper
    "edm_cifar10_cond": [(0, 3), NONE],
    "edm_cifar10_uncond": [(0, 3), NONE],
    "edm_ffhq64": [(0, 3), NONE],
    "flow_cifar10": [(0, 3), NONE],
    "xar_b": [(0, 3), (2.7, 5)],
    "xar_l": [(0, 3), (2.3, 5)],
    "var_d16": [(0, 2), (1.25, 4)],
    "var_d36": [(0, 2), (2, 4.5)],
    "imm": [(0, 5.2), (1, 3)],
}


@pytest.mark.parametrize("name", PRESETS)
def test_searches_cover_what_the_paper_found(name):
    family, preset = PRESETS[name]
    weights, guidances = parse_grid(preset.w), parse_grid(preset.grid.partition("=")[2] or "0")
    assert preset.best_w is None or preset.best_w in weights
    assert (weights == sorted(weights)) and guidances == sorted(guidances)
    assert [(weights[0], weights[-1]), (guidances[0], guidances[-1])] == RANGES[preset.trained_as or name]
    if preset.grid:
        assert preset.searched in {field.name for field in dataclasses.fields(family.Sampling)}
        assert preset.sampling.get(preset.searched, guidances[0]) in guidances


def test_the_papers_numbers_are_the_papers():
    numbers = pd.read_csv(ROOT / "paper" / "neon_results.csv").set_index("model").replace({np.nan: None})
    table = pd.read_csv(ROOT / "paper" / "table_a1.csv").set_index(["benchmark", "model"])
    for name, (_, preset) in PRESETS.items():
        row, steps = numbers.loc[name], preset.sampling.get("num_steps", preset.sampling.get("flow_steps"))
        found = (*preset.fid, preset.best_w, preset.sampling.get(preset.searched), preset.synthetic)
        assert found == (row["base_fid"], row["neon_fid"], row["w"], row["cfg"], row["synthetic_set"]), name
        assert steps in (row["steps"], None)
        for model, fid in zip(preset.rows, preset.fid):  # the text of the paper rounds some otherwise
            assert (model is None) == (fid is None)
            assert model is None or abs(table.loc[(preset.reference, model), f"fid_{preset.kind}"] - fid) < 0.011


def test_seeds_are_disjoint():
    seeds = PARAMS["seeds"]
    finals = [seeds["final"], *seeds["more"].split()]
    assert all(len(parse_seeds(text)) == 50_000 for text in finals)
    assert {point["sets"] for point in POINTS.values()} == {1, len(finals)}
    assert all((point["sets"] == 3) == (point["family"] == "edm") for point in POINTS.values())
    for model in MODELS.values():
        parts = [parse_seeds(text) for text in (seeds["search"], *finals, model["synthetic"])]
        assert len(set().union(*(part.tolist() for part in parts))) == sum(map(len, parts))


# ---------------------------------------------------------------- presets and commands


COMMANDS = ("generate", "selftrain", "search", "final")
CHOICES = [(command, name) for command in COMMANDS for name in PRESETS]
CHOICES += [("evaluate", name) for name, (_, preset) in PRESETS.items() if preset.released]


@pytest.mark.parametrize(("command", "name"), CHOICES)
def test_a_preset_chooses_what_the_pipeline_passes(stages, command, name):
    """`neon COMMAND --preset NAME`, with where things lie, is the command of the stage."""
    model = PRESETS[name][1].trained_as or name
    stage = {"generate": f"generate@{model}", "selftrain": f"selftrain@{model}", "evaluate": f"released@{name}"}
    (words,) = commands(stages[stage.get(command, f"{command}@{name}")])
    assert ("--precision" in words) == (command == "generate" and bool(PRESETS[name][1].precision))
    wanted = vars(parse(words, "neon"))
    places = {"out", "data", "selftrained", "ref", "features", "metrics", "device"}
    places |= {
        "generate": {"shard"},
        "selftrain": {"save_every"},
        "final": {"search", "seeds"},
        "search": {"seeds"},
        "evaluate": {"seeds"},
    }.get(command, set())
    given = {key: value for key, value in wanted.items() if key in places and value is not None}
    short = [w for key, v in given.items() for w in (f"--{key}", *(v if isinstance(v, list) else [str(v)]))]
    replace = ["--replace"] if wanted.get("replace") else []
    found = vars(parse([command, "--preset", name, *short, *replace], "neon"))
    assert found.pop("preset") == name and wanted.pop("preset") is None
    assert found.pop("chosen") and not wanted.pop("chosen")
    for parsed in (found, wanted):
        if command == "search":
            parsed["w"] = parse_grid(parsed["w"])
            parsed["grid"] = [(text.split("=")[0], *parse_grid(text.split("=")[1])) for text in parsed["grid"]]
    assert found == wanted


def script(command: str, monkeypatch) -> SimpleNamespace:
    """Which checkpoint a calculate_fid.py would measure, and with which sampling options; nothing is measured."""
    asked = []
    monkeypatch.setattr("neon.cli.calculate_fid.calculate_fid", lambda *given, **options: asked.append(given))
    monkeypatch.delitem(sys.modules, "VAR.fid", raising=False)  # holds the real one
    words = shlex.split(command)
    path = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", words[path:])
    runpy.run_path(str(ROOT / words[path]), run_name="__main__")
    ((args, family, checkpoint, *_),) = asked
    return SimpleNamespace(args=args, checkpoint=checkpoint, sampling=sampling_options(args, family))


README = re.findall(r"^PYTHONPATH=\S+ torchrun .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
SAMPLED = r" --(?:cfg|cfg_scale|flow_steps|num_steps) \S+"


@pytest.mark.parametrize("command", README, ids=lambda command: re.findall(r"Neon_(\w+)", command)[0])
def test_the_readmes_commands_sample_as_released(command, monkeypatch, tmp_path):
    """Typed as they are: as the released README does. Without sampling options: as the paper did."""
    (checkpoint,) = re.findall(r"checkpoints/\S+", command)
    ((family, preset),) = (row for row in PRESETS.values() if row[1].released == checkpoint)
    monkeypatch.chdir(tmp_path)
    if family.name == "edm":  # the number of steps goes by the network that the file records
        (tmp_path / "checkpoints").mkdir()
        network = {**family.networks[preset.network], "use_fp16": False}
        write_persistent_pickle(Path(checkpoint), "EDMPrecond", network, {"x": torch.zeros(1)}, EDM_CLASSES)
    typed = script(command, monkeypatch)
    assert typed.checkpoint == checkpoint
    assert (preset.readme or preset.sampling).items() <= typed.sampling.items()
    assert preset.sampling.items() <= script(re.sub(SAMPLED, "", command), monkeypatch).sampling.items()
    for option, value in re.findall(r"--(\w+) (\S+)", command.partition(".py")[2]):
        assert str(getattr(typed.args, option)) == value


def test_the_readme_has_every_released_checkpoint():
    found = {*re.findall(r"checkpoints/Neon\S+", "\n".join(README))}
    assert found == {preset.released for _, preset in PRESETS.values()} - {""}


# ---------------------------------------------------------------- docs


def test_a_document_is_filled_between_its_markers(tmp_path):
    from paper.docs import BEGIN, END, fill, filled, table

    family, document = get_family("xar"), tmp_path / "xar.md"
    document.write_text(f"before\n\n{BEGIN}old\n{END}\n\nafter\n")
    fill(document, table(family))
    text = document.read_text()
    assert text.startswith(f"before\n\n{BEGIN}| preset | `xar_b` | `xar_l` |\n")
    assert text.endswith(f"|\n{END}\n\nafter\n")
    assert "| S | 750 k images, cfg 2.7, flow_steps 40 | 750 k images, cfg 2.3, flow_steps 50 |" in text
    assert "| evaluated with | cfg 3.8, flow_steps 40 | cfg 2.7, flow_steps 50 |" in text
    assert "| FID in the paper: base, Neon | 1.72, 1.31 at w = 1.4 | 1.28, 1.02 at w = 1.6 |" in text
    assert "old" not in text and filled(text, table(family)) == text
    assert filled("no markers", "any") == "no markers"


def test_the_tables_in_docs_are_the_presets():
    from paper.docs import BEGIN, documents, filled

    for path, table in documents().items():
        text = path.read_text()
        assert BEGIN in text and filled(text, table) == text, f"{path.name}: run python -m paper.docs"
    readme = (ROOT / "README.md").read_text()
    for _, preset in PRESETS.values():
        assert Path(preset.released).name in readme


# ---------------------------------------------------------------- tables


def test_tables_of_a_part_of_the_results(tmp_path):
    """What was measured is next to the paper's number, everything else is 'not measured'."""
    from report.table_a1 import main

    row = {"family": "edm", "w": 0.0, "fid": 1.5, "fid_se": 0.01, "n": 50_000, "seconds": 1.0, "budget": 0}
    finals = [{"key": role, **row, "role": role, "fid": fid, "w": w} for role, fid, w in
              [("base", 1.77, 0.0), ("selftrained", 2.5, -1.0), ("neon", 1.39, 1.25)]]  # fmt: skip
    for path, rows in {
        f"final/edm_cifar10_cond/0/{PARAMS['seeds']['final']}.jsonl": finals,
        "released/xar_l.json": [row | {"fid": 1.03}],
    }.items():
        file = tmp_path / "rows" / path
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    main(tmp_path)
    table = pd.read_csv(tmp_path / "table_a1.csv").set_index(["benchmark", "model", "kind"])
    assert table.loc[("cifar10", "EDM + Neon", "cond"), "fid_rerun"] == 1.39
    assert table.loc[("cifar10", "EDM-VP", "cond"), "fid_rerun"] == 1.77
    assert table.loc[("imagenet256", "xAR-L + Neon", "cond"), "fid_released"] == 1.03
    assert table["fid_rerun"].notna().sum() == 2 and table["fid_released"].notna().sum() == 1
    paper = pd.read_csv(ROOT / "paper" / "table_a1.csv")
    assert sorted(table["fid_paper"]) == sorted(paper[["fid_uncond", "fid_cond"]].stack().dropna())
    assert table[["fid_rerun_se", "fid_rerun_min"]].isna().all(axis=None)  # one set, one fine-tune
    text = (tmp_path / "table_a1.md").read_text()
    assert "| Neon | EDM + Neon | 35 | cond | 1.38 | not measured | 1.39 |" in text
    assert "| Neon | xAR-L + Neon | 50 | cond | 1.02 | 1.03 | not measured |" in text
    assert "| GAN | StyleGAN-XL | 1 | cond | 1.85 |  |  |" in text
    settings = pd.read_csv(tmp_path / "settings.csv")
    assert settings["setting"].tolist() == ["edm_cifar10_cond"] and settings["w_star"].tolist() == [1.25]


def finals(folder: Path, fids: dict[str, float]) -> None:
    """Final rows of edm_ffhq64: fine-tune/set of images → FID of Neon; the base has 1 more."""
    sets = dict(zip("abc", [PARAMS["seeds"]["final"], *PARAMS["seeds"]["more"].split()]))
    for place, fid in fids.items():
        seed, images = place.split("/")
        file = folder / f"rows/final/edm_ffhq64/{seed}/{sets.get(images, images)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"family": "edm", "fid_se": 0.5, "n": 50_000, "seconds": 1.0, "budget": 0}
        places = (("base", fid + 1, 0.0), ("selftrained", fid + 2, -1.0), ("neon", fid, 1.25))
        rows = [{"key": role, **row, "role": role, "fid": value, "w": w} for role, value, w in places]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_three_sets_of_images_and_several_fine_tunes(tmp_path, capsys, monkeypatch):
    """Mean, standard error and minimum of three sets; the error is over fine-tunes as soon as there are several.

    What was measured with other seeds than those in params.yaml does not count.
    """
    from report.table_a1 import main

    def measured():
        main(tmp_path)
        lines = pd.read_csv(tmp_path / "table_a1.csv").set_index(["benchmark", "model", "kind"])
        columns = ["fid_rerun", "fid_rerun_se", "fid_rerun_min"]
        return lines.loc[("ffhq64", "EDM + Neon", "uncond"), columns].tolist()

    finals(tmp_path, {"0/a": 1.1, "0/b": 1.2, "0/c": 1.6, "0/5-9": 0.1, "7/a": 0.1})
    error = np.std([1.1, 1.2, 1.6], ddof=1) / 3**0.5
    assert measured() == pytest.approx([1.3, error, 1.1], rel=1e-4)
    assert (
        "| Neon | EDM + Neon | 79 | uncond | 1.12 | not measured | 1.30 ± 0.15, min 1.10 |" in capsys.readouterr().out
    )
    finals(tmp_path, {"1/a": 2.3, "1/b": 2.1, "1/c": 1.9})
    (tmp_path / "paper").mkdir()
    shutil.copy(ROOT / "paper/table_a1.csv", tmp_path / "paper")
    write_params(tmp_path, PARAMS | {"seeds": PARAMS["seeds"] | {"selftrain": "0 1"}})
    monkeypatch.setattr("report.table_a1.ROOT", tmp_path)
    assert measured() == pytest.approx([1.7, 0.8 / 2, 1.5], rel=1e-4)
    printed = capsys.readouterr().out
    assert "| Neon | EDM + Neon | 79 | uncond | 1.12 | not measured | 1.70 ± 0.40, min 1.50 |" in printed
    assert "| EDM, FFHQ-64, unconditional | 2 | 1.25 |" in printed


# ---------------------------------------------------------------- the whole graph


def checkout(folder: Path, params: dict) -> Path:
    """The repository as a user has it, with other numbers."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pth", "*.ckpt", "*.pkl")
    for name in (
        "neon",
        "nets",
        "report",
        "paper",
        "notebooks",
        *{FAMILIES[m["family"]].partition(".")[0] for m in MODELS.values()},
    ):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, dirs_exist_ok=True)
    for name in ("dvc.yaml", ".dvcignore", "download_models.sh", "checkpoints/.gitignore", "fid_stats/.gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    dvc("init", "--quiet", cwd=folder)
    shutil.copy(ROOT / ".gitignore", folder)
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
    lines = [f"base,{path},http://127.0.0.1:9/{path},," for path in params["files"].values()]
    (folder / "downloads.csv").write_text("\n".join(["group,path,source,size,sha256", *lines]) + "\n")
    write_params(folder, params)
    return folder


def write_params(folder: Path, params: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(params)), sort_keys=False))


def reproduce(folder: Path, *targets) -> list[str]:
    """The stages that ran."""
    return re.findall(r"Running stage '(.*)'", dvc("repro", *targets, cwd=folder, timeout=7000).stdout)


@pytest.fixture
def digits(mini, tmp_path):
    """Two 'models' of the paper that are small; everything else as it is."""
    for name, source in {"base.safetensors": mini.base, "neon.safetensors": mini.snapshots[0]}.items():
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "checkpoints" / name)
    (tmp_path / "fid_stats").mkdir()
    shutil.copy(mini.ref, tmp_path / "fid_stats" / "digits.npz")
    model = {
        "family": "edm",
        "base": "checkpoints/base.safetensors",
        "decoder": "checkpoints/base.safetensors",
        "reference": "digits",
    }
    model |= {"batch_size": 50, "synthetic": "0-63", "sampling": {"num_steps": 4}, "recipe": "digits", "compute": {}}
    model |= {"train": {"budget": 256, "snapshot": 128, "lr": 1e-3}}
    models = {name: copy.deepcopy(model) for name in ("one", "two")}
    reported = {
        "base": 1.0,
        "neon": 1.0,
        "w": None,
        "guidance": None,
        "table": "cifar10",
        "kind": "cond",
        "rows": {"base": "EDM-VP"},
    }
    points = {name: {**copy.deepcopy(item), "model": name, "values": {"w": "0,1"}, "sets": 1, "paper": reported}
              for name, item in models.items()}  # fmt: skip
    points["two"]["sets"] = 2
    params = PARAMS | {"models": models, "points": points, "launch": "python", "device": "cpu"}
    params |= {"released": {"one": {**models["one"], "checkpoint": "checkpoints/neon.safetensors"}}}
    params |= {"files": {"base": "checkpoints/base.safetensors", "neon": "checkpoints/neon.safetensors"}}
    params["files"]["stats"] = "fid_stats/digits.npz"
    params |= {"references": {"digits": {"statistics": "fid_stats/digits.npz", "real": {"images": str(mini.data)}}}}
    params |= {"features": mini.features[1], "shard": 1000, "save_every": 128}
    params |= {"search": {"method": "surface", "evaluations": 4}}
    params |= {"seeds": {k: f"{i}00-{i}59" for i, k in enumerate(PARAMS["seeds"], 1)} | {"selftrain": 0}}
    return checkout(tmp_path, json.loads(json.dumps(params)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_restarted_finished_changed(digits):
    params = yaml.safe_load((digits / "params.yaml").read_text())
    params["models"]["one"]["synthetic"] = "0-3999"
    write_params(digits, params)
    process = subprocess.Popen(
        [BIN / "dvc", "repro"], cwd=digits, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    made, deadline = digits / "runs" / "S" / "one", time.monotonic() + 200
    while not list(made.glob("*.zip")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in sorted(made.glob("*.zip"))}
    assert first and not (made / "dataset.json").exists()
    ran = reproduce(digits)
    assert {"generate@one", "final@two", "tables", "report@w_curves"} <= set(ran)
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert len(list(made.glob("*.zip"))) == 4 and not list(made.rglob("*.png")) and len(ImageSet(made)) == 4000

    assert reproduce(digits) == []
    shown = json.loads(dvc("metrics", "show", "--json", cwd=digits).stdout)[""]["data"]
    found = shown["results/paper/metrics/one.json"]["data"]
    assert {"base", "selftrained", "neon"} == found.keys() and {"fid", "precision", "recall"} <= found["neon"].keys()
    assert "fid" in shown["results/paper/metrics/released_one.json"]["data"]["released"]
    dvc("plots", "show", cwd=digits)
    assert "curves" in (digits / "dvc_plots" / "index.html").read_text()
    notebook = (digits / "results" / "paper" / "table_a1.ipynb").read_text()
    table = pd.read_csv(digits / "results/paper/table_a1.csv").set_index("model").loc["EDM-VP"]
    assert table["fid_rerun_min"].max() < table["fid_rerun"].max()  # of two sets
    assert "EDM-VP" in notebook and '"output_type": "error"' not in notebook

    params["models"]["two"]["train"]["lr"] = 2e-3  # one model's parameter: that model alone, and the tables
    write_params(digits, params)
    ran = reproduce(digits)
    assert {"selftrain@two", "search@two", "final@two", "tables"} <= set(ran)
    assert all(stage.endswith("@two") or stage.split("@")[0] in ("tables", "report", "page") for stage in ran)
    params["points"]["two"]["sampling"]["num_steps"] = 3
    write_params(digits, params)
    ran = {stage for stage in reproduce(digits) if stage.split("@")[0] not in ("tables", "report", "page")}
    assert ran == {"search@two", "final@two", "samples@two"}
    rows = [json.loads(line) for line in (digits / "results/paper/rows/search/two/0.jsonl").read_text().splitlines()]
    assert {row["num_steps"] for row in rows} == {3}

    params["seeds"]["selftrain"] = "0 1"  # a further fine-tune of each model: the first stays as it is
    write_params(digits, params)
    first = digits / "runs/selftrain/one/0/snapshot-000000256.safetensors"
    before = first.stat().st_mtime_ns
    features = digits / "results/paper/rows/search/one/0.features"  # what a search keeps is neither hashed nor shared
    features.mkdir(exist_ok=True)
    assert "selftrain@one" in reproduce(digits)
    assert first.stat().st_mtime_ns == before
    assert first.read_bytes() != (digits / "runs/selftrain/one/1" / first.name).read_bytes()
    assert len(list((digits / "results/paper/rows/final").glob("one/[01]/*.jsonl"))) == 2
    (features / "part").write_text("large")
    assert reproduce(digits) == []


@pytest.mark.slow
def test_what_is_missing_is_named_at_once(digits):
    (digits / "checkpoints" / "base.safetensors").unlink()
    done = dvc("repro", "generate@one", cwd=digits, check=False)
    assert done.returncode != 0 and "put the file at checkpoints/base.safetensors" in done.stdout + done.stderr
    shutil.copy(digits / "checkpoints" / "neon.safetensors", digits / "checkpoints" / "base.safetensors")
    params = yaml.safe_load((digits / "params.yaml").read_text()) | {"device": "cuda"}
    write_params(digits, params)
    done = dvc("repro", "generate@one", cwd=digits, check=False)
    assert done.returncode != 0 and "choose --device cpu" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_remote_shares_what_was_made(digits, tmp_path_factory):
    """What one user pushed, another pulls, and has nothing to run."""
    remote = tmp_path_factory.mktemp("remote")
    reproduce(digits, "selftrain@one")
    dvc("remote", "add", "--default", "shared", remote, cwd=digits)
    dvc("push", cwd=digits)
    shutil.rmtree(digits / "runs")
    shutil.rmtree(digits / ".dvc" / "cache")
    dvc("pull", "--with-deps", "selftrain@one", cwd=digits)
    assert reproduce(digits, "selftrain@one") == []


@pytest.mark.slow
def test_hard_links_to_the_cache(digits):
    """One copy on disk in place of two; a stage that ran before can still add to its output."""
    dvc("config", "cache.type", "hardlink", cwd=digits)
    reproduce(digits, "selftrain@one")
    snapshot = digits / "runs/selftrain/one/0/snapshot-000000256.safetensors"
    before = snapshot.stat()
    assert before.st_nlink == 2
    params = yaml.safe_load((digits / "params.yaml").read_text())
    params["seeds"]["selftrain"] = "0 1"
    write_params(digits, params)
    assert reproduce(digits, "selftrain@one") == ["selftrain@one"]
    added = digits / "runs/selftrain/one/1" / snapshot.name
    assert snapshot.stat().st_nlink == added.stat().st_nlink == 2
    shutil.rmtree(digits / "runs/selftrain/one")
    dvc("checkout", "selftrain@one", cwd=digits)
    assert added.exists() and reproduce(digits, "selftrain@one") == []


@pytest.mark.slow
def test_two_jobs_at_once_in_one_folder(digits):
    """Of two models, after what they share: --single-item asks for no stage above."""
    reproduce(digits, *("fetch@base", "fetch@neon", "fetch@stats", "reference@digits"))
    command = {"cwd": digits, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words, stages = [BIN / "dvc", "--wait-for-lock", "repro", "--single-item"], ("generate", "selftrain", "search")
    jobs = [
        subprocess.Popen([*words, *(f"{stage}@{model}" for stage in stages)], **command) for model in ("one", "two")
    ]
    said = [job.communicate(timeout=280)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert reproduce(digits, "search@one", "search@two") == []


SRUN = """#!/usr/bin/env bash
# Slurm's srun, but all nodes are this machine: the command once per node.
echo "$@" >> srun.log
while [[ $1 == --* ]]; do shift; done
for node in 1 2; do "$@" & nodes+=($!); done
for node in "${nodes[@]}"; do wait "$node" || exit; done
"""


@pytest.mark.slow
def test_the_slurm_example(digits, tmp_path_factory):
    """paper/neon.sbatch with a pretended srun: two nodes that find each other make one set."""
    programs = tmp_path_factory.mktemp("programs")
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho localhost\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    script = (digits / "paper/neon.sbatch").read_text()
    (launch,) = re.findall("^# launch: (.*)", script, flags=re.MULTILINE)
    params = yaml.safe_load((digits / "params.yaml").read_text())
    params["launch"] = launch.replace("nproc_per_node=8", "nproc_per_node=1").replace("29500", str(free_port()))
    write_params(digits, params)
    slurm = {"SLURM_SUBMIT_DIR": str(digits), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    environment = ENVIRONMENT | slurm | {"PATH": f"{programs}:{ENVIRONMENT['PATH']}"}
    done = subprocess.run(
        ["bash", "paper/neon.sbatch", "generate@one"], cwd=digits, env=environment, capture_output=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(ImageSet(digits / "runs/S/one")) == 64
    started = (digits / "srun.log").read_text().splitlines()
    assert len(started) == 1 and "torchrun --nnodes=2" in started[0] and "neon.cli generate" in started[0]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_papers_models_from_end_to_end(tmp_path, monkeypatch):
    """Full-size checkpoints of every model but VAR-d36, through every stage; Inception with random weights.

    VAR-d36 has 2.3 billion parameters: to train it in float32 takes more than 32 GB.
    """
    monkeypatch.setitem(ENVIRONMENT, "OMP_NUM_THREADS", str(os.cpu_count()))
    params = json.loads(json.dumps(PARAMS | {"launch": "python", "device": "cpu", "features": "inception:random"}))
    seeds = {"selftrain": 0, "search": "100-102", "final": "200-202", "more": "203-205"}
    seeds |= {"released": "300-302", "samples": "0-0"}
    params |= {"metrics": "fid", "seeds": seeds, "search": {"method": "grid"}}
    fewer = {"edm": {"num_steps": 2}, "flow": {"solver": "euler", "num_steps": 2}, "xar": {"flow_steps": 2}}
    fewer["imm"] = {"num_steps": 2}
    for table in ("models", "points", "released"):
        params[table] = {
            name: item for name, item in params[table].items() if name != "var_d36" and not name.endswith("_readme")
        }
        for item in params[table].values():
            sampling = item["sampling"] | fewer.get(item["family"], {})
            item |= {"batch_size": 3, "synthetic": "0-3", "sampling": sampling, "sets": 1}
            item["train"] = {"batch": 4, "budget": 4, "snapshot": 4, "precision": "bfloat16"}
            if "values" in item:
                option = item["values"].get("grid", "").partition("=")[0]
                item["values"] = {"w": "0,1"} | ({"grid": f"{option}=2,3"} if option else {})
    models, points, released = (params[table] for table in ("models", "points", "released"))
    for name, item in models.items():
        write_full_size(tmp_path, name, Path(item["base"]))
    for name, item in released.items():
        write_full_size(tmp_path, points[name]["model"], Path(item["checkpoint"]))
    (tmp_path / "fid_stats").mkdir()
    used = {item["reference"] for item in models.values()}
    params["references"] = {name: params["references"][name] for name in used}
    for reference in params["references"].values():
        np.savez(tmp_path / reference["statistics"], mu=np.full(2048, 0.4), sigma=0.2 * np.eye(2048))
    params["files"] = {name: path for name, path in params["files"].items() if (tmp_path / path).exists()}
    checkout(tmp_path, params)
    ran = {*reproduce(tmp_path)}
    assert {f"{stage}@{name}" for stage in ("generate", "selftrain") for name in models} <= ran
    assert {f"{stage}@{name}" for stage in ("search", "final", "samples") for name in points} <= ran
    assert {f"released@{name}" for name in released} <= ran
    assert reproduce(tmp_path) == []
    table = pd.read_csv(tmp_path / "results" / "paper" / "table_a1.csv")
    named = [row for point in points.values() for row in point["paper"]["rows"].values()]
    assert table["fid_rerun"].notna().sum() == len(named)
    assert table["fid_released"].notna().sum() == len(released)


def write_full_size(folder: Path, model: str, path: Path) -> None:
    """A checkpoint of that model of params.yaml, of the original's size and format, and the VAE that it needs."""
    from imm_tiny import write_full_size as write_imm
    from imm_tiny import write_vae as write_vae_of_imm
    from test_edm_paper_scale import write_checkpoint as write_edm
    from test_flow_family import write_released as write_flow
    from var_cases import write_pair
    from xar_cases import write_checkpoint as write_xar
    from xar_cases import write_vae as write_vae_of_xar

    from VAR.configs import CONFIGS

    family, _, which = model.partition("_")
    if family == "edm":
        write_edm(folder / path, which)
    elif family == "flow":
        write_flow(folder / path)
    elif family == "var":
        write_pair(folder / path.parent, CONFIGS[f"{which}_256"], path.name)
    elif family == "xar":
        write_xar(folder / path, {"b": "xar_base", "l": "xar_large"}[which])
        write_vae_of_xar(folder / "xAR" / "pretrained" / "kl16.ckpt", "xar_base")
    else:
        write_imm(folder / path)
        write_vae_of_imm(folder / path.parent)


def test_the_committed_table_is_what_the_command_writes(tmp_path):
    """results/paper/table_a1.*: where there are no rows of results, every number of ours is 'not measured'."""
    from report.table_a1 import main

    if (ROOT / "results/paper/rows").exists():
        shutil.copytree(ROOT / "results/paper/rows", tmp_path / "rows")
    main(tmp_path)
    for name in ("table_a1.md", "table_a1.csv", "table_a1.json"):
        assert (tmp_path / name).read_text() == (ROOT / "results/paper" / name).read_text()
