"""Two processes on one --out, and what a killed one leaves; other hosts, as their files show them."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from processes import BIN, ROOT, error_of, finish, kill_when, neon, ranks, start, words
from test_selftrain import selftrain

from neon import NeonError, lock
from neon.data import ImageSet
from neon.distributed import World
from neon.files import atomic, discard
from neon.generate import generate
from neon.lock import locked, writing

HOST = socket.gethostname()


def search(mini, out, w="0:20:1"):
    measuring = (*mini.measuring, "--base", mini.base, "--metrics", "fid", "--out", out)
    return ["search", *measuring, "--selftrained", mini.snapshots[0], "--seeds", "0-63", "-w", w, "--method", "grid"]


def made(mini, out):
    return ["generate", *mini.sampling, "--model", mini.base, "--seeds", "0-4999", "--batch_size", 8, "--out", out]


LONG = {
    "selftrain": lambda mini, out: selftrain(mini, out, budget=64_000, snapshot=64_000),
    "search": search,
    "generate": made,
}


def lock_of(out):
    return out.with_name(f".{out.name}.lock")


def begun(out):
    return (out.is_dir() and any(out.iterdir())) or (out.is_file() and out.stat().st_size > 0)


@pytest.mark.parametrize("name", LONG)
def test_the_second_is_refused_at_once_and_the_first_does_not_notice(mini, tmp_path, name):
    out = tmp_path / "out"
    command = LONG[name](mini, out)
    first = start(*command)
    until(lambda: begun(out), first)
    refused = f"error: another process ({first.pid}, {HOST}) is writing {out}; wait for it or choose another --out"
    assert error_of(*command) == refused
    assert first.is_alive()
    kill_when(lambda: True, first)
    assert json.loads(lock_of(out).read_text()) == {"pid": first.pid, "host": HOST}
    second = start(*command)  # the kernel has released the lock
    until(lambda: json.loads(lock_of(out).read_text() or "{}").get("pid") == second.pid, second)
    os.kill(second.pid, signal.SIGTERM)
    second.join(60)
    assert second.exitcode == 143 and out.exists() and not list(tmp_path.glob(".*"))


def until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def test_of_two_searches_the_rows_are_those_of_one(mini, tmp_path):
    command = search(mini, tmp_path / "out.jsonl", "0:2:1")
    both = [start(*command), start(*command)]
    for process in both:
        process.join(120)
    assert 0 in {process.exitcode for process in both} <= {0, 1}
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["w"] for row in rows] == [0, 1, 2] and len({row["key"] for row in rows}) == 3
    assert not list(tmp_path.glob(".*"))


def test_the_processes_of_one_job_have_one_lock_and_end_together_without_it(mini, tmp_path):
    out = tmp_path / "S"
    command = ["generate", *mini.sampling, "--model", mini.base, "--seeds", "0-15", "--batch_size", 8, "--out", out]
    with writing(out):
        refused = ranks(2, *command)
        for process in refused:
            process.join(60)
            assert process.exitcode == 1
        assert not out.exists()
    finish(*ranks(2, *command))
    assert len(ImageSet(out)) == 16 and os.listdir(tmp_path) == ["S"]


@pytest.mark.parametrize("command", ["merge", "reference", "convert", "evaluate"])
def test_short_commands_are_refused_too(mini, tmp_path, command):
    out = tmp_path / ("x.npz" if command == "reference" else "x.safetensors")
    pair = ("--base", mini.base, "--selftrained", mini.snapshots[0])
    measured = ("--seeds", "0-15", "--metrics", "fid", "--out", out)
    argv = {
        "merge": ("merge", *pair, "-w", 1, "--out", out),
        "convert": ("convert", mini.base, out),
        "reference": ("reference", "--images", mini.data, *mini.features, "--out", out),
        "evaluate": ("evaluate", *mini.measuring, "--model", mini.base, *measured),
    }[command]
    with holding(out):
        assert "is writing" in error_of(*argv) and not out.exists()
    neon(*argv)
    assert os.listdir(tmp_path) == [out.name]


class holding:
    """Another process that holds the lock of `out` until the end of the block, where it is killed."""

    def __init__(self, out):
        code = "import time; from neon.lock import writing\n"
        code += f"with writing({str(out)!r}): print('has it', flush=True); time.sleep(99)"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout.readline() == b"has it\n"

    def __enter__(self):
        return self.process

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()


def test_deleting_the_lock_gives_no_two_owners(tmp_path):
    """Four processes take and release the lock again and again: never are two of them inside."""
    context = multiprocessing.get_context("forkserver")
    counts = context.Array("i", 2)  # inside now; takings
    workers = [context.Process(target=take_often, args=(tmp_path / "out", counts)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert counts[0] == 0 and counts[1] > 50 and os.listdir(tmp_path) == []


def take_often(out, counts):
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            with writing(out):
                counts[0] += 1
                assert counts[0] == 1
                time.sleep(0.001)
                counts[1] += 1
                counts[0] -= 1
        except NeonError as error:
            assert "is writing" in str(error)


# ---------------------------------------------------------------- other hosts, other file systems


def owner(out, **found):
    lock_of(out).write_text(json.dumps({"pid": 7, "host": "far"} | found))


def test_an_owner_on_another_host_counts_while_it_gives_signs_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    out = tmp_path / "out"
    owner(out)
    with lock._beating(lock_of(out)), pytest.raises(NeonError, match=r"another process \(7, far\) is writing "):
        lock.writing(out).__enter__()
    assert json.loads(lock_of(out).read_text())["host"] == "far"
    with writing(out):  # it has gone
        assert json.loads(lock_of(out).read_text()) == {"pid": os.getpid(), "host": HOST}
    assert capsys.readouterr().err.count("was written by process 7 on far; does it still run?\n") == 2
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    out = tmp_path / "out"
    owner(out, host=HOST, pid=os.getppid())
    with pytest.raises(NeonError, match=rf"another process \({os.getppid()}, {HOST}\) is writing"), writing(out):
        pass
    gone = subprocess.Popen(["true"])
    gone.wait()
    for text in (json.dumps({"pid": gone.pid, "host": HOST}), "", "{", '{"pid": "x"}', "[]", "null"):
        lock_of(out).write_text(text)
        with writing(out):
            pass
        assert os.listdir(tmp_path) == []


def test_the_lock_of_a_link_is_that_of_its_target_and_a_mounted_disk_has_it_inside(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with holding(tmp_path / "a"), pytest.raises(NeonError, match="is writing"), writing(tmp_path / "b"):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    seeds, sample = list(range(2)), lambda seeds: torch_zeros(len(seeds))
    with writing(tmp_path / "a"):
        assert os.listdir(tmp_path / "a") == [".lock"]
        generate(sample, as_seeds(seeds), lambda seeds: None, tmp_path / "a", identity={}, batch=2, world=World())
    assert len(ImageSet(tmp_path / "a")) == 2 and ".lock" not in os.listdir(tmp_path / "a")


def torch_zeros(n):
    import torch

    return torch.zeros(n, 1, 2, 2, dtype=torch.uint8)


def as_seeds(seeds):
    import torch

    return torch.tensor(seeds)


@pytest.mark.parametrize("take", [locked, writing])
def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path, take):
    (tmp_path / "precious").write_text("precious")
    for put in (lock_of(tmp_path / "out").symlink_to, lock_of(tmp_path / "out").hardlink_to):
        put(tmp_path / "precious")
        with pytest.raises(NeonError, match=r"\.out\.lock: not a regular file.*remove it"), take(tmp_path / "out"):
            pass
        assert (tmp_path / "precious").read_text() == "precious"
        lock_of(tmp_path / "out").unlink()
    os.mkfifo(lock_of(tmp_path / "out"))
    with pytest.raises(NeonError, match="not a regular file"), take(tmp_path / "out"):
        pass


# ---------------------------------------------------------------- what killed processes leave


def test_a_temporary_name_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(3):
        with atomic(tmp_path / "x") as partial:
            names.add(partial.name)
            partial.write_text("x")
    assert len(names) == 3 and all(re.fullmatch(r"\.x\..*-[0-9a-f]{16}\.partial", name) for name in names)


def killed(code):
    """Run code that kills itself."""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_with_a_word(tmp_path, capsys):
    kill = "import os; from pathlib import Path; from neon.files import atomic\n"
    kill += f"with atomic({str(tmp_path / 'x')!r}) as partial: {{}}; os.kill(os.getpid(), 9)"
    other = tmp_path / ".y.00000000-1-0123456789abcdef.partial"
    other.write_text("of another output")
    for write in ("partial.write_text('half')", "partial.mkdir(); Path(partial, 'half').touch()"):
        killed(kill.format(write))
        (left,) = tmp_path.glob(".x.*.partial")
        with atomic(tmp_path / "x") as partial:
            partial.write_text("whole")
        assert sorted(os.listdir(tmp_path)) == [other.name, "x"]
        assert capsys.readouterr().err == f"removed {left.name}, left by a run that was killed\n"


def test_generate_removes_what_a_killed_replace_left(mini, tmp_path, capsys):
    """The old set, half deleted; then an image that was being written."""
    out = tmp_path / "S"
    command = ["generate", *mini.sampling, "--model", mini.base, "--seeds", "0-7", "--batch_size", 8, "--out", out]
    neon(*command)
    killed(
        "import os, shutil; from pathlib import Path; from neon.files import atomic, discard\n"
        f"shutil.rmtree = lambda path: os.kill(os.getpid(), 9)\ndiscard(Path({str(out)!r}))"
    )
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".S.") and left.endswith(".partial")
    neon(*command)
    assert f"removed {left}, left by a run that was killed\n" in capsys.readouterr().err
    image = str(out / "00000" / "img00000001.png")
    killed(
        "import os; from pathlib import Path; from neon.files import atomic\n"
        f"with atomic({image!r}, sync=False) as partial: partial.touch(); os.kill(os.getpid(), 9)"
    )
    neon(*command)
    said = r"removed \.img00000001\.png\..*\.partial, left by a run that was killed\n"
    assert re.search(said, capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["S"] and not list(out.rglob(".*"))
    assert len(ImageSet(out)) == 8


def test_a_process_that_still_writes_keeps_its_files(tmp_path):
    """Two writers of one name without a lock: both end, and the file is whole."""
    with atomic(tmp_path / "x") as one:
        one.write_text("one")
        with atomic(tmp_path / "x") as other:
            other.write_text("other")
    assert (tmp_path / "x").read_text() == "one" and os.listdir(tmp_path) == ["x"]


def test_a_folder_gives_way_whole(tmp_path, monkeypatch):
    """Killed at any rename, the old or the new folder is there, or both under names that the next run knows."""
    for moment in (1, 2):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "old").touch()
        code = f"""
import os
from neon.files import atomic
rename, count = os.replace, [0]
def replace(*paths):
    rename(*paths)
    count[0] += 1
    if count[0] == {moment}: os.kill(os.getpid(), 9)
os.replace = replace
with atomic({str(tmp_path / "x")!r}) as partial:
    partial.mkdir()
    (partial / "new").touch()
"""
        killed(code)
        whole = {tuple(os.listdir(folder)) for folder in tmp_path.iterdir()}
        assert whole == {("old",), ("new",)}
        with atomic(tmp_path / "x") as partial:
            partial.mkdir()
        assert os.listdir(tmp_path) == ["x"]


def test_discard_leaves_nothing(tmp_path):
    (tmp_path / "x").mkdir()
    discard(tmp_path / "x")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- signals


def stopped_by(number, command, seen):
    process = subprocess.Popen(
        [BIN / "neon", *words(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while not seen():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_sighup_saves_as_sigterm_does(mini, tmp_path):
    out = tmp_path / "run"
    log = out / "log.jsonl"
    code, said = stopped_by(signal.SIGHUP, LONG["selftrain"](mini, out), lambda: log.exists() and log.read_text())
    assert code == 129 and re.fullmatch(r"stopped by SIGHUP: the state after \d+ images is saved in .*resumes\n", said)
    assert os.listdir(tmp_path) == ["run"]


def test_sighup_that_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    code = "import os, signal; from neon.cli import command_line\n"
    code += "command_line(lambda: (os.kill(os.getpid(), signal.SIGHUP), print('still here')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")
