"""Controls, rivals and ablations at paper scale: they parse, stand on the main graph, and `neon plan` prices them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from processes import BIN, ROOT

from neon import NeonError
from neon.cli import plan as plans
from neon.cli.parser import parse
from neon.family import get_family
from neon.plan import RECIPE, plan
from neon.sampling import parse_seeds
from neon.stages import Stage, commands, stages_of
from report.rivals import METHODS

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
OWN = {name: yaml.safe_load((ROOT / f"paper/{name}/params.yaml").read_text()) for name in ("controls", "rivals")}
GIVEN = {  # what a user may add to the controls
    "diagnose": {"imm_t8": {"model": "imm", "real": "datasets/real.zip"}},
    "dinov2": {"edm_ffhq64": {"weights": "datasets/dinov2.pth", "real": {"images": "datasets/real.zip"}}},
}


def copied(folder: Path) -> Path:
    """The pipelines alone, as in a clone where the user has named real images."""
    from dvc.repo import Repo

    for name in ("dvc.yaml", "params.yaml", *(f"paper/{p}/{f}.yaml" for p in OWN for f in ("dvc", "params"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "paper/controls/params.yaml").write_text(yaml.safe_dump(OWN["controls"] | GIVEN, sort_keys=False))
    Repo.init(str(folder), no_scm=True).close()
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def found(clone) -> dict[str, list[Stage]]:
    return {name: stages_of(clone / "paper" / name) for name in OWN}


def of_kind(found, *kinds: str) -> list[dict]:
    """The parsed options of every such command."""
    lines = [words for stages in found.values() for stage in stages for words in stage.commands]
    return [vars(parse(words, "neon")) for words in lines if words[0] in kinds]


# ---------------------------------------------------------------- the stages


def test_every_stage_is_there(found):
    names = {name: {stage.name for stage in stages} for name, stages in found.items()}
    models = OWN["controls"]["like"]
    wanted = {f"{control}@{model}" for control in ("real", "corrupted", "random") for model in models}
    assert names["controls"] == wanted | {"tables", "diagnose@imm_t8", "dinov2@edm_ffhq64"}
    guided = {name for name, point in PARAMS["points"].items() if get_family(point["family"]).guidable}
    changes = ("gmo0", "gmo0.05", "gmo0.1", "gmo0.2", "noise0.1")
    settings = ("imm_t1", "imm_t2", "imm_t4", "edm_euler10", "flow_euler4")
    gmo = {f"gmo@{setting}-{change}" for setting in settings for change in changes}
    assert names["rivals"] == {f"sims@{name}" for name in guided} | gmo | {"tables@rivals", "tables@gmo"}


def test_without_real_images_nothing_asks_for_them():
    names = {stage.name.partition("@")[0] for stage in stages_of(ROOT / "paper/controls")}
    assert names == {"real", "corrupted", "random", "tables"}


def test_every_command_is_accepted(found):
    lines = [words for stages in found.values() for stage in stages for words in stage.commands]
    assert len(lines) == 6 * 3 + 1 + 2 + 8 * 2 + 25 * 4
    for words in lines:
        assert parse(words, "neon").run


def test_every_file_is_made_by_a_stage_or_given(clone):
    from dvc.repo import Repo

    with Repo(str(clone)) as repo:
        stages = repo.index.stages
        repo.index.check_graph()
        made = [out.fs_path for stage in stages for out in stage.outs]
        read = {dep.fs_path for stage in stages if "paper/" in stage.addressing for dep in stage.deps}
    own = [OWN["controls"][name] for name in ("cifar10", "cifar10_c")]
    own += ["datasets/real.zip", "datasets/dinov2.pth", "report/tables.py"]
    given = {str(clone / path) for path in own}
    assert given <= read
    for path in read - given:
        inside = [out for out in made if Path(path).is_relative_to(out) or Path(out).is_relative_to(path)]
        assert inside, path


def test_what_commands_read_is_a_dependency(clone):
    from dvc.repo import Repo

    with Repo(str(clone)) as repo:
        stages = {(stage.addressing): stage for stage in repo.index.stages if "paper/" in stage.addressing}
        for name, stage in stages.items():
            known = [out.def_path for out in (*stage.deps, *stage.outs)]
            text = " ".join(stage.cmd) if isinstance(stage.cmd, list) else stage.cmd
            for path in re.findall(r"--(?:base|model|data|ref|search|real|synthetic|images) (\S+)", text):
                preset = "--preset" in text and path.startswith("checkpoints/")
                assert preset or any(Path(path).is_relative_to(one) for one in known), (name, path)
            for path in re.findall(r"--selftrained (runs/\S+)", text):
                assert any(Path(path).is_relative_to(one) for one in known), (name, path)


def test_seeds_of_s_of_the_search_and_of_the_report_are_others(found):
    def seeds(*kinds):
        return {seed for options in of_kind(found, *kinds) for seed in parse_seeds(options["seeds"]).tolist()}

    made, searched, reported = seeds("generate"), seeds("search"), seeds("final")
    assert (len(made), len(searched), len(reported)) == (30_000, 10_000, 50_000)
    assert not made & searched and not made & reported and not searched & reported


def test_rivals_and_gmo_are_what_they_are_called(found):
    for stage in found["rivals"]:
        by = {words[0]: vars(parse(words, "neon")) for words in stage.commands}
        if stage.name.startswith("sims"):
            assert by["search"]["by"] == by["final"]["by"] == "guidance"
            assert by["search"]["evaluations"] == PARAMS["search"]["evaluations"]
        elif stage.name.startswith("gmo"):
            change = stage.name.rpartition("-")[2]
            alpha = float(re.sub("[a-z]", "", change)) or None
            assert by["generate"]["gmo"] == alpha
            assert by["generate"]["gmo_control"] == ("noise" if "noise" in change else None)
            few = {"imm_t1": 1, "imm_t2": 2, "imm_t4": 4, "edm_euler10": 10, "flow_euler4": 4}
            steps = few[stage.name.partition("@")[2].rpartition("-")[0]]
            assert {by[name]["num_steps"] for name in ("generate", "search", "final")} == {steps}


def test_tables_find_the_settings_by_the_names_of_digits(found):
    """Titles are those of the rows; report.rivals knows each suffix."""
    rows = {
        name: re.findall(r"--out \S+/search/(\S+)/0\.jsonl", " ".join(word for stage in stages
            for words in stage.commands for word in words)) for name, stages in found.items()
    }  # fmt: skip
    for name, settings in rows.items():
        assert sorted(settings) == sorted(OWN[name]["titles"])
    suffixes = {method.suffix for method in METHODS}
    controls = {f"-{setting.rpartition('-')[2]}" for setting in rows["controls"]}
    assert controls == {"-real", "-corrupted", "-random"} and controls <= suffixes
    rivals = {f"-{name.rpartition('-')[2]}" for name in rows["rivals"]}
    assert {"-sims", "-gmo0.1", "-noise0.1"} <= rivals and "-sims" in suffixes


# ---------------------------------------------------------------- shell lines


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("neon a --x 'b; c'", ["neon a --x b; c"]),
        ("mkdir x && neon a; neon b || exit", ["mkdir x", "neon a", "neon b", "exit"]),
        ("for s in 0 1; do neon a --seed $s --out x/$s || exit; done",
         ["neon a --seed 0 --out x/0", "exit", "neon a --seed 1 --out x/1", "exit"]),
        ("for s in 0 1; do for i in $(echo 5-6 7-8 9 | cut -d' ' -f-2); do neon a $s $i; done; done; neon b",
         ["neon a 0 5-6", "neon a 0 7-8", "neon a 1 5-6", "neon a 1 7-8", "neon b"]),
        ("for s in ; do neon a; done", []),
        ("neon grid $(ls 'a b'/*/x | head -n 1) --out y", ["neon grid $(ls_a_b_/*/x_head_-n_1) --out y"]),
    ],
)  # fmt: skip
def test_commands_of_a_shell_line(line, wanted):
    assert [" ".join(words) for words in commands(line)] == wanted


# ---------------------------------------------------------------- prices


def digits(folder: Path, text: str) -> Path:
    """A pipeline on the networks of digits."""
    from dvc.repo import Repo

    (folder / "dvc.yaml").write_text(text)
    Repo.init(str(folder), no_scm=True).close()
    return folder


TINY = """
stages:
  all:
    foreach: [1, 2]
    do:
      cmd:
        - neon train --family edm --network digits --recipe digits_base --data d --budget 640 --out base/${item}
        - for s in 0 1; do python -m neon.cli selftrain --family edm --base base/${item} --recipe digits --data S
          --seed $s --budget 640 --snapshot 128 --out tuned/${item}/$s || exit; done
        - neon search --family edm --base base/${item} --selftrained tuned/${item}/0 -w 0,1,2 --method grid
          --num_steps 4 --seeds 0-99 --ref r.npz --features inception:random --out rows/${item}/0.jsonl
        - neon reference --images x --out y.npz; python -m report.tables
      outs: ["base/${item}", "tuned/${item}": {cache: false}, "rows/${item}": {cache: false}]
"""


def test_models_that_are_not_there_yet_are_those_that_the_pipeline_trains(tmp_path):
    folder = digits(tmp_path, TINY)
    rows, more = plans.plan_of(folder)
    by = {(row.stage, row.name): row for row in rows}
    assert len(by) == 6 and more == ["not counted: reference"]
    assert by["train", "all@1"].images == 640 and by["selftrain", "all@2"].images == 2 * 640
    snapshots = 5
    assert by["search", "all@1"].evaluations == 1 + 2 * snapshots and by["search", "all@1"].images == 1100
    assert by["train", "all@1"].copied and not by["selftrain", "all@1"].copied
    assert [path.name for path in folder.iterdir() if path.name[0] != "."] == ["dvc.yaml"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: [", "DVC cannot read it"),
        ("stages: {a: {cmd: 'x ${nope}'}}", "DVC cannot read it"),
        ("stages: {a: {cmd: ls}}", "no `neon` command"),
        ('stages: {a: {cmd: "neon \'x"}}', "is no shell command"),
        ("stages: {a: {cmd: neon generate --family nope}}", "a: unknown family 'nope'"),
        ("stages: {a: {cmd: neon generate --family edm --out x}}", "a: neon generate: error: the following arguments"),
        (
            "stages: {a: {cmd: neon generate --family edm --model no.pkl --seeds 0-9 --out x}}",
            "a: no.pkl: no such file",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_priced_is_one_line(tmp_path, text, error):
    with pytest.raises(NeonError, match=re.escape(error)) as raised:
        plans.plan_of(digits(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_no_pipeline_no_repository_and_no_dvc_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(NeonError, match=r"dvc\.yaml: no such file"):
        stages_of(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: neon merge}}")
    with pytest.raises(NeonError, match="not inside of a DVC repository"):
        stages_of(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "dvc.repo", None)
    with pytest.raises(NeonError, match="of the extra pipeline"):
        stages_of(tmp_path)


FEW = {"models": ("edm_cifar10_cond", "imm"), "points": ("edm_cifar10_cond", "imm_t1")}


def test_the_root_costs_what_its_parameters_cost(monkeypatch, tmp_path):
    """The commands of two models against params.yaml: loops, sets of images, guidance."""
    some = {section: {name: PARAMS[section][name] for name in names} for section, names in FEW.items()}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS | some | {"released": {}, "files": {}}))
    few = [one for one in stages_of(ROOT) if one.name.partition("@")[2] in {*FEW["models"], *FEW["points"]}]
    monkeypatch.setattr(plans, "stages_of", lambda path: few)
    found = {(row.stage, row.name): row for row in plans.plan_of(ROOT)[0]}
    wanted = [row for row in plan(tmp_path / "params.yaml") if row.stage in RECIPE and row.stage != "samples"]
    assert len(wanted) == 2 * 2 + 2 * 2
    for row in wanted:
        other = found[row.stage, row.name]
        assert (other.evaluations, other.images) == (row.evaluations, row.images)
        assert other.cost.total == pytest.approx(row.cost.total, rel=1e-9)
        assert (other.disk, other.copied) == (row.disk, row.copied)


@pytest.fixture(scope="module")
def priced() -> dict:
    from paper.docs import pipelines

    return pipelines()


def test_the_prices_of_the_pipelines_are_plausible(priced):
    totals = {name: plans.as_json(rows, plans.device("A100")) for name, rows in priced.items()}
    controls, rivals, ablations = (totals[name] for name in ("controls", "rivals", "ablations"))
    assert controls["search_evaluations"] == 6 * 12 and controls["stages"]["selftrain"]["images"] == 2 * 8_000_128
    assert rivals["search_evaluations"] == 33 * 12 and rivals["stages"]["generate"]["images"] == 25 * 30_000
    assert ablations["stages"]["train"]["images"] == 4 * 200_000_000
    assert 100 < controls["gpu_hours"] < 300 and 2000 < rivals["gpu_hours"] < 4000
    by = {(row.stage, row.name): row for row in priced["rivals"]}
    plain, strong = (by["generate", f"gmo@imm_t2-{name}"].each.passes for name in ("gmo0", "gmo0.1"))
    assert (plain, strong) == (4, 4 * 104)
    assert by["search", "sims@imm_t8"].each.passes == 2 * 16


def test_the_costs_in_docs_are_those_of_the_pipelines(priced):
    from paper.docs import filled, pipeline_table

    text = (ROOT / "docs/pipeline.md").read_text()
    assert "<!-- pipelines:begin -->" in text
    assert filled(text, pipeline_table(priced), "pipelines") == text, "run python -m paper.docs"


def test_the_command_prints_json(tmp_path):
    command = [BIN / "neon", "plan", "--pipeline", digits(tmp_path, TINY), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["stages"].keys() == {"train", "selftrain", "search"}
        and found["assumptions"][-1] == "not counted: reference"
    )
