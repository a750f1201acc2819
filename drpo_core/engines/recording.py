"""A pass over the tokens, run once on symbols for an objective, and what an engine makes of it, kept for the next call."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from drpo_core.engines.trace import BOOL, FLOAT, Trace, UntraceableError, floats_of, parametrised, statics_of
from drpo_core.modes.mode import Mode, is_known, parts_of
from drpo_core.objectives.protocol import inside_of, loss_of, ratio_weight_of, weight_of
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.objectives import Objective

    Pass = Callable[..., Any]
    """`drpo_core.loss.policy_pass`, or another of the same arguments."""

__all__ = ["ARRAYS", "MOST_PROGRAMS", "program_of"]

Result = TypeVar("Result")

MOST_PROGRAMS = 256
"""Programs that a process keeps."""

ARRAYS = (
    "log_prob",
    "behavior_log_prob",
    "advantages",
    "mask",
    "coefficients",
    "divergence",
    "proximal_log_prob",
    "reference_log_prob",
)
"""What a pass is given for each token, in the order of its arguments."""

_programs: dict[tuple[Any, ...], Any] = {}
_programs_lock = Lock()


def program_of(
    make: Callable[[Trace, Any, np.dtype[Any]], Result],
    policy_pass: Pass,
    objective: Objective,
    dtype: np.dtype[Any],
    *,
    diagnostics: bool,
    names: tuple[str, ...],
) -> Result:
    """What `make` makes of the objective's recording, or made of one that is known to be the same but for its thresholds.

    `make` is given the trace, the result that is made of its symbols, and the dtype of the arithmetic. `names` are those of
    `ARRAYS` that are given. Raises `UntraceableError` if the objective, or `make`, can't be compiled.
    """
    key = (
        make,
        policy_pass,
        *_identity(policy_pass, objective, diagnostics=diagnostics, names=names),
        dtype,
        diagnostics,
        names,
    )
    program = _programs.get(key)

    def recorded(trace: Trace, traced: Objective) -> Result:
        return make(trace, _recorded(policy_pass, trace, traced, diagnostics=diagnostics, names=names), dtype)

    if program is None:
        try:
            program = _with_or_without_thresholds(recorded, objective, dtype)
        except UntraceableError as error:
            # remembered too: to find out takes some milliseconds
            program = error
        with _programs_lock:
            while len(_programs) >= MOST_PROGRAMS:
                # the oldest: objectives whose methods need the values of their numbers have a program for each value
                del _programs[next(iter(_programs))]
            _programs[key] = program
    if isinstance(program, UntraceableError):
        raise program
    return program


_METHODS = ("loss", "weight", "ratio_weight", "inside", "log_prob", "factor", "value_and_gradient")
"""Of objectives, anchors, corrections and penalties."""


def _identity(policy_pass: Pass, objective: Objective, *, diagnostics: bool, names: tuple[str, ...]) -> tuple[Any, ...]:
    """What tells an objective from all others, apart from its thresholds.

    The library's are known by their class and what is not a threshold. Any other is run on symbols at every call, because
    nothing else tells what it does now: it may read attributes and globals that have changed.
    """
    if is_known(objective):
        kinds = [type(part) for part in parts_of(objective)]
        return (*kinds, *(getattr(kind, name, None) for kind in kinds for name in _METHODS), statics_of(objective))

    def recorded(trace: Trace, traced: Objective) -> tuple[Any, ...]:
        if isinstance(objective, Mode):
            result = _recorded(policy_pass, trace, traced, diagnostics=diagnostics, names=names)
            return (result.loss.name, result.gradient.name, *trace.signature())
        numbers = {name: trace.input(name) for name in Tokens._fields if name not in ("divergence", "xp")}
        divergence = trace.input("divergence") if "divergence" in names else None
        tokens = Tokens(**numbers, divergence=divergence, xp=trace.namespace)
        results = [function(traced, tokens) for function in (loss_of, weight_of, ratio_weight_of, inside_of)]
        return (*(None if result is None else result.name for result in results), *trace.signature())

    try:
        return _with_or_without_thresholds(recorded, objective, np.dtype(np.float64))
    except (AttributeError, TypeError, ValueError) as error:
        # what does not work on symbols may on arrays; if not, array operations say so
        msg = f"an objective that raises {error!r}"
        raise UntraceableError(msg) from error


def _recorded(policy_pass: Pass, trace: Trace, traced: Objective, *, diagnostics: bool, names: tuple[str, ...]) -> Any:
    """What the pass does, on symbols."""
    inputs = {name: trace.input(name, BOOL if name == "mask" else FLOAT) for name in names}
    given = [inputs.get(name) for name in ARRAYS[: ARRAYS.index(names[-1]) + 1]]
    return policy_pass(traced, *given, dtype=FLOAT, diagnostics=diagnostics, select=False, xp=trace.namespace)


def _with_or_without_thresholds(record: Callable[[Trace, Any], Result], objective: Objective, dtype: np.dtype[Any]) -> Result:
    """What is recorded of an objective whose thresholds are symbols; or numbers, where its methods need their values."""
    epsilon = float(np.finfo(dtype).eps)
    if floats_of(objective):
        trace = Trace(epsilon)
        try:
            return record(trace, parametrised(objective, trace))
        except Exception:  # noqa: BLE001, S110 -- it can't be copied, or needs the value of a number
            pass
    return record(Trace(epsilon), objective)
