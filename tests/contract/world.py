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
PADDING = 27
"""Columns beyond the vocabulary where its size is given: with them it has two words of bits."""

TEMPERATURE, SOFTCAP = 0.7, 3.0

# log π and log μ that are far apart, in either order
_DISTANT = ((-1e-3, -26.0), (-30.0, -2.0), (-0.5, -100.0), (-100.0, -0.1), (-0.7, -22.0), (-3.0, -3.2))
# one rounding of float32 below certainty
_CERTAIN = ((0.0, -1.1920929e-07), (-1.1920929e-07, 0.0), (0.0, 0.0))
_IMPOSSIBLE = ((-math.inf, -2.0), (-1.0, -1.5), (-3.0, -2.5))
_PAIRS = {Regime.DISTANT: _DISTANT, Regime.CERTAIN: _CERTAIN, Regime.IMPOSSIBLE: _IMPOSSIBLE}

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
    pairs = _PAIRS.get(regime)
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
    # drawn apart, so that what was there before stays what it was
    more = np.random.default_rng([len(leading), n, list(Regime).index(regime), 1])
    old = _log_softmax(behavior_logits + 0.2 * more.normal(size=behavior_logits.shape))
    per_token |= {
        "temperature": more.uniform(0.6, 1.4, size=rows),
        "behavior_temperature": more.uniform(0.8, 1.6, size=rows),
        "all_proximal_log_prob": old,
        "top_k_proximal_log_prob": np.take_along_axis(old, ids, -1),
        "support": (support := _supports(tokens, more)),
        "support_beyond_top_k": _beyond_top_k(support, tokens, ids),
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


def _supports(tokens: NDArray, rng: np.random.Generator) -> NDArray:
    """Of every four tokens, one without a record, one that could be nothing else, and two that could be some others."""
    rows = rng.uniform(size=(len(tokens), VOCABULARY)) < 0.5
    rows[1::4] = False
    rows[np.arange(len(tokens)), tokens] = True
    rows[::4] = False
    return rows


def _beyond_top_k(support: NDArray, tokens: NDArray, ids: NDArray) -> NDArray:
    """With one id more where there is none but those recorded and the sampled one: or no mass would be left for the rest."""
    others = np.ones_like(support)
    np.put_along_axis(others, np.concatenate((ids, tokens[:, None]), -1), False, -1)
    last = VOCABULARY - 1 - np.argmax(others[:, ::-1], -1)
    rows = support.copy()
    rows[np.arange(len(rows)), last] |= support.any(-1) & ~(support & others).any(-1)
    return rows


def renormalised(arrays: dict[str, NDArray], regime: Regime) -> dict[str, NDArray]:
    """The recorded log-probs as those of policies over the support; ids outside it keep theirs, which count for nothing."""
    inside = arrays["support"] | ~arrays["support"].any(-1, keepdims=True)
    of_top_k = np.take_along_axis(inside, arrays["top_k_ids"], -1)
    found = dict(arrays)
    for whole, name in (("all_behavior_log_prob", "behavior_log_prob"), ("all_proximal_log_prob", "proximal_log_prob")):
        mass = np.log(np.where(inside, np.exp(arrays[whole]), 0.0).sum(-1))
        top_k = arrays[f"top_k_{name}"]
        found[f"top_k_{name}"] = np.where(of_top_k, np.minimum(top_k - mass[..., None], 0.0), top_k)
        if name == "behavior_log_prob" and regime not in _PAIRS:
            found[name] = np.minimum(arrays[name] - mass, 0.0)
    return found


def padded(arrays: dict[str, NDArray]) -> dict[str, NDArray]:
    """The same with padding behind the vocabulary, which is the first axis of a head and the last of anything else."""
    return arrays | {name: _padded(arrays[name], axis) for name, axis in _AXIS_OF_VOCABULARY.items()}


_AXIS_OF_VOCABULARY = {
    "logits": -1,
    "behavior_logits": -1,
    "support": -1,
    "support_beyond_top_k": -1,
    **dict.fromkeys(("weight", "bias", "behavior_weight", "behavior_bias"), 0),
}


def _padded(array: NDArray, axis: int) -> NDArray:
    moved = np.moveaxis(array, axis, -1)
    shape = (*moved.shape[:-1], PADDING)
    more = np.resize([np.nan, np.inf, -np.inf, 1e4], shape) if array.dtype.kind == "f" else np.resize([True, False], shape)
    return np.moveaxis(np.concatenate((moved, more), -1), -1, axis)


def _rewards(regime: Regime, rows: int, rng: np.random.Generator) -> NDArray:
    """Rewards that 16 bits hold exactly: some whose squares they don't, some that differ by one rounding, some equal."""
    steps = rng.integers(-4, 5, size=rows).astype(np.float64)
    if regime is Regime.DISTANT:
        return 250.0 * steps
    if regime is Regime.CERTAIN:
        return 100.0 + 0.5 * np.abs(steps)
    return np.ones(rows) if regime is Regime.ON_POLICY else 0.25 * steps


NOT_OF_TOKENS = {"weight", "bias", "behavior_weight", "behavior_bias", "mask", "sequence_advantages"}


def junk(arrays: dict[str, NDArray], mask: NDArray) -> dict[str, NDArray]:
    """The same where the mask is True; elsewhere what no function may look at."""
    spoilt = {}
    for name, array in arrays.items():
        if array.shape[: mask.ndim] != mask.shape or name in NOT_OF_TOKENS:
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
