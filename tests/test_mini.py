"""The pipelines of the mini scale hang together, and their driver does what it says."""

import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from processes import BIN, ROOT

from mini.each import expand, share, values_of


def test_names_are_filled_in():
    tables = {"a": {"sampling": "--num_steps 4 --note 'two words'", "data": "S/{setting}/{seed}", "none": ""}}
    words = ["x", "{setting.sampling}", "--out={seed}", "{setting.none}", "{setting.data}"]
    filled = expand(words, {"setting": "a", "seed": "7"}, tables)
    assert filled == ["x", "--num_steps", "4", "--note", "two words", "--out=7", "S/a/7"]
    for typo in ("{sed}", "{setting.smapling}"):
        with pytest.raises(KeyError):
            expand([typo], {"setting": "a", "seed": "7"}, tables)


def test_values_of():
    assert values_of("seed=0-3") == ("seed", ["0", "1", "2", "3"])
    assert values_of("setting=a,b-c") == ("setting", ["a", "b-c"])


@pytest.mark.parametrize(("commands", "cores", "at_once"), [(5, 2, 3), (6, 2, 2), (1, 2, 1), (5, 8, 5), (10, 4, 6)])
def test_no_core_idles_at_the_end(commands, cores, at_once):
    assert share(commands, cores) == at_once


def each(*argv):
    command = [BIN / "python", "-m", "mini.each", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_command_runs_and_one_failure_fails_them_all(tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "none.pth"
    torch.save({"x": torch.zeros(2)}, good)
    both = each(
        "--each", f"file={good},{bad}", "--each", "n=1-2", "neon", "convert", "{file}", f"{tmp_path}/{{n}}.safetensors"
    )
    assert both.returncode == 1 and both.stderr.count("failed: ") == 2 and "none.pth" in both.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"good.pth", "1.safetensors", "2.safetensors"}


@pytest.mark.parametrize("folder", ["mini", "mini/ablations"])
def test_every_file_a_stage_reads_is_there_or_made_by_another(folder):
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        outs = {out.fs_path for stage in repo.index.stages for out in stage.outs}
        stages = [stage for stage in repo.index.stages if stage.path_in_repo == f"{folder}/dvc.yaml"]
        assert len(stages) > 5
        for stage in stages:
            for path in (dep.fs_path for dep in stage.deps):
                made = any(out == path or out.startswith(path + "/") or path.startswith(out + "/") for out in outs)
                assert made or Path(path).exists(), f"{stage.addressing} needs {path}"


def test_chains_name_settings_that_there_are():
    params = yaml.safe_load((ROOT / "mini/params.yaml").read_text())
    assert set(params["titles"]) == {name for settings in params["settings"].values() for name in settings}
    for chain in params["chains"].values():
        base, known = params["bases"][chain["base"]], params["settings"][chain["family"]]
        assert base["family"] == chain["family"]
        for stage in ("sampled", "trained", "settings"):
            assert set(chain[stage].split(",")) <= set(known)
        assert set(values_of(f"seed={chain['seeds']}")[1]) <= set(values_of(f"seed={base['seeds']}")[1])
