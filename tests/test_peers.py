"""The same merge by other tools: mergekit itself where it is installed, and the documented arithmetic of others."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import torch
import yaml
from folders import moved, with_adapter
from processes import ROOT
from safetensors.torch import load_file

from neon.cli import main
from neon.merge import merge

W = 1.5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small language model as base, new, and ours."""
    path = folders.language_models(tmp_path_factory.mktemp("peers"))
    words = ("--base", path / "base", "--selftrained", path / "new", "-w", W, "--out", path / "ours")
    main(["merge", *map(str, words)])
    return path


def states(models, *names):
    return [load_file(models / name / "model.safetensors") for name in names]


def agree(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


# ---------------------------------------------------------------- mergekit


def task_arithmetic(base, new, weight, normalize):
    """mergekit's, by its documentation: base + Σ weight · (model − base), divided by Σ weight with normalize."""
    return base + weight * (new - base) / (weight if normalize else 1)


def test_task_arithmetic_by_its_formula(models):
    """The weight is −w, without normalize; with it the result is θ_s, whatever w is."""
    base, new, ours = states(models, "base", "new", "ours")
    agree({name: task_arithmetic(base[name], new[name], -W, False) for name in base}, ours)
    agree({name: task_arithmetic(base[name], new[name], -W, True) for name in base}, new)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_by_mergekit(models, tmp_path, normalize):
    """In an environment of its own, MERGEKIT (its mergekit-yaml), or the one on PATH."""
    program = os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml")
    if not program:
        pytest.skip("mergekit is not installed: MERGEKIT names no mergekit-yaml")
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / "new"), "parameters": {"weight": -W}}],
        "parameters": {"normalize": normalize},
        "dtype": "float32",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    words = [program, str(tmp_path / "config.yaml"), str(tmp_path / "out"), "--no-copy-tokenizer"]
    subprocess.run(words, check=True, timeout=250, stdout=sys.stderr)
    ours, new = states(models, "ours", "new")
    agree(load_file(next((tmp_path / "out").glob("*.safetensors"))), new if normalize else ours)


# ---------------------------------------------------------------- ComfyUI, A1111


def comfy_subtract(model1, model2, multiplier):
    """ModelMergeSubtract: model1 with strength `multiplier` and model2 with strength −multiplier."""
    return multiplier * (model1 - model2)


def comfy_add(model1, model2):
    return model1 + model2


@pytest.mark.parametrize("w", [0.5, 1.0, 3.0])
def test_subtract_and_add_of_comfyui(w):
    """Add of θ_r and Subtract of θ_r and θ_s with the multiplier w."""
    g = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(20, 30, generator=g)}
    new = {"weight": base["weight"] + 0.01 * torch.randn(20, 30, generator=g)}
    found = {name: comfy_add(base[name], comfy_subtract(base[name], new[name], w)) for name in base}
    agree(found, dict(merge(base, new, w)))


@pytest.mark.parametrize("w", [0.5, 1.0, 3.0])
def test_add_difference_of_a1111(w):
    """A + (B − C) · M with A = B = θ_r, C = θ_s, M = w. The weighted sum A (1 − M) + B · M needs M = −w."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=g)
    new = base + 0.01 * torch.randn(20, 30, generator=g)
    ours = dict(merge({"weight": base}, {"weight": new}, w))["weight"]
    torch.testing.assert_close(base + (base - new) * w, ours, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(base * (1 + w) + new * -w, ours, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the page


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/tools.md").read_text(), flags=re.DOTALL)


def test_the_page_is_right(models, tmp_path, monkeypatch):
    """Every command and every piece of Python on it runs, one after the other; mergekit's settings are those above."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pipe = folders.stable_diffusion()
    pipe.save_pretrained("pipeline")
    trained = with_adapter(pipe.unet, ["to_q"])
    trained.save_pretrained("lora-of-peft")
    pipe.register_modules(unet=moved(pipe.unet, 0.01))
    pipe.save_pretrained("tuned")
    main(
        [
            "merge",
            "--base",
            "pipeline",
            "--selftrained",
            "lora-of-peft",
            "-w",
            "-1",
            "--adapter",
            "diffusers",
            "--out",
            "lora.safetensors",
        ]
    )
    Path("lora").mkdir()
    Path("lora.safetensors").rename("lora/pytorch_lora_weights.safetensors")
    shutil.copytree(models / "base", "language")
    with_adapter(folders.gpt2(), ["c_attn"], fan_in_fan_out=True).save_pretrained("lora-language")
    words = "merge --base language --selftrained lora-language -w 1 --adapter peft --out negated-language"
    main(shlex.split(words))
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        shutil.rmtree("neon", ignore_errors=True)
        main(shlex.split(line, comments=True)[1:])
    for block in blocks("python"):
        exec(block, {})
    (settings,) = map(yaml.safe_load, blocks("yaml"))
    assert settings["models"][0]["parameters"]["weight"] == -1 and settings["parameters"] == {"normalize": False}
