"""Only the writer is tested here: the other modules need a framework and run in its environment (see noxfile.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore_glob = ["declare_*.py", "run.py", "row.py", "write.py"]
