"""Divergences between π and μ: Binary, Top-K and full-vocabulary TV and KL, and the estimators k1, k2, k3.

KL is KL(μ‖π) throughout, in nats. Every KL is summed as Σ μ φ(ℓ) with φ(t) = e^t − 1 − t ≥ 0, which equals Σ μ (−ℓ)
because probabilities sum to 1, but has no cancellation between outcomes and is never negative.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from drpo_core._checks import check_arrays, check_dtype, check_shape, compute_dtype
from drpo_core.tokens import Tokens, log_ratio, probability_shift, saturated

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float, Int, Namespace

__all__ = [
    "binary_kl",
    "binary_tv",
    "full_kl",
    "full_tv",
    "k1",
    "k2",
    "k3",
    "sampled_in_top_k",
    "top_k_kl",
    "top_k_tv",
]


def binary_tv(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Binary total variation D = abs(π − μ): of "the sampled token" against "any other token".

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        D, a difference of probabilities in [0, 1]. At most the TV of the whole vocabulary.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    arXiv:2602.04879 (DPPO), Binary-TV.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import binary_tv
    >>> binary_tv(np.log([0.5, 0.1]), np.log([0.25, 0.4])).round(12)
    array([0.25, 0.3 ])
    """
    d = probability_shift(log_prob, behavior_log_prob, xp=xp)
    return abs(d)


def binary_kl(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Binary KL(μ‖π) = μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π)).

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        KL in nats, ≥ 0; infinite where π = 0 < μ. A log π of 0 stands for the π nearest μ that rounds to 1.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    arXiv:2602.04879 (DPPO), Binary-KL.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import binary_kl
    >>> binary_kl(np.log([0.5, 0.1]), np.log([0.25, 0.1])).round(6)
    array([0.130812, 0.      ])
    """
    return binary_kl_of(Tokens.checked(log_prob, behavior_log_prob, log_prob, xp=xp))


def binary_kl_of(tokens: Tokens) -> Float[Array, "*tokens"]:
    """Binary KL(μ‖π) of tokens whose ℓ and d are known."""
    xp, d, b = tokens.xp, tokens.shift, tokens.behavior_log_prob
    sampled = _kl_term(xp.exp(b), tokens.log_ratio, d, xp=xp)
    mu_rest = _complement(b, xp=xp)
    # log π = 0 is a rounded number: π is within half a unit in the last place of 1, and taken as near μ as that allows
    half_unit = 2.0**-54 if _is_double(d, xp=xp) else 2.0**-25
    certain = tokens.log_prob >= 0.0
    nearest = xp.where(mu_rest < half_unit, mu_rest, half_unit)
    pi_rest = xp.where(certain, nearest, _complement(tokens.log_prob, xp=xp))
    return sampled + _kl_of_rest(pi_rest, mu_rest, xp.where(certain, nearest - mu_rest, -d), xp=xp)


def top_k_tv(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    *,
    top_k_log_prob: Float[Array, "*tokens k"],
    top_k_behavior_log_prob: Float[Array, "*tokens k"],
    sampled_in_top_k: Bool[Array, "*tokens"],
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Top-K total variation: TV = ½ Σ abs(π − μ) over K tokens, the sampled token and one bucket for the rest.

    The sampled token is forced in; without it Top-K TV could be smaller than Binary TV.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0.
    top_k_log_prob, top_k_behavior_log_prob
        log π and log μ of K distinct tokens (usually μ's most likely ones), nats; one more axis, the last.
    sampled_in_top_k
        Whether the sampled token is one of the K; see `drpo_core.sampled_in_top_k`.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        TV, a difference of probabilities in [0, 1]: at least the Binary, at most the full TV.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If shapes disagree.

    References
    ----------
    arXiv:2602.04879 (DPPO), Top-K divergences.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import top_k_tv
    >>> pi, mu = np.log([[0.5, 0.3]]), np.log([[0.4, 0.3]])
    >>> top_k_tv(
    ...     pi[:, 0], mu[:, 0], top_k_log_prob=pi, top_k_behavior_log_prob=mu, sampled_in_top_k=np.array([True])
    ... ).round(12)
    array([0.1])
    """
    arrays = (log_prob, behavior_log_prob, top_k_log_prob, top_k_behavior_log_prob, sampled_in_top_k)
    return top_k_tv_of(top_k_outcomes(*arrays, xp=xp))


def top_k_tv_of(outcomes: Tokens) -> Float[Array, "*tokens"]:
    """Top-K TV of `top_k_outcomes`."""
    xp, d = outcomes.xp, outcomes.shift
    return 0.5 * (xp.sum(xp.abs(d), axis=-1) + xp.abs(xp.sum(d, axis=-1)))


def top_k_kl(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    *,
    top_k_log_prob: Float[Array, "*tokens k"],
    top_k_behavior_log_prob: Float[Array, "*tokens k"],
    sampled_in_top_k: Bool[Array, "*tokens"],
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Top-K KL(μ‖π) = Σ μ log(μ/π) over K tokens, the sampled token and one bucket for the rest.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0.
    top_k_log_prob, top_k_behavior_log_prob
        log π and log μ of K distinct tokens (usually μ's most likely ones), nats; one more axis, the last.
    sampled_in_top_k
        Whether the sampled token is one of the K; see `drpo_core.sampled_in_top_k`.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        KL in nats, ≥ 0: at least the Binary, at most the full KL. The rest's mass is known to the rounding of the K
        probabilities only: within it, μ's counts as 0 and π's as that rounding.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If shapes disagree.

    References
    ----------
    arXiv:2602.04879 (DPPO), Top-K divergences.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import top_k_kl
    >>> pi, mu = np.log([[0.5, 0.3]]), np.log([[0.4, 0.3]])
    >>> top_k_kl(
    ...     pi[:, 0], mu[:, 0], top_k_log_prob=pi, top_k_behavior_log_prob=mu, sampled_in_top_k=np.array([True])
    ... ).round(6)
    array([0.032382])
    """
    arrays = (log_prob, behavior_log_prob, top_k_log_prob, top_k_behavior_log_prob, sampled_in_top_k)
    return top_k_kl_of(top_k_outcomes(*arrays, xp=xp))


def top_k_kl_of(outcomes: Tokens) -> Float[Array, "*tokens"]:
    """Top-K KL(μ‖π) of `top_k_outcomes`."""
    x, b, d, xp = outcomes.log_prob, outcomes.behavior_log_prob, outcomes.shift, outcomes.xp
    known = xp.sum(_kl_term(xp.exp(b), outcomes.log_ratio, d, xp=xp), axis=-1)
    (pi_rest, pi_rounding), (mu_rest, mu_rounding) = rest_of(x, xp=xp), rest_of(b, xp=xp)
    # what is within rounding is as good as nothing for μ; for π it must not become an infinite divergence
    mu_rest = xp.where(mu_rest > mu_rounding, mu_rest, 0.0)
    pi_rest = xp.where(pi_rest > pi_rounding, pi_rest, pi_rounding)
    return known + _kl_of_rest(pi_rest, mu_rest, -xp.sum(d, axis=-1), xp=xp)


def sampled_in_top_k(
    tokens: Int[Array, "*tokens"], top_k_ids: Int[Array, "*tokens k"], *, xp: Namespace | None = None
) -> Bool[Array, "*tokens"]:
    """Whether each sampled token is among its K recorded ones.

    Parameters
    ----------
    tokens
        Ids of the sampled tokens.
    top_k_ids
        Ids of the K recorded tokens; one more axis, the last.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        Boolean, of the shape of `tokens`.

    Raises
    ------
    TypeError
        If an argument is not an array of integers.
    ValueError
        If the shapes disagree.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import sampled_in_top_k
    >>> sampled_in_top_k(np.array([7, 8]), np.array([[7, 2], [1, 2]]))
    array([ True, False])
    """
    xp = check_arrays(xp=xp, kind="integral", tokens=tokens)
    check_dtype("top_k_ids", top_k_ids, "integral", xp=xp)
    if tuple(top_k_ids.shape[:-1]) != tuple(tokens.shape) or not top_k_ids.ndim:
        shape = (*tokens.shape, "K")
        msg = f"top_k_ids: expected the shape of tokens and one more axis, {shape}, got {tuple(top_k_ids.shape)}"
        raise ValueError(msg)
    return xp.any(top_k_ids == tokens[..., None], axis=-1)


def full_tv(
    log_prob: Float[Array, "*tokens vocabulary"],
    behavior_log_prob: Float[Array, "*tokens vocabulary"],
    *,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Total variation over the whole vocabulary: TV = ½ Σ_v abs(π(v) − μ(v)).

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of every token of the vocabulary (a log-softmax), nats; the vocabulary is the last axis.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        TV, a difference of probabilities in [0, 1], without the vocabulary axis.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    arXiv:2602.04879 (DPPO).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import full_tv
    >>> full_tv(np.log([[0.5, 0.3, 0.2]]), np.log([[0.4, 0.3, 0.3]])).round(12)
    array([0.1])
    """
    xp = check_arrays(xp=xp, log_prob=log_prob, behavior_log_prob=behavior_log_prob)
    return 0.5 * xp.sum(xp.abs(probability_shift(log_prob, behavior_log_prob, xp=xp)), axis=-1)


def full_kl(
    log_prob: Float[Array, "*tokens vocabulary"],
    behavior_log_prob: Float[Array, "*tokens vocabulary"],
    *,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """KL(μ‖π) over the whole vocabulary: Σ_v μ(v) (log μ(v) − log π(v)), summed as Σ_v μ φ(ℓ).

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of every token of the vocabulary (a log-softmax), nats; the vocabulary is the last axis.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        KL in nats, ≥ 0, without the vocabulary axis.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    arXiv:2602.04879 (DPPO).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import full_kl
    >>> full_kl(np.log([[0.5, 0.3, 0.2]]), np.log([[0.4, 0.3, 0.3]])).round(6)
    array([0.032382])
    """
    xp = check_arrays(xp=xp, log_prob=log_prob, behavior_log_prob=behavior_log_prob)
    dtype = compute_dtype(log_prob, behavior_log_prob, xp=xp)
    x, b = xp.astype(log_prob, dtype, copy=False), xp.astype(behavior_log_prob, dtype, copy=False)
    d = probability_shift(x, b, xp=xp)
    return xp.sum(_kl_term(xp.exp(b), log_ratio(x, b, xp=xp), d, xp=xp), axis=-1)


def k1(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Estimator k1 = −ℓ of KL(μ‖π) from tokens sampled by μ: unbiased, of either sign.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        k1 in nats.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    J. Schulman, "Approximating KL Divergence", 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import k1
    >>> k1(np.log([0.5]), np.log([0.25])).round(6)
    array([-0.693147])
    """
    return -log_ratio(log_prob, behavior_log_prob, xp=xp)


def k2(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Estimator k2 = ℓ²/2 of KL(μ‖π): biased, never negative.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        k2 in nats.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    J. Schulman, "Approximating KL Divergence", 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import k2
    >>> k2(np.log([0.5]), np.log([0.25])).round(6)
    array([0.240227])
    """
    ell = log_ratio(log_prob, behavior_log_prob, xp=xp)
    return 0.5 * ell * ell


def k3(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Estimator k3 = r − 1 − ℓ of KL(μ‖π) from tokens sampled by μ: unbiased, never negative.

    Beyond ℓ = 20 it continues along its tangent, with the derivative e²⁰ − 1, rather than overflow.
    Near ℓ = 0 it is a series: the difference would lose every digit.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        k3 in nats.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    J. Schulman, "Approximating KL Divergence", 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import k3
    >>> k3(np.log([0.5]), np.log([0.25])).round(6)
    array([0.306853])
    """
    return k3_of(Tokens.checked(log_prob, behavior_log_prob, log_prob, xp=xp))


def k3_of(tokens: Tokens) -> Float[Array, "*tokens"]:
    """k3 of tokens whose ℓ and r − 1 are known."""
    xp, ell = tokens.xp, tokens.log_ratio
    within_cap = _kl_term(xp.ones_like(ell), saturated(ell, xp=xp), tokens.ratio_minus_one, xp=xp)
    # the tangent at ℓ = 20, so that the derivative stays e²⁰ − 1 where it would vanish with the saturated ratio's
    return within_cap + 485165194.4097903 * xp.where(ell > 20.0, ell - 20.0, 0.0)


def _kl_term(mass: Array, ell: Array, shift: Array, *, xp: Namespace) -> Array:
    """One outcome's share μ φ(ℓ) = d − μ ℓ of KL(μ‖π), given μ, ℓ and d = π − μ.

    Where abs(ℓ) < ½ the difference cancels; φ(t) = t² Σ tⁿ/(n + 2)! does not.
    """
    massless = mass == 0.0
    near = (xp.abs(ell) < 0.5) & ~massless
    t = xp.where(near, ell, 0.0)
    terms = 13 if _is_double(ell, xp=xp) else 8
    series = _horner([1.0 / math.factorial(n + 2) for n in range(terms)], t)
    # an outcome that μ gives no mass adds π; 0·inf would be a NaN
    far = shift - mass * xp.where(near | massless, 0.0, ell)
    return xp.where(near, mass * (t * t * series), far)


def _kl_of_rest(pi: Array, mu: Array, shift: Array, *, xp: Namespace) -> Array:
    """`_kl_term` of an outcome whose masses are known, not their logarithms, and d = π − μ more exactly than they are.

    It is μ ψ(d/μ), ψ(s) = s − log(1 + s). With z = s/(2 + s), log(1 + s) = 2 Σ z²ⁿ⁺¹/(2n + 1) and s − 2z = s z, so
    ψ(s) = z (s − 2z² Σ z²ⁿ/(2n + 3)) has neither a logarithm nor a cancellation; for −0.6 < s < 1, abs(z) < 0.43.
    """
    # so small a mass adds nothing, and dividing by it overflows float32
    massless = mu <= 1e-37
    divisor = xp.where(massless, 1.0, mu)
    s = shift / divisor
    near = (s > -0.6) & (s < 1.0) & ~massless
    small = xp.where(near, s, 0.0)
    z = small / (2.0 + small)
    square = z * z
    terms = 20 if _is_double(s, xp=xp) else 9
    series = _horner([1.0 / (2 * n + 3) for n in range(terms)], square)
    # log(π/μ), not log π − log μ: beside certainty both logarithms are large and their difference small
    log_quotient = _log_mass(xp.where(near | massless, 1.0, pi / divisor), xp=xp)
    # without mass of μ it adds π, which rounding may have left slightly negative
    far = xp.where(massless & (shift < 0.0), 0.0, shift) - mu * log_quotient
    return xp.where(near, mu * (z * (s - 2.0 * square * series)), far)


def _is_double(x: Array, *, xp: Namespace) -> bool:
    """Whether float32's terms are too few; a tracer's stand-in, whose dtype is not known yet, counts as float64."""
    try:
        return bool(xp.finfo(x.dtype).eps < 1e-12)
    except TypeError:
        return True


def _horner(coefficients: list[float], x: Array) -> Array:
    """Σ cₙ xⁿ."""
    *rest, value = coefficients
    total = x * value + rest.pop()
    for coefficient in reversed(rest):
        total = total * x + coefficient
    return total


def _complement(log_p: Array, *, xp: Namespace) -> Array:
    """1 − p; slightly negative where rounding has left log p above 0."""
    return -xp.expm1(log_p)


def _log_mass(mass: Array, *, xp: Namespace) -> Array:
    zero = mass <= 0.0
    return xp.where(zero, -xp.inf, xp.log(xp.where(zero, 1.0, mass)))


def top_k_outcomes(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    top_k_log_prob: Float[Array, "*tokens k"],
    top_k_behavior_log_prob: Float[Array, "*tokens k"],
    sampled_in_top_k: Bool[Array, "*tokens"],
    *,
    xp: Namespace | None = None,
) -> Tokens:
    """The K recorded outcomes and the sampled one appended, which has no mass where it is one of the K already; checked."""
    x, b, top_x, top_b = log_prob, behavior_log_prob, top_k_log_prob, top_k_behavior_log_prob
    xp = check_arrays(xp=xp, log_prob=x, behavior_log_prob=b)
    check_arrays(xp=xp, top_k_log_prob=top_x, top_k_behavior_log_prob=top_b)
    check_dtype("sampled_in_top_k", sampled_in_top_k, "bool", xp=xp)
    check_shape("sampled_in_top_k", sampled_in_top_k, "log_prob", x)
    if top_x.ndim != x.ndim + 1 or tuple(top_x.shape[:-1]) != tuple(x.shape):
        msg = f"top_k_log_prob: expected the shape of log_prob and one more axis, {(*x.shape, 'K')}, got {tuple(top_x.shape)}"
        raise ValueError(msg)
    dtype = compute_dtype(x, b, top_x, top_b, xp=xp)

    def append(sampled: Array, top: Array) -> Array:
        sampled = xp.where(sampled_in_top_k, -xp.inf, xp.astype(sampled, dtype, copy=False))
        return xp.concat((xp.astype(top, dtype, copy=False), sampled[..., None]), axis=-1)

    appended = append(b, top_b)
    return Tokens.of(append(x, top_x), appended, appended, dtype=dtype, xp=xp)


def rest_of(log_p: Array, *, xp: Namespace) -> tuple[Array, Array]:
    """1 − Σ p over the last axis, accurate also where one token holds nearly all the mass, and its rounding error."""
    # by place, not by comparing with the maximum: a compiler may compute log p twice, with different roundings
    place = xp.cumulative_sum(xp.ones_like(log_p), axis=-1) - 1.0
    is_top = place == xp.astype(xp.argmax(log_p, axis=-1, keepdims=True), log_p.dtype)
    below_top = _complement(xp.sum(xp.where(is_top, log_p, 0.0), axis=-1), xp=xp)
    rest = below_top - xp.sum(xp.where(is_top, 0.0, xp.exp(log_p)), axis=-1)
    return rest, log_p.shape[-1] * xp.finfo(log_p.dtype).eps * below_top
