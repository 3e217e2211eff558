"""The paper's pipeline: what params.yaml says, and `dvc repro` from end to end with every number turned down."""

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from processes import BIN, ROOT

from neon.family import FAMILIES, get_family
from neon.fetch import choose, read_table
from neon.sampling import parse_seeds
from neon.search import parse_grid

sys.path += [*(str(ROOT / "tests" / family) for family in ("edm", "flow", "var", "xar", "imm"))]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
MODELS, POINTS, RELEASED = PARAMS["models"], PARAMS["points"], PARAMS["released"]
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}


def dvc(*words, cwd=ROOT, check=True, timeout=280):
    done = subprocess.run(
        [BIN / "dvc", *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


# ---------------------------------------------------------------- the table of the paper


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


def test_the_ablations_stand_on_the_main_graph():
    folder = ROOT / "paper" / "ablations"
    stages = dvc("stage", "list", "--name-only", cwd=folder).stdout.split()
    params = yaml.safe_load((folder / "params.yaml").read_text())
    named = {f"{figure}@{name}" for figure in ("cross", "part", "guidance") for name in params[figure]}
    assert named <= set(stages) and {name.partition("@")[2] for name in named} == set(params["titles"])
    assert all(path["S"].removeprefix("runs/S/") in MODELS for path in params["cross"].values())
    assert params["var"].items() <= POINTS["var_d16"].items()
    graph = set(re.findall(r'"(.*)" -> "(.*)";', dvc("dag", "--dot", cwd=folder).stdout))
    assert ("../../dvc.yaml:generate@flow_cifar10", "cross@flow") in graph
    assert ("../../dvc.yaml:reference@imagenet256", "guidance@2") in graph


def test_every_file_can_be_fetched_and_every_dependency_has_a_stage():
    rows = read_table(ROOT / "downloads.csv")
    assert all(len(choose(rows, [path])) == 1 for path in PARAMS["files"].values())
    made = {*PARAMS["files"].values(), *(r["statistics"] for r in PARAMS["references"].values())}
    for item in (*MODELS.values(), *POINTS.values(), *RELEASED.values()):
        assert item["base"] in made and item["reference"] in PARAMS["references"]
        assert item.get("checkpoint", item["base"]) in made
        decoder = item["decoder"]
        assert decoder in made or (ROOT / decoder).exists() or any(path.startswith(decoder + "/") for path in made)
    assert {r["path"] for r in rows if r["group"] == "released"} == {r["checkpoint"] for r in RELEASED.values()}


@pytest.mark.parametrize("name", MODELS)
def test_recipes_and_options_exist(name):
    model = MODELS[name]
    family = get_family(model["family"])
    known = {field.name for field in dataclasses.fields(family.Sampling)}
    points = [item for item in (*POINTS.values(), *RELEASED.values()) if item["family"] == model["family"]]
    for item in (model, *points):
        assert item["sampling"].keys() <= known
    recipe = family.recipes[model["recipe"]]
    assert recipe.budget > 1_000_000 and model["train"].keys() == {"micro_batch"}  # the recipe as it is
    assert recipe.batch % 8 == 0 and len(parse_seeds(model["synthetic"])) > 1000


@pytest.mark.parametrize("name", POINTS)
def test_searches_cover_what_the_paper_found(name):
    point = POINTS[name]
    paper, search = point["paper"], point["search"]
    family = get_family(point["family"])
    weights = parse_grid(search["w"])
    assert weights[0] == 0 and (paper["w"] is None or paper["w"] in weights)
    assert point["model"] in MODELS and point["base"] == MODELS[point["model"]]["base"]
    if "grid" in search:
        option, _, values = search["grid"].partition("=")
        assert option in {field.name for field in dataclasses.fields(family.Sampling)} - point["sampling"].keys()
        assert paper["guidance"] is None or paper["guidance"] in parse_grid(values)


def test_the_papers_numbers_are_the_papers():
    numbers = pd.read_csv(ROOT / "paper" / "neon_results.csv").set_index("model").replace({np.nan: None})
    for name, point in POINTS.items():
        row = numbers.loc[name]
        told = point["paper"]
        found = (told["base"], told["neon"], told["w"], told["guidance"])
        assert found == (row["base_fid"], row["neon_fid"], row["w"], row["cfg"])
        if len(parse_seeds(point["synthetic"])) != row["synthetic_set"]:
            raise AssertionError(name)
        steps = point["sampling"].get("num_steps", point["sampling"].get("flow_steps", row["steps"]))
        assert steps == row["steps"]


def defaults(family: str) -> dict:
    return dataclasses.asdict(get_family(family).Sampling())


def test_defaults_of_the_commands_are_the_papers():
    """`python FAMILY/calculate_fid.py …` without options samples the released checkpoint as the paper did."""
    for name in ("edm_cifar10_cond", "edm_cifar10_uncond", "xar_l", "var_d16", "imm_t8"):
        item = RELEASED[name]
        assert defaults(item["family"]) | item["sampling"] == defaults(item["family"]), name
    from xAR.configs import EVALUATED

    assert RELEASED["xar_b"]["sampling"] == EVALUATED["xar_base"]
    assert RELEASED["xar_l"]["sampling"] == EVALUATED["xar_large"]
    assert (
        f"cfg={RELEASED['var_d36']['sampling']['cfg']}" in (ROOT / "VAR/VAR_imagenet_512/calculate_fid.py").read_text()
    )
    for name, guidance in (("16_256", "var_d16"), ("36_512", "var_d36")):
        script = (ROOT / f"VAR/VAR_imagenet_{name[-3:]}/generate_dataset.py").read_text()
        assert float(re.search(r'"--cfg", "([\d.]+)"', script)[1]) == MODELS[guidance]["sampling"]["cfg"]


def test_the_readmes_commands_are_in_the_table():
    """cfg and steps of the released README, where they differ from the paper's."""
    commands = re.findall(r"^PYTHONPATH=\S+ torchrun .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        (checkpoint,) = re.findall(r"checkpoints/\S+", command)
        items = [item for item in RELEASED.values() if item["checkpoint"] == checkpoint]
        said = {k: float(v) for k, v in re.findall(r"--(cfg|cfg_scale|flow_steps|num_steps) (\S+)", command)}
        assert any(said.items() <= item["sampling"].items() for item in items), command


def test_seeds_are_disjoint():
    for model in MODELS.values():
        parts = [parse_seeds(text) for text in (PARAMS["seeds"]["search"], PARAMS["seeds"]["final"])]
        parts.append(parse_seeds(model["synthetic"]))
        assert len(set().union(*(part.tolist() for part in parts))) == sum(map(len, parts))


# ---------------------------------------------------------------- tables


def test_tables_of_a_part_of_the_results(tmp_path):
    """What was measured stands beside the paper's number, everything else is 'not measured'."""
    from report.table_a1 import main

    row = {"family": "edm", "w": 0.0, "fid": 1.5, "fid_se": 0.01, "n": 50_000, "seconds": 1.0, "budget": 0}
    finals = [{"key": role, **row, "role": role, "fid": fid, "w": w} for role, fid, w in
              [("base", 1.77, 0.0), ("selftrained", 2.5, -1.0), ("neon", 1.39, 1.25)]]  # fmt: skip
    for path, rows in {"final/edm_cifar10_cond.jsonl": finals, "released/xar_l.json": [row | {"fid": 1.03}]}.items():
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
    text = (tmp_path / "table_a1.md").read_text()
    assert "| Neon | EDM + Neon | 35 | cond | 1.38 | not measured | 1.39 |" in text
    assert "| Neon | xAR-L + Neon | 50 | cond | 1.02 | 1.03 | not measured |" in text
    assert "| GAN | StyleGAN-XL | 1 | cond | 1.85 |  |  |" in text
    settings = pd.read_csv(tmp_path / "settings.csv")
    assert settings["setting"].tolist() == ["edm_cifar10_cond"] and settings["w_star"].tolist() == [1.25]


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
    for name in ("dvc.yaml", "download_models.sh", "checkpoints/.gitignore", "fid_stats/.gitignore"):
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
        "decoder": "edm/sampler.py",
        "reference": "digits",
    }
    model |= {"batch_size": 50, "synthetic": "0-63", "sampling": {"num_steps": 4}, "recipe": "digits"}
    model |= {"train": {"budget": 256, "snapshot": 128, "lr": 1e-3}}
    models = {name: copy.deepcopy(model) for name in ("one", "two")}
    told = {
        "base": 1.0,
        "neon": 1.0,
        "w": None,
        "guidance": None,
        "table": "cifar10",
        "kind": "cond",
        "rows": ["EDM-VP"],
    }
    points = {k: {**copy.deepcopy(m), "model": k, "search": {"w": "0,1"}, "paper": told} for k, m in models.items()}
    params = PARAMS | {"models": models, "points": points, "launch": "python", "device": "cpu"}
    params |= {"released": {"one": {**models["one"], "checkpoint": "checkpoints/neon.safetensors"}}}
    params |= {"files": {"base": "checkpoints/base.safetensors", "neon": "checkpoints/neon.safetensors"}}
    params["files"]["stats"] = "fid_stats/digits.npz"
    params |= {"references": {"digits": {"statistics": "fid_stats/digits.npz", "real": {"images": str(mini.data)}}}}
    params |= {"features": mini.features[1], "seeds": {k: f"{i}00-{i}59" for i, k in enumerate(PARAMS["seeds"], 1)}}
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
    while len(list(made.rglob("*.png"))) < 100 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in sorted(made.rglob("*.png"))[:100]}
    assert len(first) == 100 and not (made / "dataset.json").exists()
    ran = reproduce(digits)
    assert {"generate@one", "final@two", "tables", "report@w_curves"} <= set(ran)
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert len(list(made.rglob("*.png"))) == 4000

    assert reproduce(digits) == []
    shown = json.loads(dvc("metrics", "show", "--json", cwd=digits).stdout)[""]["data"]
    found = shown["results/paper/metrics/one.json"]["data"]
    assert {"base", "selftrained", "neon"} == found.keys() and {"fid", "precision", "recall"} <= found["neon"].keys()
    assert "fid" in shown["results/paper/metrics/released_one.json"]["data"]["released"]
    dvc("plots", "show", cwd=digits)
    assert "curves" in (digits / "dvc_plots" / "index.html").read_text()
    notebook = (digits / "results" / "paper" / "table_a1.ipynb").read_text()
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
    rows = [json.loads(line) for line in (digits / "results/paper/rows/search/two.jsonl").read_text().splitlines()]
    assert {row["num_steps"] for row in rows} == {3}


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
@pytest.mark.timeout(7200)
def test_the_papers_models_from_end_to_end(tmp_path, monkeypatch):
    """Full-size checkpoints of every model but VAR-d36, through every stage; Inception with random weights.

    VAR-d36 has 2.3 billion parameters: to train it in float32 takes more than 32 GB.
    """
    monkeypatch.setitem(ENVIRONMENT, "OMP_NUM_THREADS", str(os.cpu_count()))
    params = json.loads(json.dumps(PARAMS | {"launch": "python", "device": "cpu", "features": "inception:random"}))
    seeds = {"search": "100-102", "final": "200-202", "released": "300-302", "samples": "0-0"}
    params |= {"metrics": "fid", "seeds": seeds}
    fewer = {"edm": {"num_steps": 2}, "flow": {"solver": "euler", "num_steps": 2}, "xar": {"flow_steps": 2}}
    fewer["imm"] = {"num_steps": 2}
    for table in ("models", "points", "released"):
        params[table] = {
            name: item for name, item in params[table].items() if name != "var_d36" and not name.endswith("_readme")
        }
        for item in params[table].values():
            sampling = item["sampling"] | fewer.get(item["family"], {})
            item |= {"batch_size": 3, "synthetic": "0-3", "sampling": sampling}
            item["train"] = {"batch": 4, "budget": 4, "snapshot": 4, "precision": "bfloat16"}
            if "search" in item:
                option = item["search"].get("grid", "").partition("=")[0]
                item["search"] = {"w": "0,1"} | ({"grid": f"{option}=2,3"} if option else {})
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
    named = [row for point in points.values() for row in point["paper"]["rows"] if row]
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
