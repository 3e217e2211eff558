"""Tests marked `cuda`, by pytest in a process of its own."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.bench import ROOT, Bench, Measurement
from neon import NeonError

REHEARSED = "NEON_REHEARSE_CUDA"  # environment variable: the tests run on the CPU instead of being skipped


def tests(bench: Bench) -> Iterator[Measurement]:
    """Every file that has such tests."""
    files = [file for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.cuda" in file.read_text()]
    for file in files:
        yield Measurement(file.relative_to(ROOT).as_posix(), 240, partial(counted, bench, file))


def counted(bench: Bench, file: Path) -> dict:
    """How many tests passed, failed and were skipped, and which failed. Raises NeonError if none was run."""
    report = bench.scratch / f"{file.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", f"--junitxml={report}", str(file)]
    variables = os.environ | ({REHEARSED: "1"} if bench.rehearse else {})
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    if not report.exists():
        raise NeonError(f"pytest ended with status {done.returncode}: {' '.join(done.stdout.split())[-250:]}")
    return results(report, may_skip=bench.rehearse)


def results(report: Path, may_skip: bool = False) -> dict:
    """Of a JUnit file. may_skip: it is no failure if not one test was run."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('name')}: {_message(case)}" for case in failed]
    counts = {"tests_passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    return counts | {"failures": names, "passed": (may_skip or counts["tests_passed"] > 0) and not failed}


def _message(case: ET.Element) -> str:
    found = case.find("failure") if case.find("failure") is not None else case.find("error")
    return " ".join((found.get("message") or "").split())[:200]
