"""The commands of VAR as processes, on small checkpoints; the README's own at full size (slow)."""

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import default_of, error_of, files, finish, goes_on, kill_when, neon, ranks, released_fid, run, start
from sets import write_images, write_reference
from var_cases import write_pair

from mini.features import DigitsCNN, save_digits_cnn
from neon.merge import merge_tensor
from neon.weights.checkpoint import load_weights
from VAR import family
from VAR.configs import CONFIGS
from VAR.family import RELEASED_VQVAE

ROOT = Path(__file__).parents[2]
DIGITS = CONFIGS["digits"]
README = (ROOT / "README.md").read_text()
COMMANDS = {
    int(side): command
    for command, side in re.findall(
        r"^(PYTHONPATH=\S+ torchrun \S+ \S+ VAR/VAR_imagenet_(\d+)/.*)$", README, re.MULTILINE
    )
}
SMALL = "--features digits:cnn.safetensors"
KAPPA = ["--cfg", 1.5, "--top_k", 20, "--top_p", 0.9]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a user has before typing the commands; VAR/ of the code, a small checkpoint, reference statistics."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "VAR").symlink_to(ROOT / "VAR")
    write_pair(folder / "checkpoints", DIGITS, "tiny.pth")
    for side in (256, 512):
        write_reference(folder / "fid_stats" / f"adm_in{side}_stats.npz")
    write_images(folder / "S", (1, 8, 8), 24, 10)
    torch.manual_seed(0)
    save_digits_cnn(DigitsCNN(), folder / "cnn.safetensors")
    write_reference(folder / "small.npz", 64)
    return folder


def tiny_version(command: str, side: int) -> str:
    command = re.sub(r"checkpoints/\S+", "checkpoints/tiny.pth", command)
    command = re.sub(r"fid_stats/\S+", "small.npz", command)
    return command.replace(f"--img_size {side}", f"--img_size 8 --depth {DIGITS.depth} --top_k 20")


def test_the_readme_has_both_commands():
    assert sorted(COMMANDS) == [256, 512]


@pytest.mark.slow
@pytest.mark.parametrize("side", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_same_fid_for_one_and_two_processes_and_batch_sizes(checkout, side):
    command = tiny_version(COMMANDS[side], side)
    one, two = released_fid(command, checkout, 1, 50, 50, SMALL), released_fid(command, checkout, 2, 50, 7, SMALL)
    assert one == pytest.approx(two, rel=1e-4)  # a level of a pixel may change where truncation falls on an edge


def test_the_names_of_the_released_script(checkout):
    script, ref = "VAR/VAR_imagenet_256/calculate_fid.py", "small.npz"
    options = f"--var_ckpt checkpoints/tiny.pth --fid_stats {ref} --img_size 8 --depth 4 --top_k 20 --cfg 0 --seed 1"
    more = f"--top_p 0 --more_smooth {SMALL} --metrics fid --out row.json"
    more += f" --vae_ckpt checkpoints/{RELEASED_VQVAE}"
    result = run(f"python {script} --N 4 {options} {more}", checkout)
    assert result.returncode == 0, result.stderr[-2000:]
    row = json.loads((checkout / "row.json").read_text())
    assert row["seeds"] == "4-7" and row["more_smooth"] is True and row["cfg"] == 0 and row["family"] == "var"


@pytest.mark.parametrize(
    "change, message",
    [
        ("--img_size 256", "makes images of 8 pixels, not 256"),
        ("--depth 16", "missing"),
        ("--top_k 900", "top_k must lie between 0 and the 128 codes, not 900"),
        ("--var_ckpt nowhere.pth", "no such file"),
        ("--vae_ckpt nowhere.pth", "no such file"),
    ],
)
def test_errors_are_one_line(checkout, change, message):
    command = tiny_version(COMMANDS[256], 256).split("torchrun")[1].split(maxsplit=2)[2]
    result = run(f"python {command} --num_images 4 {SMALL} --metrics fid {change}", checkout)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


def test_defaults_are_those_behind_the_papers_numbers(checkout):
    for side, cfg, made_with in ((256, "2.9", "1.25"), (512, "3.2", "2.0")):
        folder = f"VAR/VAR_imagenet_{side}"
        text = run(f"python {folder}/calculate_fid.py --help", checkout).stdout
        assert (default_of("cfg", text), default_of("top_k", text)) == (cfg, "900")
        assert default_of("top_p", text) == "0.95"
        text = run(f"python {folder}/generate_dataset.py --help", checkout).stdout
        assert (default_of("cfg", text), default_of("top_k", text)) == (made_with, "900")


def test_scripts_shadow_nothing():
    """With a script's folder first on the path, its files must not stand in for modules of others."""
    for folder in (ROOT / "VAR", *sorted((ROOT / "VAR").glob("VAR_*"))):
        names = {p.stem for p in folder.glob("*.py")} - {"__init__"}
        assert names.isdisjoint(sys.stdlib_module_names)
        code = f"import importlib.util as u; print([n for n in {sorted(names)} if u.find_spec(n)])"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd="/", env={}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_recipe_from_end_to_end(checkout):
    """Every script of a folder, in the order of the recipe."""
    base, ref = "checkpoints/tiny.pth", "small.npz"
    here, sampling = "VAR/VAR_imagenet_256", "--top_k 20"
    few = "--num_images 4 --img_size 8 --depth 4 --metrics fid"
    brief = "--batch 4 --budget 12 --snapshot 8 --precision float32"
    measure = f"--ref {ref} {SMALL} --metrics fid {sampling}"
    search, final = (f"python -m neon.cli {name} --family var --base {base}" for name in ("search", "final"))
    for command in [
        f"python {here}/generate_dataset.py --model {base} --seeds 0-11 --out made {sampling}",
        f"python {here}/selftrain.py --base {base} --data made --out run {brief}",
        f"{search} --selftrained run --w=0,1 --grid cfg=0,2 --seeds 20-23 --out search.jsonl {measure}",
        f"{final} --search search.jsonl --seeds 30-33 --out final.jsonl {measure}",
        f"python {here}/merge.py --base {base} --selftrained run -w 1.5 --out checkpoints/neon.pth",
        f"python {here}/calculate_fid.py --var_ckpt checkpoints/neon.pth --fid_stats {ref} {few} {SMALL} {sampling}",
    ]:
        result = run(command, checkout)
        assert result.returncode == 0, (command, result.stderr[-2000:])
    rows = [json.loads(line) for line in (checkout / "search.jsonl").read_text().splitlines()]
    assert {(row["w"], row["cfg"], row["budget"]) for row in rows} == {
        *((0, c, 0) for c in (0, 2)),
        *((1, c, b) for c in (0, 2) for b in (8, 12)),
    }
    old, new, merged = (
        load_weights(checkout / p) for p in (base, "run/snapshot-000000012.safetensors", "checkpoints/neon.pth")
    )
    assert list(merged) == list(old)
    for name, tensor in merged.items():
        wanted = old[name] if family.is_buffer(name) else merge_tensor(old[name], new[name], 1.5)
        assert torch.equal(tensor, wanted)


# ---- killed and started again


def generating(checkout, out):
    return [
        "generate",
        "--family",
        "var",
        "--model",
        checkout / "checkpoints/tiny.pth",
        "--seeds",
        "0-299",
        "--out",
        out,
        "--batch_size",
        4,
        *KAPPA,
    ]


def test_generation_goes_on(checkout, tmp_path):
    neon(*generating(checkout, tmp_path / "whole"))
    killed = start(*generating(checkout, tmp_path / "killed"))
    kill_when(lambda: len(list((tmp_path / "killed").rglob("*.png"))) >= 8, killed)
    assert not (tmp_path / "killed" / "dataset.json").exists()
    finish(*ranks(2, *generating(checkout, tmp_path / "killed")))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def training(checkout, out):
    return [
        "selftrain",
        "--family",
        "var",
        "--base",
        checkout / "checkpoints/tiny.pth",
        "--recipe",
        "d16_256",
        "--data",
        checkout / "S",
        "--out",
        out,
        "--batch",
        4,
        "--budget",
        48,
        "--snapshot",
        16,
        "--ramp",
        48,
        "--lr",
        1e-3,
        "--precision",
        "float32",
    ]


def test_self_training_goes_on(checkout, tmp_path):
    whole = load_weights(goes_on(partial(training, checkout), tmp_path) / "snapshot-000000048.safetensors")
    base = load_weights(checkout / "checkpoints/tiny.pth")
    assert any((whole[name] - base[name]).abs().max() > 1e-4 for name in base if "attn_bias" not in name)


def test_half_precision_training_moves_the_weights(checkout, tmp_path):
    neon(*training(checkout, tmp_path / "half")[:-1], "bfloat16")
    assert (tmp_path / "half" / "snapshot-000000048.safetensors").exists()


def searching(checkout, trained, out):
    return [
        "search",
        "--family",
        "var",
        "--base",
        checkout / "checkpoints/tiny.pth",
        "--selftrained",
        trained,
        "--w=-1,0,1",
        "--grid",
        "cfg=0,1",
        "--seeds",
        "0-199",
        "--ref",
        checkout / "small.npz",
        "--features",
        f"digits:{checkout}/cnn.safetensors",
        "--metrics",
        "fid",
        "--out",
        out,
        *KAPPA[2:],
    ]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_search_goes_on(checkout, tmp_path):
    neon(*training(checkout, tmp_path / "run"))
    last = tmp_path / "run" / "snapshot-000000048.safetensors"
    neon(*searching(checkout, last, tmp_path / "whole.jsonl"))
    killed = start(*searching(checkout, last, tmp_path / "killed.jsonl"))
    kill_when(lambda: len(rows(tmp_path / "killed.jsonl")) >= 2, killed)
    before = rows(tmp_path / "killed.jsonl")
    neon(*searching(checkout, last, tmp_path / "killed.jsonl"))
    found, wanted = rows(tmp_path / "killed.jsonl"), rows(tmp_path / "whole.jsonl")
    assert found[: len(before)] == before and len(found) == 6
    assert [(r["w"], r["cfg"], r["fid"]) for r in found] == [(r["w"], r["cfg"], r["fid"]) for r in wanted]


def test_errors(checkout, tmp_path):
    unlabelled = write_images(tmp_path / "plain", (1, 8, 8), 4, 10, labelled=False)
    options = training(checkout, tmp_path / "out")
    options[options.index("--data") + 1] = unlabelled
    assert "no labels" in error_of(*options)
    small = write_images(tmp_path / "small", (1, 16, 16), 4, 10)
    options[options.index("--data") + 1] = small
    assert "the network is trained on (1, 8, 8)" in error_of(*options)
    generate = generating(tmp_path / "alone", tmp_path / "S")
    (tmp_path / "alone" / "checkpoints").mkdir(parents=True)
    (tmp_path / "alone" / "checkpoints" / "tiny.pth").symlink_to(checkout / "checkpoints" / "tiny.pth")
    assert "download_models.sh" in error_of(*generate)
    search = searching(checkout, tmp_path, tmp_path / "x")
    assert "not a grid over a sampling option" in error_of(*search, "--grid", "more_smooth=0,1")


# ---- full size


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_d16_at_256_as_in_the_readme(checkout):
    write_pair(checkout / "checkpoints", CONFIGS["d16_256"], "Neon_VARd16_imagenet256.pth")
    one, two = released_fid(COMMANDS[256], checkout, 1, 3, 3), released_fid(COMMANDS[256], checkout, 2, 3, 1)
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_d36_at_512_two_blocks_deep(checkout):
    """Full width, real shapes, shared AdaLN."""
    config = dataclasses.replace(CONFIGS["d36_512"], depth=2)
    write_pair(checkout / "checkpoints", config, "Neon_VARd36_imagenet512.pth")
    shallow = COMMANDS[512] + " --depth 2"
    one, two = released_fid(shallow, checkout, 1, 2, 2), released_fid(shallow, checkout, 2, 2, 1)
    assert one == pytest.approx(two, rel=1e-4)
