"""Anchors: what the importance ratio is taken against.

An anchor gives each token a log-prob a, held constant, and the ratio of an objective is R = e^(log π − a). The policies
themselves are anchors: the behaviour policy μ that sampled (R = π/μ), and the proximal policy π_old, the trainer's at
the start of the update (R = π/π_old). The others give all tokens of a sequence, or of its beginning, one ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from drpo_core._checks import check_arrays, check_dtype, check_part, check_shape, compute_dtype
from drpo_core.tokens import constant, saturated_both_ways

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float, Int, Namespace
    from drpo_core._sequences import Sequences

__all__ = ["Anchor", "Behavior", "Policies", "Prefix", "Proximal", "Sequence", "interpolated_proximal_log_prob"]


class Policies(NamedTuple):
    """Log-probs of the sampled tokens (nats) under each policy, in one dtype, finite, and 0 at masked tokens."""

    log_prob: Array
    behavior_log_prob: Array
    proximal_log_prob: Array | None
    reference_log_prob: Array | None
    sequences: Sequences
    xp: Namespace


class Anchor(Protocol):
    """What an importance ratio is taken against."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs that it needs, by the names of the arguments."""
        ...

    @property
    def policy(self) -> str:
        """The policy that the ratio is against in the end: ``"behavior"`` or ``"proximal"``."""
        ...

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log a per token, nats, a constant."""
        ...


@dataclass(frozen=True, slots=True)
class Behavior:
    """The behaviour policy μ that sampled the tokens: R = π/μ, the default of a mode.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.modes import Mode
    >>> tokens = np.log([0.5, 0.2]), np.log([0.25, 0.2]), np.ones(2)
    >>> token_loss_and_gradient(Mode(PPOClip(eps=0.2)), *tokens).weight
    array([0., 1.])
    """

    arguments = ("behavior_log_prob",)
    policy = "behavior"

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log μ."""
        return policies.behavior_log_prob


@dataclass(frozen=True, slots=True)
class Proximal:
    """The proximal policy π_old, the trainer's own at the start of the update: R = π/π_old.

    What π_old and μ disagree on is then left to corrections, as in the decoupled objective.

    References
    ----------
    arXiv:2110.00641 (batch size-invariance for policy optimisation), the decoupled objective; for language models
    arXiv:2505.24298 (AReaL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.2), anchor=Proximal())
    >>> tokens = np.log([0.5, 0.2]), np.log([0.25, 0.2]), np.ones(2)
    >>> token_loss_and_gradient(mode, *tokens, proximal_log_prob=np.log([0.5, 0.1])).weight
    array([1., 0.])
    """

    arguments = ("proximal_log_prob",)
    policy = "proximal"

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log π_old."""
        return policies.proximal_log_prob


class _OfAnother:
    """An anchor made of another one, `of`."""

    __slots__ = ()
    of: Anchor

    def __post_init__(self) -> None:
        """Check the inner anchor."""
        check_part("of", self.of, "log_prob", "an anchor such as Proximal()")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of the inner anchor."""
        return self.of.arguments

    @property
    def policy(self) -> str:
        """That of the inner anchor."""
        return self.of.policy


@dataclass(frozen=True, slots=True)
class Sequence(_OfAnother):
    """One ratio for a sequence of T valid tokens: R = exp((1/T) Σ_t (log π_t − log a_t)), the geometric mean of its ratios.

    log a becomes log π − (1/T) Σ_t (log π_t − log a_t), held constant. A token's own log π carries the gradient, so that
    ∂R/∂log π = R at each token. The mean is kept within ±20 nats. The anchor is no log-probability and may exceed 0:
    objectives of π − μ, which are made for probabilities (DRPO, DPPO), are better left on tokens.

    Parameters
    ----------
    of
        The anchor a whose ratios are averaged.

    Raises
    ------
    TypeError
        If `of` is no anchor.

    References
    ----------
    arXiv:2507.18071 (GSPO), eq. 7 and section 4.3 (GSPO-token).

    Examples
    --------
    Ratios 2 and 8, whose geometric mean is 4:

    >>> import numpy as np
    >>> from drpo_core import PolicyGradient, token_loss_and_gradient
    >>> from drpo_core.anchors import Behavior, Sequence
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PolicyGradient(), anchor=Sequence(Behavior()))
    >>> tokens = np.log([[0.5, 0.8]]), np.log([[0.25, 0.1]]), np.ones((1, 2))
    >>> token_loss_and_gradient(mode, *tokens).gradient.round(6)
    array([[-4., -4.]])
    """

    of: Anchor

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log π − mean(log π − log a)."""
        x, sequences, xp = policies.log_prob, policies.sequences, policies.xp
        return x - saturated_both_ways(sequences.mean(x - self.of.log_prob(policies)), xp=xp)


@dataclass(frozen=True, slots=True)
class Prefix(_OfAnother):
    """The causal counterpart of `Sequence`: R_t = exp((1/t) Σ_{i≤t} (log π_i − log a_i)) over the valid tokens so far.

    Parameters
    ----------
    of
        The anchor a whose ratios are averaged.

    Raises
    ------
    TypeError
        If `of` is no anchor.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PolicyGradient, token_loss_and_gradient
    >>> from drpo_core.anchors import Behavior, Prefix
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PolicyGradient(), anchor=Prefix(Behavior()))
    >>> tokens = np.log([[0.5, 0.8]]), np.log([[0.25, 0.1]]), np.ones((1, 2))
    >>> token_loss_and_gradient(mode, *tokens).gradient.round(6)
    array([[-2., -4.]])
    """

    of: Anchor

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log π − the mean of log π − log a over the tokens up to each one."""
        x, sequences, xp = policies.log_prob, policies.sequences, policies.xp
        total = sequences.running_total(x - self.of.log_prob(policies))
        count = sequences.running_total(xp.ones_like(x))
        return x - saturated_both_ways(total / xp.where(count == 0.0, 1.0, count), xp=xp)


def interpolated_proximal_log_prob(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    staleness: Int[Array, "*tokens"],
    *,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Log π_old without a forward pass: log π + (log μ − log π)/d, for tokens sampled d updates ago (A-3PO).

    It stands for the policy one update ago, on the straight line in log-space from μ, d updates ago, to π. With the anchor
    `Proximal` the ratio is then R = (π/μ)^(1/d), and π_old/μ = (π/μ)^(1 − 1/d). It is log μ where d ≤ 1.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of the sampled tokens, nats, ≤ 0; any shape, the same for both.
    staleness
        d: the trainer's version minus the one that sampled the token, in updates; of the same shape.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        To be passed as `proximal_log_prob`; a constant, anew for each log π. Of the inputs' common dtype, float32 at least.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ.

    References
    ----------
    arXiv:2512.06547 (A-3PO), whose α is 1/d; AReaL's ``prox_logp_method="loglinear"`` (inclusionAI/AReaL,
    areal/trainer/ppo/actor.py, 1.0.4, ``compute_prox_logp_approximations``), whose alpha is 1 − 1/d.

    Examples
    --------
    Two updates ago: the geometric mean of 0.8 and 0.2; one update ago: μ itself.

    >>> import numpy as np
    >>> from drpo_core.anchors import interpolated_proximal_log_prob
    >>> pi, mu = np.log([0.8, 0.8]), np.log([0.2, 0.2])
    >>> np.exp(interpolated_proximal_log_prob(pi, mu, np.array([2, 1]))).round(6)
    array([0.4, 0.2])
    """
    xp = check_arrays(xp=xp, log_prob=log_prob, behavior_log_prob=behavior_log_prob)
    check_dtype("staleness", staleness, "integral", xp=xp)
    check_shape("staleness", staleness, "log_prob", log_prob)
    dtype = compute_dtype(log_prob, behavior_log_prob, xp=xp)
    x, b = (xp.astype(constant(array), dtype, copy=False) for array in (log_prob, behavior_log_prob))
    d = xp.astype(staleness, dtype)
    stale = d > 1.0
    # of log π = −∞ the line has no other point
    known = x != -xp.inf
    way = xp.where(known, b, 0.0) - xp.where(known, x, 0.0)
    return xp.where(stale, x + way / xp.where(stale, d, 1.0), b)
