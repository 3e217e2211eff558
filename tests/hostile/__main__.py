"""python -m tests.hostile: the campaign. A package's __main__ is not imported again by the processes it starts."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "golden")]

from hostile.campaign import main  # noqa: E402

main()
