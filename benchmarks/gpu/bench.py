"""What the measurements share, and how they run: one after the other, each a row, until the time is over."""

import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.card import Card, host, tf32
from benchmarks.gpu.targets import Target
from benchmarks.timing import seconds
from neon.cost import Cost, Device
from neon.files import atomic, read_object, write_json

ROOT = Path(__file__).resolve().parents[2]
# Name → what the commands call it: precision of the network, and is TensorFloat-32 allowed.
PRECISIONS = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "float16": ("float16", False),
    "bfloat16": ("bfloat16", False),
}
VERSIONS = ("torch", "torchvision", "torch-fidelity", "diffusers", "numpy")


class Measurement(NamedTuple):
    """One row of results."""

    name: str  # of the row: no other of the section has it
    needs: float  # seconds on a card, at most, as a guess
    measure: Callable[[], dict]  # → the row's other fields, JSON values; 'passed': False is a failure


@dataclass(frozen=True)
class Bench:
    """The card, what is measured on it, and a folder that is deleted afterwards."""

    card: Card
    targets: Sequence[Target]
    scratch: Path
    rehearse: bool = False
    rates: dict[str, float] = field(default_factory=dict)

    def size(self, full: int, rehearsed: int) -> int:
        return rehearsed if self.rehearse else full

    def rate(self, precision: str) -> float:
        """FLOP/s of large matrix products, by a name of PRECISIONS; measured once."""
        if precision not in self.rates:
            name, allowed = PRECISIONS[precision]
            side = self.size(4096 if precision == "float32" else 8192, 64)
            a = torch.randn(side, side, device=self.card.device, dtype=getattr(torch, name))
            with tf32(allowed):
                self.rates[precision] = 2 * side**3 / self.seconds(lambda: a @ a)
        return self.rates[precision]

    def seconds(self, run: Callable[[], object]) -> float:
        """The least of some rounds, after one to warm up: of a second in all, and one of what takes longer."""
        run()
        spent = [seconds(run, self.card.device)]
        while sum(spent) < self.size(1, 0) and len(spent) < 50:
            spent.append(seconds(run, self.card.device))
        return min(spent)

    def share(self, cost: Cost, spent: float) -> float:
        """Of the measured rate of matrix products: the seconds that the FLOPs of `cost` need at it, over `spent`."""
        return Device(self.card.name, {p: self.rate(p) / 1e12 for p in cost.flops}, 1.0).hours(cost) * 3600 / spent


def environment(card: Card, commit: str = "") -> dict[str, object]:
    """Where and when the rows are measured, JSON values. commit: what to say of the code outside a git repository."""
    return {
        "card": card.name,
        "cards": card.count,
        **card.facts(),
        **host(),
        "python": platform.python_version(),
        **{name: _version(name) for name in VERSIONS},
        "commit": commit or _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Of the code, with '+' if files were changed since; 'unknown' outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(environment: Mapping[str, object]) -> str:
    """'2x-nvidia-h100-80gb-hbm3': a file's name for the cards."""
    name = re.sub(r"[^a-z0-9]+", "-", str(environment["card"]).lower()).strip("-")
    return name if environment["cards"] == 1 else f"{environment['cards']}x-{name}"


# ---------------------------------------------------------------- rows


def run(
    sections: Mapping[str, Callable[[Bench], Iterable[Measurement]]],
    bench: Bench,
    only: Sequence[str],
    minutes: float,
    known: Mapping[str, Sequence[dict]],
    write: Callable[[dict[str, list[dict]]], None],
) -> dict[str, list[dict]]:
    """Rows of all sections, by name. Sections outside `only` keep their known rows.

    known: rows of an earlier run of the same code, which are kept, unless they say 'not measured'. write(rows): called
    after each measurement. What no longer fits into the minutes becomes a row that says so.
    """
    limit = Limit(minutes)
    rows = {section: list(known.get(section, ())) for section in sections}
    for section in only:
        kept = {row["name"]: row for row in rows[section] if "not measured" not in row}
        done = []
        for measurement in sections[section](bench):
            row = kept.pop(measurement.name, None)
            done.append(row or one(measurement, bench, limit))
            if row is None:
                print(f"{section:10s} {said(done[-1])}", flush=True)
                write(rows | {section: [*done, *kept.values()]})  # also those whose turn has not come
        rows[section] = done
    return rows


class Limit:
    """How much of the time is left, and whether the card still answers."""

    def __init__(self, minutes: float):
        self.minutes, self.end, self.broken = minutes, time.monotonic() + 60 * minutes, ""

    def refuses(self, needs: float) -> str:
        """Why a measurement of so many seconds is not begun; '' if it is."""
        if self.broken:
            return f"the card no longer answered after {self.broken}"
        return "" if time.monotonic() + needs <= self.end else f"the {self.minutes:g} minutes were over"


def one(measurement: Measurement, bench: Bench, limit: Limit) -> dict:
    """The row of a measurement: what it returns, or {'error': …}, or {'not measured': why}."""
    row = {"name": measurement.name}
    if reason := limit.refuses(0 if bench.rehearse else measurement.needs):
        return row | {"not measured": reason}
    bench.card.clear()
    started = time.monotonic()
    try:
        found = measurement.measure()
    except Exception as error:  # of any library: the other rows are still wanted
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        limit.broken = _broken(bench.card, measurement.name)
    return row | found | {"seconds": round(time.monotonic() - started, 1)}


def _broken(card: Card, name: str) -> str:
    """The name, if the card no longer computes: then nothing in this process will."""
    try:
        card.check()
    except Exception:
        return name
    return ""


def said(row: Mapping[str, object]) -> str:
    """A row in one line."""
    rest = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("name", "seconds") and not isinstance(value, list | dict)
    )
    return f"{row['name']}: {', '.join(rest)}"


def failures(rows: Mapping[str, Sequence[dict]]) -> list[str]:
    """A line for every row that failed. Too little memory is a result, not a failure."""
    return [
        f"{section}: {said(row)}"
        for section, part in rows.items()
        for row in part
        if row.get("passed") is False or ("error" in row and not row["error"].startswith("OutOfMemoryError"))
    ]


# ---------------------------------------------------------------- the file

SAME = ("card", "cards", "driver", "commit", "python", *VERSIONS)  # of an environment, for rows to be kept


def kept_rows(path: Path, environment: Mapping[str, object]) -> dict[str, list[dict]]:
    """Rows of the file, if it is of the same card, code and versions."""
    if not path.exists():
        return {}
    found = read_object(path)
    same = all(found["environment"].get(name) == environment.get(name) for name in SAME)
    return found["rows"] if same else {}


def writer(path: Path, environment: Mapping[str, object], table: Callable[[dict], str]) -> Callable[[dict], None]:
    """A function of rows that writes `path` (.json) and its table next to it (.md), each whole or not at all."""

    def write(rows: dict[str, list[dict]]) -> None:
        found = {"environment": dict(environment), "rows": rows}
        write_json(path, found)
        with atomic(path.with_suffix(".md")) as partial:
            partial.write_text(table(found))

    return write


def each(names: Iterable[str], needs: float, measure: Callable[[str], dict]) -> Iterator[Measurement]:
    """A measurement for every name."""
    for name in names:
        yield Measurement(name, needs, lambda name=name: measure(name))
