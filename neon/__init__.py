"""Neon: improve a trained generator by reversing a brief self-training (arXiv 2510.03597).

The method is one line, `neon.merge.merge`. Everything else measures it. Importing this package
imports nothing heavy; take what you need from its modules.
"""

__version__ = "0.1.0"


class NeonError(Exception):
    """Something the user can fix: bad input, a missing file, a mismatch. The text is one line."""


class Diverged(NeonError):
    """A model whose images or features are not finite, say a merge with too large a w."""
