"""python tests/hostile: the campaign. Not `-m tests.hostile`: packages of others bring a `tests`, too."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS / "golden"), str(TESTS / "var"), str(TESTS.parent)]  # in place of this folder
os.environ["OMP_NUM_THREADS"] = "1"  # threads of torch would not be there in forked processes, which wait for them

from hostile.campaign import main  # noqa: E402

main()
