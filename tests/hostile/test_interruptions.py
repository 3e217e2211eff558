"""Commands that are killed, stopped, without room, or two at once, as the campaign tries them; and what is planted in
such a command is found."""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from hostile import runs, worlds
from hostile.commands import KINDS, OUT, commands, killed, paired
from hostile.runs import Whole, contents, difference, unbroken
from hostile.workers import Finding, Limits, outcomes
from neon.cli import command_line
from neon.files import atomic, filling
from neon.lock import writing
from neon.stop import deferred

LIMITS = Limits(0, 120)
PIECES = 5


def busy(seconds=0.02):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def careful():
    """Files one after the other, with what neon has for that; those that are there are not made again."""
    with writing(f"{OUT}/x"):
        for number in range(PIECES):
            if not Path(OUT, str(number)).exists():
                busy()
                with atomic(Path(OUT, str(number))) as partial:
                    partial.write_bytes(bytes(300))


def half_files():
    """Written in place: what a kill leaves of one counts as done."""
    Path(OUT).mkdir(exist_ok=True)
    for number in range(PIECES):
        path = Path(OUT, str(number))
        if not path.exists():
            with path.open("wb", buffering=0) as file:
                file.write(bytes(150))
                busy()
                file.write(bytes(150))


def rows(path=Path(OUT, "rows.jsonl")):
    """Appended without a lock."""
    path.parent.mkdir(exist_ok=True)
    there = path.read_text().splitlines() if path.exists() else []
    for number in range(PIECES):
        if f'{{"w": {number}}}' not in there:
            busy()
            with path.open("a") as file:
                file.write(f'{{"w": {number}}}\n')


def leaves_partial():
    """Atomic, but nobody removes what a killed run has left."""
    Path(OUT).mkdir(exist_ok=True)
    for number in range(PIECES):
        partial = Path(OUT, f".{number}-{os.getpid()}.partial")
        with filling(partial), partial.open("wb") as file:
            busy()
            file.write(bytes(300))
        partial.rename(Path(OUT, str(number)))


def deaf():
    """Takes note of signals, and does nothing about them."""
    with deferred():
        careful()


def breaks():
    if Path(OUT).exists():
        raise KeyError("planted")
    careful()


def hangs():
    if Path(OUT).exists():
        busy(60)
    careful()


def found(kind, program, count=4, ranks=1):
    """What the cases of a kind find out about a program."""

    def run():
        command_line(program)

    def work(number):
        KINDS[kind](run, ranks, whole, Random(number))

    here = Path.cwd()
    whole = unbroken(run, OUT)
    for path in sorted(here.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return {outcome for outcome, _ in outcomes(work, range(count), limits=LIMITS)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_careful_program_stands_it_all(kind):
    assert found(kind, careful, count=3) <= {"read", "refused"}


@pytest.mark.parametrize(
    ("kind", "program", "what"),
    [
        ("kills", half_files, "lost"),
        ("kills", leaves_partial, "lost"),
        ("kills", breaks, "lost"),
        ("signals", half_files, "lost"),
        ("signals", deaf, "hang"),
        ("full disk", half_files, "lines"),
        ("full disk", leaves_partial, "lost"),
        ("pairs", rows, "lost"),
    ],
)
def test_what_is_planted_is_found(kind, program, what):
    assert what in found(kind, program)


def test_a_command_that_hangs_when_it_resumes_is_found(monkeypatch):
    monkeypatch.setattr(runs, "CPU", 1.0)
    assert "hang" in found("kills", hangs, count=2)


def test_differences():
    one = {"a": b"x", "rows.jsonl": [{"fid": 1.0, "w": 1}]}
    assert difference(one, one) is None
    assert difference(one | {"rows.jsonl": [{"fid": 1.00001, "w": 1}]}, one) is None
    assert "rows.jsonl is another" in difference(one | {"rows.jsonl": [{"fid": 1.01, "w": 1}]}, one)
    assert difference(one | {".b.partial": b""}, one) == ".b.partial is left behind"
    assert difference({"a": b"x"}, one) == "rows.jsonl is missing"
    Path("x.jsonl").write_text('{"w": 1, "seconds": 2}\n{"w"')
    assert contents(Path.cwd()) == {"x.jsonl": b'{"w": 1, "seconds": 2}\n{"w"'}
    Path("x.jsonl").write_text('{"w": 1, "seconds": 2}\n')
    assert contents(Path.cwd()) == {"x.jsonl": [{"w": 1}]}


# ---------------------------------------------------------------- some of the real commands


def case_of(name, world, case, ranks, seed):
    """A case of a command, in a process that may be forked: those that train are left to the campaign."""
    (command,) = (command for command in commands() if command.name == name)
    program = command.program(world)

    def work(number):
        whole = unbroken(program, OUT, ranks)
        for path in sorted(Path(OUT).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        case(program, ranks, whole, Random(seed))

    return list(outcomes(work, [0], limits=LIMITS))


@pytest.mark.parametrize(("name", "case", "ranks"), [("generate", killed, 2), ("convert", paired, 1)])
def test_a_real_command(mini, name, case, ranks):
    assert case_of(name, mini, case, ranks, 0) == [("read", "")]


def test_worlds_of_a_family(tmp_path):
    model = worlds.models(tmp_path / "edm", "edm")
    whole = worlds.whole(model)
    assert len(whole.pixels) == 72 and isinstance(whole.measuring, Whole)
    worlds.divided(model, whole, 2, Random(1))  # three processes
    name = next(iter(whole.pixels))
    whole.pixels[name] = whole.pixels[name] + 9
    whole.measuring.found["row.json"]["fid"] += 1
    with pytest.raises(Finding, match=r"an image differs by|row\.json is another"):
        worlds.divided(model, whole, 0, Random(1))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not Path(OUT).exists()
