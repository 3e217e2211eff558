"""A disk without room: one line with the bytes needed and free, and no half-written file."""

import errno
import os
import subprocess
from collections import namedtuple
from functools import partial

import pytest
import torch
from processes import BIN, error_of, words
from test_selftrain import selftrain

from hostile.runs import Job
from neon import NeonError
from neon.cli import main
from neon.files import atomic, check_room, filling, free_bytes
from neon.measure.rows import Rows

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def pair(tmp_path):
    """θ_r and θ_s of four tensors of 400 kB, in a torch file and in safetensors."""
    from neon.weights.checkpoint import save_safetensors

    base = {f"l{i}.weight": torch.randn(100, 1000) for i in range(4)}
    trained = {name: tensor + 1 for name, tensor in base.items()}
    for name, state in (("base", base), ("trained", trained)):
        torch.save(state, tmp_path / f"{name}.pth")
        save_safetensors(tmp_path / f"{name}.safetensors", state)
    return tmp_path


def merging(folder, kind, out):
    pair = ("--base", folder / f"base.{kind}", "--selftrained", folder / f"trained.{kind}")
    return ["merge", *pair, "-w", 1, "--out", out / f"x.{kind}"]


@pytest.mark.parametrize(("kind", "needed"), [("pth", 3_200_000), ("safetensors", 1_600_000)])
def test_merge_asks_for_room_first(pair, monkeypatch, kind, needed):
    """A .pth needs it twice: torch writes it from a file of the merged tensors."""
    (pair / "out").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 1_000_000))
    monkeypatch.setattr("os.fsync", lambda file: pytest.fail("something was written"))
    said = error_of(*merging(pair, kind, pair / "out"))
    bytes_needed = int(said.split(" needs ")[1].split(" bytes")[0].replace(",", ""))
    assert needed <= bytes_needed < needed + 2000 and said.endswith("the disk has 1,000,000 bytes free")
    assert os.listdir(pair / "out") == []


@pytest.mark.parametrize("command", ["convert", "extract-lora"])
def test_other_files_of_weights_too(pair, monkeypatch, command):
    (pair / "out").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 1000))
    files = ("--base", pair / "base.pth", "--selftrained", pair / "trained.pth", "--rank", 2)
    argv = {
        "convert": ("convert", pair / "base.pth", pair / "out" / "x.safetensors"),
        "extract-lora": ("extract-lora", *files, "--out", pair / "out" / "x"),
    }[command]
    assert error_of(*argv).endswith("the disk has 1,000 bytes free") and os.listdir(pair / "out") == []


def test_selftrain_says_before_the_first_step_that_its_state_has_no_room(mini, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 10_000))
    said = error_of(*selftrain(mini, tmp_path / "run"))
    assert " needs " in said and said.endswith("the disk has 10,000 bytes free") and os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("limit", [100, 500_000, 1_601_000])
def test_a_disk_that_fills_up_in_the_middle(pair, kind, limit):
    """A file may not grow beyond so many bytes: at the last size only what torch adds to the tensors is too much."""
    out = pair / "out"
    (done,) = Job(partial(main, words(merging(pair, kind, out))), largest=limit).end()
    if (kind, limit) == ("safetensors", 1_601_000):
        assert done.status == 0
        return
    assert done.status == 1 and done.said.count("\n") == 1
    assert "the disk is full (" in done.said and "needs 1,6" in done.said.replace(f"{out}", "")
    assert not any(out.iterdir())


@pytest.mark.slow
def test_a_real_disk(mini, pair, tmp_path):
    """A file system of 2.5 MB in memory, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        generate = ["generate", *mini.sampling, "--model", mini.base, "--seeds", "0-99999", "--out", disk / "S"]
        for command in (merging(pair, "pth", disk), generate):
            done = subprocess.run([BIN / "neon", *words(command)], capture_output=True, text=True)
            assert done.returncode == 1 and "Traceback" not in done.stderr
            assert " free" in done.stderr.splitlines()[-1]
            assert not [path for path in disk.rglob("*") if path.name.startswith(".")]
        assert all(path.stat().st_size for path in (disk / "S").rglob("*.png"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_rows_and_other_files(tmp_path):
    """/dev/full takes nothing; the row that has no room is not there afterwards."""
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    rows = Rows(tmp_path / "other.jsonl")
    rows.path = tmp_path / "rows.jsonl"
    with pytest.raises(NeonError, match=r"rows\.jsonl: the disk is full \([\d,]+ bytes free\)"):
        rows.cached("a", lambda: {"fid": 1.0})
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(NeonError, match=r"x: needs 1,000 bytes, and the disk is full"), filling("x", 1000):
            raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="Permission"), filling("x"):
        raise OSError(errno.EACCES, "Permission denied")


def test_a_library_that_hides_the_reason(tmp_path):
    def write():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 768 vs 726")

    with pytest.raises(NeonError, match="x: the disk is full"), atomic(tmp_path / "x") as partial:
        partial.write_text("half")
        write()
    assert os.listdir(tmp_path) == []


def test_room_is_that_of_the_disk_that_will_hold_it(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.01)
    check_room(tmp_path / "x", 1)
    with pytest.raises(NeonError, match="needs 1,000,000,000,000,000,000 bytes"):
        check_room(tmp_path / "x", 10**18)
