"""The README commands and the recipe at real size, on checkpoints that the tests write in the original format."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_cases import GOLDEN, golden
from pickle_writer import EDM_CLASSES, write_persistent_pickle

from edm import family
from edm.configs import NETWORKS
from neon import NeonError

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMMANDS = re.findall(r"^PYTHONPATH=edm torchrun .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
NAMES = {"cond": "Neon_EDM_conditional_CIFAR10", "uncond": "Neon_EDM_unconditional_CIFAR10", "ffhq": "Neon_EDM_FFHQ"}
CONFIGS = {"cond": "cifar10_cond", "uncond": "cifar10_uncond", "ffhq": "ffhq64"}


def write_checkpoint(path: Path, config: str) -> None:
    """A full-size network with its initial weights, as EDM would have pickled it."""
    kwargs = NETWORKS[config]
    torch.manual_seed(0)
    net = family.create(config, device="cpu")
    state = {name: t.contiguous() for name, t in net.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_persistent_pickle(path, "EDMPrecond", {**kwargs, "use_fp16": False}, state, EDM_CLASSES)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a user has before typing the commands: the code, checkpoints/ and fid_stats/ (so no network is needed)."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "edm").symlink_to(ROOT / "edm")
    for kind, name in NAMES.items():
        write_checkpoint(folder / "checkpoints" / f"{name}.pkl", CONFIGS[kind])
    (folder / "fid_stats").mkdir()
    for name in ("cifar10-32x32", "ffhq-64x64"):
        np.savez(folder / "fid_stats" / f"{name}.npz", mu=np.full(2048, 0.4), sigma=0.2 * np.eye(2048))
    return folder


def run(command: list[str] | str, cwd: Path, **env) -> subprocess.CompletedProcess:
    """Run as a user would, with the project's environment active."""
    variables = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | env
    words = shlex.split(command) if isinstance(command, str) else command
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=280)


def shortened(command: str, processes: int, seeds: str, batch: int) -> tuple[str, dict[str, str]]:
    """The README's command with fewer images and steps, and Inception with random weights."""
    assignment, command = command.split(maxsplit=1)
    for pattern, value in [
        (r"--nproc_per_node=8", f"--nproc_per_node={processes}"),
        (r"--seeds \S+", f"--seeds {seeds}"),
        (r"--num_steps \d+", "--num_steps 2"),
        (r"--max_batch_size \d+", f"--max_batch_size {batch}"),
    ]:
        command, n = re.subn(pattern, value, command)
        assert n == 1
    return f"{command} --features inception:random --metrics fid", dict([assignment.split("=")])


def fid(command: str, cwd: Path, processes: int, seeds: str, batch: int) -> float:
    words, env = shortened(command, processes, seeds, batch)
    result = run(words, cwd, **env)
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = result.stdout.strip().splitlines()
    assert "EDM" in line and "2 heun steps" in line
    return float(line.split()[1])


def test_the_readme_has_the_three_commands():
    assert [sum(f"{name}.pkl" in command for command in COMMANDS) for name in NAMES.values()] == [1, 1, 1]


@pytest.mark.slow
def test_cifar10_cond_same_fid_for_one_and_two_processes_and_batch_sizes(checkout):
    (command,) = (c for c in COMMANDS if NAMES["cond"] in c)
    one = fid(command, checkout, 1, "0-4", 5)
    two = fid(command, checkout, 2, "0-4", 2)
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uncond", "ffhq"])
def test_the_other_two_commands(checkout, kind):
    (command,) = (c for c in COMMANDS if NAMES[kind] in c)
    assert fid(command, checkout, 1, "0-2", 3) == pytest.approx(fid(command, checkout, 2, "0-2", 1), rel=1e-6)


def test_missing_reference_offline_says_where_to_put_it(checkout):
    command, env = shortened(COMMANDS[0], 1, "0-1", 2)
    command = command.replace("https://nvlabs-fi-cdn.nvidia.com/edm", "http://127.0.0.1:9").replace(
        "cifar10-32", "other-32"
    )
    result = run(command, checkout, **env)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode != 0 and len(errors) == 1
    assert "fid_stats/other-32x32.npz" in errors[0]
    assert not list((checkout / "fid_stats").glob("*other*"))


@pytest.mark.parametrize("config", sorted(NETWORKS.keys() - {"digits", "fashion", "fashion_gpu"}))
def test_named_configurations_equal_the_manifests(config):
    manifest = json.loads((GOLDEN / f"manifest_{config}.json").read_text())
    with torch.device("meta"):
        net = family.create(config, device="meta")
    found = [(n, list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in net.state_dict().items()]
    assert found == [(e["name"], e["shape"], e["dtype"]) for e in manifest["entries"]]
    assert {**NETWORKS[config], "use_fp16": False} == manifest["constructor_kwargs"]


@pytest.mark.parametrize("name", ["tiny_edm.pkl", "tiny_edm_torch2.pkl"])
def test_a_pickled_network_denoises_as_the_original(name):
    expected = golden("tiny_edm_expect")
    net = family.load(GOLDEN / name, device="cpu")
    with torch.no_grad():
        denoised = net(expected["x"], expected["sigma"], expected["class_labels"])
    torch.testing.assert_close(denoised, expected["D"], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(NeonError, match="no EDM checkpoint"):
        family.load(tmp_path / "x.pth", device="cpu")


@pytest.mark.slow
def test_the_whole_recipe_at_full_size(checkout):
    """generate → selftrain → search → final → merge → evaluate, from a .pkl, without a special code path."""
    base, ref = "checkpoints/Neon_EDM_conditional_CIFAR10.pkl", "fid_stats/cifar10-32x32.npz"
    measure = f"--ref {ref} --features inception:random --metrics fid --num_steps 2"
    for command in [
        f"python edm/generate_dataset.py --model {base} --seeds 0-3 --num_steps 2 --out S",
        f"python edm/selftrain.py --base {base} --recipe cifar10_cond --data S --out run --batch 4 --budget 8",
        f"neon search --family edm --base {base} --selftrained run --w=0,1 --seeds 10-13 {measure} --out search.jsonl",
        f"neon final --family edm --base {base} --search search.jsonl --seeds 20-23 {measure} --out final.jsonl",
        f"python edm/merge.py --base {base} --selftrained run -w 1 --out neon.safetensors",
        f"python edm/calculate_fid.py --network_pkl neon.safetensors --seeds 20-23 {measure}",
    ]:
        result = run(command, checkout)
        assert result.returncode == 0, (command, result.stderr[-2000:])
    rows = [json.loads(line) for line in (checkout / "search.jsonl").read_text().splitlines()]
    assert [row["w"] for row in rows] == [0, 1]
    final = [json.loads(line) for line in (checkout / "final.jsonl").read_text().splitlines()]
    assert [row["role"] for row in final] == ["base", "selftrained", "neon"]
