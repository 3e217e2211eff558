"""Readers refuse mutated files in one line; and the fuzzer finds what is planted."""

import random
import time

import pytest

from hostile import fuzz as fuzzing
from hostile.fuzz import fuzz, mutate
from hostile.readers import readers
from neon import NeonError

READERS = readers()
COUNT = 300  # of each reader; the campaign tries very many more


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_mutated_files_are_read_or_refused(reader, tmp_path):
    seeds = reader.seeds()
    for seed in seeds:
        if reader.name not in ("index", "params"):  # their other files are not there
            (tmp_path / f"seed{reader.suffix}").write_bytes(seed)
            reader.read(tmp_path / f"seed{reader.suffix}")
    report = fuzz(reader.read, seeds, reader.suffix, COUNT)
    assert not report.found, [(kind, text) for kind, text, _ in report.found[:5]]
    assert report.tried == COUNT and report.counts["refused"] > 0


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_bug_in_a_reader_is_found(reader):
    """One that shows in a fifth of all files: those in which a byte was lost or gained."""
    sizes = set(map(len, reader.seeds()))

    def faulty(path):
        if path.stat().st_size not in sizes:
            raise IndexError("planted")

    report = fuzz(faulty, reader.seeds(), reader.suffix, 40)
    assert report.counts["traceback"] and "IndexError: planted" in {text for _, text, _ in report.found}


def test_crashes_hangs_and_memory_are_found_and_the_rest_is_read(monkeypatch):
    import ctypes

    monkeypatch.setattr(fuzzing, "SECONDS", 0.3)

    def faulty(path):
        number = sum(path.read_bytes()) % 6
        if number == 0:
            ctypes.string_at(0)  # segmentation fault
        if number == 1:
            time.sleep(10)
        if number == 2:
            bytearray(fuzzing.MEMORY + 2**30)
        if number == 3:
            raise NeonError("two\nlines")
        if number == 4:
            raise NeonError("one line")

    report = fuzz(faulty, [bytes(100)], ".x", 25)
    assert report.tried == 25 and {"crash", "hang", "memory", "lines", "refused", "read"} == set(report.counts)


def test_the_same_seed_gives_the_same_files():
    made = [mutate(b"abc" * 50, random.Random(seed)) for seed in range(200)]
    assert made == [mutate(b"abc" * 50, random.Random(seed)) for seed in range(200)]
    assert len(set(made)) > 150 and mutate(b"", random.Random(0)) is not None
