"""The score-centring term of any objective, whose derivative is its coefficients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_core.centering import outcome_terms
from drpo_jax._checks import check_jax_arrays
from drpo_jax._namespace import xp
from drpo_jax.loss import attached

if TYPE_CHECKING:
    from drpo_core import Objective

__all__ = ["centering_term", "score_centering"]


def score_centering(
    objective: Objective,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    tail: bool = True,
    mask: jax.Array | None = None,
    proximal_log_prob: jax.Array | None = None,
    divergence: jax.Array | None = None,
) -> jax.Array:
    """Score-centring term Σ_v C_v log π_v per token, C_v = −μ_v g_v, with the derivative C_v in each log π_v.

    Added to `drpo_jax.token_loss`, it makes the expected gradient at a constant advantage 0. Only `log_prob` is
    differentiated; the other arrays are constants. The value has no meaning of its own. A second derivative is that of the
    formula of C_v.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode` that looks at one token at a time; static and
        hashable under `jit`.
    log_prob, behavior_log_prob
        log π and log μ of K distinct outcomes of each token, nats, ≤ 0; (…, K). −inf is a probability of 0.
    advantages
        A of the sampled tokens, (…).
    tail
        True if the K outcomes are part of the vocabulary, False if they are all that can be sampled.
    mask
        Boolean, (…), True at tokens that count; the others may hold anything and have term and gradient 0.
    proximal_log_prob
        log π_old of the K outcomes, (…, K), where the mode needs it.
    divergence
        Per-token divergence, (…), for ``DPPO(divergence="per_token")``.

    Returns
    -------
    jax.Array
        The term per token, (…), float32 at least.

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype.
    ValueError
        If shapes disagree, K is 0, or the mode has a part that looks at other tokens.

    See Also
    --------
    drpo_core.centering.score_centering : the formula, the tail and their source.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import DRPO
    >>> from drpo_jax import score_centering
    >>> behavior = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    >>> def term(log_prob):
    ...     return score_centering(
    ...         DRPO(delta=0.5), log_prob=log_prob, behavior_log_prob=behavior, advantages=jnp.array(1.0), tail=False
    ...     )
    >>> [round(c, 4) for c in jax.grad(term)(jnp.log(jnp.array([0.5, 0.3, 0.2]))).tolist()]
    [0.2, 0.3, 0.32]
    """
    arrays = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    options: dict[str, Any] = {"mask": mask, "proximal_log_prob": proximal_log_prob, "divergence": divergence}
    check_jax_arrays(**arrays, **options)
    constants = {"behavior_log_prob": behavior_log_prob, "advantages": advantages, **options}
    return centering_term(objective, log_prob, jax.lax.stop_gradient(constants), tail=tail)


def centering_term(objective: Objective, log_prob: jax.Array, constants: dict[str, Any], *, tail: bool) -> jax.Array:
    """The term per token, differentiable in `log_prob`; the constants are the other arrays by their names."""

    def run(log_prob: jax.Array, *arrays: Any) -> tuple[jax.Array, jax.Array]:  # noqa: ANN401 -- the constants
        named: dict[str, Any] = dict(zip(constants, arrays, strict=True))
        return outcome_terms(objective, log_prob, **named, tail=tail, xp=xp)

    arrays = tuple(constants.values())
    values, gradient = run(jax.lax.stop_gradient(log_prob), *arrays)
    mask = constants["mask"]
    if mask is not None:
        log_prob = jnp.where(mask[..., None], log_prob, jnp.zeros((), log_prob.dtype))
    log_prob = log_prob.astype(gradient.dtype)
    of_outcomes = attached(lambda *given: run(*given)[1], values, gradient, log_prob, arrays)
    return jnp.sum(of_outcomes, axis=-1)
