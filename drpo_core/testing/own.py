"""References for an objective that the oracle has no formula for: its own methods, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.objectives.protocol import loss_of, ratio_weight_of, weight_of
from drpo_core.testing.oracle import References
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from drpo_core.testing.batch import BoolArray, FloatArray

__all__ = ["evaluates", "references"]

# how far, relative to the log-probs, a token may be moved, and where between the extremes it is looked at
DISTANCES = 2.0 ** np.arange(-49, 0, 4)
POINTS = np.linspace(-1.0, 1.0, 9)


def evaluates(objective: object) -> bool:
    """Return whether the methods of an objective give finite numbers for a token."""
    one = np.full(1, -1.0)
    try:
        loss, weight = _evaluate(objective, one, one, -one)
    except Exception:  # noqa: BLE001 -- whatever it raises, it can't be compared with
        return False
    return bool(np.isfinite(loss).all() and np.isfinite(weight).all())


def references(
    objective: object, log_prob: FloatArray, behavior_log_prob: FloatArray, advantages: FloatArray, mask: BoolArray
) -> References:
    """Return what `oracle.references` returns; `kept` is w ≥ 0, and `jump` is found by moving log π."""
    x, b, a = (np.where(mask, array, 0.0) for array in (log_prob, behavior_log_prob, advantages))
    loss, weight = _evaluate(objective, x, b, a)
    ell, size = np.abs(x - b), np.abs(a) * np.exp(np.minimum(x - b, 20.0))
    weight_scale = 1.0 + np.abs(weight - 1.0) * (1.0 + ell)
    factor = _ratio_weight(objective, x, b, a)
    moved = size * weight if factor is None else np.abs(a) * factor
    scale = size * weight_scale if factor is None else np.abs(moved)
    return References(
        loss=np.where(mask, loss, 0.0),
        weight=np.where(mask, weight, 0.0),
        gradient=np.where(mask, -np.sign(a) * moved, 0.0),
        loss_scale=np.where(mask, (np.abs(loss) + np.abs(moved)) * (1.0 + ell), 0.0),
        weight_scale=np.where(mask, weight_scale, 0.0),
        gradient_scale=np.where(mask & (weight != 0.0), scale * (1.0 + ell), 0.0),
        kept=~mask | (weight >= 0.0),
        jump=np.where(mask, _jump(objective, x, b, a), np.inf),
    )


def _evaluate(objective: Any, x: FloatArray, b: FloatArray, a: FloatArray) -> tuple[FloatArray, FloatArray]:
    with np.errstate(all="ignore"):
        tokens = Tokens.checked(x, b, a)
        return loss_of(objective, tokens), weight_of(objective, tokens)


def _ratio_weight(objective: Any, x: FloatArray, b: FloatArray, a: FloatArray) -> FloatArray | None:
    with np.errstate(all="ignore"):
        return ratio_weight_of(objective, Tokens.checked(x, b, a))


def _jump(objective: object, x: FloatArray, b: FloatArray, a: FloatArray) -> FloatArray:
    """Return the smallest distance within which L or w jumps, relative to the log-probs; 0 where either is not finite.

    Between neighbouring points a continuous function makes a small part of its way, a jump makes most of it.
    """
    scale = np.maximum(1.0, np.maximum(np.abs(x), np.abs(b)))
    moved = np.minimum(x + np.multiply.outer(np.multiply.outer(DISTANCES, POINTS), scale), 0.0)
    loss, weight = _evaluate(objective, moved, *(np.broadcast_to(array, moved.shape) for array in (b, a)))
    size = np.abs(a) * np.exp(np.minimum(moved - b, 20.0))
    jumps = np.zeros((len(DISTANCES), *x.shape), dtype=bool)
    for values in (weight, loss / (1.0 + size)):
        steps = np.abs(np.diff(values, axis=1))
        jumps |= ~(steps.max(axis=1) <= np.maximum(0.5 * steps.sum(axis=1), 1e-10 * (1.0 + np.abs(values).max(axis=1))))
        jumps |= ~np.isfinite(values).all(axis=1)
    nearest = np.where(jumps, DISTANCES.reshape(-1, *(1,) * x.ndim), np.inf).min(axis=0)
    unknown = ~np.isfinite(weight[0, len(POINTS) // 2])
    found: FloatArray = np.where(unknown, 0.0, nearest)
    return found
