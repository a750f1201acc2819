"""Log-ratio, importance ratio and probability shift: the numbers every objective is a function of.

The numerical care of the library is here; `docs/derivations/ratio.md` derives the error bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from drpo_core._checks import check_arrays, check_mask, compute_dtype

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float, Namespace

__all__ = ["Tokens", "importance_ratio", "log_ratio", "probability_shift"]


class Tokens(NamedTuple):
    """What every objective is a function of, per token: arrays of one shape and one dtype.

    ======================  =================================================

    `log_prob`              log π of the sampled token, nats
    `behavior_log_prob`     log μ of the sampled token, nats
    `advantages`            A
    `log_ratio`             ℓ = log π − log μ, nats
    `ratio`                 r = π/μ = e^ℓ, saturated at e²⁰
    `ratio_minus_one`       r − 1, accurate near r = 1
    `shift`                 d = π − μ, a difference of probabilities in [−1, 1]
    `divergence`            a per-token divergence the caller measured, or None
    `xp`                    the namespace of the arrays
    ======================  =================================================


    Build it with `Tokens.checked`; objectives read it (see `drpo_core.Objective`).
    """

    log_prob: Array
    behavior_log_prob: Array
    advantages: Array
    log_ratio: Array
    ratio: Array
    ratio_minus_one: Array
    shift: Array
    divergence: Array | None
    xp: Namespace

    @classmethod
    def checked(
        cls,
        log_prob: Float[Array, "*tokens"],
        behavior_log_prob: Float[Array, "*tokens"],
        advantages: Float[Array, "*tokens"],
        *,
        mask: Bool[Array, "*tokens"] | None = None,
        divergence: Float[Array, "*tokens"] | None = None,
        xp: Namespace | None = None,
    ) -> Tokens:
        """`Tokens.of` after checking dtypes and shapes."""
        xp, dtype = check_tokens(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
        return cls.of(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, dtype=dtype, xp=xp)

    @classmethod
    def of(
        cls,
        log_prob: Float[Array, "*tokens"],
        behavior_log_prob: Float[Array, "*tokens"],
        advantages: Float[Array, "*tokens"],
        *,
        mask: Bool[Array, "*tokens"] | None = None,
        divergence: Float[Array, "*tokens"] | None = None,
        dtype: Any,
        xp: Namespace,
    ) -> Tokens:
        """Convert to `dtype`, select by the mask, compute ℓ, r, r − 1 and d with three exponentials; checks nothing.

        Masked positions are replaced before any arithmetic by an inert on-policy token, so nothing they hold,
        NaN included, can reach a value or a derivative.
        """

        def prepared(array: Array) -> Array:
            selected = array if mask is None else xp.where(mask, array, 0.0)
            return xp.astype(selected, dtype, copy=False)

        x, b, a = prepared(log_prob), prepared(behavior_log_prob), prepared(advantages)
        larger = xp.maximum(x, b)
        ell = _log_ratio(x, b, larger, xp=xp)
        # one argument for both, so that a compiler can share most of the work
        exponent = _bounded(ell, xp=xp)
        power, power_minus_one = xp.exp(exponent), xp.expm1(exponent)
        return cls(
            log_prob=x,
            behavior_log_prob=b,
            advantages=a,
            log_ratio=ell,
            ratio=_ratio(power, xp=xp),
            ratio_minus_one=_ratio_minus_one(power_minus_one, xp=xp),
            shift=_shift(larger, power, power_minus_one, xp=xp),
            divergence=None if divergence is None else prepared(divergence),
            xp=xp,
        )

    def along_advantage(self, x: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """sign(A)·x of a finite x, as every field but `log_ratio` is; a token is *diverging* where sign(A)(r − 1) > 0.

        Gives 0 at A = 0, and NaN where A or x is NaN, so that every comparison with it fails closed.
        """
        # not xp.sign: array-api-compat's torch version can't be vmapped
        a, where = self.advantages, self.xp.where
        return where(a > 0.0, x, where(a < 0.0, -x, a))

    def by_advantage(self, low: float, high: float) -> Array | float:
        """The bound that governs each token: `high` where A ≥ 0, `low` where A < 0."""
        # by identity, because a compiled loop's thresholds are symbols without a value
        if low is high:
            return high
        return self.xp.where(self.advantages < 0.0, low, self.xp.full_like(self.advantages, high))

    def indicator(self, condition: Bool[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """1 where the condition holds, else 0, in the dtype of the tokens."""
        return self.xp.where(condition, self.xp.ones_like(self.advantages), 0.0)


def check_tokens(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None,
    divergence: Float[Array, "*tokens"] | None,
    xp: Namespace | None,
) -> tuple[Namespace, Any]:
    """Namespace and dtype of the arithmetic, after checking dtypes and shapes."""
    arrays = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    if divergence is not None:
        arrays["divergence"] = divergence
    xp = check_arrays(xp=xp, **arrays)
    if mask is not None:
        check_mask(mask, "log_prob", log_prob, xp=xp)
    return xp, compute_dtype(*arrays.values(), xp=xp)


def constant(array: Array | None) -> Array | None:
    """The array without its graph, where its library keeps one (torch), or None: a returned gradient is not autograd's."""
    detach = getattr(array, "detach", None)
    return array if detach is None else detach()


def log_ratio(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Log importance ratio ℓ = log π − log μ.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
        float16 and bfloat16 are computed in float32.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        ℓ in nats, of the inputs' shape. −inf where π = 0, +inf where μ = 0, and 0 where both are 0.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import log_ratio
    >>> log_ratio(np.log([0.5, 0.1]), np.log([0.25, 0.1]))
    array([0.69314718, 0.        ])
    """
    x, b, xp = _prepare(log_prob, behavior_log_prob, xp)
    return _log_ratio(x, b, xp.maximum(x, b), xp=xp)


def importance_ratio(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Importance ratio r = π/μ = e^min(ℓ, 20).

    The ratio saturates at e²⁰ ≈ 4.85e8 rather than overflow. Objectives keep the sign of their gradient there
    (see `drpo_core.token_loss_and_gradient`).

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
        float16 and bfloat16 are computed in float32.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        r, of the inputs' shape, in [0, e²⁰].

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import importance_ratio
    >>> importance_ratio(np.log([0.5, 0.1]), np.log([0.25, 0.1])).round(12)
    array([2., 1.])
    """
    x, b, xp = _prepare(log_prob, behavior_log_prob, xp)
    return _ratio(xp.exp(_bounded(_log_ratio(x, b, xp.maximum(x, b), xp=xp), xp=xp)), xp=xp)


def probability_shift(
    log_prob: Float[Array, "*tokens"], behavior_log_prob: Float[Array, "*tokens"], *, xp: Namespace | None = None
) -> Float[Array, "*tokens"]:
    """Probability shift d = π − μ of the sampled token, computed as max(π, μ)·(r − 1)/max(r, 1).

    Within 5 machine epsilons (relative) of the exact difference of the given log-probs, also near on-policy, where
    e^{log π} − e^{log μ} loses every digit; it can't overflow.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
        float16 and bfloat16 are computed in float32.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        d, a difference of probabilities in [−1, 1], of the inputs' shape.

    Raises
    ------
    TypeError
        If an argument is not an array of real floating-point numbers.
    ValueError
        If the shapes differ.

    References
    ----------
    arXiv:2602.04879 (DPPO) uses abs(d), the Binary TV, as the trust region's divergence.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import probability_shift
    >>> probability_shift(np.log([0.5, 0.1]), np.log([0.25, 0.4])).round(12)
    array([ 0.25, -0.3 ])
    """
    x, b, xp = _prepare(log_prob, behavior_log_prob, xp)
    larger = xp.maximum(x, b)
    exponent = _bounded(_log_ratio(x, b, larger, xp=xp), xp=xp)
    return _shift(larger, xp.exp(exponent), xp.expm1(exponent), xp=xp)


def saturated(ell: Float[Array, "*tokens"], *, xp: Namespace) -> Float[Array, "*tokens"]:
    """min(ℓ, 20): the log of the importance ratio, which saturates at e²⁰ ≈ 4.85e8."""
    # a literal: torch.compile(dynamic=True) turns a global float into a graph input
    return xp.where(ell > 20.0, 20.0, ell)


def inverse_ratio(r: Float[Array, "*tokens"], *, xp: Namespace) -> Float[Array, "*tokens"]:
    """min(1/r, e²⁰) = e^−clip(ℓ, −20, 20), without dividing by zero."""
    # a literal, as above; r itself where it is NaN
    return 1.0 / xp.where(r < 2.061153622438558e-09, 2.061153622438558e-09, r)


def saturated_both_ways(ell: Float[Array, "*tokens"], *, xp: Namespace) -> Float[Array, "*tokens"]:
    """ℓ within ±20 nats: the log of a ratio between e⁻²⁰ and e²⁰, for what is multiplied or averaged."""
    return xp.where(ell > 20.0, 20.0, xp.where(ell < -20.0, -20.0, ell))


def _prepare(log_prob: Array, behavior_log_prob: Array, xp: Namespace | None) -> tuple[Array, Array, Namespace]:
    xp = check_arrays(xp=xp, log_prob=log_prob, behavior_log_prob=behavior_log_prob)
    dtype = compute_dtype(log_prob, behavior_log_prob, xp=xp)
    return xp.astype(log_prob, dtype, copy=False), xp.astype(behavior_log_prob, dtype, copy=False), xp


def _log_ratio(x: Array, b: Array, larger: Array, *, xp: Namespace) -> Array:
    # −inf − (−inf) is a NaN, in value and in derivative: select before subtracting
    impossible = larger == -xp.inf
    return xp.where(impossible, 0.0, x) - xp.where(impossible, 0.0, b)


def _bounded(ell: Array, *, xp: Namespace) -> Array:
    """min(ℓ, 40): its power can't overflow, and beyond it 1 − e^−ℓ is 1, in float64 too."""
    return xp.where(ell > 40.0, 40.0, ell)


def _ratio(power: Array, *, xp: Namespace) -> Array:
    """min(e^ℓ, e²⁰)."""
    # a literal, here and below: torch.compile(dynamic=True) turns a global float into a graph input
    return xp.where(power > 485165195.4097903, 485165195.4097903, power)


def _ratio_minus_one(power_minus_one: Array, *, xp: Namespace) -> Array:
    """min(e^ℓ − 1, e²⁰ − 1)."""
    return xp.where(power_minus_one > 485165194.4097903, 485165194.4097903, power_minus_one)


def _shift(larger: Array, power: Array, power_minus_one: Array, *, xp: Namespace) -> Array:
    """max(π, μ) (e^ℓ − 1) / max(e^ℓ, 1), because max(π, μ) = μ max(e^ℓ, 1)."""
    gap = power_minus_one / xp.where(power < 1.0, 1.0, power)
    # two functions' rounding may have left it just above 1; not a `where`, which would have XLA keep both in memory
    return xp.exp(larger) * xp.minimum(gap, xp.ones_like(gap))
