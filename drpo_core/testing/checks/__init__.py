"""The checks, by property: plain functions of (implementation, case) that raise `PropertyViolated`.

Each is usable alone: call it with a batch, or let `drpo_core.testing.run_check` search for one.
"""

from drpo_core.testing.checks import divergences, gradient, modes, structure, weights
from drpo_core.testing.checks._base import CHECKS, Check, CheckInfo, PropertyViolated, check

__all__ = ["CHECKS", "Check", "CheckInfo", "PropertyViolated", "check"]

_in_order = sorted(CHECKS.items(), key=lambda item: int(item[1].property[1:]))
CHECKS.clear()
CHECKS.update(_in_order)
globals().update({name: info.function for name, info in CHECKS.items()})
__all__ += list(CHECKS)
del divergences, gradient, modes, structure, weights
