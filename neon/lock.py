"""One writer for each output.

The lock is flock's on a hidden file next to the output, `.NAME.lock`: the kernel releases it when its process ends,
however that happens. The file names the owner. Who holds the lock deletes the file before the lock goes, and who gets
a lock asks whether its file is still the one of that name: so deleting is safe. A killed process leaves the file,
which the next one takes over.

Hosts that share a file system may not see each other's locks. There the owner renews the time of its file every few
seconds, and another host watches the file of an unknown owner for a while before it takes it over.
"""

import errno
import inspect
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO

from neon import NeonError
from neon.files import is_alive, sweep

BEAT = 10.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one, after which the owner on another host is taken for dead
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems that have none
_held: set[Path] = set()  # by this process


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """One process at a time is inside for each `path`; the others wait. Raises OSError, NeonError."""
    import fcntl  # not on Windows

    lock = _lock_of(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with own_file(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(lock, file):
                continue  # who had the lock before has removed the file: others may lock a new one
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


@contextmanager
def writing(path: str | Path | None, world=None) -> Iterator[None]:
    """This process, or job of several, alone writes `path` in the block. What killed runs left of it is removed first.

    world: the neon.distributed.World of the job, whose first process holds the lock; all must call. A block in another
    one of the same process for the same path, and None for a path, do nothing. Raises NeonError at once, on every
    process, if another process writes there.
    """
    with ExitStack() as held:
        problem = None
        if path is not None and (world is None or world.rank == 0):
            try:
                held.enter_context(_alone(Path(os.path.realpath(path)), path))
            except (NeonError, OSError) as error:
                problem = str(error)
        if problem := world.gather(problem)[0] if world else problem:
            raise NeonError(problem)
        yield


def one_writer(function: Callable) -> Callable:
    """A function with the arguments `out` and `world`, which runs in a block of `writing`."""
    signature = inspect.signature(function)

    @wraps(function)
    def alone(*args, **options):
        given = signature.bind(*args, **options).arguments
        with writing(given["out"], given["world"]):
            return function(*args, **options)

    return alone


@contextmanager
def _alone(real: Path, said: str | Path) -> Iterator[None]:
    """said: the path in words of the user."""
    if real in _held:
        yield
        return
    lock = _lock_of(real)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NeonError(f"{said}: cannot be made ({error.strerror})") from None
    with _taken(lock, said) as file:
        _write_owner(file)
        _held.add(real)
        try:
            sweep(real, sole=True)
            with _beating(lock):
                yield
        finally:
            _held.discard(real)
            lock.unlink(missing_ok=True)


@contextmanager
def _taken(lock: Path, said: str | Path) -> Iterator[IO]:
    """The open lock file, which is this process's. Raises NeonError if it is another's."""
    while True:
        with own_file(lock) as file:
            kernel = _try(file, said)
            if not _is_still(lock, file):
                continue
            owner = _owner(file)
            if owner.get("host") == socket.gethostname():
                taken = not kernel and is_alive(owner["pid"])
            else:
                taken = bool(owner) and _lives(lock, owner, said)
            if taken:
                raise _busy(said, owner)
            yield file
            return


def _try(file: IO, said: str | Path) -> bool:
    """Lock it; False if this file system has no locks. Raises NeonError if another process of this host has it."""
    import fcntl  # not on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(said, _owner(file)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _busy(said: str | Path, owner: dict) -> NeonError:
    who = f" ({owner['pid']}, {owner['host']})" if owner else ""
    return NeonError(f"another process{who} is writing {said}; wait for it or choose another --out")


def _lives(lock: Path, owner: dict, said: str | Path) -> bool:
    """Does the owner, on another host, give a sign of life within PATIENCE?"""
    print(f"{said}: was written by process {owner['pid']} on {owner['host']}; does it still run?", file=sys.stderr)
    before, end = _renewed(lock), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if _renewed(lock) != before:
            return True
    return False


def _renewed(lock: Path) -> int:
    with own_file(lock) as file:  # opened again: network file systems look anew only then
        return os.fstat(file.fileno()).st_mtime_ns


@contextmanager
def _beating(lock: Path) -> Iterator[None]:
    """Renew the time of the file for as long as the block runs."""
    over = threading.Event()

    def beat():
        while not over.wait(BEAT):
            with suppress(OSError):  # the file's folder may be gone for a moment; nothing else hangs on this
                os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _owner(file: IO) -> dict:
    """What the file says of its owner; {} if nothing, or not yet."""
    file.seek(0)
    try:
        owner = json.loads(file.read(1000))
        return {"pid": int(owner["pid"]), "host": str(owner["host"])}
    except (ValueError, TypeError, KeyError):
        return {}


def _write_owner(file: IO) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    file.flush()


def _lock_of(path: str | Path) -> Path:
    """Next to the output; in it, where its folder takes no files, as that of a mounted disk."""
    path = Path(path)
    if path.is_dir() and not os.access(path.parent, os.W_OK):
        return path / ".lock"
    return path.with_name(f".{path.name}.lock")


def own_file(path: Path) -> IO:
    """A file open for reading and writing, made if it is not there, as it is if it is. Raises NeonError if the name is
    a link's, or of anything but a regular file: others may have put it there to have its target overwritten."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise NeonError(f"{path}: not a regular file; remove it") from None
        raise
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(number)
        raise NeonError(f"{path}: not a regular file with this one name; remove it")
    return os.fdopen(number, "r+b")


def _is_still(path: Path, file: IO) -> bool:
    """Is the open file the one of that name?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
