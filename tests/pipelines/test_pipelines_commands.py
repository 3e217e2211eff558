"""The commands of docs/pipelines.md on tiny pipelines, from S to what is reported."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline_cases import write_dit, write_pixels, write_prompts, write_sd
from processes import ROOT, error_of, files, neon

from mini.features import DigitsCNN, save_digits_cnn
from neon.data import ImageSet
from neon.measure.candidates import Candidates
from neon.merge import merge_tensor
from neon.weights.checkpoint import load_weights
from pipelines import family

SNAPSHOT = "run/snapshot-000000016.safetensors"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to type commands in, with features and reference statistics."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_digits_cnn(DigitsCNN(), tmp_path / "cnn.safetensors")
    np.savez(tmp_path / "ref.npz", mu=np.full(64, 0.4), sigma=0.2 * np.eye(64))
    return tmp_path


def run(line: str) -> str:
    command, *words = shlex.split(line)
    return neon(command, "--family", "diffusers", *words)


MEASURE = "--ref ref.npz --features digits:cnn.safetensors --metrics fid"
TRAIN = "--data S --out run --batch 8 --budget 16 --snapshot 8 --lr 1e-3"


def whole_recipe(base: str, recipe: str, sampling: str, texts: str = "") -> SimpleNamespace:
    """The four commands on a base, and what they have written."""
    run(f"generate --model {base} --seeds 0-15 --out S {sampling} {texts}")
    run(f"selftrain --base {base} --recipe {recipe} {TRAIN} {texts}")
    search = f"search --base {base} --selftrained run -w 0,1 --seeds 20-39 {MEASURE} {sampling} {texts} --out s.jsonl"
    run(search)
    again = run(search)  # nothing is measured twice
    run(f"final --base {base} --search s.jsonl --seeds 50-69 {MEASURE} {sampling} {texts} --out f.jsonl")
    rows = {name: [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()] for name in "sf"}
    return SimpleNamespace(search=rows["s"], final=rows["f"], again=again)


def test_the_recipe_on_a_pipeline_of_pixels(here):
    base = write_pixels(here / "pipe", "DDIMPipeline", "DDIMScheduler")
    sampling = "--num_inference_steps 3"
    found = whole_recipe("pipe", "digits", sampling)
    assert len(ImageSet("S")) == 16 and ImageSet("S").labels is None
    assert [(row["w"], row["budget"]) for row in found.search] == [(0, 0), (1, 8), (1, 16)]
    assert found.search[0]["fid"] != found.search[2]["fid"]
    assert {row["role"] for row in found.final} == {"base", "selftrained", "neon"}

    old, new = load_weights(base), load_weights(SNAPSHOT)
    for w in ("0", "1.5"):
        neon("merge", "--base", "pipe", "--selftrained", SNAPSHOT, "-w", w, "--out", f"neon-{w}")
        merged = load_weights(f"neon-{w}")
        assert all(torch.equal(t, merge_tensor(old[name], new[name], float(w))) for name, t in merged.items())
        run(f"generate --model neon-{w} --seeds 0-15 --out S-{w} {sampling}")
    s, zero, more = (ImageSet(name).images(range(16)) for name in ("S", "S-0", "S-1.5"))
    assert torch.equal(s, zero) and not torch.equal(s, more)  # w = 0: bit for bit
    assert all(torch.equal(t, old[name]) for name, t in load_weights("neon-0").items())

    candidates = Candidates(family, "pipe", "cpu")
    candidates.load(SNAPSHOT, 1.5)
    model = candidates.load(None, 0.0)  # and back from another w
    assert all(torch.equal(t, old[name]) for name, t in model.network.state_dict().items())

    run("grid --final f.jsonl --seeds 0-3 --columns 2 --out grid")
    assert {path.name for path in (here / "grid").iterdir()} == {"base.png", "selftrained.png", "neon.png"}


def test_batches_and_world_size_change_nothing(here):
    write_pixels(here / "pipe")  # DDPM: noise at each step
    for batch in (2, 5):
        run(f"generate --model pipe --seeds 0-6 --batch_size {batch} --out S{batch} --num_inference_steps 3")
    assert files(here / "S2") == files(here / "S5")
    run("generate --model pipe --seeds 0-15 --out S --num_inference_steps 3")
    for micro in (8, 3):
        run(f"selftrain --base pipe --recipe digits {TRAIN.replace('run', f'run{micro}')} --micro_batch {micro}")
    one, two = (load_weights(f"run{micro}/snapshot-000000016.safetensors") for micro in (8, 3))
    base = load_weights("pipe")
    flat = [torch.cat([state[name].flatten() for name in base]) for state in (one, two, base)]
    assert (flat[0] - flat[1]).norm() < 0.02 * (flat[0] - flat[2]).norm()


def test_two_processes_make_the_images_of_one(here):
    from processes import finish, ranks

    write_pixels(here / "pipe")
    command = ["generate", "--family", "diffusers", "--model", here / "pipe", "--num_inference_steps", 2]
    neon(*command, "--seeds", "0-6", "--out", here / "one")
    finish(*ranks(2, *command, "--seeds", "0-6", "--out", here / "two"))
    assert files(here / "one") == files(here / "two")


@pytest.mark.parametrize("recipe", ["full", "lora4"])
def test_the_recipe_on_a_pipeline_of_text(here, recipe):
    base = write_sd(here / "pipe", skip_prk_steps=True, steps_offset=1)
    write_prompts(here / "prompts.txt")
    sampling, texts = "--num_inference_steps 2 --guidance_scale 3", "--prompts prompts.txt"
    found = whole_recipe("pipe", recipe, sampling, texts)
    assert ImageSet("S").labels.tolist() == [i % 3 for i in range(16)]
    assert found.search[0]["guidance_scale"] == 3 and len({row["fid"] for row in found.search}) == 3
    old, new = load_weights(base), load_weights(SNAPSHOT)
    changed = {name for name, t in new.items() if not torch.equal(t, old[name])}
    assert old.keys() == new.keys()
    if recipe == "lora4":
        assert changed and all(".attentions." in name or ".attn" in name for name in changed)
    else:
        assert len(changed) > 0.9 * len(old)
    # frozen: the VAE and the text encoder are those of the folder
    snapshot = family.load(SNAPSHOT, device="cpu", prompts="prompts.txt")
    assert snapshot.frozen_sha256 == family.load("pipe", device="cpu", prompts="prompts.txt").frozen_sha256


def test_the_recipe_on_a_pipeline_of_classes(here):
    write_dit(here / "pipe")
    found = whole_recipe("pipe", "full", "--num_inference_steps 2 --guidance_scale 2")
    assert ImageSet("S").labels.tolist() == list(range(16)) and len(found.search) == 3


def test_a_base_from_nothing(here):
    """As the mini scale trains it: snapshots are files, which build their pipeline themselves."""
    write_pixels(here / "pipe")
    run("generate --model pipe --seeds 0-15 --out real --num_inference_steps 2")
    options = TRAIN.replace("run", "base").replace("S", "real")
    run(f"train --network digits --recipe digits_base {options} --ramp 8")
    found = whole_recipe("base", "digits_lora", "--num_inference_steps 2 --eta 0.5", "")
    assert len(found.search) == 3 and found.search[0]["base"].startswith("base/snapshot-")


def test_plans_read_no_weights(here):
    write_sd(here / "pipe", skip_prk_steps=True, steps_offset=1)
    for path in (here / "pipe").rglob("*.safetensors"):
        path.write_bytes(b"")
    said = run("generate --model pipe --seeds 0-99 --guidance_scale 3 --num_inference_steps 20 --out S --dry_run")
    assert "would write 100 images" in said and " 42 network passes" in said
    assert "3 snapshots" in run("selftrain --base pipe --recipe full --budget 60k --data S --out run --dry_run")
    assert not (here / "S").exists()


def test_errors_are_one_line(here):
    write_sd(here / "text")
    folder = write_pixels(here / "pipe")
    generate = ["generate", "--family", "diffusers", "--seeds", "0-3", "--out", "S", "--model"]
    assert "--prompts FILE" in error_of(*generate, "text")
    assert "takes no guidance_scale" in error_of(*generate, "pipe", "--guidance_scale", "2")
    assert not (here / "S").exists() or not list((here / "S").rglob("*.png"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert "is a pickle" in error_of(*generate, "pipe")
    assert "is a pickle" in error_of("inspect", "pipe")
    assert "no such file" in error_of(*generate, "nowhere")


def test_the_page_of_docs(here):
    """Its first commands as they are written there, on less of everything."""
    from diffusers import DiffusionPipeline

    write_pixels(here / "pipe", "DDIMPipeline", "DDIMScheduler")
    run("generate --model pipe --seeds 100-139 --num_inference_steps 4 --out photos")
    features = "--features digits:cnn.safetensors"
    fewer = {"--num_inference_steps 50": "--num_inference_steps 2", "0-9999": "0-15", "100000-109999": "100-179"}
    fewer |= {"snapshot-000200000": "snapshot-000000016"}
    more = {"reference": features, "search": f"{features} --evaluations 4"}
    more |= {"selftrain": "--batch 8 --budget 16 --snapshot 16 --lr 1e-3"}
    (first, second, *_) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "pipelines.md").read_text(), re.DOTALL)
    commands = [shlex.split(line)[1:] for line in (first + second).splitlines()]
    assert [words[0] for words in commands] == ["reference", "generate", "selftrain", "search", "merge", "generate"]
    for words in commands:
        text = shlex.join(words)
        for written, less in fewer.items():
            text = text.replace(written, less)
        neon(*shlex.split(f"{text} {more.get(words[0], '')}"))
    assert json.loads(Path("search.best.json").read_text())
    assert DiffusionPipeline.from_pretrained("neon").unet.config.sample_size == 8
    look, base = (ImageSet(name).images(range(16)) for name in ("look", "S"))
    assert not torch.equal(look, base)
