"""Eager checks of values: what no mask or clamp should hide."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from drpo_core._checks import check_arrays, check_mask, check_number

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float, Namespace

__all__ = ["BehaviorPolicyWarning", "Problem", "find_problems", "validate"]


LOWEST, UNLIKELY = -1000.0, -1.0
SENTINEL = f"below {LOWEST:g} (a sentinel, such as -9999, for a log-prob that is missing?)"
PLACEHOLDER = f"exactly 0 where the other policy's is below {UNLIKELY:g} (a missing log-prob filled with 0?)"


class BehaviorPolicyWarning(UserWarning):
    """The log-probs that anchor the trust region are not known to be those of the policy that sampled the tokens."""


class Problem(NamedTuple):
    """A kind of bad value at valid tokens of one argument: how many, and the index of the first."""

    argument: str
    kind: str
    occurrences: int
    first: tuple[int, ...]

    def __str__(self) -> str:
        """One clause of an error message."""
        where = f"at index {self.first}" if self.occurrences == 1 else f"the first at index {self.first}"
        return f"{self.argument}: {self.occurrences} {self.kind} at valid tokens, {where}"


def validate(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    tolerance: float | None = None,
    xp: Namespace | None = None,
) -> None:
    """Raise if a valid token has a number that no policy gives; eagerly, so not inside jit or compile.

    A NaN, an infinity, a log-prob above 0, one below −1000 nats (a sentinel such as −9999, with which the ratio has no
    meaning), or one of exactly 0 where the other policy's is below −1 nat (a missing log-prob filled with 0).

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats) and A of the sampled tokens; any shape, the same for all three.
    mask
        True at tokens that count; other positions may hold anything. None: every token counts.
    tolerance
        Nats, 0 or more, by which rounding may leave a log-prob above 0; default: 16 machine epsilons of its dtype, 1e-5 at
        least.
    xp
        Namespace of the arrays; inferred when omitted.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, or any value is bad: the message has, for each argument and kind, the count and the
        index of the first.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import validate
    >>> validate(np.array([-1.0, np.nan]), np.array([-1.0, -2.0]), np.zeros(2))
    Traceback (most recent call last):
    ValueError: log_prob: 1 NaN at valid tokens, at index (1,)
    """
    problems = find_problems(log_prob, behavior_log_prob, advantages, mask=mask, tolerance=tolerance, xp=xp)
    if problems:
        raise ValueError("; ".join(map(str, problems)))


def find_problems(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    tolerance: float | None = None,
    xp: Namespace | None = None,
) -> list[Problem]:
    """What `validate` would raise about, as a list."""
    xp = check_arrays(xp=xp, log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantages=advantages)
    if mask is not None:
        check_mask(mask, "log_prob", log_prob, xp=xp)
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance, at_least=0.0)
    others = {"log_prob": behavior_log_prob, "behavior_log_prob": log_prob, "advantages": None}
    problems = []
    for name, array in (("log_prob", log_prob), ("behavior_log_prob", behavior_log_prob), ("advantages", advantages)):
        kinds = [("NaN", array != array), ("+inf", array == xp.inf), ("-inf", array == -xp.inf)]
        if (other := others[name]) is not None:
            slack = max(1e-5, 16.0 * float(xp.finfo(array.dtype).eps)) if tolerance is None else tolerance
            kinds += [
                (f"above {slack:g}", (array > slack) & (array != xp.inf)),
                (SENTINEL, (array < LOWEST) & (array != -xp.inf)),
                (PLACEHOLDER, (array == 0.0) & (other < UNLIKELY)),
            ]
        for kind, bad in kinds:
            problem = _first(name, kind, bad if mask is None else bad & mask, xp=xp)
            if problem is not None:
                problems.append(problem)
    return problems


def _first(name: str, kind: str, bad: Array, *, xp: Namespace) -> Problem | None:
    flat = xp.reshape(bad, (-1,))
    count = int(xp.sum(xp.astype(flat, xp.int32)))
    if count == 0:
        return None
    position = int(xp.argmax(xp.astype(flat, xp.int32)))
    index = []
    for size in reversed(bad.shape):
        position, i = divmod(position, size)
        index.append(i)
    return Problem(name, kind, count, tuple(reversed(index)))
