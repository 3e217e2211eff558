"""The commands of xAR as processes, on small checkpoints; the README's own at full size (slow)."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import (
    ROOT,
    default_of,
    error_of,
    files,
    finish,
    goes_on,
    kill_when,
    neon,
    ranks,
    released_fid,
    run,
    start,
)
from sets import write_images, write_reference
from xar_cases import write_checkpoint, write_vae

from mini.features import DigitsCNN, save_digits_cnn
from neon.merge import merge_tensor
from neon.weights.checkpoint import load_weights
from xAR import family

README = (ROOT / "README.md").read_text()
COMMANDS = {
    model: command
    for command, model in re.findall(r"^(PYTHONPATH=xAR torchrun .* --model (\w+) .*)$", README, re.MULTILINE)
}
SMALL = "--features digits:cnn.safetensors"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a user has before typing the commands; the scripts, a small checkpoint, reference statistics."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "xAR" / "pretrained").mkdir(parents=True)
    for script in (ROOT / "xAR").glob("*.py"):
        (folder / "xAR" / script.name).symlink_to(script)
    write_checkpoint(folder / "checkpoints" / "tiny.pth", "tiny")
    write_vae(folder / "tiny.ckpt", "tiny")
    write_images(folder / "S", (3, 8, 8), 24, 10)
    write_reference(folder / "fid_stats" / "adm_in256_stats.npz")
    write_reference(folder / "small.npz", 64)
    torch.manual_seed(0)
    save_digits_cnn(DigitsCNN(), folder / "cnn.safetensors")
    return folder


def tiny_version(model: str) -> str:
    command = COMMANDS[model]
    for old, new in [
        (f"--model {model}", "--model tiny"),
        (r"checkpoints/\S+", "checkpoints/tiny.pth"),
        ("xAR/pretrained/kl16.ckpt", "tiny.ckpt"),
        (r"fid_stats/\S+", "small.npz"),
        (r"--cfg [\d.]+", "--cfg 2"),
        (r"--flow_steps \d+", "--flow_steps 3"),
        ("--img_size 256", "--img_size 8"),
    ]:
        command, found = re.subn(old, new, command)
        assert found == 1
    return command


def test_the_readme_has_both_commands_of_the_release():
    for model, size, cfg, steps, batch in (("xar_large", "L", "2.3", 40, 64), ("xar_base", "B", "2.7", 50, 32)):
        assert (
            COMMANDS[model].split()
            == (
                f"PYTHONPATH=xAR torchrun --standalone --nproc_per_node=8 xAR/calculate_fid.py --model {model} "
                f"--model_ckpt checkpoints/Neon_xAR{size}_imagenet256.pth --cfg {cfg} "
                f"--vae_path xAR/pretrained/kl16.ckpt --num_images 50000 --batch_size {batch} "
                f"--flow_steps {steps} --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz"
            ).split()
        )


def test_same_fid_for_one_and_two_processes_and_batch_sizes(checkout):
    """Both commands, on one small checkpoint."""
    one = released_fid(tiny_version("xar_large"), checkout, 1, 50, 50, SMALL)
    two = released_fid(tiny_version("xar_base"), checkout, 2, 50, 7, SMALL)
    assert one == pytest.approx(two, rel=1e-4)  # a level of a pixel may change where truncation falls on an edge


def evaluate(monkeypatch, capsys, checkout, *options) -> tuple[int, str, str]:
    """The script in this process, from the checkout: exit status, what it prints, what it complains of."""
    from xAR import calculate_fid

    command = tiny_version("xar_base").split("torchrun")[1].split()[3:]
    words = [*command, "--num_images", "4", *SMALL.split(), "--metrics", "fid", *options]
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", ["calculate_fid.py", *words])
    status = 0
    try:
        calculate_fid.command_line(calculate_fid.main)
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_a_row_of_results(monkeypatch, capsys, checkout):
    status, _, err = evaluate(monkeypatch, capsys, checkout, "--seed", "1", "--out", "row.json")
    assert status == 0, err
    row = json.loads((checkout / "row.json").read_text())
    assert (row["seeds"], row["cfg"], row["flow_steps"], row["family"], row["n"]) == ("4-7", 2.0, 3, "xar", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--img_size 256", "makes images of 8 pixels, not 256"),
        ("--model digits", "this network needs"),
        ("--model_ckpt nowhere.pth", "no such file"),
        ("--vae_path nowhere.ckpt", "hf download xwen99/mar-vae-kl16 --include kl16.ckpt --local-dir xAR/pretrained"),
        ("--flow_steps 1", "two sampling steps or more"),
        ("--cfg 0.5", "cfg must be 1 (no guidance) or more"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, checkout, change, message):
    status, out, err = evaluate(monkeypatch, capsys, checkout, *change.split())
    assert status == 1 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(("model", "cfg", "steps"), [("xar_base", 3.8, 40), ("xar_large", 2.7, 50)])
def test_defaults_are_those_behind_the_papers_numbers(monkeypatch, capsys, checkout, model, cfg, steps):
    status, out, _ = evaluate(monkeypatch, capsys, checkout, "--model", model, "--help")
    assert status == 0
    assert (default_of("cfg", out), default_of("flow_steps", out)) == (str(cfg), str(steps))


def test_scripts_shadow_nothing():
    """With the folder first on the path, its files must not stand in for modules of others."""
    names = {p.stem for p in (ROOT / "xAR").glob("*.py")} - {"__init__"}
    assert names.isdisjoint(sys.stdlib_module_names)
    others = {p.stem for folder in map(Path, sys.path) if folder.name == "site-packages" for p in folder.iterdir()}
    assert names.isdisjoint(others) and "torch" in others


# ---- the recipe

KAPPA = ("--vae_path", "tiny.ckpt", "--cfg", 2, "--flow_steps", 3)


def training(out, *more):
    brief = ("--batch", 4, "--budget", 48, "--snapshot", 16, "--ramp", 48, "--lr", 1e-3, "--precision", "float32")
    options = ("--recipe", "xar_base", "--data", "S", "--vae_path", "tiny.ckpt", *brief)
    return ["selftrain", "--family", "xar", "--base", "checkpoints/tiny.pth", *options, "--out", out, *more]


def generating(out):
    options = ("--seeds", "0-99", "--batch_size", 4, *KAPPA)
    return ["generate", "--family", "xar", "--model", "checkpoints/tiny.pth", *options, "--out", out]


def test_the_recipe_from_end_to_end(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    base, measure = "checkpoints/tiny.pth", ("--ref", "small.npz", *SMALL.split(), "--metrics", "fid")
    models, family_is = ("--base", base), ("--family", "xar")
    neon("generate", *family_is, "--model", base, "--seeds", "0-11", *KAPPA, "--out", "made")
    neon(*training("run", "--budget", 12, "--snapshot", 8, "--data", "made"))
    grid = ("--selftrained", "run", "--w=0,1", "--grid", "cfg=1,2")
    neon("search", *family_is, *models, *grid, "--seeds", "20-23", *measure, *KAPPA, "--out", "search.jsonl")
    options = ("--search", "search.jsonl", "--seeds", "30-33")
    neon("final", *family_is, *models, *options, *measure, *KAPPA, "--out", "final.jsonl")
    last = "run/snapshot-000000012.safetensors"
    for script in ("generate_dataset", "selftrain", "merge"):
        result = run(f"python xAR/{script}.py --help", checkout)
        assert result.returncode == 0 and "--family" in result.stdout
    neon("merge", *family_is, *models, "--selftrained", last, "-w", 1.5, "--out", "checkpoints/neon.pth")
    rows = [json.loads(line) for line in Path("search.jsonl").read_text().splitlines()]
    assert {(row["w"], row["cfg"], row["budget"]) for row in rows} == {
        *((0, c, 0) for c in (1, 2)),
        *((1, c, b) for c in (1, 2) for b in (8, 12)),
    }
    old, new, merged = (load_weights(path) for path in (base, last, "checkpoints/neon.pth"))
    assert list(merged) == list(old)
    for name, tensor in merged.items():
        wanted = old[name] if family.is_buffer(name) else merge_tensor(old[name], new[name], 1.5)
        assert torch.equal(tensor, wanted)
    assert family.load("checkpoints/neon.pth", device="cpu", vae_path="tiny.ckpt").config == family.networks["tiny"]


def test_nothing_is_reused_with_another_vae(checkout, tmp_path, monkeypatch):
    """The base records no VAE, so that which one it was is a fact of every result."""
    monkeypatch.chdir(checkout)
    neon(*training(tmp_path / "run", "--budget", 8))
    other = ("--vae_path", write_vae(tmp_path / "other.ckpt", "tiny", seed=1))
    measure = ("--base", "checkpoints/tiny.pth", "--ref", "small.npz", *SMALL.split(), "--metrics", "fid", *KAPPA)
    search, final = ([name, "--family", "xar", *measure] for name in ("search", "final"))
    search += ["--seeds", "0-3", "--selftrained", tmp_path / "run", "--out", tmp_path / "rows.jsonl"]
    final += ["--seeds", "4-7", "--search", tmp_path / "rows.jsonl", "--out", tmp_path / "final.jsonl"]
    neon(*search, "--w=0,1")
    assert "the search had vae_sha256" in error_of(*final, *other)
    neon(*search, "--w=0", *other)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["vae_sha256"] for row in rows}) == 2 and [row["w"] for row in rows] == [0, 1, 0]
    neon(*generating(tmp_path / "S"))
    assert "another set (vae_sha256 differs)" in error_of(*generating(tmp_path / "S"), *other)
    assert "holds another run (vae is" in error_of(*training(tmp_path / "run", "--budget", 8, *other))


def test_the_average_is_what_is_merged(checkout, tmp_path, monkeypatch):
    """Per step a ten thousandth of the way from the base to the raw weights."""
    monkeypatch.chdir(checkout)
    neon(*training(tmp_path / "run", "--budget", 8, "--ramp", 0, "--raw"))
    base = load_weights("checkpoints/tiny.pth")
    average, raw = (load_weights(tmp_path / "run" / f"{kind}-000000008.safetensors") for kind in ("snapshot", "raw"))
    moved = {name: (raw[name] - base[name]).abs().max() for name in base if not family.is_buffer(name)}
    assert all(1e-4 < far < 4e-3 for far in moved.values())
    assert all((average[name] - base[name]).abs().max() < 3e-4 * far for name, far in moved.items())


def test_generation_goes_on(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)
    neon(*generating(tmp_path / "whole"))
    killed = start(*generating(tmp_path / "killed"))
    kill_when(lambda: len(list((tmp_path / "killed").rglob("*.png"))) >= 8, killed)
    assert not (tmp_path / "killed" / "dataset.json").exists()
    finish(*ranks(2, *generating(tmp_path / "killed")))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_self_training_goes_on(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)
    assert len([*goes_on(lambda out: training(out, "--raw"), tmp_path).glob("raw-*")]) > 0


def test_half_precision_training_moves_the_weights(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)
    neon(*training(tmp_path / "half", "--precision", "bfloat16"))
    assert (tmp_path / "half" / "snapshot-000000048.safetensors").exists()


def test_unlabelled_images(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)
    plain = write_images(tmp_path / "plain", (3, 8, 8), 4, 10, labelled=False)
    assert "no labels" in error_of(*training(tmp_path / "out", "--data", plain))


# ---- full size


@pytest.fixture(scope="module")
def released(checkout):
    return write_vae(checkout / "xAR" / "pretrained" / "kl16.ckpt", "xar_base")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("model", "size"), [("xar_base", "B"), ("xar_large", "L")])
def test_as_in_the_readme(checkout, released, model, size):
    """The whole network and decoder, fewer steps."""
    write_checkpoint(checkout / "checkpoints" / f"Neon_xAR{size}_imagenet256.pth", model)
    command = COMMANDS[model] + " --flow_steps 2"
    one, two = released_fid(command, checkout, 1, 2, 2), released_fid(command, checkout, 2, 2, 1)
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_recipe_at_full_size(checkout, released, tmp_path):
    base = write_checkpoint(checkout / "checkpoints" / "xAR-B.pth", "xar_base")
    made, out, vae = tmp_path / "S", tmp_path / "run", "--vae_path xAR/pretrained/kl16.ckpt"
    for command in [
        f"python xAR/generate_dataset.py --model {base} --seeds 0-1 --out {made} --cfg 2.7 --flow_steps 2 {vae}",
        f"python xAR/selftrain.py --base {base} --recipe xar_base --data {made} --out {out} {vae} "
        "--batch 2 --budget 4 --snapshot 4 --precision bfloat16",
        f"python xAR/merge.py --base {base} --selftrained {out} -w 1.4 --out {tmp_path}/neon.pth",
    ]:
        result = run(command, checkout)
        assert result.returncode == 0, (command, result.stderr[-2000:])
    assert list(load_weights(tmp_path / "neon.pth")) == list(load_weights(base))
