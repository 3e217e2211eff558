"""Files written whole or not at all, locks, digests, and progress bars."""

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

    The temporary name is fixed: the next process overwrites what a killed one has left.
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


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """One process at a time is inside for each `path`; the others wait. Raises OSError.

    The lock is on a hidden file next to `path`, which is removed at the end. A killed process may leave this file, but
    not the lock.
    """
    import fcntl  # not on Windows

    lock = Path(path).with_name(f".{Path(path).name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(lock, file):
                continue  # who had the lock before has removed the file: others may lock a new one
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_still(path: Path, file) -> bool:
    """Is the open file the one of that name?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def discard(folder: Path) -> None:
    """Delete a folder with all in it; if it is killed, no part of it is left under its name."""
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
