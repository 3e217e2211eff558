"""Files written whole or not at all, digests, and progress bars."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neon import NeonError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to (a file or a folder); renamed to `path` on success, removed on error.

    The temporary name is fixed, so what a killed process leaves behind is overwritten by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def discard(folder: Path) -> None:
    """Delete a folder with all in it; killed halfway, no part of it is left under its name."""
    trash = folder.with_name(f".{folder.name}.partial")
    _remove(trash)
    os.replace(folder, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: str | Path):
    """The parsed file. Raises NeonError if it is missing or no JSON."""
    try:
        return json.loads(existing(path).read_text())
    except (ValueError, RecursionError) as error:
        raise NeonError(f"{path}: not JSON ({error})") from None


def existing(path: str | Path) -> Path:
    """`path`, which must exist. Raises NeonError."""
    path = Path(path)
    if not path.exists():
        raise NeonError(f"{path}: no such file")
    return path


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file, or of all files of a folder with their names, in sorted order."""
    path = existing(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def progress(total: int, unit: str, desc: str, rank: int = 0, done: int = 0):
    """A tqdm bar on rank 0 if stderr is a terminal, else a silent one."""
    from tqdm import tqdm

    quiet = rank != 0 or not sys.stderr.isatty()
    return tqdm(total=total, initial=done, unit=unit, desc=desc, disable=quiet, dynamic_ncols=True)
