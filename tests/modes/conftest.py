"""What these tests share is in this folder. tests/parity puts it on the path too: not `tests`, which has a folder `torch`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
