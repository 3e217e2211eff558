"""No hostile input ends in a traceback, a wait, or a file: each is refused in one line."""

import signal
import sys
from pathlib import Path

import pytest

from hostile import judged
from hostile.files import EXECUTED, READ, cases

CASES = list(cases())
SECONDS = 5  # until a case counts as hanging


class Hangs(BaseException):
    """No reader catches it."""


def run(argv) -> tuple[int, str]:
    """judged.run, for a few seconds at most."""

    def hang(number, frame):
        raise Hangs

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return judged.run(argv)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What a command would import within the seconds of its first case."""
    judged.import_all()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_refused_in_one_line(case, mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    path = tmp_path / case.name
    case.make(path, mini)
    before = below(tmp_path)
    status, said = run(case.command(mini, path, tmp_path / "out"))
    if case.expectation == READ:
        assert (status, said) == (0, "")
        return
    lines = said.splitlines()
    assert status in (1, 2), said
    assert "error:" in lines[-1] and (len(lines) == 1 or lines[0].startswith("usage:")), said
    assert sum("error" in line for line in lines) == 1 and "Traceback" not in said
    assert below(tmp_path) == before
    assert not Path(EXECUTED).exists()


def test_ids_and_number_of_cases():
    assert len({case.id for case in CASES}) == len(CASES) >= 150
    assert [case.id for case in cases()] == [case.id for case in CASES]  # what the campaign tries is always the same
