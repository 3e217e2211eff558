"""SIGTERM: a scheduler takes the machine away and leaves some seconds to save what can be resumed.

The first signal raises Terminated wherever the program is, as Ctrl-C raises KeyboardInterrupt. A loop that has
something to save is `deferred`: it asks between its steps, saves, and raises Terminated itself. A second signal ends
the process at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM  # what shells show for a process that SIGTERM has ended
SAME = 2.0  # seconds: a scheduler may signal every process, and torchrun, which passes it on; that is one request


class Terminated(BaseException):
    """The program was asked to end. The text says what is saved; '' if the place where it was raised does not know."""


class _Request:
    """What SIGTERM has asked for."""

    def __init__(self):
        self.at: float | None = None  # when the first signal came
        self.deferred = False

    def handle(self, number, frame) -> None:
        if self.at is None:
            self.at = time.monotonic()
            if not self.deferred:
                raise Terminated
        elif time.monotonic() - self.at > SAME:
            os._exit(STATUS)


_request = _Request()


def asked() -> bool:
    """Has SIGTERM come?"""
    return _request.at is not None


@contextmanager
def attended() -> Iterator[None]:
    """SIGTERM raises Terminated in the block. In a thread other than the main one it does what it did before."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return
    _request.at = None
    before = signal.signal(signal.SIGTERM, _request.handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _request.at = None


@contextmanager
def leaves(text: str) -> Iterator[None]:
    """What to say of a block that SIGTERM stops, where Terminated does not say it: what is saved.

    A process that waits for another one, which SIGTERM has ended, gets a RuntimeError: that is Terminated too.
    """
    try:
        yield
    except (Terminated, RuntimeError) as error:
        if not asked():
            raise
        known = str(error) if isinstance(error, Terminated) else ""
        raise Terminated(known or text) from None


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """SIGTERM does not interrupt the block, which calls what it is given between its steps: has SIGTERM come?"""
    _request.deferred = True
    try:
        yield asked
    finally:
        _request.deferred = False
