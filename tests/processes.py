"""The commands as their users meet them: as processes that can fail, be killed and be started again."""

import contextlib
import io
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from neon.cli import main
from neon.weights.checkpoint import load_weights

BIN = Path(sys.prefix, "bin")
ROOT = Path(__file__).parents[1]

# Processes forked from one that has imported torch: a command starts in a tenth of a second.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["neon.cli", "neon.cli.commands", "edm.family", "neon.shard"])


def words(argv) -> list[str]:
    return [str(word) for word in argv]


def neon(*argv) -> str:
    """Run a command in this process; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(words(argv))
    return out.getvalue()


def error_of(*argv, prints: bool = False) -> str:
    """Run a command that must fail as users should see it: one line, status 1; the line. prints: results before it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main(words(argv))
    assert exit.value.code == 1 and bool(out.getvalue()) == prints
    assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1
    return err.getvalue().strip()


def start(*argv, **env):
    """A command in a process of its own (multiprocessing's: kill, join, exitcode)."""
    process = forkserver.Process(target=_run, args=(words(argv), words(sys.path), env), daemon=True)
    process.start()
    return process


def _run(argv, path, env):
    sys.path[:] = path
    os.environ.update(env)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        main(argv)


def ranks(n: int, *argv) -> list:
    """A command in n processes that find each other as under torchrun."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    return [start(*argv, RANK=str(i), LOCAL_RANK=str(i), **meet) for i in range(n)]


def job(n: int, function, *args) -> None:
    """function(*args) in n processes that find each other as under torchrun; it is that of a module."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    each = [meet | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(n)]
    started = [forkserver.Process(target=_call, args=(function, args, env), daemon=True) for env in each]
    for process in started:
        process.start()
    finish(*started)


def _call(function, args, env) -> None:
    os.environ.update(env)
    function(*args)


def kill_when(condition, *processes, delay: float = 0, timeout: float = 60) -> None:
    """SIGKILL the processes as soon as condition() holds, or so many seconds later; they must all have been running."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert all(process.is_alive() for process in processes) and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL


def finish(*processes) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def goes_on(training, folder: Path) -> Path:
    """Train in one go, and killed after the first snapshot and typed again: every file of weights agrees.

    training(out): the command, with a snapshot at 16 images. Returns the folder of the run in one go.
    """
    whole, resumed = folder / "whole", folder / "killed"
    neon(*training(whole))
    killed = start(*training(resumed))
    kill_when((resumed / "snapshot-000000016.safetensors").exists, killed)
    finish(start(*training(resumed)))
    written = sorted(path.name for path in whole.glob("*-*.safetensors"))
    assert len(written) > 1
    for name in written:
        one, other = load_weights(whole / name), load_weights(resumed / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    return whole


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(n: int, *program, nodes: int = 1, check: bool = True) -> list[subprocess.CompletedProcess]:
    """Run `program` ('-m', 'neon.cli', … or a script and its options) under torchrun, one launcher per node."""
    port = free_port()
    meet = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    launchers = [
        subprocess.Popen(
            [BIN / "torchrun", *meet, f"--node_rank={i}", f"--nproc_per_node={n}", *words(program)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(nodes)
    ]
    done = []
    for launcher in launchers:
        out, err = launcher.communicate(timeout=120)
        assert not check or launcher.returncode == 0, err
        done.append(subprocess.CompletedProcess(launcher.args, launcher.returncode, out, err))
    return done


def run(command: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a line of the shell as a user would, with the project's environment active."""
    variables = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = os.pathsep.join(filter(None, [value, os.environ.get(name)]))
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=1500)


def released_fid(
    command: str, cwd: Path, processes: int, n: int, batch: int, features: str = "--features inception:random"
) -> float:
    """What a command of the README prints, with fewer images and processes and Inception with random weights."""
    for pattern, value in [
        (r"--nproc_per_node=8", f"--nproc_per_node={processes}"),
        (r"--num_images 50000", f"--num_images {n}"),
        (r"--batch_size \d+", f"--batch_size {batch}"),
    ]:
        command, found = re.subn(pattern, value, command)
        assert found == 1
    result = run(f"{command} --metrics fid {features}", cwd)
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = result.stdout.strip().splitlines()
    assert re.fullmatch(rf"FID \d+\.\d+  \([^()]+ px, cfg [\d.]+.*, {n} images, [\d.]+ s\)", line)
    return float(line.split()[1])


def default_of(option: str, help: str) -> str:
    """The default that a command's help shows for an option."""
    return re.search(rf"--{option} [A-Z_]+\s(?:(?!\n  --).)*?\(default\s+([^)]*)\)", help, flags=re.DOTALL)[1]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, without what a clock has measured for log.jsonl."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    clock = rb', "images_per_second": [\d.]+, "time": "[^"]+"'
    return {name: re.sub(clock, b"", text) if name.endswith("log.jsonl") else text for name, text in found.items()}
