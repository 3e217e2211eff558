"""Mutated files, each read in a forked process with limits on time and memory."""

import os
import random
import resource
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from neon import NeonError

MEMORY = 2 * 2**30  # bytes that a reader may take beyond what the process has
SECONDS = 5.0  # that a file may take
BATCH = 50  # files of one process: what it dies of is found by reading them one by one
TOKENS = (b"\0", b"\xff", b"-1", b"0", b"[", b"{", b'"', b"null", b"1e999", b"18446744073709551615", b"NaN")
TOKENS += tuple((2**n - one).to_bytes(8, "little") for n in (31, 32, 63, 64) for one in (0, 1) if 2**n - one < 2**64)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to eight changes: bits, bytes, numbers, words of TOKENS, pieces cut, doubled or moved."""
    found = bytearray(data)
    for _ in range(1 + int(rng.expovariate(0.7)) % 8):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 512) + 1)
        size = min(1 + int(rng.expovariate(0.1)), 64)
        match rng.randrange(7):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(found):
                found[at] = rng.randrange(256)
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[at : at + size]
            case 4:
                token = rng.choice(TOKENS)
                found[at : at + len(token) * rng.randrange(2)] = token
            case 5:
                other = rng.randrange(len(found) + 1)
                found[at : at + size] = found[other : other + size]
            case _ if rng.random() < 0.2:
                del found[at:]
    return bytes(found)


@dataclass
class Report:
    """How often a reader refused, read, failed, hung, or took too much memory; the files of all but the first two."""

    counts: Counter = field(default_factory=Counter)
    found: list[tuple[str, str, bytes]] = field(default_factory=list)  # (kind, what was raised, file)

    @property
    def tried(self) -> int:
        return sum(self.counts.values())


def fuzz(read: Callable[[Path], object], seeds: Iterable[bytes], suffix: str, count: int, seed: int = 0) -> Report:
    """Read `count` mutated files. read: given a path, may raise NeonError and nothing else.

    The same arguments give the same files.
    """
    seeds, report = list(seeds), Report()
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, count, BATCH):
            files = list(mutated(seeds, seed, range(start, min(start + BATCH, count))))
            for kind, text, index in tried(read, files, Path(folder), suffix):
                report.counts[kind] += 1
                if kind not in ("refused", "read"):
                    report.found.append((kind, text, files[index]))
    return report


def mutated(seeds: list[bytes], seed: int, numbers: Iterable[int]) -> Iterator[bytes]:
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        yield mutate(seeds[number % len(seeds)], rng)


def tried(read: Callable, files: list[bytes], folder: Path, suffix: str) -> Iterator[tuple[str, str, int]]:
    """(kind, what was raised, number) of each file; a process that dies is followed by one for the next file."""
    start = 0
    while start < len(files):
        done = yield from _process(read, files, start, folder, suffix)
        start = done


def _process(read: Callable, files: list[bytes], start: int, folder: Path, suffix: str):
    """Read files from number `start` on in one forked process; returns the number of the next to read."""
    inward, outward = os.pipe()
    child = os.fork()
    if not child:
        os.close(inward)
        _child(read, files, start, folder, suffix, outward)
    os.close(outward)
    index = start
    with os.fdopen(inward, "r", errors="replace") as lines:
        for line in lines:
            kind, _, text = line.rstrip("\n").partition("\t")
            yield kind, text, index
            index += 1
    _, status = os.waitpid(child, 0)
    if index < len(files):
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        yield "hang" if number in (signal.SIGALRM, signal.SIGXCPU) else "crash", f"signal {number}", index
        index += 1
    return index


def _child(read: Callable, files: list[bytes], start: int, folder: Path, suffix: str, outward: int):
    """Never returns. SIGALRM ends it without a handler: a reader that does not come back to Python hangs too."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        path = folder / f"mutated{suffix}"
        for data in files[start:]:
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            line = _outcome(read, path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(outward, line.encode(errors="replace")[:4000] + b"\n")
    finally:
        os._exit(0)


def _outcome(read: Callable, path: Path) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    then = time.monotonic()
    try:
        read(path)
        kind, text = "read", ""
    except NeonError as error:
        text = str(error)
        kind = "refused" if "\n" not in text else "lines"
    except MemoryError:
        kind, text = "memory", "MemoryError"
    except BaseException as error:
        kind, text = "traceback", f"{type(error).__name__}: {error}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > MEMORY:
        kind = "memory"
    elif time.monotonic() - then > SECONDS:
        kind = "hang"
    return f"{kind}\t{' '.join(text.split())}"
