"""SIGTERM: a scheduler takes the machine away and leaves some seconds to save what can be resumed. SIGHUP: the
terminal has gone, which asks for the same.

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

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows
SAME = 2.0  # seconds: a scheduler may signal every process, and torchrun, which passes it on; that is one request


class Terminated(BaseException):
    """The program was asked to end. The text says what is saved; '' if the place where it was raised does not know."""


class _Request:
    """What a signal has asked for."""

    def __init__(self):
        self.at: float | None = None  # when the first signal came
        self.number = signal.SIGTERM  # of the first signal
        self.deferred = False

    def handle(self, number, frame) -> None:
        if self.at is None:
            self.at, self.number = time.monotonic(), signal.Signals(number)
            if not self.deferred:
                raise Terminated
        elif time.monotonic() - self.at > SAME:
            os._exit(128 + number)


_request = _Request()


def asked() -> bool:
    """Has a signal come?"""
    return _request.at is not None


def ended_by() -> tuple[str, int]:
    """'SIGTERM' or 'SIGHUP', whichever came last, and the exit status that shells show for a process it has ended."""
    return _request.number.name, 128 + _request.number


@contextmanager
def attended() -> Iterator[None]:
    """SIGNALS raise Terminated in the block. In a thread other than the main one they do what they did before.

    SIGHUP stays ignored where it is, as under nohup.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return
    _request.at = None
    handled = [n for n in SIGNALS if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, _request.handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _request.at = None


@contextmanager
def leaves(text: str) -> Iterator[None]:
    """What to say of a block that a signal stops, where Terminated does not say it: what is saved.

    A process that waits for another one, which a signal has ended, gets a RuntimeError: that is Terminated too.
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
    """Signals do not interrupt the block, which calls what it is given between its steps: has one come?"""
    _request.deferred = True
    try:
        yield asked
    finally:
        _request.deferred = False
