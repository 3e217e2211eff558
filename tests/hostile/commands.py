"""The commands that write, and what may happen to them: killed, stopped, without room, or two of them at once.

Every case runs a command in the current folder, where it writes below OUT, interrupts it at a moment that a generator
of random numbers chooses, runs the same command to its end, and compares what is there with what an unbroken run
leaves. A moment is a share of the time that the command computes, so a busy machine does not move it.
"""

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

from processes import words

from hostile.runs import Job, Whole, contents, difference
from hostile.workers import Finding
from neon import NeonError
from neon.cli import main

OUT = "made"
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}  # and the exit status after them
SMALLEST = 100  # bytes of a file that a full disk still takes: that of a lock has fewer
SOON = 0.5  # of an unbroken run's seconds: in this time a signal is heard, and what can be saved is saved
BEGUN = 0.02  # seconds of computing after which a command attends to signals


@dataclass(frozen=True)
class Command:
    """words(world): of a command that writes below OUT. ranks: numbers of processes that it is tried with."""

    name: str
    words: Callable[[SimpleNamespace], Sequence]
    ranks: tuple[int, ...] = (1, 2)

    def program(self, world: SimpleNamespace) -> Callable[[], None]:
        return partial(main, words(self.words(world)))


def commands() -> list[Command]:
    """All that take long, and two that do not. world: that of tests/world.py with a search (see searched)."""
    training = ("--family", "edm", "--budget", 512, "--batch", 32, "--snapshot", 128, "--save_every", 64)
    return [
        Command(
            "train",
            lambda w: [
                *("train", "--network", "digits", "--recipe", "digits_base", "--data", w.data),
                *(*training, "--out", f"{OUT}/run"),
            ],
        ),
        Command(
            "selftrain",
            lambda w: [
                *("selftrain", "--base", w.base, "--recipe", "digits", "--data", w.data),
                *(*training, "--out", f"{OUT}/run"),
            ],
        ),
        Command("generate", lambda w: [*_generate(w), "--seeds", "0-95", "--batch_size", 8]),
        Command("generate --shard", lambda w: [*_generate(w), "--seeds", "0-95", "--batch_size", 8, "--shard", 16]),
        Command("search", lambda w: [*_search(w), "-w", "0:2", "--evaluations", 5]),
        Command("search --method grid", lambda w: [*_search(w), "-w", "0,0.5,1,1.5", "--method", "grid"]),
        Command(
            "final",
            lambda w: [
                *("final", *w.measuring, "--base", w.base, "--search", w.search, "--metrics", "fid"),
                *("--seeds", "100-163", "--batch_size", 16, "--out", f"{OUT}/final.jsonl"),
            ],
        ),
        Command(
            "evaluate",
            lambda w: [
                *("evaluate", *w.measuring, "--base", w.base, "--selftrained", w.snapshots[0], "-w", 1),
                *("--seeds", "0-127", "--batch_size", 16, "--metrics", "fid,is", "--keep_features"),
                *("--out", f"{OUT}/row.json"),
            ],
        ),
        Command(
            "reference",
            lambda w: [
                *("reference", "--images", w.data, *w.features, "--batch_size", 4, "--keep", 100),
                *("--out", f"{OUT}/ref.npz"),
            ],
        ),
        Command(
            "merge",
            lambda w: [
                *("merge", "--base", w.base, "--selftrained", w.snapshots[0], "-w", "0.5,1,1.5"),
                *("--out", f"{OUT}/neon-{{w}}.safetensors"),
            ],
            (1,),
        ),
        Command("convert", lambda w: ["convert", w.base, f"{OUT}/base.safetensors"], (1,)),
    ]


def _generate(world) -> list:
    return ["generate", *world.sampling, "--model", world.base, "--out", f"{OUT}/S"]


def _search(world) -> list:
    measuring = (*world.measuring, "--base", world.base, "--selftrained", world.snapshots[0])
    options = ("--metrics", "fid", "--seeds", "0-63", "--batch_size", 16)
    return ["search", *measuring, *options, "--out", f"{OUT}/search.jsonl"]


def searched(world: SimpleNamespace) -> SimpleNamespace:
    """The world with what `neon search` wrote, for `neon final`."""
    from processes import neon

    path = world.path / "search.jsonl"
    if not path.exists():
        measuring = (*world.measuring, "--base", world.base, "--selftrained", world.snapshots[0], "--metrics", "fid")
        neon("search", *measuring, "--seeds", "0-63", "-w", "0,1", "--method", "grid", "--out", path)
    return SimpleNamespace(**vars(world) | {"search": path})


# ---------------------------------------------------------------- cases


@contextmanager
def _cleared() -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(OUT, ignore_errors=True)


def killed(run: Callable, ranks: int, whole: Whole, random: Random) -> None:
    """One SIGKILL, or two in a row; of several processes all are killed, or one and torchrun stops the others."""
    with _cleared():
        for _ in range(random.choice((1, 1, 2))):
            job = Job(run, ranks)
            if job.until(whole.seconds * random.random()):
                who = random.choice([job.processes, [random.choice(job.processes)]])
                for process in who:
                    process.signal(signal.SIGKILL)
            job.end(patience=0)
        _resumes(run, ranks, whole)


def stopped(run: Callable, ranks: int, whole: Whole, random: Random) -> None:
    """A signal of SIGNALS to all processes: one line of the first at most, which says what is kept."""
    number = random.choice(list(SIGNALS))
    with _cleared():
        job = Job(run, ranks)
        if job.until(max(BEGUN, whole.seconds * random.random())):
            job.signal(number)
        then = job.processes[0].seconds
        ended = job.end()
        if ranks == 1 and ended[0].seconds - then > SOON * whole.seconds + BEGUN:
            raise Finding("hang", f"it computed {ended[0].seconds - then:.1f} s more after the signal")
        allowed = {SIGNALS[number], 0} | ({-number} if difference(contents(Path(OUT)), whole.found) is None else set())
        _is_calm(ended[0], allowed, lines=1 if ended[0].status else 0)
        for process in ended[1:]:
            _is_calm(process, {*allowed, -signal.SIGTERM}, lines=0)  # the launcher stops those that still run
        said, name = ended[0].said, signal.Signals(number).name
        if said and not (said.startswith(f"stopped by {name}: ") and number != signal.SIGINT):
            raise Finding("lines", f"{name}: {said}")
        _resumes(run, ranks, whole)


def filled(run: Callable, ranks: int, whole: Whole, random: Random) -> None:
    """No file may grow beyond a size, as on a disk that is full then. Raises NeonError if the command needs more."""
    largest = random.choice([random.randrange(SMALLEST, SMALLEST + whole.sizes[-1]), random.choice(whole.sizes) - 1])
    with _cleared():
        ended = Job(run, ranks, max(largest, SMALLEST)).end()
        for process in ended:  # of which the launcher stops some
            _is_calm(process, {0, 1, SIGNALS[signal.SIGTERM], -signal.SIGTERM}, lines=1 if process.status else 0)
        _nothing_unfinished(Path(OUT))
        said = [process.said.strip() for process in ended if process.status == 1 and process is ended[0]]
        if said and not any(" full " in line or " free" in line for line in said):
            raise Finding("lines", f"at {largest} bytes: {said}")
        _resumes(run, ranks, whole)
    if said:
        raise NeonError(said[0])


def paired(run: Callable, ranks: int, whole: Whole, random: Random) -> None:
    """The same command twice, the second begins when the first has computed for a while: one of them writes, and the
    other is refused, or finds all done."""
    with _cleared():
        one = Job(run, ranks)
        one.until(whole.seconds * random.random() ** 2)
        other = Job(run, ranks)
        firsts = [job.end()[0] for job in (one, other)]
        if all(first.status for first in firsts):
            raise Finding("lost", f"both failed: {[first.said for first in firsts]}")
        for first in firsts:
            _is_calm(first, {0, 1}, lines=1 if first.status else 0)
            if first.status and " is writing " not in first.said:
                raise Finding("lines", first.said)
        _is_whole(whole)
        _resumes(run, ranks, whole)


def _resumes(run: Callable, ranks: int, whole: Whole) -> None:
    """The same command, which nothing happens to, ends with all that an unbroken one leaves."""
    for process in Job(run, ranks).end():
        if process.status:
            kind = "traceback" if "Traceback" in process.said else "lost"
            raise Finding(kind, f"the same command ended with {process.status}: {process.said}")
    _is_whole(whole)


def _is_whole(whole: Whole) -> None:
    if found := difference(contents(Path(OUT)), whole.found):
        raise Finding("lost", found)


def _is_calm(process, allowed: set[int], lines: int) -> None:
    """Its status is one of these, and it says so many lines at most."""
    if process.status not in allowed or "Traceback" in process.said:
        raise Finding("traceback", f"status {process.status}: {process.said}")
    if len(process.said.splitlines()) > lines:
        raise Finding("lines", f"status {process.status}: {process.said}")


def _nothing_unfinished(folder: Path) -> None:
    if left := [path.name for path in folder.rglob(".*")]:
        raise Finding("lost", f"left {left}")


KINDS = {"kills": killed, "signals": stopped, "full disk": filled, "pairs": paired}
