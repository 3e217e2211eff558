"""Files written whole or not at all, room on the disk, digests, and how far a command is."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from neon import Missing, NeonError


@contextmanager
def atomic(path: str | Path, sync: bool = True, size: int = 0) -> Iterator[Path]:
    """A temporary sibling of `path` to write to (a file or a folder); renamed to `path` on success, removed on error.

    Nobody can guess its name and put a link there. What killed processes left of `path` is removed first. sync: on
    success its bytes and its name are on the disk, so that a power loss leaves no empty file; False for one of many,
    which the caller syncs and sweeps together. size: bytes that it will have, if known. Raises NeonError, before
    anything is written where the size is known, if the disk has no room.
    """
    path = named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if sync:
        sweep(path)
    check_room(path, size)
    partial = _partial(path)
    try:
        with filling(path, size):
            yield partial
            put(partial, path, sync)
    except BaseException:
        _remove(partial)
        raise


@contextmanager
def scratch(path: str | Path) -> Iterator[Path]:
    """An empty folder next to `path` for the time of the block; sweep finds what a killed process leaves of it."""
    folder = _partial(Path(path))
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        _remove(folder)


def _partial(path: Path) -> Path:
    """A new name next to `path` that says whose it is: host, process, and a random part."""
    return path.with_name(f".{path.name}.{_host():08x}-{os.getpid()}-{secrets.token_hex(8)}.partial")


PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{16}\.partial")


def _host() -> int:
    return crc32(socket.gethostname().encode())


def put(partial: Path, path: Path, sync: bool = True) -> None:
    """Give what is finished its name; sync: its bytes and its name are on the disk.

    A folder that is there gives way first, whole, and is deleted when the new one has its name.
    """
    if sync:
        synced(partial)
    old = _partial(path) if partial.is_dir() and path.is_dir() else None
    if old:
        os.replace(path, old)
    os.replace(partial, path)
    if sync:
        sync_folder(path.parent)
    if old:
        _remove(old)


def sweep(path: Path, sole: bool = False) -> None:
    """Remove unfinished files and folders that killed processes of this host left of `path`, and say so on stderr.

    sole: no other process writes `path` now: remove those of other hosts too, and in the folder `path`.
    """
    found = [entry for entry in path.parent.glob(".*.partial") if _made_for(entry.name) == path.name]
    if sole and path.is_dir():
        found += [entry for entry in path.rglob(".*.partial") if _made_for(entry.name)]
    left = [entry for entry in found if _is_left(entry.name, sole)]
    for entry in left:
        _remove(entry)
    if left:
        what = left[0].name if len(left) == 1 else f"{len(left)} unfinished files of {path.name}"
        print(f"removed {what}, left by a run that was killed", file=sys.stderr, flush=True)


def _made_for(partial: str) -> str | None:
    """The name that an unfinished file would get; None if it is none of ours."""
    match = PARTIAL.fullmatch(partial)
    return match and match["name"]


def _is_left(partial: str, sole: bool) -> bool:
    """Is the process that made it no more? Of another host this is unknown. sole: this one has just begun to write."""
    match = PARTIAL.fullmatch(partial)
    pid = int(match["pid"])
    if int(match["host"], 16) != _host():
        return sole
    return not is_alive(pid) or (sole and pid == os.getpid())


def is_alive(pid: int) -> bool:
    """Is there a process of that number on this host?"""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def synced(*paths: Path) -> None:
    """Return when the files, and the folders with all in them, are on the disk."""
    for path in paths:
        for entry in path.iterdir() if path.is_dir() else ():
            if not entry.is_symlink():
                synced(entry)
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """The names in a folder, or the bytes of a file, are on the disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do it, as some on the network
            raise
    finally:
        os.close(file)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def filling(path: str | Path, size: int = 0) -> Iterator[None]:
    """Writing to `path` in the block: a full disk becomes one NeonError. size: the bytes it needs, 0 if unknown."""
    try:
        yield
    except Exception as error:  # of the library that writes, too
        if not _is_full(error):
            raise
        needs = f"needs {size:,} bytes, and " if size else ""
        raise NeonError(f"{path}: {needs}the disk is full ({free_bytes(path):,} bytes free)") from None


def _is_full(error: BaseException | None) -> bool:
    """Did this error, or one it comes from, say that there is no room?"""
    while error:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def check_room(path: str | Path, size: int) -> None:
    """Raises NeonError if `path` needs more bytes than its disk has."""
    if size and size > (free := free_bytes(path)):
        raise NeonError(f"{path}: needs {size:,} bytes, and the disk has {free:,} bytes free")


def free_bytes(path: str | Path) -> int:
    """Of the disk that holds `path`, or would."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def discard(folder: Path) -> None:
    """Delete a folder with all in it; if it is killed, no part of it is left under its name."""
    trash = _partial(folder)
    os.replace(folder, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, atomically; see to_json."""
    with atomic(path) as partial:
        partial.write_text(to_json(value, indent=1) + "\n")


def read_json(path: str | Path):
    """The parsed file. Raises NeonError if it is missing or no JSON."""
    path = regular(path)
    with reading(path, "not JSON"):
        return from_json(path.read_text(encoding="utf-8"))


def read_object(path: str | Path) -> dict:
    """The JSON object in a file. Raises NeonError if there is anything else in it."""
    if not isinstance(found := read_json(path), dict):
        raise NeonError(f"{path}: not JSON of an object, {{…}}")
    return found


NOT_FINITE = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def to_json(value, **layout) -> str:
    """Strict JSON, which has no infinities: they become the strings 'Infinity', '-Infinity' and 'NaN'."""
    return json.dumps(_each(value, _named), allow_nan=False, **layout)


def from_json(text: str | bytes):
    """What to_json has written; older files with bare infinities, too. Raises ValueError."""
    return _each(json.loads(text), lambda leaf: NOT_FINITE.get(leaf, leaf) if isinstance(leaf, str) else leaf)


def _named(leaf):
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return "NaN" if math.isnan(leaf) else "Infinity" if leaf > 0 else "-Infinity"
    return leaf


def _each(value, change: Callable):
    """The same lists and dicts with their leaves changed."""
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each(part, change) for part in value]
    return change(value)


KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def existing(path: str | Path) -> Path:
    """`path`, which must be a file or a folder. Raises Missing, or NeonError: a pipe could wait for ever."""
    path = Path(path)
    if kind := KINDS.get(stat.S_IFMT(_mode(path))):
        raise NeonError(f"{path}: {kind}, not a file")
    return path


def regular(path: str | Path) -> Path:
    """`path`, which must be a file. Raises as `existing` does, also for a folder."""
    path = existing(path)
    if path.is_dir():
        raise NeonError(f"{path}: a folder, not a file")
    return path


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(path) from None
    except (OSError, ValueError) as error:  # no permission, a circle of links, a name that no file can have
        raise NeonError(f"{str(path)!r}: {reason_of(error)}") from None


def named(path: str | Path) -> Path:
    """`path`, which must end with a name that a file can have. Raises NeonError."""
    path = Path(path)
    if path.name in ("", "..") or "\0" in str(path):
        raise NeonError(f"{str(path)!r} is no name for a file or a folder")
    return path


@contextmanager
def reading(path: str | Path, wrong: str) -> Iterator[None]:
    """In the block a library reads `path`: whatever it raises becomes one NeonError, 'PATH: WRONG (reason)'.

    wrong: what the file then is, such as 'not JSON'.
    """
    try:
        yield
    except NeonError:
        raise
    except Exception as error:  # of a damaged file, nearly anything, MemoryError too
        raise NeonError(f"{path}: {wrong} ({reason_of(error)})") from None


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, at most 200 characters; its type if it says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.strip().partition("\n")[0].split())[:200] or type(error).__name__


def same_file(one: str | Path, other: str | Path) -> bool:
    """Do both paths lead to one file or folder, also through links?"""
    one, other = Path(one), Path(other)
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


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
    """How far rank 0 is, on stderr: a tqdm bar on a terminal, else a line now and then. unit: a key of UNITS."""
    if rank or not sys.stderr.isatty():
        return Lines(total, unit, desc, done, float("inf") if rank else _interval())
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=unit, desc=desc, dynamic_ncols=True)


def _interval() -> float:
    text = os.environ.get(INTERVAL, "60")
    try:
        return float(text)
    except ValueError:
        raise NeonError(f"{INTERVAL} is a number of seconds, not {text!r}") from None


UNITS = {"img": ("images", 1), "B": ("MiB", 2**20)}  # in words, and their size
INTERVAL = "NEON_PROGRESS_SECONDS"  # environment variable: seconds between lines, by default a minute
FIRST = 10.0  # seconds until the first line, which says how long it will take


class Lines:
    """What a command uses of a tqdm bar, as lines: 'generate: 640 of 6,000 images, 12.3 images/s, 8 min left'."""

    def __init__(self, total: int | None, unit: str, desc: str, done: int, every: float):
        self.total, self.desc, self.n, self.initial = total, desc, done, done
        self.every, self.note = every, ""
        self.unit, self.size = UNITS[unit]
        self.start = time.monotonic()
        self.due = self.start + min(FIRST, every) if every < float("inf") else every

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.note = text

    def update(self, n: int) -> None:
        self.n += n
        if (now := time.monotonic()) >= self.due:
            self.due = now + self.every
            print(self.line(now - self.start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds."""
        rate = (self.n - self.initial) / max(seconds, 1e-9)
        done, total = self.n // self.size, (self.total or 0) // self.size
        parts = [f"{done:,} of {total:,} {self.unit}" if total else f"{done:,} {self.unit}"]
        parts.append(f"{rate / self.size:.3g} {self.unit}/s")
        if self.note:
            parts.append(self.note)
        if self.total and rate:
            parts.append(f"{duration(max(self.total - self.n, 0) / rate)} left")
        return f"{self.desc}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """'40 s', '8 min', '5.3 h', for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
