import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "golden")]


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """The smallest world in which every command has a meaning; see world.small_world."""
    from world import small_world

    return small_world(tmp_path_factory.mktemp("mini"))
