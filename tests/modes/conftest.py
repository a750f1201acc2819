"""What these tests share is in this folder. tests/parity puts it on the path too: not `tests`, which has a folder `torch`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _interpreted(interpreted_loops):
    """A framework is compared with a mode's formula; that compiling keeps it is for tests/core/engines/test_rows.py."""
