"""`neon merge` as the user runs it: a process, its files, its exit status and what it says."""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neon.cli import main

NEON = shutil.which("neon", path=Path(sys.prefix) / "bin")
EDM = Path(__file__).parent / "golden" / "edm"


def state(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(300, 1000, generator=g),
        "bias": torch.randn(5, generator=g).half(),
        "steps": torch.tensor(seed),
        "mask": torch.full((2, 2), -torch.inf).triu(1),
        "last": torch.randn(3, generator=g, dtype=torch.float64),
    }


BASE, SELFTRAINED = state(1), state(2)


def expected(w):
    wide = {
        name: ((1 + w) * BASE[name].double() - w * SELFTRAINED[name].double()) for name in ("weight", "bias", "last")
    }
    return {name: wide[name].to(t.dtype) if name in wide else t for name, t in BASE.items()}


def check(found, w):
    assert set(found) == set(BASE)
    for name, wanted in expected(w).items():
        assert found[name].dtype == wanted.dtype
        torch.testing.assert_close(found[name], wanted, rtol=2e-3 if name == "bias" else 1e-6, atol=1e-6)


def neon(*args):
    """Run the installed command. Returns exit status, lines on stdout, lines on stderr."""
    done = subprocess.run([NEON, *map(str, args)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# ---------------------------------------------------------------- every format


def test_safetensors_with_an_old_torch_file(tmp_path):
    base, new, out = (tmp_path / name for name in ("base.safetensors", "new.pth", "sub/out.safetensors"))
    save_file(BASE, base, {"format": "pt"})
    wrapped = {"model": BASE, "inner": {"net": dict(reversed(SELFTRAINED.items()))}}
    torch.save(wrapped, new, _use_new_zipfile_serialization=False)
    merge = ("merge", "--base", base, "--selftrained", new, "--selftrained_key", "inner.net", "--out", out)
    assert neon(*merge, "-w", 1.5) == (0, [], [])
    check(load_file(out), 1.5)
    with safe_open(out, "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert everything(tmp_path / "sub") == ["out.safetensors"]


def test_shards(tmp_path):
    for folder, tensors in (("base", BASE), ("new", SELFTRAINED)):
        (tmp_path / folder).mkdir()
        names = list(tensors)
        parts = {f"m-{i}.safetensors": names[i::2] for i in range(2)}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, tmp_path / folder / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    new, out = tmp_path / "new" / "m.safetensors.index.json", tmp_path / "neon-w0.5"
    assert neon("merge", "--base", tmp_path / "base", "--selftrained", new, "-w", 0.5, "--out", out) == (0, [], [])
    assert everything(out) == everything(tmp_path / "base")
    check(load_file(out / "m-0.safetensors") | load_file(out / "m-1.safetensors"), 0.5)


def test_nested_torch(tmp_path):
    args = argparse.Namespace(lr=1e-4, out="runs/1")
    for name, tensors in (("base", BASE), ("new", SELFTRAINED)):
        tree = {"model": {"weight": torch.zeros(1)}, "model_ema": tensors, "args": args, "epoch": 7}
        torch.save(tree, tmp_path / f"{name}.pth")
    files = ("--base", tmp_path / "base.pth", "--selftrained", tmp_path / "new.pth", "--out", tmp_path / "out.pth")
    assert neon("merge", *files, "-w", "-0.5") == (0, [], [])
    assert everything(tmp_path) == ["base.pth", "new.pth", "out.pth"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        tree = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(tree) == ["model", "model_ema", "args", "epoch"]
    assert tree["args"] == args and tree["epoch"] == 7 and not tree["model"]["weight"].any()
    assert list(tree["model_ema"]) == list(BASE)
    check(tree["model_ema"], -0.5)


def test_pickle(tmp_path):
    pkl, new, out = EDM / "tiny_edm.pkl", tmp_path / "new.safetensors", tmp_path / "out.safetensors"
    wanted = {name: torch.from_numpy(array) for name, array in np.load(EDM / "tiny_edm_state.npz").items()}
    save_file({name: tensor + 1 for name, tensor in wanted.items()}, new)
    merge = ("merge", "--base", pkl, "--selftrained", new, "-w", 2, "--out", out, "--family", "edm")
    assert neon(*merge) == (0, [], [])
    found = load_file(out)
    buffers = {name for name in wanted if name.endswith("resample_filter")}
    assert set(found) == set(wanted) and buffers
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor if name in buffers else tensor - 2, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- errors, in a process


def fails(tmp_path, message, *args):
    """Exit status 1 and one line, nothing written."""
    before = everything(tmp_path)
    status, said, errors = neon(*args)
    assert (status, said, len(errors)) == (1, [], 1), errors
    assert errors[0].startswith("error: ") and re.search(message, errors[0])
    assert everything(tmp_path) == before


def test_an_error_in_the_last_tensor(tmp_path):
    torch.save(BASE, tmp_path / "base.pth")
    torch.save(SELFTRAINED | {"last": torch.tensor([1.0, torch.nan, 1.0])}, tmp_path / "new.pth")
    (tmp_path / "out.pth").write_bytes(b"old")
    files = ("--base", tmp_path / "base.pth", "--selftrained", tmp_path / "new.pth", "--out", tmp_path / "out.pth")
    fails(tmp_path, "last: not finite in the self-trained model", "merge", *files, "-w", 1)
    assert (tmp_path / "out.pth").read_bytes() == b"old"


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_a_file_that_wants_to_run_a_program(tmp_path):
    torch.save(BASE, tmp_path / "base.pth")
    torch.save({"model": SELFTRAINED, "args": Evil(tmp_path / "canary")}, tmp_path / "new.pth")
    files = ("--base", tmp_path / "base.pth", "--selftrained", tmp_path / "new.pth", "--out", tmp_path / "out.pth")
    fails(tmp_path, r"new.pth: refused, it asks for posix.system", "merge", *files, "-w", 1)
    (tmp_path / "new.pth").write_bytes(pickle.dumps({"args": Evil(tmp_path / "canary")}))
    fails(tmp_path, r"new.pth: refused", "merge", *files, "-w", 1)


def test_a_truncated_file(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    content = (tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "new.safetensors").write_bytes(content[:-1000])
    files = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors")
    out = tmp_path / "out.safetensors"
    fails(tmp_path, r"new.safetensors: not a readable", "merge", *files, "--out", out, "-w", 1)


# ---------------------------------------------------------------- the same command, called


@pytest.fixture
def files(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors", {"a": "b"})
    save_file(SELFTRAINED, tmp_path / "new.safetensors")
    return {"--base": "base.safetensors", "--selftrained": "new.safetensors", "--out": "out.safetensors", "-w": "1"}


def call(tmp_path, files):
    args = [part for name, value in files.items() for part in (name, str(value if name == "-w" else tmp_path / value))]
    main(["merge", *args])


@pytest.mark.parametrize("w", ["1.5", "-1", "-0.25", "+2", "1e-3", ".5"])
def test_w(tmp_path, files, w):
    call(tmp_path, files | {"-w": w})
    check(load_file(tmp_path / "out.safetensors"), float(w))


def test_w0_copies_the_base(tmp_path, files):
    call(tmp_path, files | {"-w": "0"})
    call(tmp_path, files | {"-w": "0", "--base": "out.safetensors", "--out": "again.safetensors"})
    found = load_file(tmp_path / "out.safetensors")
    for name, tensor in BASE.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base": "gone.pth"}, "gone.pth: no such file"),
        ({"--selftrained": "gone"}, "gone: no such file"),
        ({"--selftrained": "text.bin"}, "text.bin: unknown kind of checkpoint"),
        ({"--selftrained": "text.pth"}, "text.pth: "),
        ({"--selftrained": "."}, "0 files named"),
        ({"--selftrained": "fewer.safetensors"}, "last and 1 more: missing in the self-trained model"),
        ({"--base": "fewer.safetensors"}, "last and 1 more: missing in the base"),
        ({"--selftrained": "shape.safetensors"}, r"last: shape \(3,\) in the base, \(4,\) in the self-trained model"),
        ({"-w": "nan"}, "w must be finite, not nan"),
        ({"-w": "inf"}, "w must be finite, not inf"),
        ({"-w": "1e9"}, "bias: not finite in the merge with w = 1000000000.0 in torch.float16"),
        ({"--out": "out.pth"}, r"out.pth: weights from base.safetensors are written as .safetensors"),
        ({"--out": "out"}, r"out: weights from base.safetensors are written as .safetensors"),
        ({"--out": "text.pth/out.safetensors"}, "text.pth"),
        ({"--out": "folder.safetensors"}, "folder.safetensors: Is a directory"),
    ],
)
def test_errors(tmp_path, files, capsys, change, message):
    for name in ("text.bin", "text.pth"):
        (tmp_path / name).write_text("<html>\nnot\nfound\n")
    (tmp_path / "folder.safetensors").mkdir()
    save_file({name: BASE[name] for name in ("weight", "bias", "steps")}, tmp_path / "fewer.safetensors")
    save_file(SELFTRAINED | {"last": torch.ones(4)}, tmp_path / "shape.safetensors")
    before = everything(tmp_path)
    with pytest.raises(SystemExit) as caught:
        call(tmp_path, files | change)
    said, error = capsys.readouterr()
    assert (caught.value.code, said, error.count("\n")) == (1, "", 1), error
    assert error.startswith("error: ") and re.search(message, error)
    assert everything(tmp_path) == before


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two models of 500 MB in both formats; the widest tensor has 50 MB."""
    folder = tmp_path_factory.mktemp("large")
    for i, name in enumerate(("base", "new")):
        g = torch.Generator().manual_seed(i)
        tensors = {f"block{b}": torch.randn(4096, 1024, generator=g) for b in range(27)}
        tensors["embedding"] = torch.randn(12288, 1024, generator=g)
        save_file(tensors, folder / f"{name}.safetensors")
        torch.save(tensors, folder / f"{name}.pth")
    yield folder
    shutil.rmtree(folder)


def memory(*args):
    """Run the command; its peak memory in MB: all that is resident, and that without the pages of mapped files."""
    peak = {"VmHWM": 0, "RssAnon": 0}  # not ru_maxrss, which starts from the parent's
    child = subprocess.Popen([NEON, *map(str, args)])
    while child.poll() is None:
        for key, kilobytes in re.findall(r"(VmHWM|RssAnon):\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text()):
            peak[key] = max(peak[key], int(kilobytes))
        time.sleep(0.01)
    assert child.returncode == 0
    return peak["VmHWM"] / 1024, peak["RssAnon"] / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_merge_does_not_need_the_memory_of_a_model(large, suffix):
    """.pth files are mapped: their pages are counted in the total, but the system takes them back when it needs to."""
    files = [large / f"{name}{suffix}" for name in ("base", "new", "out")]
    total, anonymous = memory("merge", "--base", files[0], "--selftrained", files[1], "--out", files[2], "-w", 1.5)
    print(f"\n{suffix}: peak {total:.0f} MB, {anonymous:.0f} MB of it not mapped files")
    assert anonymous < 800
    if suffix == ".safetensors":
        assert total < 1500
    out = large / f"out{suffix}"
    assert out.stat().st_size == pytest.approx(files[0].stat().st_size, rel=1e-3)
