"""Mutated files, each read in a forked process with limits on time and memory."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostile.workers import FINE, outcomes

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
    found: list[tuple[str, str, int]] = field(default_factory=list)  # (kind, what was raised, number of the file)

    @property
    def tried(self) -> int:
        return sum(self.counts.values())


def fuzz(
    read: Callable[[Path], object], seeds: Iterable[bytes], suffix: str, numbers: Iterable[int], seed: int = 0
) -> Report:
    """Read the mutated files of these numbers. read: given a path, may raise NeonError and nothing else.

    The same seed and number give the same file: `mutated`.
    """
    numbers, report = list(numbers), Report()
    work = reading(read, list(seeds), suffix, seed)
    for number, (kind, text) in zip(numbers, outcomes(work, numbers)):
        report.counts[kind] += 1
        if kind not in FINE:
            report.found.append((kind, text, number))
    return report


def reading(read: Callable[[Path], object], seeds: Sequence[bytes], suffix: str, seed: int) -> Callable[[int], None]:
    """For outcomes: writes the mutated file of a number into the current folder, reads and removes it."""

    def work(number: int) -> None:
        file = Path.cwd() / f"mutated{suffix}"
        file.write_bytes(mutated(seeds, seed, number))
        try:
            read(file)
        finally:
            file.unlink()

    return work


def mutated(seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """One of the seeds, the file of that number changed."""
    return mutate(seeds[number % len(seeds)], random.Random(f"{seed} {number}"))
