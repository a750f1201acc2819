"""Score centring: a term of the loss that makes an objective's expected gradient at a constant advantage zero."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from drpo_core._checks import check_arrays, check_dtype, check_flag, check_mask, check_shape, compute_dtype
from drpo_core.divergence import rest_of
from drpo_core.loss import gradient_of
from drpo_core.modes.mode import Mode, anchored, evidence_of, is_whole_mode
from drpo_core.objectives.protocol import check_objective, ratio_weight_of, weight_of
from drpo_core.tokens import Tokens, constant

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float, Namespace
    from drpo_core.anchors import Policies
    from drpo_core.objectives import Objective

__all__ = ["CenteringTerm", "score_centering"]


class CenteringTerm(NamedTuple):
    """Per token: the term's value Σ_v C_v log π_v, (…), and its gradient in the log π_v, C_v, (…, K); 0 at masked tokens.

    The value has no meaning of its own: C_v is a constant in it, which makes C_v the gradient.
    """

    loss: Array
    gradient: Array


def score_centering(
    objective: Objective,
    log_prob: Float[Array, "*tokens k"],
    behavior_log_prob: Float[Array, "*tokens k"],
    advantages: Float[Array, "*tokens"],
    *,
    tail: bool = True,
    mask: Bool[Array, "*tokens"] | None = None,
    proximal_log_prob: Float[Array, "*tokens k"] | None = None,
    divergence: Float[Array, "*tokens"] | None = None,
    xp: Namespace | None = None,
) -> CenteringTerm:
    """Score-centring term Σ_v sg(C_v) log π_v of any objective, C_v = −μ_v g_v (sg: a constant in the derivative).

    g_v = −A K R w is the gradient that the objective gives to outcome v. A sampled outcome y ~ μ gives g_y ∇log π_y, which
    at a constant A is −Σ_v C_v ∇log π_v on average. Added to the loss, the term makes that 0.

    With a tail, the K outcomes are a head of recorded ones. All others share the masses π_T and μ_T that the head leaves,
    each of them a probability near 0 and one ratio, π_T/μ_T; with their gradient g_T, C_v = −μ_v g_v + (μ_T/π_T) g_T π_v.
    The tail counts nothing where π_T or μ_T is within the rounding of the head's sum.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode` whose anchor and corrections look at one token
        at a time. Its penalties are left out: A does not multiply them. Its reduction is left to you.
    log_prob, behavior_log_prob
        log π and log μ of K distinct outcomes of each token, nats, ≤ 0; (…, K), K of 1 or more. −inf is a probability of 0,
        such as of an outcome that is listed twice.
    advantages
        A of the sampled tokens, (…).
    tail
        True if the K outcomes are part of the vocabulary. False if they are all of it, or a support of truncated sampling
        over which both policies are renormalised: then the sum is exact.
    mask
        True at tokens that count, (…). Masked positions may hold anything, NaN included.
    proximal_log_prob
        log π_old of the K outcomes, (…, K), where the mode needs it.
    divergence
        Per-token divergence, (…), for ``DPPO(divergence="per_token")``.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    CenteringTerm
        `loss` in the dtype of the arithmetic, float32 at least, and `gradient` in that of `log_prob`.

    Raises
    ------
    TypeError
        If an array is not real floating-point, the mask is not boolean, or the objective is none.
    ValueError
        If shapes disagree, K is 0, or the mode has a part that looks at other tokens.

    References
    ----------
    arXiv:2609.20807, for one loss; `docs/derivations/centering.md`: any objective, the tail and its error.

    Examples
    --------
    Whatever DRPO's weights are, the expected gradient and the term cancel:

    >>> import numpy as np
    >>> from drpo_core import DRPO, token_loss_and_gradient
    >>> from drpo_core.centering import score_centering
    >>> pi, mu = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    >>> objective = DRPO(delta=0.5)
    >>> term = score_centering(objective, np.log(pi), np.log(mu), np.array(1.0), tail=False)
    >>> term.gradient.round(6)
    array([0.2 , 0.3 , 0.32])
    >>> expected = mu * token_loss_and_gradient(objective, np.log(pi), np.log(mu), np.ones(3)).gradient
    >>> (expected + term.gradient).round(6) + 0.0
    array([0., 0., 0.])
    """
    value, gradient = outcome_terms(
        objective,
        log_prob,
        behavior_log_prob,
        advantages,
        tail=tail,
        mask=mask,
        proximal_log_prob=proximal_log_prob,
        divergence=divergence,
        xp=xp,
    )
    xp = check_arrays(xp=xp, log_prob=log_prob)
    return CenteringTerm(xp.sum(value, axis=-1), xp.astype(gradient, log_prob.dtype, copy=False))


def outcome_terms(
    objective: Objective,
    log_prob: Float[Array, "*tokens k"],
    behavior_log_prob: Float[Array, "*tokens k"],
    advantages: Float[Array, "*tokens"],
    *,
    tail: bool,
    mask: Bool[Array, "*tokens"] | None,
    proximal_log_prob: Float[Array, "*tokens k"] | None,
    divergence: Float[Array, "*tokens"] | None,
    xp: Namespace | None,
) -> tuple[Float[Array, "*tokens k"], Float[Array, "*tokens k"]]:
    """C_v log π_v, 0 where π_v = 0, and C_v, in the dtype of the arithmetic."""
    check_objective(objective)
    check_flag("tail", tail)
    log_prob, behavior_log_prob, advantages = map(constant, (log_prob, behavior_log_prob, advantages))
    proximal_log_prob, divergence = map(constant, (proximal_log_prob, divergence))
    xp = check_arrays(xp=xp, log_prob=log_prob, behavior_log_prob=behavior_log_prob)
    if not log_prob.ndim or not log_prob.shape[-1]:
        msg = f"log_prob: expected shape (…, K) with K of 1 or more, got {tuple(log_prob.shape)}"
        raise ValueError(msg)
    check_centred(objective, proximal_log_prob)
    # for its shape: to look at what masked tokens hold would trip jax_debug_nans
    tokens = xp.zeros(tuple(log_prob.shape[:-1]))
    given = {"advantages": advantages} | ({} if divergence is None else {"divergence": divergence})
    for name, array in given.items():
        check_dtype(name, array, "real floating", xp=xp)
        check_shape(name, array, "log_prob without its last axis", tokens)
    if mask is not None:
        check_mask(mask, "log_prob without its last axis", tokens, xp=xp)
    recorded = () if proximal_log_prob is None else (proximal_log_prob,)
    if recorded:
        check_arrays(xp=xp, log_prob=log_prob, proximal_log_prob=proximal_log_prob)
    dtype = compute_dtype(log_prob, behavior_log_prob, *given.values(), *recorded, xp=xp)

    def prepared(array: Array | None, *, over_outcomes: bool = False) -> Array | None:
        if array is None:
            return None
        if mask is not None:
            array = xp.where(mask if over_outcomes else mask[..., None], array, 0.0)
        array = xp.astype(array, dtype, copy=False)
        return array[..., None] if over_outcomes else array

    x, b, old = (prepared(array) for array in (log_prob, behavior_log_prob, proximal_log_prob))
    a, d = (prepared(array, over_outcomes=True) for array in (advantages, divergence))
    gradient = _coefficients(objective, x, b, old, a, d, tail=tail, xp=xp)
    if mask is not None:
        gradient = xp.where(mask[..., None], gradient, 0.0)
    return xp.where(x == -xp.inf, 0.0, gradient * xp.where(x == -xp.inf, 0.0, x)), gradient


def check_centred(objective: Objective, proximal_log_prob: Array | None, name: str = "proximal_log_prob") -> None:
    """Raise unless log π_old of the outcomes is given where the anchor or a correction needs it, and only there."""
    parts: tuple[Any, ...] = (objective.anchor, *objective.corrections) if isinstance(objective, Mode) else ()
    needed = any("proximal_log_prob" in part.arguments for part in parts)
    if needed and proximal_log_prob is None:
        msg = f"{name}: expected log-probs of the outcomes, which {objective!r} needs, got None"
        raise ValueError(msg)
    if not needed and proximal_log_prob is not None:
        msg = f"{name}: expected None, because {objective!r} does not use it, got an array"
        raise ValueError(msg)


def _coefficients(
    objective: Objective,
    x: Float[Array, "*tokens k"],
    b: Float[Array, "*tokens k"],
    old: Float[Array, "*tokens k"] | None,
    advantages: Float[Array, "*tokens 1"],
    divergence: Float[Array, "*tokens 1"] | None,
    *,
    tail: bool,
    xp: Namespace,
) -> Float[Array, "*tokens k"]:
    """C_v from log π, log μ and log π_old of the outcomes."""
    if not tail:
        return _minus_expected(objective, x, b, old, advantages, divergence, -xp.exp(b), xp=xp)
    pi, exists, share, log_share = _tail(x, b, xp=xp)
    # far enough for a probability of 0, near enough for the ratio to keep its digits
    far = xp.full_like(share, 2.0 * math.log(float(xp.finfo(x.dtype).eps)))
    if old is not None:
        rest, rounding = rest_of(old, xp=xp)
        rest = xp.where(rest > rounding, rest, rounding)[..., None]
        old = xp.concat((old, far + xp.log(xp.where(exists, rest / pi, 1.0))), axis=-1)
    outcomes = xp.concat((x, far), axis=-1), xp.concat((b, far + log_share), axis=-1), old
    factors = xp.concat((-xp.exp(b), share), axis=-1)
    found = _minus_expected(objective, *outcomes, advantages, divergence, factors, xp=xp)
    return found[..., :-1] + xp.exp(x) * found[..., -1:]


def _tail(x: Array, b: Array, *, xp: Namespace) -> tuple[Array, Array, Array, Array]:
    """π_T, or 1 where there is no tail; whether there is one; α = μ_T/π_T, or 0; and log α, or 0; (…, 1)."""
    (pi, pi_rounding), (mu, mu_rounding) = rest_of(x, xp=xp), rest_of(b, xp=xp)
    exists = (pi > pi_rounding) & (mu > mu_rounding)
    pi, mu = xp.where(exists, pi, 1.0), xp.where(exists, mu, 1.0)
    share = mu / pi
    return pi[..., None], exists[..., None], xp.where(exists, share, 0.0)[..., None], xp.log(share)[..., None]


def _minus_expected(
    objective: Objective,
    x: Array,
    b: Array,
    old: Array | None,
    advantages: Array,
    divergence: Array | None,
    factors: Array,
    *,
    xp: Namespace,
) -> Float[Array, "*tokens k"]:
    """The objective's own gradient g at each outcome, times a factor."""
    advantages = xp.broadcast_to(advantages, x.shape)
    divergence = None if divergence is None else xp.broadcast_to(divergence, x.shape)
    if isinstance(objective, Mode):
        if is_whole_mode(objective):
            b, factors = _of_mode(objective, x, b, old, advantages, factors, xp=xp)
        objective = objective.objective
    tokens = Tokens.of(x, b, advantages, divergence=divergence, dtype=x.dtype, xp=xp)
    weight, ratio_weight = weight_of(objective, tokens), ratio_weight_of(objective, tokens)
    return gradient_of(tokens, weight, ratio_weight, mask=None, coefficients=factors)


def _of_mode(
    mode: Mode, x: Array, b: Array, old: Array | None, advantages: Array, factors: Array, *, xp: Namespace
) -> tuple[Array, Array]:
    """The anchor's log-probs of the outcomes, and the factors times K."""
    nothing = _NoSequences(mode, xp.ones_like(x) > 0.0, xp)
    evidence = evidence_of(x, b, old, None, advantages=advantages, sequences=nothing, dtype=x.dtype)  # type: ignore[arg-type]
    for correction in mode.corrections:
        one = correction.factor(evidence._replace(policies=_alone(evidence.policies, correction)))
        # what is left out stays out, whatever other corrections make of it
        factors = xp.where((one == 0.0) | (factors == 0.0), 0.0, factors * one)
    return anchored(mode, _alone(evidence.policies, mode.anchor), b, old), factors


def _alone(policies: Policies, part: object) -> Policies:
    """The policies as a part of a mode sees them at one outcome of one token."""
    return policies._replace(sequences=_NoSequences(part, policies.sequences.mask, policies.xp))  # type: ignore[arg-type]


class _NoSequences:
    """Stands where a part of a mode would find sequences, whose other tokens have no outcome v."""

    def __init__(self, part: object, mask: Array, xp: Namespace) -> None:
        self._part, self.mask, self.xp = part, mask, xp

    def __getattr__(self, name: str) -> Any:
        """A method that refuses the part by its name, once it is called."""

        def refuse(*_: object, **__: object) -> None:
            msg = f"objective: expected a mode that looks at one token at a time, got one with {self._part!r}"
            raise ValueError(msg)

        return refuse
