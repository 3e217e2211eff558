"""A command on a hostile file, and whether it ended as it must."""

import contextlib
import importlib
import io
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from processes import words

from hostile.files import EXECUTED, READ, Case
from hostile.workers import Finding, untimed
from neon import NeonError
from neon.cli import command_line, main

IMPORTED = ("torch_fidelity", "pyarrow.parquet", "yaml", "sklearn.datasets", "nbformat", "mini.features")
IMPORTED += ("neon.cli.commands", "neon.cli.plan", "neon.plan", "neon.fetch")
IMPORTED += ("report.page", "report.metrics", "report.tables")
IMPORTED += ("edm.family", "flow.family", "VAR.family", "xAR.family", "imm.family")


def import_all() -> None:
    """What commands import when they need it, so that no case has to wait for it, and no forked process."""
    for name in IMPORTED:
        importlib.import_module(name)
    import nbformat

    nbformat.validate(nbformat.v4.new_notebook())


def run(argv) -> tuple[int, str]:
    """A command of neon or a script, in this process: exit status and what it says on stderr."""
    program, *rest = words(argv)
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            if program.startswith("report."):
                sys.argv[:] = [program, *rest]
                command_line(importlib.import_module(program).main)
            else:
                main([program, *rest])
        return 0, err.getvalue()
    except SystemExit as ended:
        return ended.code or 0, err.getvalue()


def judged(case: Case, world: SimpleNamespace) -> None:
    """Run the case in the current folder, which is empty before and afterwards. Raises NeonError if it is refused as
    it must be, and Finding."""
    here = Path.cwd()
    path = here / case.name
    with untimed():
        case.make(path, world)
    before = set(here.rglob("*"))
    status, said = run(case.command(world, path, here / "out"))
    executed, left = Path(EXECUTED).exists(), set(here.rglob("*")) - before
    for entry in here.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else os.unlink(entry)
    lines = said.splitlines()
    if executed:
        raise Finding("executed", case.id)
    if case.expectation == READ:
        if (status, said) != (0, ""):
            raise Finding("lost", f"{case.id}: not read: {said}")
        return
    if status not in (1, 2) or "Traceback" in said or sum("error" in line for line in lines) != 1:
        raise Finding("traceback", f"{case.id}: status {status}: {said}")
    if left:
        raise Finding("lost", f"{case.id}: left {sorted(path.name for path in left)}")
    raise NeonError(f"{case.id}: {lines[-1]}")
