"""The audit of recorded rollouts: `audit` reads a file and returns what each objective would do to its tokens.

`drpo_core.audit.explorer` makes a page of it, `drpo_core.audit.plots` draws it, and the command `drpo audit` prints it.
"""

from importlib.resources import files

from drpo_core.audit.readers import CHUNK_TOKENS, Chunk, RolloutError, Rollouts, open_rollouts
from drpo_core.audit.report import SCHEMA_VERSION, Audited, Curve, Report, Snapshot
from drpo_core.audit.selection import Row, rows
from drpo_core.audit.statistics import audit
from drpo_core.objectives import Threshold

__all__ = [
    "BUNDLED",
    "CHUNK_TOKENS",
    "SCHEMA_VERSION",
    "Audited",
    "Chunk",
    "Curve",
    "Report",
    "RolloutError",
    "Rollouts",
    "Row",
    "Snapshot",
    "Threshold",
    "audit",
    "open_rollouts",
    "rows",
]

BUNDLED = files("drpo_core.audit") / "data" / "gemma3_270m_arithmetic.npz"
"""Rollouts that ship with the package: Gemma 3 270M on arithmetic, at six snapshots of training."""
