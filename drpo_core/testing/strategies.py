"""Hypothesis strategies: batches of the tokens that break policy losses.

A batch is decoded, all tokens at once, from one string of bytes. That costs one draw instead of hundreds, and it shrinks
well: a token whose bytes are all 0 is the simplest there is (π = μ = ½, A = 1, valid), so what remains unusual in a
counterexample is what it takes to fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from drpo_core.objectives import DPPO, SPO, TokenwiseClip
from drpo_core.testing.batch import TokenBatch, Vocabulary, round_to, unit_roundoff
from drpo_core.testing.oracle import clip_range, thresholds, token_bound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import SearchStrategy
    from numpy.typing import NDArray

    from drpo_core.testing.batch import BoolArray, FloatArray

__all__ = ["LAYOUTS", "REGIMES", "token_batches", "vocabularies"]

REGIMES = ("on_policy", "head", "tail", "near_certain", "near_on_policy", "far", "near_boundary", "extreme")
"""Kinds of token: π = μ; both likely; both rare; both almost 1; almost equal; unrelated; within a few ulp of the edge of
the trust region; log-probs to −100."""

LAYOUTS = ("full", "right_padded", "left_padded", "holes", "empty_rows")
"""Kinds of mask."""

_BYTES, _BYTES_OF_OTHERS = 9, 2  # of one token


def token_batches(
    objective: object = None,
    *,
    dtype: str = "float64",
    shape: tuple[int, int] | None = None,
    square: bool = False,
    regimes: Sequence[str] = REGIMES,
    layouts: Sequence[str] = LAYOUTS,
    max_abs_log_ratio: float = np.inf,
    max_ulp: int = 4,
    others: Sequence[str] = (),
    one_advantage: bool = False,
) -> SearchStrategy[TokenBatch]:
    """Batches of tokens, (sequences, tokens).

    Parameters
    ----------
    objective
        Whose thresholds tokens of the regime ``"near_boundary"`` are near to; without one they are ``"far"``.
    dtype
        Values are exactly representable in it.
    shape
        A fixed shape, for implementations that recompile at a new one; otherwise up to 5 × 8.
    square
        As many sequences as tokens: where broadcasting by mistake goes unnoticed.
    regimes, layouts
        Which kinds of tokens and masks to draw from.
    max_abs_log_ratio
        Largest abs(ℓ).
    max_ulp
        How many units in the last place of log π a token is off the boundary.
    others
        Which of ``"proximal_log_prob"`` and ``"reference_log_prob"`` to draw too: that of μ for some tokens, near it for
        most, and far from it for a few.
    one_advantage
        Whether all tokens of a sequence have the same advantage, as losses of sequences take for granted.

    Returns
    -------
    SearchStrategy
        Of `TokenBatch`. Advantages are 0 or ±[0.01, 5].

    Examples
    --------
    >>> from drpo_core.testing.strategies import token_batches
    >>> strategy = token_batches(layouts=["right_padded"], regimes=["tail"])
    """

    def build(drawn: tuple[tuple[int, int], str]) -> SearchStrategy[TokenBatch]:
        (rows, columns), layout = drawn
        per_token = _BYTES + _BYTES_OF_OTHERS * len(others)
        size = rows * columns * per_token

        def decoded(raw: bytes) -> TokenBatch:
            every = np.frombuffer(raw, np.uint8).reshape(rows, columns, per_token)
            own, more = every[..., :_BYTES], every[..., _BYTES:]
            batch = _decode(own, objective, dtype, tuple(regimes), layout, max_abs_log_ratio, max_ulp)
            places = (more[..., i * _BYTES_OF_OTHERS :] for i in range(len(others)))
            near = (_near(place, batch, dtype, max_abs_log_ratio) for place in places)
            batch = batch.replace(**dict(zip(others, near, strict=True)))
            same = np.broadcast_to(batch.advantages[:, :1], batch.shape).copy()
            return batch.replace(advantages=same) if one_advantage else batch

        return st.binary(min_size=size, max_size=size).map(decoded)

    shapes: SearchStrategy[tuple[int, int]]
    if shape is not None:
        shapes = st.just(shape)
    elif square:
        shapes = st.integers(2, 5).map(lambda n: (n, n))
    else:
        shapes = st.tuples(st.integers(1, 5), st.integers(1, 8))
    return st.tuples(shapes, st.sampled_from(tuple(layouts))).flatmap(build)


def vocabularies(
    *, size: int | None = None, states: int | None = None, max_logit: float = 5.0, on_policy: bool = False
) -> SearchStrategy[Vocabulary]:
    """Two policies over a vocabulary of 2 to 8 tokens, in 1 to 3 states.

    Parameters
    ----------
    size, states
        Fixed numbers of tokens and states.
    max_logit
        Logits of both policies lie in ±max_logit.
    on_policy
        Whether π is close to μ.

    Returns
    -------
    SearchStrategy
        Of `Vocabulary`; every probability is positive and no advantage is 0.

    Examples
    --------
    >>> from drpo_core.testing.strategies import vocabularies
    >>> strategy = vocabularies(size=4)
    """

    def build(shape: tuple[int, int]) -> SearchStrategy[Vocabulary]:
        length = shape[0] * shape[1] * 6
        return st.binary(min_size=length, max_size=length).map(lambda raw: decode(raw, shape))

    def decode(raw: bytes, shape: tuple[int, int]) -> Vocabulary:
        fields = np.frombuffer(raw, "<u2").reshape(*shape, 3)
        mu = _log_softmax(_centred(fields[..., 0]) * max_logit)
        pi = _log_softmax((mu if on_policy else 0.0) + _centred(fields[..., 1]) * (0.1 if on_policy else max_logit))
        return Vocabulary(pi, mu, _advantages(fields[..., 2], zero=False), fields[:, 0, 0].astype(np.int64) % shape[1])

    sizes = st.integers(2, 8) if size is None else st.just(size)
    return st.tuples(st.integers(1, 3) if states is None else st.just(states), sizes).flatmap(build)


def _decode(
    raw: NDArray[np.uint8],
    objective: object,
    dtype: str,
    regimes: tuple[str, ...],
    layout: str,
    max_abs_log_ratio: float,
    max_ulp: int,
) -> TokenBatch:
    code, ulp, seed = raw[..., 0], raw[..., 1], raw[..., 8]
    u, v, level = (raw[..., i : i + 2].copy().view("<u2")[..., 0] for i in (2, 4, 6))
    # even codes of the first regime are the simplest token
    regime = np.array(regimes)[code % len(regimes)]
    advantages = round_to(dtype, _advantages(level, zero=True))
    x, b = _log_probs(regime, u / 65536.0, v / 65536.0, advantages, objective)
    x, b = round_to(dtype, x), round_to(dtype, b)
    steps = np.where(regime == "near_boundary", np.rint(max_ulp * (ulp.view(np.int8) / 128.0)), 0.0)
    # rounded again, because steps may cross into a binade with wider spacing
    x = round_to(dtype, np.minimum(x + steps * np.nan_to_num(_spacing(x, dtype)), 0.0))
    if np.isfinite(max_abs_log_ratio):
        limit = max_abs_log_ratio * (1.0 - 4.0 * unit_roundoff(dtype)) - 1e-6
        b = round_to(dtype, np.clip(b, x - limit, np.minimum(x + limit, 0.0)))
    return TokenBatch(x, b, advantages, _mask(seed, layout))


def _near(raw: NDArray[np.uint8], batch: TokenBatch, dtype: str, max_abs_log_ratio: float) -> FloatArray:
    """Log-probs under another policy: μ's for code 0 and a quarter of the codes, else 0.001 to 10 nats from them.

    Within the largest abs(ℓ) of π's too.
    """
    kind, size = raw[..., 0], raw[..., 1] / 255.0
    # near, as far as weights are truncated, and further
    lowest, span = (np.array(exponents)[kind % 4] for exponents in ((0.0, -3.0, -1.0, 0.0), (0.0, 2.5, 1.3, 1.0)))
    step = np.where(kind // 4 % 2 == 0, 1.0, -1.0) * 10.0 ** (lowest + span * size)
    moved = batch.behavior_log_prob + np.where(kind % 4 == 0, 0.0, step)
    if np.isfinite(max_abs_log_ratio):
        limit = max_abs_log_ratio * (1.0 - 4.0 * unit_roundoff(dtype)) - 1e-6
        moved = np.clip(moved, batch.log_prob - limit, batch.log_prob + limit)
    return round_to(dtype, np.minimum(moved, 0.0))


def _log_probs(
    regime: NDArray[np.str_], u: FloatArray, v: FloatArray, advantages: FloatArray, objective: object
) -> tuple[FloatArray, FloatArray]:
    """(log π, log μ) of every token; u and v in [0, 1), where 0 is the simplest."""
    likely_u, likely_v = np.log(0.05 + 0.9 * ((u + 0.5) % 1.0)), np.log(0.05 + 0.9 * ((v + 0.5) % 1.0))
    rare = -3.0 - 27.0 * u
    anywhere_u, anywhere_v = -30.0 * u * u - 1e-3, -30.0 * v * v - 1e-3
    likely_or_rare = np.where((v * 16.0).astype(int) % 2 == 0, likely_u, rare)
    step = np.where((u * 4096.0).astype(int) % 2 == 0, 1.0, -1.0) * 10.0 ** (-1.0 - 14.0 * v)
    edge_x, edge_b = _boundary(objective, likely_or_rare, u, advantages)
    nothing = np.full_like(u, np.nan)
    extreme_x = np.where(v < 0.5, -100.0 + 70.0 * u, -20.0 * v)
    extreme_b = np.where(v < 0.5, -20.0 * v, -100.0 + 70.0 * u)
    table = {
        "on_policy": (likely_u, likely_u),
        "head": (likely_v, likely_u),
        "tail": (np.minimum(rare + 6.0 * ((v + 0.5) % 1.0) - 3.0, -1e-6), rare),
        "near_certain": (-(10.0 ** (-1.0 - 14.0 * v)), -(10.0 ** (-1.0 - 14.0 * u))),
        "near_on_policy": (np.minimum(likely_or_rare + step, 0.0), likely_or_rare),
        "far": (anywhere_v, anywhere_u),
        "near_boundary": (np.where(np.isnan(edge_x), anywhere_v, edge_x), np.where(np.isnan(edge_x), anywhere_u, edge_b)),
        "extreme": (extreme_x, extreme_b),
    }
    x, b = nothing, nothing
    for name, (of_x, of_b) in table.items():
        x, b = np.where(regime == name, of_x, x), np.where(regime == name, of_b, b)
    return x, b


def _boundary(objective: Any, b: FloatArray, u: FloatArray, advantages: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(log π, log μ) on the edge of the trust region that bounds A, NaN where no token is there."""
    if isinstance(objective, TokenwiseClip):
        return _token_boundary(objective, b, advantages)
    regions = clip_range(objective) or thresholds(objective)
    if regions is None:
        caps = _at_ratio(getattr(objective, "max_ratio", None), b)
        floors = _at_ratio(getattr(objective, "min_ratio", None), b)
        use = (u > 0.5) & np.isfinite(floors[0])
        return np.where(use, floors[0], caps[0]), np.where(use, floors[1], caps[1])
    down = advantages < 0.0
    bound = np.where(down, regions[0], regions[1])
    side = np.where(down, -1.0, 1.0)
    with np.errstate(all="ignore"):
        if isinstance(objective, SPO) or clip_range(objective) is not None:
            step = np.log1p(side * bound)
            b = np.minimum(b, -step)
            x = b + step
            # A < 0 also has the dual clip for an edge
            cap_x, cap_b = _at_ratio(getattr(objective, "dual_clip", None), b)
            use = down & (u > 0.5) & np.isfinite(cap_x)
            x, b = np.where(use, cap_x, x), np.where(use, cap_b, b)
        elif isinstance(objective, DPPO) and objective.divergence == "binary_kl":
            x = _kl_boundary(b, bound, side)
        else:
            mu = np.where(down, bound + (1.0 - bound) * np.exp(b), (1.0 - bound) * np.exp(b))
            b = np.log(mu)
            x = np.log(mu + side * bound)
    return np.where(np.isfinite(x) & np.isfinite(b) & (b <= 0.0) & (x <= 0.0), x, np.nan), b


def _token_boundary(objective: TokenwiseClip, b: FloatArray, advantages: FloatArray) -> tuple[FloatArray, FloatArray]:
    up = advantages >= 0.0
    values = zip(b.ravel().tolist(), np.broadcast_to(up, b.shape).ravel().tolist(), strict=True)
    most = np.reshape([float(token_bound(objective.bounds, value, up=side)[0]) for value, side in values], b.shape)
    with np.errstate(all="ignore"):
        x = b + np.log1p(np.where(up, most, -most))
    return np.where(np.isfinite(x) & (x <= 0.0), x, np.nan), b


def _at_ratio(cap: float | None, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(log π, log μ) with r = cap; NaN without one."""
    if cap is None:
        return np.full_like(b, np.nan), b
    b = np.minimum(b, -max(float(np.log(cap)), 0.0))
    return b + np.log(cap), b


def _kl_boundary(b: FloatArray, delta: FloatArray, side: FloatArray) -> FloatArray:
    """Log π at which the Binary KL(μ‖π) reaches δ, on the given side of μ, by bisection."""
    near, far = b, np.where(side > 0.0, 0.0, -100.0)
    mu, rest = np.exp(b), -np.expm1(b)
    for _ in range(60):
        middle = 0.5 * (near + far)
        kl = mu * (b - middle) + rest * (np.log(rest) - np.log(-np.expm1(middle)))
        inside = kl <= delta
        near, far = np.where(inside, middle, near), np.where(inside, far, middle)
    return near


def _mask(seed: NDArray[np.uint8], layout: str) -> BoolArray:
    rows, columns = seed.shape
    position = np.arange(columns)
    # the first byte of each row says how much of it is padding
    padding = (seed[:, :1] % (columns + 1)).astype(int)
    masks: dict[str, BoolArray] = {
        "full": np.ones((rows, columns), dtype=bool),
        "right_padded": position < columns - padding,
        "left_padded": position >= padding,
        "holes": seed % 4 != 3,
        "empty_rows": np.broadcast_to(seed[:, :1] % 2 == 0, (rows, columns)).copy(),
    }
    return masks[layout]


def _advantages(level: NDArray[np.uint16], *, zero: bool) -> FloatArray:
    """A in ±[0.01, 5], and 0 for an eighth of the codes; 1 for code 0."""
    kind, size = level % 8, (level // 8) / 8191.0
    # subnormal advantages produce artefacts of the backends, hence the gap around 0
    magnitude = np.round(10.0 ** (np.log10(5.0) - size * np.log10(500.0)), 4)
    signed = np.where(kind % 2 == 0, 1.0, -1.0) * magnitude
    signed = np.where(level == 0, 1.0, signed)
    return np.where(kind == 7, 0.0, signed) if zero else signed


def _centred(code: NDArray[np.uint16]) -> FloatArray:
    """0 for code 0, and otherwise in [−1, 1)."""
    centred: FloatArray = ((code / 65536.0 + 0.5) % 1.0) * 2.0 - 1.0
    return centred


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def _spacing(x: FloatArray, dtype: str) -> FloatArray:
    """Distance to the next value of a dtype, away from 0; 0 at π = 1, whose neighbours are subnormal."""
    x = np.where(np.abs(x) < 1e-20, np.nan, x)
    if dtype == "float64":
        return np.spacing(np.abs(x))
    if dtype == "float32":
        return np.spacing(np.abs(x).astype(np.float32)).astype(np.float64)
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 1e-30))) - 7.0)
