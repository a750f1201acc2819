"""Only what needs no framework is tested here: the rest runs in the frameworks' environments (see noxfile.py)."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "modes")]

collect_ignore_glob = ["compare_*.py", "measure.py", "run.py", "sources.py", "tensors.py"]
