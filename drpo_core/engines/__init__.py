"""How a pass over the tokens is run: recorded on symbols (`trace`) and compiled as a loop (`numba_loop`)."""

from drpo_core.engines.trace import UntraceableError

__all__ = ["UntraceableError"]
