"""Work in forked processes with limits on time and memory: what it ends in, whatever that is."""

import os
import pickle
import resource
import select
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from neon import NeonError

MEMORY = 2 * 2**30  # bytes that an item may take beyond what the process has
SECONDS = 5.0  # that an item may compute: a busy machine makes a case slow, but not this number large
WALL = 120.0  # seconds until an item counts as waiting for ever
BATCH = 1000  # items of one process, at most
SHARES = 4  # parts of the items for each of several processes, so that they end together
FINE = ("refused", "read")
OVER_TIME = (signal.SIGALRM, signal.SIGPROF)


class Finding(Exception):
    """What an item is found to do, and how it shows. kind: 'lost', 'executed', 'traceback', 'lines', …"""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """Seconds that an item may compute (its own process, not those it starts; 0 is no limit), and that it may take."""

    cpu: float
    wall: float


def outcomes(
    work: Callable[[object], object], items: Sequence, jobs: int = 1, limits: Limits | None = None
) -> Iterator[tuple[str, str]]:
    """(kind, text) of each item, in their order, from so many processes at a time; one that dies is followed by
    another for the items that it has not done.

    work(item): called in a process whose current folder is new, empty, and removed afterwards. kind: 'refused' if it
    raises NeonError with one line, text; 'lines' if with more; 'read' if it returns; 'executed' if a file is there
    afterwards that work had no reason to write (it removes its own); 'hang', 'memory', 'crash', 'traceback', and what
    a Finding says. limits: by default SECONDS and WALL.
    """
    limits = limits or Limits(SECONDS, WALL)
    size = min(BATCH, -(-len(items) // (jobs * SHARES if jobs > 1 else 1)) or 1)
    waiting = deque(range(i, min(i + size, len(items))) for i in range(0, len(items), size))
    running: list[_Process] = []
    found: dict[int, tuple[str, str]] = {}
    try:
        for number in range(len(items)):
            while number not in found:
                while waiting and len(running) < jobs:
                    running.append(_Process(work, items, waiting.popleft(), limits))
                select.select([file for process in running for file in process.files], [], [])
                for process in running:
                    found |= process.read()
                    if process.over and process.left:
                        waiting.appendleft(process.left)
                running = [process for process in running if not process.over]
            yield found.pop(number)
    finally:  # also if the caller has seen enough
        for process in running:
            process.end()


class _Process:
    """A forked process that does the items of these numbers, one after the other, until it dies."""

    def __init__(self, work: Callable, items: Sequence, numbers: range, limits: Limits):
        self.left, self.over, self._text = numbers, False, b""
        self._folder = tempfile.TemporaryDirectory(prefix="neon-hostile-")
        inward, outward = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(inward)
            _child(work, [items[number] for number in numbers], self._folder.name, outward, limits)
        os.close(outward)
        os.set_blocking(inward, False)
        # Something to read; or it has ended, though what it has started may still hold the pipe.
        self.files = (inward, os.pidfd_open(self._pid))

    def read(self) -> dict[int, tuple[str, str]]:
        """What is new: the outcomes of these numbers. `over` if there will be no more."""
        ended = bool(select.select([self.files[1]], [], [], 0)[0])  # asked first, so that no line comes afterwards
        while data := self._available():
            self._text += data
        *lines, self._text = self._text.split(b"\n")
        outcomes = [tuple(line.decode(errors="replace").partition("\t")[::2]) for line in lines]
        numbers, self.left = self.left[: len(lines)], self.left[len(lines) :]
        return dict(zip(numbers, outcomes, strict=True)) | (self._died() if ended else {})

    def _available(self) -> bytes:
        try:
            return os.read(self.files[0], 2**16)
        except BlockingIOError:
            return b""

    def _died(self) -> dict[int, tuple[str, str]]:
        status = self.end()
        if not self.left:
            return {}
        number, self.left = self.left[0], self.left[1:]
        signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return {number: ("hang" if signalled in OVER_TIME else "crash", f"signal {signalled}")}

    def end(self) -> int:
        """Kill it and all that it has started; its status."""
        self.over = True
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # it may not have a group yet; nothing, if it has ended
        _, status = os.waitpid(self._pid, 0)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        for file in self.files:
            os.close(file)
        self._folder.cleanup()
        return status


_limits = Limits(0, 0)  # of the items of this process


def _child(work: Callable, items: Sequence, folder: str, outward: int, limits: Limits):
    """Never returns. Signals end it without a handler: what does not come back to Python hangs too."""
    global _limits
    try:
        _limits = limits
        os.setsid()
        for number in OVER_TIME:
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(folder)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        for item in items:
            _time(limits)
            line = _outcome(work, item, folder)
            _time(Limits(0, 0))
            os.write(outward, line.encode(errors="replace")[:4000] + b"\n")
    finally:
        os._exit(0)


def _time(limits: Limits) -> None:
    """From now on."""
    signal.setitimer(signal.ITIMER_PROF, limits.cpu)
    signal.setitimer(signal.ITIMER_REAL, limits.wall)


@contextmanager
def untimed() -> Iterator[None]:
    """In work: what the block takes, to make an input, say, does not count."""
    _time(Limits(0, _limits.wall))
    try:
        yield
    finally:
        _time(_limits)


def _outcome(work: Callable, item, folder: str) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        work(item)
        kind, text = "read", ""
    except NeonError as error:
        text = str(error)
        kind = "refused" if "\n" not in text else "lines"
    except Finding as finding:
        kind, text = finding.kind, str(finding)
    except MemoryError:
        kind, text = "memory", "MemoryError"
    except BaseException as error:
        kind, text = "traceback", f"{type(error).__name__}: {error}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if left := os.listdir(folder):
        kind, text = "executed", f"wrote {', '.join(left)}"
        _empty(folder)
    elif grown > MEMORY:
        kind = "memory"
    return f"{kind}\t{' '.join(text.split())}"


def _empty(folder: str) -> None:
    for entry in Path(folder).iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def apart(function: Callable[[], object]):
    """What the function returns, called in a forked process: no thread that a library starts for it, and nothing else
    that a fork cannot take along, stays in this one. Raises RuntimeError if it fails."""
    inward, outward = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(outward, "wb") as file:
                pickle.dump(function(), file)
            os._exit(0)
        finally:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(outward)
    with os.fdopen(inward, "rb") as file:
        found = file.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{function} failed in its process")
    return pickle.loads(found)
