"""Measure this project on a GPU: `python -m benchmarks.gpu`; see docs/gpu.md.

Every measurement is one row of OUT/<card>.json; OUT/<card>.md shows them. The files are written after each one, so an
interrupted run leaves what it measured, and the same command measures what is missing, if card, code and versions are
the same. A measurement that fails, for lack of memory or otherwise, is a row with its error.

    python -m benchmarks.gpu                             # all, at most 20 minutes
    python -m benchmarks.gpu --only parity,sampling --minutes 9
    python -m benchmarks.gpu --rehearse                  # the same code on the CPU, tiny: a few minutes on one core
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import page, parity, speed, suite, training
from benchmarks.gpu.bench import ROOT, Bench, environment, failures, kept_rows, run, slug, writer
from benchmarks.gpu.card import Card, StandIn
from benchmarks.gpu.targets import presets, rehearsed
from neon import NeonError
from neon.cli import command_line
from neon.stop import leaves

RESULTS = ROOT / "results/gpu"
# In the order in which they run: what is quick and what others need first.
SECTIONS = {
    "rates": speed.rates,
    "tests": suite.tests,
    "parity": parity.reduced,
    "processes": training.processes,
    "parts": speed.parts,
    "training": training.training,
    "sampling": speed.sampling,
    "whole": parity.whole,
    "parity_compiled": parity.compiled,
    "compiled": speed.compiled,
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny: shows that all of it runs")
    parser.add_argument(
        "--out", help=f"folder of the results (default {RESULTS.relative_to(ROOT)}; of a rehearsal a temporary one)"
    )
    parser.add_argument("--minutes", type=float, default=20, help="time limit (default %(default)s)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, of %(default)s")
    parser.add_argument("--replace", action="store_true", help="measure again what an earlier run has measured")
    parser.add_argument("--commit", default="", help="of this code, if it lies in no git repository")
    return parser.parse_args(argv)


def folder(args: argparse.Namespace) -> Path:
    """Where the results go. Raises NeonError if a rehearsal would write where those of cards are."""
    if not args.rehearse:
        return Path(args.out or RESULTS)
    out = Path(args.out or tempfile.mkdtemp(prefix="neon-gpu-rehearsal-"))
    if out.resolve().is_relative_to(RESULTS):
        raise NeonError(f"{out}: results of cards; choose another --out for a rehearsal")
    return out


def chosen(only: str) -> list[str]:
    """Sections in the order in which they run. Raises NeonError for others."""
    names = only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise NeonError(f"no section {unknown[0]!r} (know {', '.join(SECTIONS)})")
    return [name for name in SECTIONS if name in names]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    only = chosen(args.only)
    if not args.minutes > 0:
        raise NeonError(f"--minutes must be positive, not {args.minutes:g}")
    card = StandIn() if args.rehearse else Card()
    about = environment(card, args.commit)
    path = folder(args) / f"{slug(about)}.json"
    print(f"{about['cards']} × {about['card']}, torch {about['torch']}, commit {about['commit']} → {path}", flush=True)
    known = kept_rows(path, about)
    if args.replace:
        known = {name: rows for name, rows in known.items() if name not in only}
    write = writer(path, about, page.one_card)
    left = leaves(f"what was measured is in {path}; the same command measures the rest")
    with left, tempfile.TemporaryDirectory(prefix="neon-gpu-") as scratch:
        bench = Bench(card, rehearsed() if args.rehearse else presets(), Path(scratch), args.rehearse)
        rows = run(SECTIONS, bench, only, args.minutes, known, lambda rows: write(speed.with_ratios(rows)))
    write(speed.with_ratios(rows))
    summary(rows)


def summary(rows: dict[str, list[dict]]) -> None:
    """Print how many rows there are. Raises NeonError if something failed."""
    every = [row for part in rows.values() for row in part]
    missing = sum("not measured" in row for row in every)
    print(f"{len(every)} rows, of which {missing} are not measured")
    if failed := failures(rows):
        for line in failed:
            print(line, file=sys.stderr)
        raise NeonError(f"{len(failed)} of {len(every)} measurements failed")


if __name__ == "__main__":
    command_line(main)
