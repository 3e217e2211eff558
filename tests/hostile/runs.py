"""Commands in forked processes, which are killed, signalled and watched; and what they leave behind."""

import csv
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from processes import files, free_port

from hostile.workers import Finding

CPU, WALL = 120.0, 1200.0  # seconds that a command may compute, and take, until it counts as hanging
PATIENCE = 5.0  # seconds until the others are stopped when one has failed: on a busy machine they say why meanwhile
GRACE = 30.0  # seconds that torchrun gives the other processes when one has ended with an error
LOOK = 0.002  # seconds between two looks at a process


@dataclass
class _Forked:
    """A process; its status is that of subprocess, once it has ended."""

    pid: int
    errors: int  # where its stderr is read
    status: int | None = None
    said: str = ""
    seconds: float = 0.0  # that it has computed

    def look(self) -> None:
        """Has it ended?"""
        if self.status is not None:
            return
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
            self.seconds = used.ru_utime + used.ru_stime
            with os.fdopen(self.errors, errors="replace") as file:
                self.said = file.read()
        else:
            with suppress(OSError):
                self.seconds = time.clock_gettime(~self.pid << 3 | 2)  # the kernel's clock of another process

    def signal(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)


class Job:
    """A program in one process, or in several that find each other as under torchrun. All end with it.

    run: the program, which may raise SystemExit. largest: bytes that a file may have, as on a disk that is full then.
    """

    def __init__(self, run: Callable[[], object], ranks: int = 1, largest: int | None = None):
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        places = [meet | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)] if ranks > 1 else [{}]
        self.processes = [_fork(run, place, largest) for place in places]

    def until(self, seconds: float) -> bool:
        """Wait until the first process has computed so long; False if it has ended before."""
        first, deadline = self.processes[0], time.monotonic() + WALL
        while True:
            first.look()
            if first.status is not None or time.monotonic() > deadline:
                return False
            if first.seconds >= seconds:
                return True
            time.sleep(LOOK)

    def signal(self, number: int) -> None:
        """To all."""
        for process in self.processes:
            process.signal(number)

    def end(self, patience: float = PATIENCE) -> list[_Forked]:
        """Wait for all. As torchrun does: when one has failed, the others get SIGTERM and, much later, SIGKILL.

        patience: seconds before the SIGTERM; torchrun has none. Raises Finding if they compute or take too long."""
        began, failed, asked = time.monotonic(), None, False
        while any(process.status is None for process in self.processes):
            for process in self.processes:
                process.look()
            now = time.monotonic()
            if sum(process.seconds for process in self.processes) > CPU or now - began > WALL:
                self._kill()
                used = [round(process.seconds, 1) for process in self.processes]
                raise Finding("hang", f"after {now - began:.0f} s, of which it computed {used}")
            if failed is None and any(process.status for process in self.processes):
                failed = now
            if failed is not None and not asked and now - failed >= patience:
                asked = True
                self.signal(signal.SIGTERM)
            if failed is not None and now - failed > patience + GRACE:
                self.signal(signal.SIGKILL)
            time.sleep(LOOK)
        return self.processes

    def _kill(self) -> None:
        self.signal(signal.SIGKILL)
        while any(process.status is None for process in self.processes):
            for process in self.processes:
                process.look()
            time.sleep(LOOK)


def _fork(run: Callable[[], object], place: dict[str, str], largest: int | None) -> _Forked:
    errors, outward = os.pipe()
    pid = os.fork()
    if pid:
        os.close(outward)
        return _Forked(pid, errors)
    status = 1
    try:
        _begin(outward, place, largest)
        run()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def _begin(outward: int, place: dict[str, str], largest: int | None) -> None:
    """What a program finds when it is started: its streams, signals as they are by default, its environment."""
    os.dup2(outward, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False, errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="replace")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(place, NEON_PROGRESS_SECONDS="inf")
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


# ---------------------------------------------------------------- what they leave


@dataclass(frozen=True)
class Whole:
    """What an unbroken run leaves, how many bytes its files have, and how long its first process computes."""

    seconds: float
    found: dict[str, object] = field(repr=False)
    sizes: tuple[int, ...] = ()


def unbroken(run: Callable[[], object], out: str, ranks: int = 1) -> Whole:
    """Of a program that writes into the folder `out`. Raises Finding if it fails."""
    first, *others = Job(run, ranks).end()
    if any(process.status for process in (first, *others)):
        raise Finding("traceback", f"unbroken, it ends with {first.status}: {first.said}")
    sizes = {path.stat().st_size for path in Path(out).rglob("*") if path.is_file()}
    return Whole(first.seconds, contents(Path(out)), tuple(sorted(sizes)))


def contents(folder: Path) -> dict[str, object]:
    """Every file below the folder, hidden ones too: its bytes, or its values where they may differ in their last
    digits; without what a clock has measured."""
    return {name: _values(name, data) for name, data in files(folder).items()}


def _values(name: str, data: bytes) -> object:
    try:
        match Path(name).suffix:
            case ".json":
                return _timeless(json.loads(data))
            case ".jsonl":
                return [_timeless(json.loads(line)) for line in data.splitlines()]
            case ".csv":
                return [list(map(_number, row)) for row in csv.reader(data.decode().splitlines())]
            case ".npz":
                return _arrays(data)
    except (ValueError, OSError, EOFError):
        pass  # torn
    return data


def _timeless(value: object) -> object:
    return {key: v for key, v in value.items() if key != "seconds"} if isinstance(value, dict) else value


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _arrays(data: bytes) -> dict[str, list]:
    import io

    import numpy as np

    with np.load(io.BytesIO(data)) as found:
        return {name: found[name].tolist() for name in found.files}


def difference(found: dict[str, object], wanted: dict[str, object]) -> str | None:
    """The first file that is lost, left behind, or another; None if there is none."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} is left behind"
        if not _alike(found[name], wanted[name]):
            return f"{name} is another: {str(found[name])[:200]} in place of {str(wanted[name])[:200]}"
    return None


def _alike(one: object, other: object) -> bool:
    """The same, up to the order of floating-point sums."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one == other
