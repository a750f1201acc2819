"""Triton kernels over two rows of logits, one program a pair: what `drpo_torch.vocabulary.triton_divergences` runs.

`policy` and `behavior` are `drpo_torch.vocabulary.triton_arguments.Rows`, each with the maximum and log-sum of its rows over
all ranks; `support` is `Words`. What there is not is None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drpo_core.engines.triton_source import FUNCTIONS
from drpo_torch.engines.triton_loop import module_of
from drpo_torch.vocabulary.softmax import LARGEST_LOG_RATIO
from drpo_torch.vocabulary.triton_kernels import place_of, row_of, steepness, tempered, words_of

__all__ = ["divergence_gradients", "divergences"]

expm1, narrowed = (module_of(FUNCTIONS)[name] for name in ("expm1", "narrowed"))
LARGEST = tl.constexpr(LARGEST_LOG_RATIO)
# μ is floored at π e^−60, which keeps every product finite
FLOOR = tl.constexpr(2.718281828459045**-LARGEST_LOG_RATIO)


@triton.jit
def _probability(x, maximum, log_sum):
    # two tanh of one argument may differ in their last bit
    return tl.exp(tl.minimum(x - maximum, 0.0) - log_sum)


@triton.jit
def divergences(
    policy,
    policy_maximum_at,
    policy_log_sum_at,
    behavior,
    behavior_maximum_at,
    behavior_log_sum_at,
    support,
    valid_at,
    width,
    sums_at,
    rows,
    BLOCK: tl.constexpr,
):
    """Of each row ½ Σ μ abs(e^ℓ − 1), Σ μ (e^ℓ − 1 − ℓ) and Σ π sign(π − μ), to the rows of a matrix (3, rows)."""
    r = tl.program_id(0).to(tl.int64)
    number = sums_at.dtype.element_ty
    counts = True
    if valid_at is not None:
        counts = tl.load(valid_at + r) != 0
    lane = tl.arange(0, BLOCK)
    moved = tl.zeros((BLOCK,), number)
    excess = tl.zeros((BLOCK,), number)
    signed = tl.zeros((BLOCK,), number)
    if counts:
        of_policy, of_behavior, words = row_of(policy, r, number), row_of(behavior, r, number), words_of(support, r)
        x_max, x_log_sum = tl.load(policy_maximum_at + r), tl.load(policy_log_sum_at + r)
        y_max, y_log_sum = tl.load(behavior_maximum_at + r), tl.load(behavior_log_sum_at + r)
        shift = (x_max - y_max) + (x_log_sum - y_log_sum)
        for start in range(0, width, BLOCK):
            column = start + lane
            x, _ = tempered(policy, of_policy, support, words, column, column < width)
            y, _ = tempered(behavior, of_behavior, support, words, column, column < width)
            p, q = _probability(x, x_max, x_log_sum), _probability(y, y_max, y_log_sum)
            ell = x - y - shift
            # −inf + inf, of a token that neither policy can take; of a NaN, p or q is one
            ell = tl.minimum(tl.where(ell == ell, ell, 0.0), LARGEST)
            floored = tl.maximum(q, p * FLOOR, propagate_nan=tl.PropagateNan.ALL)
            e = expm1(ell)
            moved += tl.abs(e) * floored
            # where both probabilities underflow, 0 times inf would be a NaN
            excess += tl.where(floored == 0.0, 0.0, (e - ell) * floored)
            signed += tl.where(p > q, p, tl.where(p < q, -p, 0.0))
    tl.store(sums_at + r, 0.5 * tl.sum(moved, 0))
    tl.store(sums_at + rows + r, tl.sum(excess, 0))
    tl.store(sums_at + 2 * rows + r, tl.sum(signed, 0))


@triton.jit
def divergence_gradients(
    policy,
    policy_maximum_at,
    policy_log_sum_at,
    behavior,
    behavior_maximum_at,
    behavior_log_sum_at,
    support,
    signed_at,
    of_tv_at,
    of_kl_at,
    width,
    out_at,
    out_row_stride: tl.int64,
    out_column_stride: tl.int64,
    BLOCK: tl.constexpr,
):
    """The gradient in z of each row: (½ a π (s − Σ π s) + b (π − μ)) ∂x/∂z, s = sign(π − μ), of the cotangents a and b."""
    r = tl.program_id(0).to(tl.int64)
    number = of_tv_at.dtype.element_ty
    into = place_of(policy, r) * out_row_stride
    of_tv, of_kl = 0.5 * tl.load(of_tv_at + r), tl.load(of_kl_at + r)
    lane = tl.arange(0, BLOCK)
    if (of_tv != 0.0) | (of_kl != 0.0):
        of_policy, of_behavior, words = row_of(policy, r, number), row_of(behavior, r, number), words_of(support, r)
        x_max, x_log_sum = tl.load(policy_maximum_at + r), tl.load(policy_log_sum_at + r)
        y_max, y_log_sum = tl.load(behavior_maximum_at + r), tl.load(behavior_log_sum_at + r)
        signed = tl.load(signed_at + r)
        for start in range(0, width, BLOCK):
            column = start + lane
            x, z = tempered(policy, of_policy, support, words, column, column < width)
            y, _ = tempered(behavior, of_behavior, support, words, column, column < width)
            p, q = _probability(x, x_max, x_log_sum), _probability(y, y_max, y_log_sum)
            sign = tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0)).to(number)
            of_x = of_tv * p * (sign - signed) + of_kl * (p - q)
            # outside the support z may be a NaN
            of_z = tl.where(of_x == 0.0, 0.0, of_x * steepness(policy, of_policy, z))
            tl.store(out_at + into + column * out_column_stride, narrowed(of_z, out_at), mask=column < width)
    else:
        for start in range(0, width, BLOCK):
            column = start + lane
            tl.store(out_at + into + column * out_column_stride, tl.zeros((BLOCK,), number), mask=column < width)
