"""What a campaign finds lands in its column, makes it fail, and can be repeated alone; finished cases are kept."""

import json
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostile import campaign as campaigns
from hostile import workers
from hostile.campaign import BAD, MARKS, Part, Record, campaign, put, table
from hostile.files import EXECUTED
from hostile.workers import Finding, apart, outcomes, untimed
from neon import NeonError


def lost(number):
    raise Finding("lost", "row 3")


def refused(number):
    raise NeonError("one line")


def two_lines(number):
    raise NeonError("two\nlines")


def compute(number):
    while True:
        pass


PLANTED = {
    "a traceback": (lambda number: [][number], "traceback"),
    "a crash": (lambda number: os.kill(os.getpid(), signal.SIGSEGV), "traceback"),
    "two lines": (two_lines, "traceback"),
    "a hang": (compute, "hang > 5 s"),
    "a wait": (lambda number: time.sleep(100), "hang > 5 s"),
    "memory": (lambda number: bytearray(workers.MEMORY + 2**30), "memory > 2 GB"),
    "a program": (lambda number: Path(EXECUTED).touch(), "executed"),
    "a lost row": (lost, "lost"),
}


def part(work, count=2):
    return Part("planted", count, lambda numbers: outcomes(work, list(numbers)))


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_lands_in_its_column(name, monkeypatch, capsys):
    monkeypatch.setattr(workers, "SECONDS", 0.3)
    monkeypatch.setattr(workers, "WALL", 2)
    work, column = PLANTED[name]
    one, record = part(lambda number: work(number) if number else None), Record(None, "")
    assert campaign([one], record) == 1
    counts = record.row(one)
    assert counts == {"tried": 2, "ran": 1, column: 1} and column in BAD
    assert "FOUND planted, case 1: " in capsys.readouterr().err
    assert [case for _, case, _, _ in record.findings()] == [1]


def test_what_is_fine_is_no_finding():
    good, record = part(lambda number: refused(number) if number else None), Record(None, "")
    assert campaign([good], record) == 0
    assert record.row(good) == {"tried": 2, "ran": 1, "refused": 1}
    assert table([good], record).splitlines()[2] == "| planted | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 |"


def test_a_case_that_was_slow_once_is_no_hang(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "SECONDS", 0.3)

    def slow_once(number):
        if not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            compute(number)

    assert campaign([part(slow_once)], Record(None, "")) == 0


def test_only_computing_counts_and_not_the_making_of_an_input(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS", 0.3)

    def work(number):
        if number == 0:
            time.sleep(0.5)
        elif number == 1:
            with untimed():
                busy(0.5)
        else:
            with untimed():
                pass
            busy(0.5)

    assert [kind for kind, _ in outcomes(work, range(3))] == ["read", "read", "hang"]


def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("jobs", [1, 3])
def test_outcomes_are_in_order_whatever_ends_first_or_dies(jobs):
    def work(number):
        if number % 5 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if number < 10:
            time.sleep(0.02)
        raise Finding("lost", str(number))

    found = list(outcomes(work, range(100, 140), jobs))
    wanted = [("crash", "signal 9") if number % 5 == 0 else ("lost", str(number)) for number in range(100, 140)]
    assert found == wanted


def test_several_processes_work_at_a_time():
    """Each waits for the other."""

    def work(number):
        Path(folder, str(number)).touch()
        while not Path(folder, str(1 - number)).exists():
            time.sleep(0.01)

    with tempfile.TemporaryDirectory() as folder:
        assert [kind for kind, _ in outcomes(work, range(2), jobs=2)] == ["read", "read"]


def test_what_a_process_has_started_ends_with_it(tmp_path):
    def work(number):
        child = os.fork()
        if not child:
            time.sleep(100)
        (tmp_path / "pid").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)

    assert [kind for kind, _ in outcomes(work, [0])] == ["crash"]
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_apart_leaves_no_thread_here():
    def threads():
        ThreadPoolExecutor(2).submit(time.sleep, 0)
        return threading.active_count()

    before = threading.active_count()
    assert apart(threads) > before == threading.active_count()
    with pytest.raises(RuntimeError, match="failed in its process"):
        apart(lambda: 1 / 0)


def test_it_resumes_after_finished_cases_of_the_same_code(monkeypatch, tmp_path):
    monkeypatch.setattr(campaigns, "STEP", 2)
    seen, path = [], tmp_path / "record.jsonl"

    def run(numbers):
        if 4 in numbers and len(seen) == 4:
            raise KeyboardInterrupt
        seen.extend(numbers)
        return [("lost" if number == 1 else "read", "") for number in numbers]

    one = Part("a", 6, run)
    with pytest.raises(KeyboardInterrupt):
        campaign([one], Record(path, "key"))
    seen.append("again")
    assert campaign([one], Record(path, "key")) == 1
    assert seen == [0, 1, 2, 3, "again", 4, 5] and Record(path, "key").row(one)["tried"] == 6
    assert Record(path, "other").done(one) == 0
    assert all(json.loads(line)["key"] == "key" for line in path.read_text().splitlines())


def test_no_case_is_begun_after_the_deadline():
    record = Record(None, "")
    assert campaign([part(refused)], record, deadline=0) == 0 and record.done(part(refused)) == 0


def test_the_table_is_put_between_the_marks(tmp_path):
    (tmp_path / "a.md").write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    put("new", tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text() == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter\n"
