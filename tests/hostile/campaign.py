"""The campaign: every part of tests/hostile many times over, and one table of what came out.

make campaign                                   # the whole: a million mutated files
python tests/hostile --fuzz 20000 --kills 2 --worlds 4   # a short one
python tests/hostile --only fuzz/torch          # one part; --case N repeats one of its cases alone
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

from hostile.judged import import_all
from hostile.workers import FINE, Finding, Limits, apart, outcomes

COLUMNS = ("tried", "refused", "ran", "traceback", "hang > 5 s", "memory > 2 GB", "executed", "lost")
BAD = COLUMNS[3:]  # none of these may be
COLUMN = {"refused": "refused", "read": "ran", "hang": "hang > 5 s", "memory": "memory > 2 GB"}
COLUMN |= {"executed": "executed", "lost": "lost"}  # any other kind, 'lines' and 'crash' among them: traceback
STEP = 4000  # cases between two lines of the record
LONG_STEP = 12  # of cases that take seconds
LONG = Limits(0, 3 * 3600)  # of those: their commands have limits of their own (hostile.runs)
PACKAGES = ("neon", "nets", "edm", "flow", "VAR", "xAR", "imm", "report")
MARKS = ("<!-- campaign -->", "<!-- /campaign -->")


@dataclass(frozen=True)
class Part:
    """A row of the table. run(numbers): (kind, text) of each case of these numbers, in their order; see
    workers.outcomes. A number is the same case in every run of the campaign with the same seed. step: cases that are
    recorded together."""

    name: str
    count: int
    run: Callable[[Sequence[int]], Iterable[tuple[str, str]]]
    step: int | None = None  # STEP


class Record:
    """Finished cases, a JSON line for every STEP of a part: an interrupted campaign resumes after them."""

    def __init__(self, path: Path | None, key: str):
        self.path, self.key, self.lines = path, key, []
        if path and path.exists():
            found = [json.loads(line) for line in path.read_text().splitlines()]
            self.lines = [line for line in found if line["key"] == key]

    def done(self, part: Part) -> int:
        """The number of the part's next case."""
        return max((line["end"] for line in self.lines if line["part"] == part.name), default=0)

    def add(self, part: Part, end: int, counts: Counter, found: list) -> None:
        line = {"key": self.key, "part": part.name, "end": end, "counts": dict(counts), "found": found}
        self.lines.append(line)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def row(self, part: Part) -> Counter:
        return sum((Counter(line["counts"]) for line in self.lines if line["part"] == part.name), Counter())

    def findings(self) -> Iterator[tuple[str, int, str, str]]:
        """(part, case, kind, text)."""
        for line in self.lines:
            for case, kind, text in line["found"]:
                yield line["part"], case, kind, text


def campaign(parts: Sequence[Part], record: Record, deadline: float = float("inf")) -> int:
    """Run what is not recorded yet; the number of findings. Each is printed as it is found, also how far a part is."""
    for part in parts:
        start = record.done(part)
        while start < part.count and time.monotonic() < deadline:
            numbers = range(start, min(start + (part.step or STEP), part.count))
            record.add(part, numbers.stop, *_tried(part, numbers))
            start = numbers.stop
            print(f"{part.name}: {start:,} of {part.count:,}", file=sys.stderr, flush=True)
    return sum(1 for _ in record.findings())


def _tried(part: Part, numbers: range) -> tuple[Counter, list]:
    counts, found = Counter(), []
    for number, (kind, text) in zip(numbers, part.run(numbers), strict=True):
        if kind == "hang":  # a busy machine can make a case slow once
            ((kind, text),) = part.run([number])
        counts["tried"] += 1
        counts[COLUMN.get(kind, "traceback")] += 1
        if kind not in FINE:
            found.append((number, kind, text))
            print(f"FOUND {part.name}, case {number}: {kind}: {text}", file=sys.stderr, flush=True)
    return counts, found


def table(parts: Sequence[Part], record: Record) -> str:
    """In Markdown, of the parts that were begun, with a last row of sums."""
    rows = [(part.name, record.row(part)) for part in parts if record.done(part)]
    rows.append(("all", sum((counts for _, counts in rows), Counter())))
    lines = [("part", *COLUMNS), ("---", *["--:"] * len(COLUMNS))]
    lines += [(name, *(f"{counts[column]:,}" for column in COLUMNS)) for name, counts in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(text: str, path: Path) -> None:
    """Between MARKS of the file."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


# ---------------------------------------------------------------- parts


def parts(world: SimpleNamespace, args) -> Iterator[Part]:
    """All of them. world: see tests/world.py and hostile.commands.searched."""
    yield from hostile_files(world, args.jobs)
    yield from interruptions(world, args)
    yield from divisions(world, args)
    yield from fuzzed(args)


def hostile_files(world: SimpleNamespace, jobs: int) -> Iterator[Part]:
    """A part for each group of files, which are named by their first word."""
    from hostile.files import cases
    from hostile.judged import judged

    groups: dict[str, list] = {}
    for case in cases():
        groups.setdefault(case.command(world, Path("path"), Path("out"))[0], []).append(case)
    for command, group in groups.items():

        def run(numbers, group=group):
            return outcomes(lambda number: judged(group[number], world), list(numbers), jobs)

        yield Part(f"files/{command}", len(group), run)


# Cases for each command and number of processes, in parts of --kills.
SHARES = {"kills": 1.0, "signals": 0.4, "full disk": 0.4, "pairs": 0.2}


def interruptions(world: SimpleNamespace, args) -> Iterator[Part]:
    """A part for each command and each way to interrupt it."""
    from hostile.commands import KINDS, OUT, commands
    from hostile.runs import unbroken

    for command in commands():

        @cache
        def wholes(command=command):
            run = partial(unbroken, command.program(world), OUT)
            return {ranks: _in_a_folder(partial(run, ranks)) for ranks in command.ranks}

        for kind, case in KINDS.items():
            name = f"{kind}/{command.name}"

            def work(number, whole, command=command, case=case, name=name):
                ranks = command.ranks[number % len(command.ranks)]
                case(command.program(world), ranks, _good(whole[ranks]), Random(f"{args.seed} {name} {number}"))

            count = max(round(args.kills * SHARES[kind]), 1) * len(command.ranks)
            yield _long(name, count, work, wholes, args.jobs)


def divisions(world: SimpleNamespace, args) -> Iterator[Part]:
    """A part for each family."""
    from hostile import worlds

    for family in worlds.NETWORKS:

        @cache
        def prepared(family=family):
            model = apart(lambda: worlds.models(world.path / "families" / family, family))
            return model, _in_a_folder(lambda: worlds.whole(model))

        def work(number, found, family=family):
            model, whole = found
            worlds.divided(model, _good(whole), number, Random(f"{args.seed} {family} {number}"))

        yield _long(f"worlds/{family}", args.worlds, work, prepared, args.jobs)


def _long(name: str, count: int, work: Callable, prepared: Callable, jobs: int) -> Part:
    """Of cases that run commands. work(number, what prepared() returns)."""

    def run(numbers):
        found = prepared()
        return outcomes(lambda number: work(number, found), list(numbers), jobs, LONG)

    return Part(name, count, run, LONG_STEP)


def _in_a_folder(function: Callable):
    """What the function returns in a process of its own whose current folder is new, or the Finding it raises."""

    def run():
        with tempfile.TemporaryDirectory(prefix="neon-hostile-") as folder:
            os.chdir(folder)
            try:
                return function()
            except Finding as finding:
                return finding

    return apart(run)


def _good(whole):
    if isinstance(whole, Finding):
        raise whole
    return whole


def fuzzed(args) -> Iterator[Part]:
    """A part for each reader; together --fuzz files."""
    from hostile.fuzz import reading
    from hostile.readers import readers

    every = readers()
    for reader in every:
        seeds = cache(lambda reader=reader: apart(lambda: reader.seeds() + reader.programs()))

        def run(numbers, reader=reader, seeds=seeds):
            return outcomes(reading(reader.read, seeds(), reader.suffix, args.seed), list(numbers), args.jobs)

        yield Part(f"fuzz/{reader.name}", -(-args.fuzz // len(every)), run)


# ---------------------------------------------------------------- the command


def main() -> None:
    args = _parse()
    began = time.monotonic()
    import_all()
    with tempfile.TemporaryDirectory(prefix="neon-campaign-") as folder:
        world = apart(lambda: _world(Path(folder)))
        every = [part for part in parts(world, args) if not args.only or part.name.startswith(tuple(args.only))]
        if args.case is not None:
            found = [outcome for part in every for outcome in part.run([args.case])]
            print(*(f"{kind}: {text}" for kind, text in found), sep="\n")
            sys.exit(any(kind not in FINE for kind, _ in found))
        record = Record(args.record, f"{args.seed} {args.fuzz} {args.kills} {args.worlds} {_code()}")
        try:
            found = campaign(every, record, began + 60 * args.minutes)
        except KeyboardInterrupt:
            sys.exit(f"interrupted; the same command resumes from {args.record}")
    unfinished = [part.name for part in every if record.done(part) < part.count]
    text = f"{_said(args, (time.monotonic() - began) / 60)}"
    text += f" **Not finished**: {len(unfinished)} of {len(every)} parts." if unfinished else ""
    text += f"\n\n{table(every, record)}"
    print(text)
    if args.out:
        put(text, args.out)
    if unfinished:
        print(f"not finished in {args.minutes:g} minutes: {', '.join(unfinished)}", file=sys.stderr)
    sys.exit(bool(found or unfinished))


def _world(folder: Path) -> SimpleNamespace:
    from world import small_world

    from hostile.commands import searched
    from hostile.files import interrupted

    world = searched(small_world(folder))
    interrupted(world)  # made once, which takes longer than a case may
    return world


def _parse():
    parser = argparse.ArgumentParser(prog="python tests/hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of mutations")
    parser.add_argument("--fuzz", type=int, default=1_000_000, help="mutated files, over all readers")
    parser.add_argument("--kills", type=int, default=15, help="SIGKILLs of each command and number of processes")
    parser.add_argument("--worlds", type=int, default=24, help="numbers of processes and batch sizes of each family")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="after which no more cases are begun")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so")
    parser.add_argument("--case", type=int, help="this case alone, of the parts of --only")
    parser.add_argument("--record", type=Path, default=Path("campaign.jsonl"), help="finished cases; resumed from")
    parser.add_argument("--out", type=Path, help="a file between whose marks the table is put, too")
    args = parser.parse_args()
    if args.case is not None and not args.only:
        parser.error("--case needs --only PART")
    return args


def _code() -> str:
    """A digest of the code, so that a record is not one of other code."""
    root = Path(__file__).parents[2]
    files = sorted(path for name in (*PACKAGES, "tests/hostile") for path in (root / name).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _said(args, minutes: float) -> str:
    command = f"python tests/hostile --seed {args.seed} --fuzz {args.fuzz} --kills {args.kills}"
    command += f" --worlds {args.worlds}"
    command += f" --only {' '.join(args.only)}" if args.only else ""
    machine = f"{os.cpu_count()} cores of {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    return f"`{command}`, {time.strftime('%Y-%m-%d')}, {minutes:.0f} minutes on {machine}."
