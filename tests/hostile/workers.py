"""Work in forked processes with limits on time and memory: what it ends in, whatever that is."""

import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from neon import NeonError

MEMORY = 2 * 2**30  # bytes that an item may take beyond what the process has
SECONDS = 5.0  # that an item may take
BATCH = 1000  # items of one process, at most
FINE = ("refused", "read")


class Finding(Exception):
    """What an item is found to do, and how it shows. kind: 'lost', 'executed', 'traceback', 'lines', …"""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def outcomes(work: Callable[[object], object], items: Sequence) -> Iterator[tuple[str, str]]:
    """(kind, text) of each item, in their order; a process that dies is followed by one for the next item.

    work(item): called in a process whose current folder is new, empty, and removed afterwards. kind: 'refused' if it
    raises NeonError with one line, text; 'lines' if with more; 'read' if it returns; 'executed' if a file is there
    afterwards that work had no reason to write (it removes its own); 'hang', 'memory', 'crash', 'traceback', and what
    a Finding says.
    """
    start = 0
    while start < len(items):
        with tempfile.TemporaryDirectory(prefix="neon-hostile-") as folder:
            start += yield from _process(work, items[start : start + BATCH], folder)


def _process(work: Callable, items: Sequence, folder: str):
    """Do the items in one forked process until it dies; returns how many are done."""
    inward, outward = os.pipe()
    child = os.fork()
    if not child:
        os.close(inward)
        _child(work, items, folder, outward)
    os.close(outward)
    done = 0
    try:
        with os.fdopen(inward, "r", errors="replace") as lines:
            for line in lines:
                kind, _, text = line.rstrip("\n").partition("\t")
                yield kind, text
                done += 1
    except BaseException:  # of the caller, who has seen enough
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if done < len(items):
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        yield "hang" if number in (signal.SIGALRM, signal.SIGXCPU) else "crash", f"signal {number}"
        done += 1
    return done


def _child(work: Callable, items: Sequence, folder: str, outward: int):
    """Never returns. SIGALRM ends it without a handler: what does not come back to Python hangs too."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(folder)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        for item in items:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            line = _outcome(work, item, folder)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(outward, line.encode(errors="replace")[:4000] + b"\n")
    finally:
        os._exit(0)


def _outcome(work: Callable, item, folder: str) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    then = time.monotonic()
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
    elif time.monotonic() - then > SECONDS:
        kind = "hang"
    return f"{kind}\t{' '.join(text.split())}"


def _empty(folder: str) -> None:
    for entry in Path(folder).iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
