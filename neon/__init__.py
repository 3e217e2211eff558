"""Neon: improve a trained generator by reversing a brief self-training (arXiv 2510.03597).

The method is one line, `neon.merge.merge`. Everything else measures it. Importing this package
imports nothing heavy; take what you need from its modules. `neon.extrapolated` is that of neon.extrapolate.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__version__ = "0.1.0"


class NeonError(Exception):
    """Something the user can fix: bad input, a missing file, a mismatch. The text is one line."""


class Missing(NeonError):
    """A file that is not there."""

    def __init__(self, path):
        super().__init__(f"{path}: no such file")
        self.path = path


class Diverged(NeonError):
    """A model whose images or features are not finite, say a merge with too large a w."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import in it what an extra of pyproject.toml installs. Raises NeonError if that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise NeonError(
            f"this needs {error.name}, of the extra {name}: pip install '.[{name}]' in the root of the repository"
        ) from None


def __getattr__(name: str):
    if name != "extrapolated":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from neon.extrapolate import extrapolated  # here, for it loads torch

    return extrapolated
