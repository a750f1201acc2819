"""One objective, one pass: unreduced loss, its gradient in log π, and the gradient weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from drpo_core.ratio import Tokens

if TYPE_CHECKING:
    from drpo_core.objectives import Objective
    from drpo_core.types import Array, Bool, Float, Namespace

__all__ = ["TokenLoss", "token_loss_and_gradient"]


class TokenLoss(NamedTuple):
    """Per token: the loss L, its gradient ∂L/∂log π = −A r w, and the weight w; all 0 at masked tokens."""

    loss: Array
    gradient: Array
    weight: Array


def token_loss_and_gradient(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    divergence: Float[Array, "*tokens"] | None = None,
    xp: Namespace | None = None,
) -> TokenLoss:
    """Unreduced loss L of an objective with its analytic gradient ∂L/∂log π = −A r w.

    The ratio in the gradient saturates at e²⁰ (ℓ = 20 nats); the gradient keeps its sign there, where the derivative of
    the saturated value would be 0. A token whose weight is 0
    has a gradient of exactly 0, whatever its ratio. A NaN at a valid token gives a NaN gradient, or drops the token
    where the weight is a mask; see `drpo_core.validate`.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        float16 and bfloat16 are computed in float32.
    mask
        True at tokens that count. Masked positions may hold anything, NaN included: they are replaced before any
        arithmetic. None: every token counts.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    TokenLoss
        `loss` and `weight` in the dtype of the arithmetic, `gradient` in the dtype of `log_prob`.

    Raises
    ------
    TypeError
        If an array is not real floating-point, or the mask is not boolean.
    ValueError
        If the shapes differ.

    References
    ----------
    `docs/derivations/index.md`: an objective is its gradient weight.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DRPO, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(DRPO(delta=0.5), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.gradient.round(6)
    array([-1. , -1. ,  0.2])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
    xp = tokens.xp
    weight = objective.weight(tokens)
    loss, gradient = objective.loss(tokens), xp.astype(gradient_of(tokens, weight, mask=mask), log_prob.dtype, copy=False)
    if mask is None:
        return TokenLoss(loss, gradient, weight)
    return TokenLoss(xp.where(mask, loss, 0.0), gradient, xp.where(mask, weight, 0.0))


def gradient_of(
    tokens: Tokens,
    weight: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None,
    coefficients: Float[Array, "..."] | None = None,
) -> Float[Array, "*tokens"]:
    """−m c A r w; exactly 0 where m = 0 or w = 0, whatever the ratio and the coefficient."""
    gradient = -tokens.advantages * tokens.ratio * weight
    moves = weight != 0.0
    return tokens.xp.where(
        moves if mask is None else mask & moves, gradient if coefficients is None else coefficients * gradient, 0.0
    )
