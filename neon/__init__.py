"""Neon: improve a trained generator by reversing a brief self-training (arXiv 2510.03597).

The method is one line, `neon.merge.merge`. Everything else measures it. Importing this package
imports nothing heavy; take what you need from its modules.
"""

__version__ = "0.1.0"


class NeonError(Exception):
    """Something the user can mend: bad input, a missing file, a mismatch. The text is one line."""
