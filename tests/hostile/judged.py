"""A command on a hostile file, and whether it ended as it must."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from processes import words

from hostile.files import EXECUTED, READ, Case
from hostile.workers import Finding
from neon import NeonError
from neon.cli import command_line, main


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
    import shutil

    here = Path.cwd()
    path = here / case.name
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
