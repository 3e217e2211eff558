"""Readers refuse mutated files in one line; and the fuzzer finds what is planted."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from hostile import workers
from hostile.files import EXECUTED
from hostile.fuzz import fuzz, mutate, mutated
from hostile.readers import readers
from neon import NeonError

READERS = readers()
COUNT = 120  # of each reader; the campaign tries very many more


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_mutated_files_are_read_or_refused(reader, tmp_path):
    seeds, path = reader.seeds(), tmp_path / f"seed{reader.suffix}"
    for seed in seeds:
        path.write_bytes(seed)
        reader.read(path)
    for program in reader.programs():
        path.write_bytes(program)
        with pytest.raises(NeonError):
            reader.read(path)
    report = fuzz(reader.read, seeds + reader.programs(), reader.suffix, range(COUNT))
    assert not report.found
    assert report.tried == COUNT and report.counts["refused"] > 0


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_bug_in_a_reader_is_found(reader):
    """One that shows in a fifth of all files: those in which a byte was lost or gained."""
    sizes = set(map(len, reader.seeds()))

    def faulty(path):
        if path.stat().st_size not in sizes:
            raise IndexError("planted")

    report = fuzz(faulty, reader.seeds(), reader.suffix, range(40))
    assert report.counts["traceback"] and "IndexError: planted" in {text for _, text, _ in report.found}


def test_crashes_hangs_memory_and_programs_are_found_and_the_rest_is_read(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS", 0.3)
    monkeypatch.setattr(workers, "WALL", 2)

    def faulty(path):
        number = sum(path.read_bytes()) % 7
        if number == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 1:
            time.sleep(10)
        if number == 2:
            bytearray(workers.MEMORY + 2**30)
        if number == 3:
            raise NeonError("two\nlines")
        if number == 4:
            raise NeonError("one line")
        if number == 5:
            Path(EXECUTED).touch()

    report = fuzz(faulty, [bytes(100)], ".x", range(30))
    kinds = {"crash", "hang", "memory", "lines", "refused", "executed", "read"}
    assert report.tried == 30 and set(report.counts) == kinds
    again = fuzz(faulty, [bytes(100)], ".x", [number for _, _, number in report.found])
    assert again.found == report.found  # each can be repeated alone


def test_the_same_seed_gives_the_same_files():
    made = [mutated([b"abc" * 50], 0, number) for number in range(200)]
    assert made == [mutated([b"abc" * 50], 0, number) for number in range(200)]
    assert len(set(made)) > 150 and made != [mutated([b"abc" * 50], 1, number) for number in range(200)]
    assert mutate(b"", random.Random(0)) is not None
