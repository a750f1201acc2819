"""Reductions of per-token values to a scalar: the same weighted sum, with four choices of weight and denominator.

A padded array has one sequence a row, tokens on the last axis. A packed one is 1-D with `segment_ids`, which name the
sequence of each token (any integers, in any order). Both give the same scalar.

A denominator counts what the mask of this call contains. Where a batch is split over micro-batches or devices, pass
the denominator of the whole batch as `normalizer` and sum the results.
"""

from __future__ import annotations

import numbers
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from drpo_core._arrays import in_one_piece
from drpo_core._checks import (
    check_arrays,
    check_dtype,
    check_mask,
    check_number,
    check_segment_ids,
    check_shape,
    compute_dtype,
)
from drpo_core._sequences import Segments

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core._arrays import Array, Bool, Float, Int, Namespace

__all__ = [
    "MaskedSum",
    "Reduction",
    "masked_sum",
    "prompt_mean",
    "reduction_coefficients",
    "reduction_count",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "token_mean",
]


class LinearReduction(Protocol):
    """A reduction of per-token values to the scalar Σ m c v, known by its coefficients c.

    The adapters' `linear_reduction` makes one of any linear function of the values.
    """

    def coefficients(
        self,
        mask: Array,
        *,
        dtype: Any,
        normalizer: Any = None,
        token_weights: Any = None,
        segment_ids: Any = None,
        xp: Any,
    ) -> Array:
        """Factor c of each token's value, an array that broadcasts to the mask's shape."""
        ...


Reduction: TypeAlias = "Callable[..., Array] | LinearReduction"
"""`token_mean`, `sequence_mean_token_mean`, `sequence_mean_token_sum`, `prompt_mean`, each also with arguments bound by
`functools.partial`, or a `LinearReduction`."""


class MaskedSum(NamedTuple):
    """`total` of the values at valid tokens, and their `count`; both 0-d, in the dtype of the arithmetic."""

    total: Array
    count: Array


def masked_sum(
    values: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    *,
    token_weights: Float[Array, "*tokens"] | None = None,
    xp: Namespace | None = None,
) -> MaskedSum:
    """Sum of m·u·v over tokens and the number of valid tokens, Σ m.

    Parameters
    ----------
    values
        v per token, any shape; anything, NaN included, where the mask is False.
    mask
        m: True at tokens that count.
    token_weights
        u: factors of the values (truncated importance weights, say). They do not enter the count.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    MaskedSum
        `total` and `count`; divide them once every shard has added its own.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core.reduction import masked_sum
    >>> total, count = masked_sum(np.array([1.0, 2.0, np.nan]), np.array([True, True, False]))
    >>> float(total), float(count)
    (3.0, 2.0)
    """
    values, mask, xp = _selected(values, mask, token_weights, xp)
    return MaskedSum(xp.sum(values), count_true(mask, values.dtype, xp=xp))


def token_mean(
    values: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    *,
    normalizer: float | Array | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, ""]:
    """Mean over valid tokens: Σ m u v / N, every token counting the same ("token-mean").

    Parameters
    ----------
    values
        v per token, any shape; anything, NaN included, where the mask is False.
    mask
        m: True at tokens that count.
    normalizer
        N, the number of valid tokens of the whole batch; default: of this mask.
    token_weights
        u: factors of the values (truncated importance weights, say). They do not enter N.
    segment_ids
        Accepted, checked and not needed: sequences play no part.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        0-d; 0 if no token is valid.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, or the normalizer is negative or not finite.

    References
    ----------
    arXiv:2503.14476 (DAPO), eq. 12.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_mean
    >>> values, mask = np.array([[1.0, 2.0], [6.0, 0.0]]), np.array([[True, True], [True, False]])
    >>> float(token_mean(values, mask))
    3.0
    >>> float(token_mean(values, mask, normalizer=6))
    1.5
    """
    values, mask, xp = _selected(values, mask, token_weights, xp)
    _, tokens = _per_token(mask, segment_ids, values.dtype, xp=xp)
    return xp.sum(values) / _denominator(normalizer, tokens, xp=xp)


def sequence_mean_token_mean(
    values: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    *,
    normalizer: float | Array | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, ""]:
    """Mean over sequences of each sequence's token mean: Σ_s (Σ_t m u v / n_s) / S ("seq-mean-token-mean").

    n_s is the number of valid tokens of sequence s; S counts sequences that have one.

    Parameters
    ----------
    values
        v per token: (…, tokens) padded, or (tokens,) packed. Anything, NaN included, where the mask is False.
    mask
        m: True at tokens that count.
    normalizer
        S of the whole batch; default: of this mask.
    token_weights
        u: factors of the values (truncated importance weights, say). They do not enter n_s.
    segment_ids
        Of packed tokens: which sequence each belongs to.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        0-d; 0 if no token is valid.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, or the normalizer is negative or not finite.

    References
    ----------
    arXiv:2402.03300 (GRPO), eq. 3.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import sequence_mean_token_mean
    >>> values, mask = np.array([[1.0, 2.0], [6.0, 0.0]]), np.array([[True, True], [True, False]])
    >>> float(sequence_mean_token_mean(values, mask))
    3.75
    >>> packed, ids = np.array([1.0, 2.0, 6.0]), np.array([0, 0, 1])
    >>> float(sequence_mean_token_mean(packed, np.ones(3, dtype=bool), segment_ids=ids))
    3.75
    """
    values, mask, xp = _selected(values, mask, token_weights, xp)
    length, sequences = _per_sequence(mask, segment_ids, values.dtype, xp=xp)
    return xp.sum(values / length) / _denominator(normalizer, sequences, xp=xp)


def sequence_mean_token_sum(
    values: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    *,
    horizon: float | Array = 1.0,
    normalizer: float | Array | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, ""]:
    """Mean over sequences of each sequence's token sum over a horizon: Σ_s (Σ_t m u v / H) / S ("seq-mean-token-sum").

    Parameters
    ----------
    values
        v per token: (…, tokens) padded, or (tokens,) packed. Anything, NaN included, where the mask is False.
    mask
        m: True at tokens that count.
    horizon
        H > 0, a constant such as the longest completion a run allows. Never the padded width, which changes from batch
        to batch.
    normalizer
        S, the number of non-empty sequences of the whole batch; default: of this mask.
    token_weights
        u: factors of the values (truncated importance weights, say).
    segment_ids
        Of packed tokens: which sequence each belongs to.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        0-d; 0 if no token is valid.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, the horizon is not finite and positive, or the normalizer is negative or not finite.

    References
    ----------
    arXiv:2503.20783 (Dr. GRPO): a constant instead of the sequence length.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import sequence_mean_token_sum
    >>> values, mask = np.array([[1.0, 2.0], [6.0, 0.0]]), np.array([[True, True], [True, False]])
    >>> float(sequence_mean_token_sum(values, mask, horizon=2))
    2.25
    """
    values, mask, xp = _selected(values, mask, token_weights, xp)
    horizon, sequences = _per_horizon(mask, segment_ids, values.dtype, xp=xp, horizon=horizon)
    return xp.sum(values) / horizon / _denominator(normalizer, sequences, xp=xp)


def prompt_mean(
    values: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    *,
    group_ids: Int[Array, "..."],
    normalizer: float | Array | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, ""]:
    """Mean over prompts of each prompt's token mean: Σ_g (Σ_{t in g} m u v / n_g) / G ("prompt_mean").

    A prompt's group is all sequences sampled from it. n_g is the number of valid tokens of group g, over its sequences; G
    counts groups that have one. Within a prompt every token counts the same, as in `token_mean`.

    Parameters
    ----------
    values
        v per token: (…, tokens) padded, or (tokens,) packed. Anything, NaN included, where the mask is False.
    mask
        m: True at tokens that count.
    group_ids
        Which prompt each sequence answers (any integers, in any order): one a row of padded tokens, (…), or one a token of
        packed ones, (tokens,). A loss takes it bound: ``functools.partial(prompt_mean, group_ids=ids)``, beside a
        `drpo_core.modes.Mode` of reduction ``"prompt_mean"`` too.
    normalizer
        G of the whole batch; default: of this mask.
    token_weights
        u: factors of the values (truncated importance weights, say). They do not enter n_g.
    segment_ids
        Accepted, checked and not needed: how a prompt's tokens are divided into sequences plays no part.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        0-d; 0 if no token is valid.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, or the normalizer is negative or not finite.

    Notes
    -----
    n_g counts the tokens of this call. Where the samples of a prompt lie in different micro-batches, take the coefficients
    of the whole batch from `reduction_coefficients`, broadcast to the mask's shape, and pass each part its own as
    `token_weights` of `token_mean`, with ``normalizer=1``. A `drpo_core.modes.Mode` takes them so too, with its reduction
    ``"token_sum"``.

    References
    ----------
    SkyRL's ``loss_reduction="prompt_mean"`` (NovaSky-AI/SkyRL, skyrl/backends/skyrl_train/utils/ppo_utils.py,
    ``apply_loss_reduction_to_advantages_minibatch``) and prime-rl's ``loss_aggregation="prompt"``. The ``"prompt_mean"`` of
    torchrl's GRPOLoss knows no prompts: it is `sequence_mean_token_mean`.

    Examples
    --------
    Two samples of prompt 7 have three valid tokens together, one sample of prompt 4 has one:

    >>> import numpy as np
    >>> from drpo_core.reduction import prompt_mean
    >>> values = np.array([[1.0, 2.0], [6.0, 0.0], [5.0, 0.0]])
    >>> mask = np.array([[True, True], [True, False], [True, False]])
    >>> float(prompt_mean(values, mask, group_ids=np.array([7, 7, 4])))
    4.0
    >>> packed = np.array([1.0, 2.0, 6.0, 5.0])
    >>> float(prompt_mean(packed, np.ones(4, dtype=bool), group_ids=np.array([7, 7, 7, 4])))
    4.0
    """
    values, mask, xp = _selected(values, mask, token_weights, xp)
    tokens, prompts = _per_prompt(mask, segment_ids, values.dtype, xp=xp, group_ids=group_ids)
    return xp.sum(values / tokens) / _denominator(normalizer, prompts, xp=xp)


def reduction_coefficients(
    reduction: Reduction,
    mask: Bool[Array, "*tokens"],
    *,
    dtype: object,
    normalizer: float | Array | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    xp: Namespace | None = None,
) -> Array:
    """Factors c in reduction(v) = Σ m c v: what each valid token's value, and so its gradient, is multiplied with.

    Known before any value is, so that a loss and its final gradient can be formed in one pass.

    Parameters
    ----------
    reduction
        A reduction of this module, which may have arguments bound by `functools.partial`, or a `LinearReduction`.
    mask
        m: True at tokens that count.
    dtype
        Of the arithmetic.
    normalizer, token_weights, segment_ids
        As for the reduction; None leaves what `functools.partial` has bound.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        Of a shape that broadcasts to the mask's: 0-d, one a row, or (with `token_weights` or packed sequences) one a
        token, where it may be anything at masked tokens.

    Raises
    ------
    TypeError
        If nothing is known of the reduction, or a dtype is wrong.
    ValueError
        If the shapes differ, or a number is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import sequence_mean_token_mean
    >>> from drpo_core.reduction import reduction_coefficients
    >>> mask = np.array([[True, True], [True, False]])
    >>> reduction_coefficients(sequence_mean_token_mean, mask, dtype=np.float64)
    array([[0.25],
           [0.5 ]])
    """
    xp = check_arrays(xp=xp, kind="bool", mask=mask)
    given = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    if callable(getattr(reduction, "coefficients", None)):
        return _usable(reduction.coefficients(mask, dtype=dtype, **given, xp=xp), mask, dtype, xp=xp)  # type: ignore[union-attr]
    divisors, options = _known(reduction, given)
    normalizer, token_weights = options.pop("normalizer"), options.pop("token_weights")
    divisor, count = divisors(mask, options.pop("segment_ids"), dtype, xp=xp, **options)
    coefficients = xp.ones_like(count) / divisor / _denominator(normalizer, count, xp=xp)
    return coefficients if token_weights is None else coefficients * _weights(token_weights, mask, dtype, xp=xp)


def reduction_count(
    reduction: Reduction,
    mask: Bool[Array, "*tokens"],
    *,
    dtype: object,
    segment_ids: Int[Array, " tokens"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, ""]:
    """Denominator of a reduction of this module: the number of valid tokens, or of sequences or prompts that have one.

    Add those of micro-batches and shards to get the `normalizer` of the whole batch.

    Parameters
    ----------
    reduction
        A reduction of this module, which may have arguments bound by `functools.partial`.
    mask
        True at tokens that count.
    dtype
        Of the result.
    segment_ids
        As for the reduction.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        0-d.

    Raises
    ------
    TypeError
        If it is another reduction, or a dtype is wrong.
    ValueError
        If the shapes differ, or the reduction has a normalizer bound: its denominator is that, and no count.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import sequence_mean_token_mean, token_mean
    >>> from drpo_core.reduction import reduction_count
    >>> mask = np.array([[True, True], [True, False], [False, False]])
    >>> [float(reduction_count(mean, mask, dtype=np.float64)) for mean in (token_mean, sequence_mean_token_mean)]
    [3.0, 2.0]
    """
    xp = check_arrays(xp=xp, kind="bool", mask=mask)
    divisors, options = _known(reduction, {"segment_ids": segment_ids})
    options.pop("token_weights", None)
    if (bound := options.pop("normalizer", None)) is not None:
        msg = f"reduction: expected one that counts its own denominator, got one with normalizer={bound!r} bound"
        raise ValueError(msg)
    _, count = divisors(mask, options.pop("segment_ids"), dtype, xp=xp, **options)
    return count


def _known(reduction: Reduction, given: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function to a reduction's divisors and count, and its options: what was given, else what `partial` has bound."""
    function: Any = reduction.func if isinstance(reduction, partial) else reduction
    bound = reduction.keywords if isinstance(reduction, partial) else {}
    divisors = _DIVISORS.get(function) if callable(function) and getattr(function, "__hash__", None) else None
    if divisors is None or (isinstance(reduction, partial) and reduction.args):
        msg = (
            "reduction: expected token_mean, sequence_mean_token_mean, sequence_mean_token_sum, prompt_mean (arguments may be "
            "bound by functools.partial) or a linear_reduction, whose coefficients are known beforehand, "
            f"got {reduction!r}"
        )
        raise TypeError(msg)
    options = {name: value for name, value in bound.items() if name != "xp"}
    own = _OWN.get(function)
    if unknown := options.keys() - {"normalizer", "token_weights", "segment_ids", own}:
        msg = f"reduction: {function.__name__} has no argument {', '.join(sorted(unknown))}"
        raise TypeError(msg)
    if own == "group_ids" and options.get(own) is None:
        msg = f"reduction: expected group_ids bound, as in functools.partial(prompt_mean, group_ids=ids), got {reduction!r}"
        raise TypeError(msg)
    return divisors, given | {name: value for name, value in options.items() if given.get(name) is None}


def _usable(coefficients: Array, mask: Array, dtype: object, *, xp: Namespace) -> Array:
    """Coefficients of a caller's own reduction, in a form that every engine knows: 0-d, one a row or one a token."""
    check_dtype("coefficients of the reduction", coefficients, "real floating", xp=xp)
    given, shape = tuple(coefficients.shape), tuple(mask.shape)
    aligned = (1,) * (len(shape) - len(given)) + given
    if len(aligned) != len(shape) or any(size not in (1, full) for size, full in zip(aligned, shape, strict=True)):
        msg = f"coefficients of the reduction: expected a shape that broadcasts to the mask's, {shape}, got {given}"
        raise ValueError(msg)
    coefficients = xp.astype(coefficients, dtype, copy=False)
    if given in ((), (*shape[:-1], 1)):
        return coefficients
    # selected, because NumPy would warn of what masked tokens are multiplied with
    return xp.where(mask, coefficients, 0.0)


def _selected(values: Array, mask: Array, token_weights: Array | None, xp: Namespace | None) -> tuple[Array, Array, Namespace]:
    """m·u·v, by selection: what masked positions hold is never multiplied."""
    xp = check_arrays(xp=xp, values=values)
    check_mask(mask, "values", values, xp=xp)
    dtype = compute_dtype(values, xp=xp)
    selected = xp.astype(xp.where(mask, values, 0.0), dtype, copy=False)
    if token_weights is not None:
        selected = selected * _weights(token_weights, mask, dtype, xp=xp)
    return selected, mask, xp


def _weights(token_weights: Array, mask: Array, dtype: object, *, xp: Namespace) -> Array:
    check_dtype("token_weights", token_weights, "real floating", xp=xp)
    check_shape("token_weights", token_weights, "mask", mask)
    return xp.astype(xp.where(mask, token_weights, 0.0), dtype, copy=False)


def _per_token(mask: Array, segment_ids: Array | None, dtype: object, *, xp: Namespace) -> tuple[float, Array]:
    """Divisor of each token, and what is counted for the denominator: tokens."""
    if segment_ids is not None:
        check_segment_ids(segment_ids, mask, xp=xp)
    return 1.0, count_true(mask, dtype, xp=xp)


def _per_sequence(mask: Array, segment_ids: Array | None, dtype: object, *, xp: Namespace) -> tuple[Array, Array]:
    """Divisor of each token, the length of its sequence, and what is counted: sequences."""
    length, sequences = _sequences(mask, segment_ids, dtype, xp=xp)
    return _nonzero(length, xp=xp), sequences


def _per_horizon(
    mask: Array, segment_ids: Array | None, dtype: object, *, xp: Namespace, horizon: float | Array = 1.0
) -> tuple[float | Array, Array]:
    """Divisor of each token, the horizon, and what is counted: sequences."""
    _, sequences = _sequences(mask, segment_ids, dtype, xp=xp)
    return _number_or_array("horizon", horizon, above=0.0, like=sequences, xp=xp), sequences


def _per_prompt(
    mask: Array, segment_ids: Array | None, dtype: object, *, xp: Namespace, group_ids: Array
) -> tuple[Array, Array]:
    """Divisor of each token, the valid tokens of its prompt, and what is counted: prompts."""
    if segment_ids is not None:
        check_segment_ids(segment_ids, mask, xp=xp)
    _check_has_tokens(mask)
    check_dtype("group_ids", group_ids, "integral", xp=xp)
    packed = mask.ndim == 1
    rows = tuple(mask.shape if packed else mask.shape[:-1])
    if tuple(group_ids.shape) != rows:
        kind = "one a token" if packed else "one a row of the mask"
        msg = f"group_ids: expected {kind}, shape {rows}, got {tuple(group_ids.shape)}"
        raise ValueError(msg)
    if packed:
        # tokens of one prompt are counted as those of one sequence are
        tokens, prompts = _sequences(mask, group_ids, dtype, xp=xp)
        return _nonzero(tokens, xp=xp), prompts
    length = xp.sum(xp.astype(mask, xp.int32), axis=-1, keepdims=True)
    ids, flat = xp.reshape(group_ids, (-1,)), xp.reshape(length, (-1,))
    _, prompts = _sequences(flat > 0, ids, dtype, xp=xp)
    tokens = Segments(ids, xp=xp).whole(flat, xp.add) if 0 not in ids.shape else flat
    return _nonzero(xp.astype(xp.reshape(tokens, length.shape), dtype), xp=xp), prompts


_DIVISORS: dict[Any, Callable[..., Any]] = {
    token_mean: _per_token,
    sequence_mean_token_mean: _per_sequence,
    sequence_mean_token_sum: _per_horizon,
    prompt_mean: _per_prompt,
}

_OWN: dict[Any, str] = {sequence_mean_token_sum: "horizon", prompt_mean: "group_ids"}
"""The argument that a reduction has and the others have not."""


def _sequences(mask: Array, segment_ids: Array | None, dtype: object, *, xp: Namespace) -> tuple[Array, Array]:
    """Number of valid tokens of each token's own sequence, and number of sequences that have a valid token."""
    if segment_ids is not None:
        check_segment_ids(segment_ids, mask, xp=xp)
    else:
        _check_has_tokens(mask)
    if segment_ids is None:
        length = xp.sum(xp.astype(mask, xp.int32), axis=-1, keepdims=True)
        return xp.astype(length, dtype), count_true(length > 0, dtype, xp=xp)
    # count equal ids by their range among the sorted ids: exact, of static shape, in any namespace. The place of an id
    # there stands for it, so that one more number, for masked tokens, can't collide with an id or leave its dtype
    n = segment_ids.shape[0]
    if n == 0:
        return xp.astype(mask, dtype), count_true(mask, dtype, xp=xp)
    segment_ids, mask = in_one_piece(segment_ids, xp=xp), in_one_piece(mask, xp=xp)
    place = xp.searchsorted(xp.sort(segment_ids), segment_ids, side="left")
    valid = xp.sort(xp.where(mask, place, n))
    length = xp.searchsorted(valid, place, side="right") - xp.searchsorted(valid, place, side="left")
    starts = xp.concat((xp.ones_like(mask[:1]), valid[1:] != valid[:-1]))
    return xp.astype(length, dtype), count_true(starts & (valid != n), dtype, xp=xp)


def _check_has_tokens(mask: Array) -> None:
    if mask.ndim == 0:
        msg = "mask: expected at least one axis, the tokens of a sequence, got a 0-d array"
        raise ValueError(msg)


def count_true(condition: Bool[Array, "*tokens"], dtype: object, *, xp: Namespace) -> Float[Array, ""]:
    """Number of True elements, counted in integers, as a 0-d array of a floating dtype."""
    return xp.astype(xp.count_nonzero(condition), dtype)


def _nonzero(count: Array, *, xp: Namespace) -> Array:
    return xp.where(count == 0.0, 1.0, count)


def _denominator(normalizer: float | Array | None, count: Array, *, xp: Namespace) -> Array | float:
    """The caller's denominator, else the local count; 1 where it is 0, because then nothing was summed."""
    if normalizer is None:
        return _nonzero(count, xp=xp)
    number = _number_or_array("normalizer", normalizer, at_least=0.0, like=count, xp=xp)
    if isinstance(number, float):
        return number if number > 0.0 else 1.0
    return _nonzero(number, xp=xp)


def _number_or_array(
    name: str,
    value: float | Array,
    *,
    above: float | None = None,
    at_least: float | None = None,
    like: Array,
    xp: Namespace,
) -> float | Array:
    """A number within its bounds, as a Python float; or a 0-d array, in the dtype of another, NaN where it is outside them.

    An array's value may be on a device, and unknown while a compiler traces, so that nothing can be raised.
    """
    if isinstance(value, (numbers.Real, np.ndarray, np.generic, str)) or not hasattr(value, "shape"):
        return check_number(name, value, above=above, at_least=at_least)
    if tuple(value.shape):
        msg = f"{name}: expected a number or a 0-d array, got shape {tuple(value.shape)}"
        raise ValueError(msg)
    number = value if isinstance(value, type(like)) else xp.asarray(value)
    if not xp.isdtype(number.dtype, ("integral", "real floating")):
        msg = f"{name}: expected a real number, got a 0-d array of {number.dtype}"
        raise TypeError(msg)
    number = xp.astype(number, like.dtype)
    right = number > above if at_least is None else number >= at_least
    return xp.where(right & (number < xp.inf), number, xp.nan)
