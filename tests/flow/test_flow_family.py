"""Flow matching behind the contract of neon.family, and its commands as processes."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_parameters
from processes import neon

from flow import family
from flow.configs import NETWORKS
from mini.features import DigitsCNN, save_digits_cnn
from neon import NeonError
from neon.merge import merge_tensor
from neon.weights.checkpoint import load_weights, save_safetensors

ROOT = Path(__file__).parents[2]
SEEDS = torch.tensor([3, 8, 2**32 + 1])


def write_released(path: Path) -> Path:
    """A full-size checkpoint in the layout of torchcfm's training script."""
    torch.manual_seed(0)
    raw, ema = (fill_parameters(family.create("cifar10", device="cpu")).state_dict() for _ in range(2))
    raw = {name: 0 * t for name, t in raw.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"net_model": raw, "ema_model": ema, "sched": {"last_epoch": 1}, "optim": {}, "step": 400_000}, path)
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The code, a small network whose every part matters, real digits and reference statistics."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "flow").symlink_to(ROOT / "flow")
    net = fill_parameters(family.create("digits", device="cpu"))
    net.out[2].weight.data.mul_(0.3)
    save_safetensors(folder / "base.safetensors", net.state_dict(), family.metadata(net))
    torch.manual_seed(0)
    save_digits_cnn(DigitsCNN(), folder / "cnn.safetensors")
    np.savez(folder / "ref.npz", mu=np.full(64, 0.4), sigma=0.2 * np.eye(64))
    return folder


@pytest.fixture(scope="module")
def model(checkout):
    return family.load(checkout / "base.safetensors", device="cpu")


@pytest.mark.parametrize("sampling", [{"solver": "dopri5"}, {"solver": "euler", "num_steps": 4}])
def test_image_i_depends_on_seed_i_alone(model, sampling):
    labels = family.labels(model, SEEDS)
    images = family.sample(model, SEEDS, labels, **sampling)
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.uint8 and images.float().std() > 5
    again = family.sample(model, SEEDS, None, **sampling)  # classes come from the same streams
    alone = family.sample(model, SEEDS[1:2], labels[1:2], **sampling)
    assert torch.equal(again, images) and (alone[0].int() - images[1].int()).abs().max() <= 1
    other = family.sample(model, SEEDS, (labels + 1) % 10, **sampling)
    assert not torch.equal(other, images)


def test_solvers_agree_where_steps_are_small(model):
    exact = family.sample(model, SEEDS, None)
    heun, euler = (family.sample(model, SEEDS, None, solver=s, num_steps=100) for s in ("heun", "euler"))
    assert (heun.int() - exact.int()).abs().max() <= 1
    assert (euler.int() - exact.int()).abs().float().mean() < 3


def test_a_released_checkpoint_is_its_average(tmp_path):
    net = family.load(write_released(tmp_path / "otcfm.pt"), device="cpu")
    assert net.dim == (3, 32, 32) and net.num_classes == 0 and not net.training
    assert torch.equal(net.out[2].weight, fill_parameters(family.create("cifar10", device="cpu")).out[2].weight)
    assert family.labels(net, SEEDS) is None
    images = family.sample(net, SEEDS[:1], None, solver="euler", num_steps=1)
    assert images.shape == (1, 3, 32, 32)


def test_a_snapshot_carries_its_network(model, tmp_path):
    save_safetensors(tmp_path / "s.safetensors", model.state_dict(), family.metadata(model))
    again = family.load(tmp_path / "s.safetensors", device="cpu", precision="bfloat16")
    assert again.init_kwargs == NETWORKS["digits"]
    exact, rough = (family.sample(m, SEEDS, None, solver="euler", num_steps=4) for m in (model, again))
    assert 0 < (exact.int() - rough.int()).abs().float().mean() < 3


def test_other_files_are_refused(tmp_path):
    torch.save({"ema_model": {"a": torch.zeros(2)}}, tmp_path / "x.pt")
    with pytest.raises(NeonError, match=r"x\.pt: time_embed\.0\.weight is missing"):
        family.load(tmp_path / "x.pt", device="cpu")
    save_safetensors(tmp_path / "y.safetensors", {"a": torch.zeros(2)}, {"init_kwargs": '{"size": 3}'})
    with pytest.raises(NeonError, match="no flow checkpoint"):
        family.load(tmp_path / "y.safetensors", device="cpu")


def test_training_data_must_fit(model):
    with pytest.raises(NeonError, match=r"images are \(3, 8, 8\)"):
        family.check(model, (3, 8, 8), None)
    with pytest.raises(NeonError, match="no labels"):
        family.check(model, (1, 8, 8), None)
    with pytest.raises(NeonError, match="labels must lie in 0"):
        family.check(model, (1, 8, 8), torch.tensor([10]))


def test_flips_and_couplings_of_the_recipes():
    """The loss of a network at rest is the mean square of image − noise: flips keep it, optimal coupling lowers it."""
    net = family.create("cifar10", device="cpu", num_channels=32)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    half = torch.cat([images[:16], images[:16].flip(3)])
    loss = {}
    for recipe in ("cifar10_icfm", "cifar10_otcfm"):
        options = family.recipes[recipe].loss
        assert options["flip"]
        draws = family.draw(net, 32, torch.Generator().manual_seed(0), images=lambda: half, **options)
        loss[recipe] = family.loss(net, half, None, draws, **options).item()
    assert loss["cifar10_otcfm"] < loss["cifar10_icfm"]


def script(command: str, monkeypatch, capsys) -> str:
    """Run 'flow/merge.py …' in this process; what it prints."""
    words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    return capsys.readouterr().out


def fid_of(line: str) -> float:
    found = re.fullmatch(r"FID (\d+\.\d+)  \(flow matching, euler, 2 steps, 40 images, [\d.]+ s\)", line.strip())
    return float(found[1])


def test_the_recipe_from_end_to_end(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    base, sampling = "base.safetensors", "--solver euler --num_steps 2"
    measure = f"--ref ref.npz --features digits:cnn.safetensors --metrics fid {sampling}"
    search, final = (f"{name} --family flow --base {base}" for name in ("search", "final"))
    script(f"flow/generate_dataset.py --model {base} --seeds 0-15 --out S {sampling}", monkeypatch, capsys)
    recipe = "--recipe digits --data S --out run --batch 4 --budget 8"
    script(f"flow/selftrain.py --base {base} {recipe}", monkeypatch, capsys)
    neon(*f"{search} --selftrained run --w=0,1 --seeds 20-29 {measure} --out search.jsonl".split())
    neon(*f"{final} --search search.jsonl --seeds 30-39 {measure} --out final.jsonl".split())
    merge = f"--base {base} --selftrained run -w 1.5 --out neon.safetensors"
    script(f"flow/merge.py {merge}", monkeypatch, capsys)
    assert [json.loads(line)["w"] for line in Path("search.jsonl").read_text().splitlines()] == [0, 1]
    names = (base, "run/snapshot-000000008.safetensors", "neon.safetensors")
    old, new, merged = (load_weights(name) for name in names)
    assert all(torch.equal(t, merge_tensor(old[name], new[name], 1.5)) for name, t in merged.items())

    command = f"flow/calculate_fid.py --model_ckpt neon.safetensors --seeds 40-79 {measure}"
    one = fid_of(script(f"{command} --max_batch_size 40", monkeypatch, capsys))
    two = run(f"torchrun --standalone --nproc_per_node=2 {command} --max_batch_size 7", checkout)
    assert two.returncode == 0, two.stderr[-2000:]
    # a level of a pixel may change where truncation falls on an edge
    assert one == pytest.approx(fid_of(two.stdout), rel=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [("--model_ckpt nowhere.pt", "no such file"), ("--model_ckpt base.safetensors --tol 2", "tol must lie")],
)
def test_errors_are_one_line(checkout, monkeypatch, capsys, change, message):
    monkeypatch.chdir(checkout)
    measure = "--ref ref.npz --features digits:cnn.safetensors --metrics fid --seeds 0-3"
    with pytest.raises(SystemExit) as exit:
        script(f"flow/calculate_fid.py {measure} {change}", monkeypatch, capsys)
    printed = capsys.readouterr()
    assert exit.value.code == 1 and not printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err


def test_scripts_shadow_nothing():
    names = {p.stem for p in (ROOT / "flow").glob("*.py")} - {"__init__"}
    assert names.isdisjoint(sys.stdlib_module_names)


def run(command: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run as a user would, with the project's environment active."""
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(shlex.split(command), cwd=cwd, env=variables, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_at_full_size(tmp_path):
    """From a released .pt to a merged .pt, with nothing special about its size."""
    (tmp_path / "flow").symlink_to(ROOT / "flow")
    write_released(tmp_path / "otcfm.pt")
    np.savez(tmp_path / "ref.npz", mu=np.full(2048, 0.4), sigma=0.2 * np.eye(2048))
    sampling = "--solver euler --num_steps 2"
    for command in [
        f"python flow/generate_dataset.py --model otcfm.pt --seeds 0-3 --out S {sampling}",
        "python flow/selftrain.py --base otcfm.pt --recipe cifar10_otcfm --data S --out run --batch 4 --budget 8",
        "python flow/merge.py --base otcfm.pt --selftrained run -w 1 --out neon.pt",
        "python flow/calculate_fid.py --model_ckpt neon.pt --ref ref.npz --seeds 0-3 --features inception:random"
        f" --metrics fid {sampling}",
        "python flow/calculate_fid.py --model_ckpt neon.pt --ref ref.npz --seeds 0-1 --features inception:random"
        " --metrics fid --tol 1e-2",
    ]:
        result = run(command, tmp_path)
        assert result.returncode == 0, (command, result.stderr[-2000:])
    kept = torch.load(tmp_path / "neon.pt", weights_only=True)
    assert kept["step"] == 400_000 and not any(t.any() for t in kept["net_model"].values())
