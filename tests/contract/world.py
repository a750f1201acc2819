"""One batch by argument names: a head, hidden states and two policies, from which every argument of every function follows.

All numbers are float64 and determined by the axes alone, so a cell is the same in every run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from contract.axes import Masked, Regime, Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCABULARY, WIDTH, RECORDED = 7, 5, 3
TEMPERATURE, SOFTCAP = 0.7, 3.0

# log π and log μ that are far apart, in either order
_DISTANT = ((-1e-3, -26.0), (-30.0, -2.0), (-0.5, -100.0), (-100.0, -0.1), (-0.7, -22.0), (-3.0, -3.2))
# one rounding of float32 below certainty
_CERTAIN = ((0.0, -1.1920929e-07), (-1.1920929e-07, 0.0), (0.0, 0.0))
_IMPOSSIBLE = ((-math.inf, -2.0), (-1.0, -1.5), (-3.0, -2.5))
_DISTINCT = 24
"""Tokens of a large batch are these, repeated."""


def world(shape: Shape, regime: Regime, masked: Masked) -> dict[str, NDArray]:
    """Arrays by name. Vocabulary-scale log-probs begin with `vocabulary_`, those of token scale don't."""
    leading = shape.leading
    n = math.prod(leading)
    rng = np.random.default_rng([len(leading), n, list(Regime).index(regime)])
    rows = min(n, _DISTINCT) or 1

    def normal(*size: int) -> NDArray:
        return rng.normal(size=size)

    def repeated(array: NDArray) -> NDArray:
        return np.resize(array, (n, *array.shape[1:])) if n else array[:0]

    head = {"weight": 0.6 * normal(VOCABULARY, WIDTH), "bias": 0.3 * normal(VOCABULARY)}
    hidden, tokens = normal(rows, WIDTH), 1 + rng.integers(VOCABULARY - 1, size=rows)
    behavior_hidden = hidden + (0.0 if regime is Regime.ON_POLICY else 0.3) * normal(rows, WIDTH)
    if regime is Regime.DISTANT:
        hidden, behavior_hidden = 60.0 * hidden, 60.0 * behavior_hidden
    if regime is Regime.IMPOSSIBLE:
        head["bias"][0] = -np.inf
    logits, behavior_logits = (h @ head["weight"].T + head["bias"] for h in (hidden, behavior_hidden))
    if regime is Regime.CERTAIN:
        logits[np.arange(rows), tokens] += 60.0
        behavior_logits[np.arange(rows), tokens] += 60.0
    x, b = _log_softmax(logits), _log_softmax(behavior_logits)
    ids = np.argsort(-b, axis=-1, kind="stable")[:, :RECORDED]
    at = np.arange(rows), tokens
    pairs = {Regime.DISTANT: _DISTANT, Regime.CERTAIN: _CERTAIN, Regime.IMPOSSIBLE: _IMPOSSIBLE}.get(regime)
    token_x, token_b = (x[at], b[at]) if pairs is None else np.resize(pairs, (rows, 2)).T
    a = normal(rows) + 0.1
    a[1::5] = 0.0
    per_token = {
        "hidden": hidden,
        "behavior_hidden": behavior_hidden,
        "logits": logits,
        "behavior_logits": behavior_logits,
        "tokens": tokens,
        "all_log_prob": x,
        "all_behavior_log_prob": b,
        "vocabulary_log_prob": x[at],
        "vocabulary_behavior_log_prob": b[at],
        "log_prob": token_x,
        "behavior_log_prob": token_b,
        "log_normalizer": logits.max(-1),
        "top_k_ids": ids,
        "top_k_log_prob": np.take_along_axis(x, ids, -1),
        "top_k_behavior_log_prob": np.take_along_axis(b, ids, -1),
        "sampled_in_top_k": (ids == tokens[:, None]).any(-1),
        "advantages": a,
        "values": normal(rows),
        "rewards": _rewards(regime, rows, rng),
        "token_weights": rng.uniform(0.5, 2.0, size=rows),
        "divergence": np.abs(np.exp(token_x) - np.exp(token_b)),
        "lengths": rng.integers(0, 50, size=rows),
        "staleness": rng.integers(-1, 5, size=rows),
        "noise": rng.uniform(size=rows),
        "candidates": rng.uniform(size=rows) < 0.8,
        "several_rewards": np.stack((_rewards(regime, rows, rng), _rewards(regime, rows, rng)), axis=-1),
        # at some distance from the sampler's, and from the policy's where that is finite
        "proximal_log_prob": np.minimum(token_b + 0.2 * normal(rows), 0.0),
        "reference_log_prob": np.minimum(token_b + 0.5 * normal(rows), 0.0),
    }
    arrays = {name: repeated(array).reshape((*leading, *array.shape[1:])) for name, array in per_token.items()}
    # of packed tokens: any integers, in any order; and indices of sequences
    ids = np.resize([5, 5, -100, 5, 9, -100], n)
    arrays |= head | {
        "mask": _mask(shape, masked),
        "segment_ids": ids.reshape(leading),
        "group_ids": ids.reshape(leading),
        # one a row of padded tokens, one a packed token
        "prompt_ids": np.resize([5, -100, 5], leading[:-1]) if len(leading) > 1 else ids.reshape(leading),
        "sequence_ids": np.resize([0, 0, 1, 0, 2, 1], n).reshape(leading),
        "sequence_advantages": normal(3 if len(leading) < 2 else leading[0]),
    }
    return arrays


def _rewards(regime: Regime, rows: int, rng: np.random.Generator) -> NDArray:
    """Rewards that 16 bits hold exactly: some whose squares they don't, some that differ by one rounding, some equal."""
    steps = rng.integers(-4, 5, size=rows).astype(np.float64)
    if regime is Regime.DISTANT:
        return 250.0 * steps
    if regime is Regime.CERTAIN:
        return 100.0 + 0.5 * np.abs(steps)
    return np.ones(rows) if regime is Regime.ON_POLICY else 0.25 * steps


def junk(arrays: dict[str, NDArray], mask: NDArray) -> dict[str, NDArray]:
    """The same where the mask is True; elsewhere what no function may look at."""
    spoilt = {}
    for name, array in arrays.items():
        if array.shape[: mask.ndim] != mask.shape or name in {"weight", "bias", "mask", "sequence_advantages"}:
            spoilt[name] = array
            continue
        bad = np.resize([np.nan, np.inf, -np.inf, 1e4], array.shape)
        if array.dtype == np.bool_:
            bad = ~array
        elif np.issubdtype(array.dtype, np.integer):
            bad = np.resize([-1, VOCABULARY, -100], array.shape)
        spoilt[name] = np.where(mask.reshape((*mask.shape, *(1,) * (array.ndim - mask.ndim))), array, bad)
    return spoilt


def _mask(shape: Shape, masked: Masked) -> NDArray:
    if masked is not Masked.SOME:
        return np.full(shape.leading, masked is Masked.NONE)
    # sequences of different lengths, one of them empty
    pattern = [1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0] if len(shape.leading) > 1 else [1, 1, 0, 1, 0, 1]
    return np.resize(np.array(pattern, dtype=bool), shape.leading)


def _log_softmax(z: NDArray) -> NDArray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
