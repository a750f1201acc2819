"""Group-relative advantages, and their expansion from sequences to tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from array_api_compat import is_numpy_namespace

from drpo_core._arrays import in_one_piece
from drpo_core._checks import check_arrays, check_dtype, check_number, check_segment_ids, check_shape, compute_dtype
from drpo_core._sequences import Segments

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core._arrays import Array, Bool, Float, Int, Namespace

__all__ = ["expand_advantages", "group_advantages"]


def group_advantages(
    rewards: Float[Array, "*sequences"],
    *,
    group_ids: Int[Array, " sequences"] | None = None,
    divide_by_std: bool = False,
    std_offset: float = 1e-6,
    leave_one_out: bool = False,
    xp: Namespace | None = None,
) -> Float[Array, "*sequences"]:
    """Group-relative advantages A = R − mean(R of its group), optionally divided by the group's standard deviation.

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
        If the shapes differ, `rewards` with `group_ids` is not 1-D, or `std_offset` is negative or not finite.

    References
    ----------
    arXiv:2402.03300 (GRPO), section 4.1.1; without the division: arXiv:2503.20783 (Dr. GRPO); leave-one-out:
    arXiv:2402.14740 (RLOO).

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
    if rewards.ndim == 0:
        msg = "rewards: expected at least one axis, got a 0-d array"
        raise ValueError(msg)
    if group_ids is not None:
        check_dtype("group_ids", group_ids, "integral", xp=xp)
        check_shape("group_ids", group_ids, "rewards", rewards)
        if rewards.ndim != 1:
            msg = f"rewards: expected 1-D with group_ids, got shape {tuple(rewards.shape)}"
            raise ValueError(msg)
    if 0 in rewards.shape:
        return rewards
    r = xp.astype(rewards, compute_dtype(rewards, xp=xp), copy=False)
    over_group = _over_rows(xp) if group_ids is None else _over_ids(group_ids, xp)
    n = over_group(xp.ones_like(r), xp.sum, xp.add)
    centred = r - over_group(r, xp.sum, xp.add) / n
    others = xp.where(n > 1.0, n - 1.0, 1.0)
    # equal rewards can differ from their rounded mean; dividing that by a tiny spread would be noise of size 1
    constant = over_group(r, xp.max, xp.maximum) == over_group(r, xp.min, xp.minimum)
    advantages = centred * n / others if leave_one_out else centred
    if divide_by_std:
        squares = over_group(centred * centred, xp.sum, xp.add)
        advantages = advantages / xp.where(constant, 1.0, xp.sqrt(squares / others) + std_offset)
    return xp.astype(xp.where(constant, 0.0, advantages), rewards.dtype, copy=False)


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
