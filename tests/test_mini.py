"""The pipelines of the mini scale hang together, run what settings.py says, and are as old as their locks."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from processes import BIN, ROOT

import mini.ddo
from mini.plan import plan, titles
from mini.run import choose, share
from mini.settings import ABLATIONS, BASES, CHAINS, COMPARED, CONTROLS, GMO, RIVALS, TESTED
from neon import NeonError

PIPELINES = ("mini", "mini/ablations", "mini/methods", "mini/controls", "mini/rivals")


def words(stage: str, chain: str, setting: str, seed: int = 0) -> dict[str, str]:
    """Option → value of the one command that runs."""
    (job,) = choose(stage, chain, setting, seed)
    return dict(re.findall(r"--(\w+)[ =](\S+)", shlex.join(job.command)))


def test_what_runs_for_a_setting_and_seed():
    sampling = {"solver": "euler", "num_steps": "10", "sigma_max": "20"}
    made = words("generate", "demo", "euler10")
    assert sampling.items() <= made.items() and made["seeds"] == "10000-11999"
    assert (made["model"], made["out"]) == ("runs/base/edm/0", "runs/S/demo/euler10/0")
    trained = words("selftrain", "demo", "euler10")
    assert trained["data"] == made["out"] and trained["seed"] == "0" and "budget" not in trained
    searched = words("search", "demo", "euler10")
    assert searched["selftrained"] == trained["out"] and (searched["method"], searched["w"]) == ("surface", "0:3")
    assert words("final", "demo", "euler10")["search"] == searched["out"]


def test_what_a_setting_takes_from_elsewhere():
    assert words("selftrain", "demo", "real")["data"] == "runs/data/train"
    assert "real" not in {job.setting for job in choose("generate", "demo")}
    assert (
        words("search", "imm", "imm2", 3)["selftrained"] == "runs/selftrain/imm/imm8/3/snapshot-000012800.safetensors"
    )
    assert {job.setting for job in choose("selftrain", "imm")} == {"imm8"}
    assert words("selftrain", "cross", "var")["data"] == "runs/S/var/tau06/0"
    base, made = words("base", "part", "150"), words("generate", "part", "150")
    assert base["max_images"] == "150" and base["out"] == made["model"] == "runs/ablations/part/base/150/0"
    (search,) = choose("search", "sizes", seed=1)
    first = search.command.index("--selftrained") + 1
    whole = "runs/selftrain/imm/imm8/1"
    assert search.command[first : first + 3] == ["runs/sizes/selftrain/100/1", "runs/sizes/selftrain/500/1", whole]


def test_what_replaces_the_fine_tune():
    real = words("selftrain", "controls-demo", "euler10-real")
    assert real["data"] == "runs/data/train" and "budget" not in real  # as long as Neon's own
    random, searched = (
        words("selftrain", "controls-more", "euler10-random", 3),
        words("search", "controls-more", "euler10-random", 3),
    )
    assert random["selftrained"] == "runs/selftrain/more/euler10/3/snapshot-000012800.safetensors"
    assert random["out"] == searched["selftrained"] and random["seed"] == "3"
    older = words("search", "controls-flow", "fm4-older")["selftrained"]
    assert older == "runs/base/flow/0/snapshot-000060032.safetensors"
    sims, auto = (words("final", "guided-imm", f"imm8-{rival}") for rival in ("sims", "auto"))
    assert sims["by"] == auto["by"] == "guidance" and "by" not in words("final", "imm", "imm8")
    ddo = words("selftrain", "ddo-var", "tau06-ddo")
    assert (ddo["real"], ddo["fake"]) == ("runs/data/train", "runs/S/var/tau06/0")


def test_S_of_gmo_is_made_as_it_is_measured():
    made, noise = (words("generate", "gmo-imm", f"imm1-{name}0.1") for name in ("gmo", "noise"))
    assert made["num_steps"] == words("search", "gmo-imm", "imm1-gmo0.1")["num_steps"] == "1" and made["gmo"] == "0.1"
    assert noise["gmo_control"] == "noise" and "gmo" not in words("generate", "gmo-imm", "imm1-gmo0")


FIRST = "digits:runs/features.safetensors"


def test_each_feature_space_judges_what_both_chose():
    finals = [shlex.join(job.command) for job in choose("final", "spaces-var", seed=0)]
    found = {tuple(re.findall(r"--(?:search|ref|features) (\S+)", command)) for command in finals}
    own, first = "runs/spaces/spaces-var/rows/search/tau06/0.jsonl", "runs/rows/var/search/tau06/0.jsonl"
    second = ("runs/second/heldout.npz", "digits:runs/second/features.safetensors")
    assert found == {
        (own, *second),
        (first, *second),
        (own, "runs/ref/heldout.npz", "digits:runs/features.safetensors"),
    }
    assert ["--other_features" in command for command in finals] == [False, True, True]


def test_neon_knows_every_command():
    from neon.cli.parser import parse

    jobs = plan()
    for command in (job.command for job in itertools.chain(*jobs.values())):
        if command[0] == "neon":
            parse(command[1:], "neon")
        else:
            assert command[:3] == ["python", "-m", "mini.ddo"] and mini.ddo.parser().parse_args(command[3:])
    ablations, methods = 1 + 2 + 3 * 3, 5 + 6 * 4 + 12 * 2
    controls, rivals = 6 * 3 + 6 * 2, 3 * 2 + 2 * 3 + 2 * 4
    # bases, chains, sizes, diagnoses, …
    assert len(jobs) == 7 + 8 * 4 + 2 + 8 + ablations + methods + controls + rivals


def test_settings_have_one_title_and_chains_a_base_of_their_seeds():
    for chains in (CHAINS, ABLATIONS, CONTROLS, RIVALS, GMO):
        for chain in chains.values():
            assert set(chain.seeds) <= set(BASES[chain.base].seeds)
            assert all(titles(chains)[name] == setting.title for name, setting in chain.settings.items())
    assert list(titles(CHAINS))[:3] == ["euler10", "heun8", "real"] and len(set(titles(CHAINS).values())) == 14


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (("generate", "sizes"), "demo more paper flow var xar imm diffusers part guidance"),
        (("search", "demo", "imm8"), "euler10 heun8 real"),
        (("final", "more", "real", 0), "3 4"),
    ],
)
def test_what_there_is_not_is_an_error(words, known):
    with pytest.raises(NeonError, match=known):
        choose(*words)


def mini_run(*argv, code: str = "", **where):
    program = ["-c", code] if code else ["-m", "mini.run"]
    path = os.pathsep.join([str(where.pop("path", ROOT)), str(ROOT)])
    command = [BIN / "python", *program, *map(str, argv)]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, **where)


def test_dry_run_prints_commands_and_runs_none(tmp_path):
    printed = mini_run("search", "demo", "--setting", "euler10", "--dry_run", cwd=tmp_path)
    assert printed.returncode == 0 and not list(tmp_path.iterdir())
    lines = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert lines == [job.command for job in choose("search", "demo", "euler10")] and len(lines) == 3
    error = mini_run("search", "demo", "--seed", "9", "--dry_run")
    assert error.returncode == 1 and error.stderr.count("\n") == 1 and error.stderr.startswith("error: ")


@pytest.mark.parametrize(("commands", "cores", "at_once"), [(5, 2, 3), (6, 2, 2), (1, 2, 1), (5, 8, 5), (10, 4, 6)])
def test_no_core_idles_at_the_end(commands, cores, at_once):
    assert share(commands, cores) == at_once


def test_every_command_runs_and_one_failure_fails_them_all(tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "none.pth"
    torch.save({"x": torch.zeros(2)}, good)
    commands = [["neon", "convert", str(file), f"{tmp_path}/{n}.safetensors"] for file in (bad, good) for n in (1, 2)]
    both = mini_run(code=f"import sys; from mini.run import side_by_side; sys.exit(side_by_side({commands!r}, ''))")
    assert both.returncode == 1 and both.stderr.count("failed: ") == 2 and "none.pth" in both.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"good.pth", "1.safetensors", "2.safetensors"}


TINY = """
from dataclasses import replace
few = {"sampling": {"num_steps": 2}, "training": {"budget": 256, "snapshot": 128}, "w": (-1, 0, 1)}
BASES = {"edm": Base("edm", range(2), {"budget": 640, "snapshot": 640, "ramp": 64})}
CHAINS = {
    "demo": Chain(
        base="edm",
        seeds=range(2),
        settings={"euler10": replace(EULER10, **few), "real": replace(REAL, **few)},
        images=Images("0-63", "100-163", "200-263"),
        metrics="fid",
    )
}
ABLATIONS = METHODS = {}
ALL = CHAINS
"""


@pytest.fixture
def tiny(mini, tmp_path):
    """A copy of the mini scale with one small chain and all that it starts from."""
    shutil.copytree(ROOT / "mini", tmp_path / "mini", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    with open(tmp_path / "mini/settings.py", "a") as settings:
        settings.write(TINY)
    runs = tmp_path / "mini/runs"
    shutil.copytree(mini.data, runs / "data/train")
    shutil.copy(mini.path / "features.safetensors", runs)
    (runs / "ref").mkdir()
    for name in ("train", "heldout"):
        shutil.copy(mini.ref, runs / f"ref/{name}.npz")
    return tmp_path


def test_a_chain_from_base_to_reported_rows(tiny):
    for stage, chain in (
        ("base", "edm"),
        ("generate", "demo"),
        ("selftrain", "demo"),
        ("search", "demo"),
        ("final", "demo"),
    ):
        ran = mini_run(stage, chain, cwd=tiny / "mini", path=tiny)
        assert ran.returncode == 0, ran.stderr[-2000:]
    runs = tiny / "mini/runs"
    assert [path.name for path in (runs / "S/demo").iterdir()] == ["euler10"]
    rows = {str(path.relative_to(runs / "rows/demo")): path for path in runs.glob("rows/demo/*/*/*.jsonl")}
    assert set(rows) == {f"{s}/{n}/{i}.jsonl" for s in ("search", "final") for n in ("euler10", "real") for i in (0, 1)}
    roles = [json.loads(line)["role"] for line in rows["final/real/1.jsonl"].read_text().splitlines()]
    assert roles == ["base", "selftrained", "neon"]
    searched = [json.loads(line) for line in rows["search/euler10/0.jsonl"].read_text().splitlines()]
    assert [(row["w"], row["n"]) for row in searched][:2] == [(0, 64), (0.5, 64)]  # by surface, from 0 to 1
    real = [json.loads(line)["w"] for line in rows["search/real/0.jsonl"].read_text().splitlines()]
    assert real == [-1, 0, 1, -1, 1]  # by grid, of two snapshots; w = 0 once


def stages(folder: str, root: Path = ROOT) -> list:
    """The stages of a pipeline as DVC resolves them."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return [stage for stage in repo.index.stages if stage.path_in_repo == f"{folder}/dvc.yaml"]


def commands(stage) -> list[list[str]]:
    return [shlex.split(command) for command in ([stage.cmd] if isinstance(stage.cmd, str) else stage.cmd)]


def within(path: Path, folders: set[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def test_every_file_a_stage_reads_is_there_or_made_by_another():
    found = [stage for folder in PIPELINES for stage in stages(folder)]
    outs = {Path(out.fs_path) for stage in found for out in stage.outs}
    assert len(found) > 50
    for stage in found:
        for path in (Path(dep.fs_path) for dep in stage.deps):
            made = within(path, outs) or any(out.is_relative_to(path) for out in outs)
            assert made or path.exists(), f"{stage.addressing} needs {path}"


def test_stages_run_all_that_is_planned_and_name_what_it_reads_and_writes():
    jobs, ran = plan(), []
    found = [stage for folder in PIPELINES for stage in stages(folder)]
    needs = {Path(out.fs_path): {Path(dep.fs_path) for dep in stage.deps} for stage in found for out in stage.outs}
    reads = ("--model", "--base", "--data", "--selftrained", "--search", "--ref", "--vae_ckpt")
    reads += ("--real", "--synthetic", "--fake")
    for stage in found:
        deps, outs = ({Path(file.fs_path) for file in files} for files in (stage.deps, stage.outs))
        ancestors = deps | {dep for made, given in needs.items() if made in deps for dep in given}
        assert Path(stage.wdir) == ROOT / "mini"
        for name, chain in [words[-2:] for words in commands(stage) if "mini.run" in words]:
            ran.append((name, chain))
            assert ROOT / f"mini/runs/plan/{name}/{chain}.sh" in deps
            for command in (job.command for job in jobs[name, chain]):
                for option, value in itertools.pairwise(command):
                    path = ROOT / "mini" / value
                    assert option != "--out" or within(path, outs), f"{stage.name} writes {value}"
                    known = within(path, ancestors | outs)
                    assert option not in reads or known, f"{stage.name} reads {value}"
    assert sorted(ran) == sorted(jobs)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A copy of both pipelines whose locks agree with their files. What stages make is a stand-in, except the plan."""
    copy = tmp_path_factory.mktemp("reproduced")
    for name in ("mini", "neon"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("runs", "__pycache__", "dvc.lock"))
    for stage in itertools.chain(*map(stages, PIPELINES)):
        for path in (copy / Path(file.fs_path).relative_to(ROOT) for file in (*stage.outs, *stage.deps)):
            stand_in(path)
    dvc(copy, "init", "--quiet", "--no-scm")
    shutil.rmtree(copy / "mini/runs/plan")
    dvc(copy / "mini", "repro", "plan")
    dvc(copy, "commit", "--force", "--quiet")
    assert stale(copy) == set()
    return copy


def stand_in(path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if not path.suffix else path.write_text(path.name)


def dvc(folder: Path, *argv) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder.parent), "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [BIN / "dvc", *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@contextlib.contextmanager
def edited(path: Path, old: str = "", new: str = "\n"):
    """The file with every `old` replaced, or with a line more."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else text + new)
    yield
    path.write_text(text)


def stale(copy: Path) -> set[str]:
    """The stages that would run for changed dependencies or commands."""
    return {name.rpartition(":")[2] for name in json.loads(dvc(copy, "status", "--json"))}


CHANGES = {
    "# few first-order": ("# Few first-order", []),
    "w=(-1, -0.5, 0, 0.5,": ("w=(-1, 0, 0.5,", ["grid@demo", "grid@fresh-demo"]),
    "training=SHORT,\n    w=(-1, 0, 0.5, 1, 2),\n)\nFM4": (
        "training=SHORT,\n    w=(-1, 0, 0.5, 1, 3),\n)\nFM4",
        ["search@paper", "search@more", "fresh-paper", "grid@paper", "grid@fresh-paper"],
    ),
    'euler", "num_steps": 4},': (
        'euler", "num_steps": 5},',
        [
            *("generate@flow", "search@flow", "final@flow", "fresh@flow", "grid@flow", "grid@fresh-flow"),
            *("rows@flow", "spaces@flow", "guided@flow", "gmo@flow"),
        ],
    ),
    'synthetic={"cfg": 2}': ('synthetic={"cfg": 3}', ["generate@xar", "fresh@xar"]),
    "temperature 0.6 (": ("temperature 0.6, (", ["report-demo", "report-mini"]),
    "parts=(100, 500)": ("parts=(100, 400)", ["sizes"]),
    '"num_steps": 1}': (
        '"num_steps": 3}',
        ["search@imm", "final@imm", "fresh@imm", "grid@imm", "grid@fresh-imm", "gmo@imm"],
    ),
    "TRAIN = 1200": ("TRAIN = 1100", ["data"]),
    "range(5), {": ("range(6), {", ["base@var"]),
    '"VAR", "var/tau06"': ('"VAR", "xar/cfg2"', ["cross-selftrain"]),
}


@pytest.mark.parametrize("old", CHANGES)
def test_a_changed_setting_reruns_what_it_touches_and_nothing_else(reproduced, old):
    new, touched = CHANGES[old]

    def planned():
        code = "from pathlib import Path; from mini.plan import write; write(Path('runs/plan'))"
        done = mini_run(code=code, path=reproduced, cwd=reproduced / "mini")
        assert done.returncode == 0, done.stderr

    with edited(reproduced / "mini/settings.py", old, new):
        planned()  # as the stage does, and in a third of the time
        found = stale(reproduced)
    planned()
    assert found == {"plan", *touched}


def at(stages: str, *names: str) -> set[str]:
    return {f"{stage}@{name}" for stage in stages.split() for name in names}


FRESH = at("fresh", "demo", "flow", "var", "xar", "imm")
# Stages that measure, of ablations, controls and rivals.
MORE = at("rows", *ABLATIONS) | at("rows spaces", *TESTED) | at("ddo", "demo", "var")
MORE |= at("guided", "demo", "flow", "imm") | at("gmo", "flow", "imm")
CODE = {
    "flow/sampler.py": at("base generate search final fresh train rows spaces diagnose guided gmo", "flow"),
    "imm/latents.py": at("base generate selftrain search final fresh", "imm")
    | at("train rows spaces diagnose guided gmo", "imm")
    | {"sizes"},
    "VAR/configs.py": at("base selftrain fresh train diagnose ddo", "var") | {"tokenizer", "guidance-selftrain"},
    "neon/merge.py": at("search final", *CHAINS.keys() - {"sizes"}) | MORE | {"sizes"} | FRESH,
    "neon/final.py": at("final", *CHAINS.keys() - {"sizes"}) | MORE | FRESH | at("grid", *COMPARED),
    "mini/run.py": set(),
    "neon/cli/commands.py": set(),
}


@pytest.mark.parametrize("file", CODE)
def test_changed_code_reruns_the_stages_whose_numbers_it_makes(reproduced, file):
    with edited(reproduced / file):
        found = stale(reproduced)
    assert found == CODE[file]


def out_of_date(root: Path, folder: str) -> list[str]:
    """What changed since the pipeline ran: code, commands, settings, results. Files that git ignores need not exist."""
    locked = yaml.safe_load((root / folder / "dvc.lock").read_text())["stages"]
    named = {stage.name for stage in stages(folder, root)}
    wrong = [f"{name}: only in the {'lock' if name in locked else 'pipeline'}" for name in locked.keys() ^ named]
    for name, changes in json.loads(dvc(root / folder, "status", "--json", "dvc.yaml")).items():
        wrong += [f"{name}: {change}" for change in changes if isinstance(change, str)]
        for files in (files for change in changes if isinstance(change, dict) for files in change.values()):
            wrong += [f"{name}: {path}" for path, how in files.items() if "runs/" not in path and how != "deleted"]
    return sorted(wrong)


def test_what_is_out_of_date_is_found_without_the_runs(reproduced):
    (reproduced / "mini/runs").rename(reproduced / "elsewhere")
    none, found = [out_of_date(reproduced, folder) for folder in PIPELINES], {}
    for file in ("neon/merge.py", "mini/plan.py"):
        with edited(reproduced / file):
            found[file] = [out_of_date(reproduced, folder) for folder in PIPELINES]
    (reproduced / "elsewhere").rename(reproduced / "mini/runs")
    assert none == [[]] * 5 and found["mini/plan.py"] == [["plan: plan.py"], *[[]] * 4]
    assert "search@demo: ../neon/merge.py" in found["neon/merge.py"][0]
    assert "rows@cross: ../../neon/merge.py" in found["neon/merge.py"][1]


@pytest.mark.parametrize("folder", PIPELINES)
def test_the_lock_is_of_this_code(folder):
    found, target = out_of_date(ROOT, folder), {"mini": "demo mini"}.get(folder, folder.replace("/", "-"))
    assert not found, f"run `make {target}` and commit {folder}/dvc.lock; it is older than\n" + "\n".join(found)
