"""Group-relative advantages, and their expansion from sequences to tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from array_api_compat import is_numpy_namespace

from drpo_core._arrays import in_one_piece, taken_along_rows
from drpo_core._checks import (
    check_arrays,
    check_dtype,
    check_mask,
    check_number,
    check_segment_ids,
    check_shape,
    compute_dtype,
)
from drpo_core._sequences import Segments, Sequences, distances

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drpo_core._arrays import Array, Bool, Float, Int, Namespace

__all__ = [
    "KeptGroups",
    "expand_advantages",
    "generalized_advantages",
    "group_advantages",
    "informative_groups",
    "length_weighted_advantages",
    "pass_at_k_advantages",
    "reward_decoupled_advantages",
    "whitened_advantages",
]


def group_advantages(
    rewards: Float[Array, "*sequences"],
    *,
    group_ids: Int[Array, " sequences"] | None = None,
    divide_by_std: bool = False,
    std_offset: float = 1e-6,
    divide_by_mean: bool = False,
    leave_one_out: bool = False,
    xp: Namespace | None = None,
) -> Float[Array, "*sequences"]:
    """Group-relative advantages A = R − mean(R of its group), optionally divided by the group's deviation or its mean.

    Parameters
    ----------
    rewards
        R per sequence: (…, samples) with one group a row, or (sequences,) with `group_ids`.
    group_ids
        Which group each sequence belongs to (any integers, in any order); groups may differ in size.
    divide_by_std
        A = (R − mean) / (std + `std_offset`), with the sample standard deviation (n − 1).
    std_offset
        Added to the standard deviation, in units of the reward; 0 or more.
    divide_by_mean
        A = (R − mean) / mean, for rewards that are 0 or more (MaxRL). A negative mean would turn every sign around, as it
        does in frameworks that divide by it, so a negative reward is an error in NumPy; elsewhere, where values may be on a
        device, it makes its group's advantages NaN, which `drpo_core.validate` reports.
    leave_one_out
        Use the mean of the *other* sequences of the group: A = n/(n − 1)·(R − mean).
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        A per sequence, of the shape and dtype of `rewards`, computed in float32 at least. Exactly 0 in a group of equal
        rewards or of one sequence.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, `rewards` with `group_ids` is not 1-D, `std_offset` is negative or not finite, both divisions
        are asked for, or a reward of a NumPy array is NaN, or negative with `divide_by_mean`; elsewhere, a NaN stays in its
        own group.

    References
    ----------
    arXiv:2402.03300 (GRPO), section 4.1.1; without the division: arXiv:2503.20783 (Dr. GRPO); leave-one-out:
    arXiv:2402.14740 (RLOO); divided by the mean: arXiv:2602.02710 (MaxRL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import group_advantages
    >>> group_advantages(np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    array([[ 0.75, -0.25, -0.25, -0.25],
           [ 0.  ,  0.  ,  0.  ,  0.  ]])
    >>> group_advantages(np.array([1.0, 5.0, 0.0, 5.0]), group_ids=np.array([7, 3, 7, 3]), leave_one_out=True)
    array([ 1.,  0., -1.,  0.])
    """
    xp = check_arrays(xp=xp, rewards=rewards)
    std_offset = check_number("std_offset", std_offset, at_least=0.0)
    if divide_by_std and divide_by_mean:
        msg = "divide_by_mean: expected False with divide_by_std, got True"
        raise ValueError(msg)
    over_group = _groups("rewards", rewards, group_ids, xp=xp)
    if divide_by_mean:
        _check_values("rewards", rewards, rewards < 0.0, "0 or more with divide_by_mean", xp=xp)
    if 0 in rewards.shape:
        return rewards
    r = xp.astype(rewards, compute_dtype(rewards, xp=xp), copy=False)
    n = over_group(xp.ones_like(r), xp.sum, xp.add)
    centred = r - over_group(r, xp.sum, xp.add) / n
    others = xp.where(n > 1.0, n - 1.0, 1.0)
    # equal rewards can differ from their rounded mean; dividing that by a tiny spread would be noise of size 1
    constant = over_group(r, xp.max, xp.maximum) == over_group(r, xp.min, xp.minimum)
    advantages = centred * n / others if leave_one_out else centred
    if divide_by_std:
        advantages = advantages / xp.where(constant, 1.0, _deviation(centred, n, over_group, xp=xp) + std_offset)
    if divide_by_mean:
        mean = over_group(r, xp.sum, xp.add) / n
        advantages = advantages / xp.where(constant, 1.0, mean)
    advantages = xp.where(constant, 0.0, advantages)
    if divide_by_mean:
        advantages = xp.where(over_group(r, xp.min, xp.minimum) < 0.0, xp.nan, advantages)
    return xp.astype(advantages, rewards.dtype, copy=False)


def length_weighted_advantages(
    rewards: Float[Array, "*sequences"],
    lengths: Int[Array, "*sequences"],
    *,
    group_ids: Int[Array, " sequences"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*sequences"]:
    """Advantages A = R − Σ T R / Σ T over its group: the baseline of least variance if a sequence's gradient grows with T.

    Parameters
    ----------
    rewards
        R per sequence: (…, samples) with one group a row, or (sequences,) with `group_ids`.
    lengths
        T, tokens of each sequence, 0 or more; of the shape of `rewards`.
    group_ids
        Which group each sequence belongs to; any integers, in any order.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        A per sequence, of the shape and dtype of `rewards`, computed in float32 at least; exactly 0 in a group of equal
        rewards, else R − 0 in a group of no token.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, or in NumPy arrays a reward is NaN or a length negative; elsewhere, either makes its group's
        advantages NaN.

    References
    ----------
    arXiv:2505.23585 (OPO), eq. 8.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core.advantages import length_weighted_advantages
    >>> length_weighted_advantages(np.array([[1.0, 0.0]]), np.array([[30, 10]]))
    array([[ 0.25, -0.75]])
    """
    xp = check_arrays(xp=xp, rewards=rewards)
    check_dtype("lengths", lengths, "integral", xp=xp)
    check_shape("lengths", lengths, "rewards", rewards)
    over_group = _groups("rewards", rewards, group_ids, xp=xp)
    _check_values("lengths", lengths, lengths < 0, "0 or more", xp=xp)
    if 0 in rewards.shape:
        return rewards
    r = xp.astype(rewards, compute_dtype(rewards, xp=xp), copy=False)
    t = xp.astype(lengths, r.dtype)
    total = over_group(t, xp.sum, xp.add)
    baseline = over_group(t * r, xp.sum, xp.add) / xp.where(total == 0.0, 1.0, total)
    # equal rewards can differ from their rounded mean
    constant = over_group(r, xp.max, xp.maximum) == over_group(r, xp.min, xp.minimum)
    advantages = xp.where(constant, 0.0, r - baseline)
    advantages = xp.where(over_group(t, xp.min, xp.minimum) < 0.0, xp.nan, advantages)
    return xp.astype(advantages, rewards.dtype, copy=False)


def reward_decoupled_advantages(
    rewards: Float[Array, "*sequences rewards"],
    *,
    weights: Sequence[float] | None = None,
    group_ids: Int[Array, " sequences"] | None = None,
    divide_by_std: bool = True,
    std_offset: float = 1e-6,
    xp: Namespace | None = None,
) -> Float[Array, "*sequences"]:
    """Advantages of several rewards, each normalised in its group by itself: A = Σ_k w_k (R_k − mean) / (std + offset) (GDPO).

    Summed first, as in GRPO, a reward of large spread drowns the others, and different sums become the same advantage.

    Parameters
    ----------
    rewards
        R_k per sequence, rewards last: (…, samples, rewards) with one group a row, or (sequences, rewards) with `group_ids`.
    weights
        w_k, a number for each reward; default: 1.
    group_ids
        Which group each sequence belongs to; any integers, in any order.
    divide_by_std, std_offset
        As in `drpo_core.group_advantages`.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        A per sequence, without the axis of rewards; of the dtype of `rewards`, computed in float32 at least. A reward that
        is equal in all of a group adds exactly 0.

    Raises
    ------
    TypeError
        If a dtype is wrong, or a weight is no number.
    ValueError
        If the shapes differ, there is not a weight for each reward, a number is out of its range, or a reward of a NumPy
        array is NaN.

    Notes
    -----
    GDPO whitens the sums over the batch: `whitened_advantages` of the result (TRL, ms-swift: over sequences), or of it
    expanded to tokens (verl).

    References
    ----------
    arXiv:2601.05242 (GDPO); verl's ``compute_gdpo_outcome_advantage`` (verl/trainer/ppo/core_algos.py, 0.9.1), TRL's
    ``multi_objective_aggregation="normalize_then_sum"`` (trl/trainer/grpo_trainer.py, 1.16.0; offset 1e-4).

    Examples
    --------
    Two rewards count the same, though one is a hundred times as large:

    >>> import numpy as np
    >>> from drpo_core.advantages import reward_decoupled_advantages
    >>> rewards = np.array([[[2.0, 0.0], [1.0, 100.0], [0.0, 0.0]]])
    >>> reward_decoupled_advantages(rewards).round(3)
    array([[ 0.423,  1.155, -1.577]])
    """
    xp = check_arrays(xp=xp, rewards=rewards)
    if rewards.ndim < 2:
        msg = f"rewards: expected (…, samples, rewards), got shape {tuple(rewards.shape)}"
        raise ValueError(msg)
    count = rewards.shape[-1]
    if weights is not None and not hasattr(weights, "__len__"):
        msg = f"weights: expected {count} numbers, one for each reward, got {type(weights).__name__}"
        raise TypeError(msg)
    numbers = [1.0] * count if weights is None else [check_number("weights", weight) for weight in weights]
    if len(numbers) != count:
        msg = f"weights: expected {count}, one for each reward, got {len(numbers)}"
        raise ValueError(msg)
    r = xp.astype(rewards, compute_dtype(rewards, xp=xp), copy=False)
    options: dict[str, Any] = {"group_ids": group_ids, "divide_by_std": divide_by_std, "std_offset": std_offset, "xp": xp}
    total = xp.sum(xp.zeros_like(r), axis=-1)
    for k, weight in enumerate(numbers):
        total = total + weight * group_advantages(r[..., k], **options)
    return xp.astype(total, rewards.dtype, copy=False)


def pass_at_k_advantages(
    rewards: Float[Array, "*sequences"],
    *,
    k: int,
    group_ids: Int[Array, " sequences"] | None = None,
    divide_by_std: bool = False,
    std_offset: float = 1e-6,
    xp: Namespace | None = None,
) -> Float[Array, "*sequences"]:
    """Advantages for the best of k samples: A_i = E[max(R_i, M) − M], M the largest reward of k − 1 others of its group.

    The mean is over all (k − 1)-subsets of the group's other samples. For rewards of 0 and 1 it is pass@k: a correct sample
    has the probability that k − 1 others are all wrong, a wrong one 0. The expectation of (k/n) Σ_i A_i ∇log π_i over n
    samples is the gradient of E[max of k rewards].

    Parameters
    ----------
    rewards
        R per sequence: (…, samples) with one group a row, or (sequences,) with `group_ids`.
    k
        k ≥ 2. A group of fewer samples is taken whole, as if k were its size. For one sample, pass@1, see
        `drpo_core.group_advantages`.
    group_ids
        Which group each sequence belongs to; any integers, in any order.
    divide_by_std
        Divide A by (std + `std_offset`), with the sample standard deviation (n − 1) of the group's rewards.
    std_offset
        Added to the standard deviation, in units of the reward; 0 or more.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        A per sequence, 0 or more, of the shape and dtype of `rewards`, computed in float32 at least; exactly 0 in a group
        of equal rewards or of one sequence.

    Raises
    ------
    TypeError
        If a dtype is wrong, or `k` is no whole number.
    ValueError
        If the shapes differ, a number is out of its range, or a reward of a NumPy array is NaN.

    References
    ----------
    arXiv:2505.15201 (PKPO), eq. 33, times n/k. With k = n: arXiv:2503.19595, and verl's ``grpo_passk``
    (verl/trainer/ppo/core_algos.py, 0.9.1), which gives the best sample its lead over the second and by default divides by
    the standard deviation.

    Examples
    --------
    The only right one of four always adds 1; one of two adds it where both others that are drawn are wrong, a third of the
    time:

    >>> import numpy as np
    >>> from drpo_core.advantages import pass_at_k_advantages
    >>> pass_at_k_advantages(np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]), k=3).round(3)
    array([[1.   , 0.   , 0.   , 0.   ],
           [0.333, 0.333, 0.   , 0.   ]])
    """
    xp = check_arrays(xp=xp, rewards=rewards)
    k = int(check_number("k", k, at_least=2, whole=True))
    std_offset = check_number("std_offset", std_offset, at_least=0.0)
    over_group = _groups("rewards", rewards, group_ids, xp=xp)
    if 0 in rewards.shape:
        return rewards
    r = xp.astype(rewards, compute_dtype(rewards, xp=xp), copy=False)
    order = xp.argsort(in_one_piece(r, xp=xp), axis=-1, stable=True)

    def arranged(x: Array, order: Array) -> Array:
        return taken_along_rows(in_one_piece(x, xp=xp), order, xp=xp)

    ordered = arranged(r, order)
    ids = None if group_ids is None else arranged(group_ids, order)
    group = Sequences(xp.astype(xp.ones_like(ordered), xp.bool), ids, xp=xp)
    n, lower = group.length(ordered), group.running_total(xp.ones_like(ordered)) - 1.0
    gap = xp.where(lower > 0.0, ordered + group.smallest_before(-ordered, nothing=0.0), 0.0)
    # between two neighbours the mean grows by their gap where all k − 1 others are among the lower ones
    for j in range(k - 1):
        left = n - 1.0 - j
        gap = gap * xp.where(left > 0.0, xp.where(lower > j, lower - j, 0.0) / xp.where(left > 0.0, left, 1.0), 1.0)
    advantages = arranged(group.running_total(gap), xp.argsort(order, axis=-1, stable=True))
    if divide_by_std:
        n = over_group(xp.ones_like(r), xp.sum, xp.add)
        centred = r - over_group(r, xp.sum, xp.add) / n
        std = _deviation(centred, n, over_group, xp=xp) + std_offset
        advantages = advantages / xp.where(std == 0.0, 1.0, std)
    return xp.astype(advantages, rewards.dtype, copy=False)


def whitened_advantages(
    advantages: Float[Array, "*tokens"], mask: Bool[Array, "*tokens"], *, std_offset: float = 1e-8, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Advantages with mean 0 and standard deviation 1 over the valid tokens of the batch: A' = (A − mean) / (std + offset).

    Parameters
    ----------
    advantages
        A per token, any shape; anything where the mask is False.
    mask
        True at tokens that count.
    std_offset
        Added to the standard deviation (with n − 1), in units of A; 0 or more.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        A' per token, 0 where the mask is False and where all valid ones are equal; of the dtype of `advantages`.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, or `std_offset` is negative or not finite.

    References
    ----------
    arXiv:2501.03262 (REINFORCE++), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core.advantages import whitened_advantages
    >>> whitened_advantages(np.array([1.0, 2.0, 3.0, np.nan]), np.array([True, True, True, False])).round(6)
    array([-1.,  0.,  1.,  0.])
    """
    xp = check_arrays(xp=xp, advantages=advantages)
    check_mask(mask, "advantages", advantages, xp=xp)
    std_offset = check_number("std_offset", std_offset, at_least=0.0)
    if 0 in advantages.shape:
        return advantages
    a = xp.astype(xp.where(mask, advantages, 0.0), compute_dtype(advantages, xp=xp), copy=False)
    n = xp.astype(xp.count_nonzero(mask), a.dtype)
    mean = xp.sum(a) / xp.where(n == 0.0, 1.0, n)
    centred = xp.where(mask, a - mean, 0.0)
    std = xp.sqrt(xp.sum(centred * centred) / xp.where(n > 1.0, n - 1.0, 1.0))
    constant = xp.max(xp.where(mask, a, -xp.inf)) <= xp.min(xp.where(mask, a, xp.inf))
    whitened = centred / xp.where(constant, 1.0, std + std_offset)
    return xp.astype(xp.where(constant, 0.0, whitened), advantages.dtype, copy=False)


def generalized_advantages(
    rewards: Float[Array, "*sequences tokens"],
    values: Float[Array, "*sequences tokens"],
    mask: Bool[Array, "*sequences tokens"],
    *,
    discount: float = 1.0,
    trace_decay: float | Array = 0.95,
    xp: Namespace | None = None,
) -> Float[Array, "*sequences tokens"]:
    """Generalised advantage estimates A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = R_t + γ V_{t+1} − V_t, over valid tokens.

    Tokens that the mask leaves out are skipped, as if the valid ones of a row stood side by side (a tool's answer between
    a model's turns, say). After the last one the value is 0.

    Parameters
    ----------
    rewards, values
        R and V per token, (…, tokens); anything where the mask is False.
    mask
        True at tokens that count.
    discount
        γ in [0, 1].
    trace_decay
        λ in [0, 1]: a number, or one a row, (…, 1): λ = 1 − 1/(α T) for sequences of T tokens (VAPO). One outside it is an
        error as a number or in NumPy; elsewhere it makes its row's advantages NaN.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        A per token, 0 where the mask is False; of the dtype of `rewards`, computed in float32 at least. A + V is the return
        that a value function is fitted to.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, there is no axis of tokens, or a number is out of its range.

    References
    ----------
    arXiv:1506.02438 (GAE), eq. 16; length-adaptive λ: arXiv:2504.05118 (VAPO), section 4.2.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core.advantages import generalized_advantages
    >>> rewards, values = np.array([[0.0, 9.0, 1.0]]), np.array([[0.5, 9.0, 0.25]])
    >>> generalized_advantages(rewards, values, np.array([[True, False, True]]), trace_decay=1.0)
    array([[0.5 , 0.  , 0.75]])
    """
    xp = check_arrays(xp=xp, rewards=rewards, values=values)
    check_mask(mask, "rewards", rewards, xp=xp)
    if rewards.ndim == 0:
        msg = "rewards: expected at least one axis, the tokens of a sequence, got a 0-d array"
        raise ValueError(msg)
    discount = check_number("discount", discount, at_least=0.0, at_most=1.0)
    dtype = compute_dtype(rewards, values, xp=xp)
    trace_decay = _checked_decay(trace_decay, rewards, dtype, xp=xp)
    r, v = (xp.astype(xp.where(mask, array, 0.0), dtype, copy=False) for array in (rewards, values))
    keep = xp.astype(mask, dtype)
    # A_t = δ_t + γλ A_{t+1} and V_{t+1}, each through (a, b): x_t = b_t + a_t x_{t+1}, composed over 1, 2, 4 … tokens
    following = _recurrence(v, 1.0 - keep, shift=1, xp=xp)
    delta = xp.where(mask, r + discount * following - v, 0.0)
    estimate = _recurrence(delta, xp.where(mask, discount * trace_decay, xp.ones_like(delta)), shift=0, xp=xp)
    return xp.astype(xp.where(mask, estimate, 0.0), rewards.dtype, copy=False)


def _checked_decay(trace_decay: float | Array, rewards: Array, dtype: Any, *, xp: Namespace) -> float | Array:
    """λ as a number, or an array of one a row that has NaN where it is outside [0, 1]."""
    if not getattr(trace_decay, "shape", ()):
        return check_number("trace_decay", trace_decay, at_least=0.0, at_most=1.0)
    decay: Array = trace_decay
    check_dtype("trace_decay", decay, "real floating", xp=xp)
    rows = (*rewards.shape[:-1], 1)
    if tuple(decay.shape) != rows:
        msg = f"trace_decay: expected a number, or one a row, shape {rows}, got shape {tuple(decay.shape)}"
        raise ValueError(msg)
    right = (decay >= 0.0) & (decay <= 1.0)
    _check_values("trace_decay", decay, ~right, "a number in [0, 1]", xp=xp)
    return xp.astype(xp.where(right, decay, xp.nan), dtype, copy=False)


def _recurrence(b: Array, a: Array, *, shift: int, xp: Namespace) -> Array:
    """x_t = b_t + a_t x_{t+1} along the last axis, with x = 0 after the end; x_{t+1} with ``shift=1``."""

    def moved(array: Array, distance: int, fill: float) -> Array:
        if array.shape[-1] <= distance:
            return xp.full_like(array, fill)
        return xp.concat((array[..., distance:], xp.full_like(array[..., :distance], fill)), axis=-1)

    a = xp.broadcast_to(a, b.shape)
    for distance in distances(b.shape[-1]):
        a, b = a * moved(a, distance, 1.0), b + a * moved(b, distance, 0.0)
    return moved(b, 1, 0.0) if shift else b


class KeptGroups(NamedTuple):
    """Which sequences a filter keeps, and counts of groups: 0-d integer arrays."""

    kept: Array
    groups_kept: Array
    groups_removed: Array


def informative_groups(
    rewards: Float[Array, "groups samples"],
    *,
    low: float | None = None,
    high: float | None = None,
    xp: Namespace | None = None,
) -> KeptGroups:
    """Groups from which something can be learnt: not all rewards equal, and a mean within (low, high) if bounds are given.

    Parameters
    ----------
    rewards
        R, one group a row.
    low, high
        Exclusive bounds of a group's mean reward; None for none.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    KeptGroups
        `kept` per sequence, boolean; how many groups were kept and removed.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If `rewards` is not 2-D, a bound is not finite, or a reward of a NumPy array is NaN; elsewhere, a group with a NaN is
        removed.

    References
    ----------
    arXiv:2503.14476 (DAPO), dynamic sampling.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core.advantages import informative_groups
    >>> found = informative_groups(np.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> found.kept.tolist(), int(found.groups_removed)
    ([[True, True], [False, False]], 1)
    """
    xp = check_arrays(xp=xp, rewards=rewards)
    if rewards.ndim != 2:
        msg = f"rewards: expected (groups, samples), got shape {tuple(rewards.shape)}"
        raise ValueError(msg)
    low = None if low is None else check_number("low", low)
    high = None if high is None else check_number("high", high)
    _check_no_nan("rewards", rewards, xp=xp)
    if 0 in rewards.shape:
        none = xp.count_nonzero(rewards > xp.inf)
        return KeptGroups(rewards > xp.inf, none, none + rewards.shape[0])
    r = xp.astype(rewards, compute_dtype(rewards, xp=xp), copy=False)
    mean = xp.mean(r, axis=-1, keepdims=True)
    kept = xp.max(r, axis=-1, keepdims=True) > xp.min(r, axis=-1, keepdims=True)
    kept = kept if low is None else kept & (mean > low)
    kept = kept if high is None else kept & (mean < high)
    count = xp.count_nonzero(kept)
    # not broadcast: an array of its own, which may be written to
    return KeptGroups(kept & (r == r), count, r.shape[0] - count)


def _check_no_nan(name: str, array: Array, *, xp: Namespace) -> None:
    """Raise for a NaN in a NumPy array, by its place."""
    _check_values(name, array, array != array, "numbers", xp=xp)


def _check_values(name: str, array: Array, wrong: Array, expected: str, *, xp: Namespace) -> None:
    """Raise for a wrong value of a NumPy array, by its place; those of other arrays may be on a device, or unknown."""
    if is_numpy_namespace(xp) and bool(xp.any(wrong)):
        place = tuple(int(i) for i in xp.argwhere(wrong)[0])
        msg = f"{name}: expected {expected}, got {array[place]} at index {place if len(place) > 1 else place[0]}"
        raise ValueError(msg)


def _groups(name: str, rewards: Array, group_ids: Array | None, *, xp: Namespace) -> Callable[..., Array]:
    """A reduction over groups, after checking the arrays."""
    if rewards.ndim == 0:
        msg = f"{name}: expected at least one axis, got a 0-d array"
        raise ValueError(msg)
    if group_ids is not None:
        check_dtype("group_ids", group_ids, "integral", xp=xp)
        check_shape("group_ids", group_ids, name, rewards)
        if rewards.ndim != 1:
            msg = f"{name}: expected 1-D with group_ids, got shape {tuple(rewards.shape)}"
            raise ValueError(msg)
    _check_no_nan(name, rewards, xp=xp)
    return _over_rows(xp) if group_ids is None or 0 in rewards.shape else _over_ids(group_ids, xp)


def _deviation(centred: Array, n: Array, over_group: Callable[..., Array], *, xp: Namespace) -> Array:
    """Sample standard deviation of each one's group of n; 0 in a group of one."""
    squares = over_group(centred * centred, xp.sum, xp.add)
    return xp.sqrt(squares / xp.where(n > 1.0, n - 1.0, 1.0))


def _over_rows(xp: Namespace) -> Callable[..., Array]:
    """A reduction over the last axis, given to each of its elements."""

    def over_row(x: Array, reduce: Callable[..., Array], combine: Callable[..., Array]) -> Array:  # noqa: ARG001
        return xp.broadcast_to(reduce(x, axis=-1, keepdims=True), x.shape)

    return over_row


def _over_ids(group_ids: Array, xp: Namespace) -> Callable[..., Array]:
    """A reduction over the elements with the same id, given to each of them."""
    groups = Segments(group_ids, xp=xp)

    def over_ids(x: Array, reduce: Callable[..., Array], combine: Callable[..., Array]) -> Array:  # noqa: ARG001
        return groups.whole(x, combine)

    return over_ids


def expand_advantages(
    advantages: Float[Array, " sequences"],
    mask: Bool[Array, "*tokens"],
    *,
    segment_ids: Int[Array, " tokens"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Give every token its sequence's advantage: A[s, t] = A[s] where the mask is True, else 0.

    Parameters
    ----------
    advantages
        A per sequence, (sequences,).
    mask
        True at tokens that count: (sequences, tokens) padded, or (tokens,) packed.
    segment_ids
        Of packed tokens: the index of each token's sequence in `advantages`. One outside it at a valid token is an error
        in NumPy; elsewhere, where a value may be on a device or unknown, it gives NaN, which `drpo_core.validate` reports.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        A per token, of the mask's shape and the advantages' dtype.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the mask is not (sequences, tokens), or not (tokens,) with `segment_ids`, or an id has no advantage.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import expand_advantages
    >>> expand_advantages(np.array([0.5, -0.5]), np.array([[True, True, False], [True, False, False]]))
    array([[ 0.5,  0.5,  0. ],
           [-0.5,  0. ,  0. ]])
    >>> expand_advantages(np.array([0.5, -0.5]), np.ones(3, dtype=bool), segment_ids=np.array([0, 1, 1]))
    array([ 0.5, -0.5, -0.5])
    """
    xp = check_arrays(xp=xp, advantages=advantages)
    check_dtype("mask", mask, "bool", xp=xp)
    if advantages.ndim != 1:
        msg = f"advantages: expected one per sequence, 1-D, got shape {tuple(advantages.shape)}"
        raise ValueError(msg)
    if segment_ids is not None:
        check_segment_ids(segment_ids, mask, xp=xp)
        count = advantages.shape[0]
        wrong = mask & ((segment_ids < 0) | (segment_ids >= count))
        if is_numpy_namespace(xp) and wrong.any():
            first = int(wrong.argmax())
            msg = f"segment_ids: expected ids in [0, {count}) at valid tokens, got {int(segment_ids[first])} at index {first}"
            raise ValueError(msg)
        if 0 in mask.shape:
            return xp.astype(mask, advantages.dtype)
        if count == 0:
            advantages = xp.full_like(mask, xp.nan, dtype=advantages.dtype)[:1]
        indices = in_one_piece(xp.where(mask & ~wrong, segment_ids, 0), xp=xp)
        chosen = xp.take(in_one_piece(advantages, xp=xp), indices, axis=0)
        return xp.where(mask, xp.where(wrong, xp.nan, chosen), 0.0)
    if mask.ndim != 2 or mask.shape[0] != advantages.shape[0]:
        msg = f"mask: expected ({advantages.shape[0]}, tokens), one row per advantage, got {tuple(mask.shape)}"
        raise ValueError(msg)
    return xp.where(mask, advantages[:, None], 0.0)
