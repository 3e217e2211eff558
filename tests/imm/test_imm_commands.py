"""The commands of IMM as processes, on small checkpoints; the README's own at full size (slow)."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from imm_tiny import TINY, tiny, write_digits, write_full_size, write_pickle, write_vae
from processes import default_of, error_of, goes_on, neon, run
from sets import write_images, write_reference

from imm import family
from imm.autoencoder import NAME
from mini.features import DigitsCNN, save_digits_cnn
from neon import NeonError
from neon.merge import merge_tensor
from neon.weights.checkpoint import load_weights

ROOT = Path(__file__).parents[2]
(COMMAND,) = re.findall(r"^PYTHONPATH=imm torchrun .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
RELEASED, REF = "checkpoints/Neon_imm_imagenet256.pkl", "fid_stats/adm_in256_stats.npz"
BRIEF = "--batch 4 --budget 12 --snapshot 8 --precision float32"
SMALL, INCEPTION = "--features digits:cnn.safetensors", "--features inception:random"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a user has before typing the commands: imm/ of the code, a small checkpoint and VAE, statistics."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "imm").symlink_to(ROOT / "imm")
    write_vae(folder / "checkpoints")
    write_pickle(folder / RELEASED, tiny(), TINY)
    write_digits(folder / "digits.safetensors")
    write_images(folder / "S", (1, 8, 8), 24, 10)
    torch.manual_seed(0)
    save_digits_cnn(DigitsCNN(), folder / "cnn.safetensors")
    write_reference(folder / REF)
    write_reference(folder / "small.npz", 64)
    return folder


def fid(command: str, cwd: Path, processes: int, n: int, batch: int, features: str = INCEPTION) -> float:
    """What the README's command prints, with fewer images and processes and another feature extractor."""
    command, found = re.subn(r"--nproc_per_node=8", f"--nproc_per_node={processes}", command)
    assert found == 1
    result = run(f"{command} --num_images {n} --batch_size {batch} --metrics fid {features}", cwd)
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = result.stdout.strip().splitlines()
    assert re.fullmatch(rf"FID \d+\.\d+  \(IMM, 8 uniform steps, cfg 1.8, {n} images, [\d.]+ s\)", line)
    return float(line.split()[1])


@pytest.mark.slow
def test_the_readmes_command_on_a_pickle_and_a_vae(checkout):
    assert fid(COMMAND, checkout, 1, 3, 2) > 0


def tiny_version(command: str) -> str:
    return command.replace(RELEASED, "digits.safetensors").replace(REF, "small.npz")


@pytest.mark.slow
def test_same_fid_for_one_and_two_processes_and_batch_sizes(checkout):
    command = tiny_version(COMMAND)
    one, two = fid(command, checkout, 1, 50, 50, SMALL), fid(command, checkout, 2, 50, 7, SMALL)
    assert one == pytest.approx(two, rel=1e-4)  # a level of a pixel may change where truncation falls on an edge


def test_errors_are_one_line(checkout):
    command = tiny_version(COMMAND).split("nproc_per_node=8 ")[1]
    result = run(f"python {command} --num_images 2 {SMALL} --metrics fid --num_steps 0", checkout)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "at least one step" in result.stderr


def test_defaults(checkout):
    text = run("python imm/calculate_fid.py --help", checkout).stdout
    assert re.search(r"--num_images .*\n? +default 50000", text)
    assert (default_of("num_steps", text), default_of("cfg_scale", text)) == ("8", "1.8")
    assert "uniform,edm" in text and "--vae" in text and "--seed " in text
    made_with = run("python imm/generate_dataset.py --help", checkout).stdout
    assert default_of("num_steps", made_with) == "8"
    assert default_of("cfg_scale", made_with) == "1.5"


def test_scripts_shadow_nothing():
    """With imm/ first on the path, its files must not stand in for modules of others."""
    names = {p.stem for p in (ROOT / "imm").glob("*.py")} - {"__init__"}
    assert names.isdisjoint(sys.stdlib_module_names)
    code = f"import importlib.util as u; print([n for n in {sorted(names)} if u.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", env={}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_recipe_from_end_to_end(checkout, monkeypatch):
    """Every script of the folder, in the order of the recipe."""
    monkeypatch.chdir(checkout)
    base, few = "digits.safetensors", f"{SMALL} --metrics fid --num_steps 2"
    measure = f"--family imm --base {base} --ref small.npz {few}"
    for command in [
        f"imm/generate_dataset.py --model {base} --seeds 0-7 --out made --num_steps 2",
        f"imm/selftrain.py --base {base} --recipe digits --data made --out run {BRIEF}",
        f"search {measure} --selftrained run --w=0,1 --grid cfg_scale=1,2 --seeds 20-23 --out search.jsonl",
        f"final {measure} --search search.jsonl --seeds 30-33 --out final.jsonl",
        f"imm/merge.py --base {base} --selftrained run -w 1.5 --out neon.safetensors",
        f"imm/calculate_fid.py --network_pkl neon.safetensors --fid_stats small.npz --num_images 4 {few}",
    ]:
        if command.startswith("imm/"):
            result = run(f"python {command}", checkout)
            assert result.returncode == 0, (command, result.stderr[-2000:])
        else:
            neon(*command.split())
    rows = [json.loads(line) for line in (checkout / "search.jsonl").read_text().splitlines()]
    assert {(row["w"], row["cfg_scale"], row["budget"], row["num_synthetic"]) for row in rows} == {
        *((0, c, 0, 0) for c in (1, 2)),
        *((1, c, b, 8) for c in (1, 2) for b in (8, 12)),
    }


def test_a_released_pickle_is_self_trained_on_latents_and_merged(checkout, tmp_path):
    """The position table is trained and merged like any other; snapshots know their VAE."""
    base, made, trained, merged = checkout / RELEASED, tmp_path / "S", tmp_path / "run", tmp_path / "neon.safetensors"
    neon("generate", "--family", "imm", "--model", base, "--seeds", "0-7", "--out", made, "--num_steps", 2)
    vae = ("--vae", checkout / "checkpoints" / NAME)
    brief = ("--recipe", "imagenet256", "--lr", 0.1, *BRIEF.split(), *vae)
    neon("selftrain", "--family", "imm", "--base", base, "--data", made, "--out", trained, *brief)
    neon("merge", "--family", "imm", "--base", base, "--selftrained", trained, "-w", 1.5, "--out", merged)
    last = trained / "snapshot-000000012.safetensors"
    old, new, result = map(load_weights, (base, last, merged))
    assert list(result) == list(old) and not torch.equal(new["model.pos_embed"], old["model.pos_embed"])
    for name, tensor in result.items():
        assert torch.equal(tensor, merge_tensor(old[name], new[name], 1.5))
    assert family.load(merged, device="cpu", vae=str(vae[1])).vae is not None
    with pytest.raises(NeonError, match="not the VAE that"):
        family.load(last, device="cpu", vae=str(write_vae(tmp_path, seed=1)))


# ---- killed and started again


def training(checkout, out):
    options = ["--batch", 4, "--budget", 48, "--snapshot", 16, "--lr", 1e-3, "--precision", "float32"]
    base, data = checkout / "digits.safetensors", checkout / "S"
    return [
        "selftrain",
        "--family",
        "imm",
        "--base",
        base,
        "--recipe",
        "digits",
        "--data",
        data,
        "--out",
        out,
        *options,
    ]


def test_self_training_goes_on(checkout, tmp_path):
    goes_on(partial(training, checkout), tmp_path)


def test_errors(checkout, tmp_path):
    images = ("--seeds", "0-1", "--out", tmp_path / "S")
    message = error_of("generate", "--family", "imm", "--model", checkout / RELEASED, *images, "--vae", "nowhere")
    assert "get it with `hf download stabilityai/sd-vae-ft-ema" in message and not (tmp_path / "S").exists()
    command = training(checkout, tmp_path / "out")
    assert "groups of 4" in error_of(*command, "--batch", 6)
    command[command.index("--data") + 1] = write_images(tmp_path / "plain", (1, 8, 8), 4, 10, labelled=False)
    command[command.index("--out") + 1] = tmp_path / "other"
    assert "no labels" in error_of(*command)


# ---- full size


@pytest.fixture(scope="module")
def released(checkout):
    """Full-size checkpoints, one of them two blocks deep."""
    write_full_size(checkout / "checkpoints" / "full.pkl")
    write_full_size(checkout / "checkpoints" / "shallow.pkl", depth=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readmes_command_at_full_size(checkout, released):
    assert fid(COMMAND.replace(RELEASED, "checkpoints/full.pkl"), checkout, 1, 2, 2) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_width_same_fid_for_one_and_two_processes_and_batch_sizes(checkout, released):
    shallow = COMMAND.replace(RELEASED, "checkpoints/shallow.pkl")
    one, two = fid(shallow, checkout, 1, 4, 4), fid(shallow, checkout, 2, 4, 1)
    assert one == pytest.approx(two, rel=1e-4)
