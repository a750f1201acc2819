"""Corrections: detached factors K of a token's gradient, from what the policies disagree on.

A correction looks at one edge between two policies, at the level of tokens, of sequences (the product of their ratios),
of their geometric mean, or of the batch. It gives a factor per token: a weight, or a mask of zeros and ones. A mode's
corrections are multiplied. They are constants: nothing is differentiated through them. All sums are of logarithms, and a
ratio saturates at e²⁰ and e⁻²⁰.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from drpo_core._arrays import in_one_piece
from drpo_core._checks import check_arrays, check_flag, check_mask, check_number, compute_dtype
from drpo_core.divergence import binary_kl_of, k3_of
from drpo_core.reduction import count_true
from drpo_core.tokens import Tokens, constant, saturated_both_ways

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core._arrays import Array, Bool, Float, Namespace
    from drpo_core.anchors import Policies

__all__ = [
    "ClippedGeometricRatio",
    "Correction",
    "DivergenceMask",
    "Edge",
    "Evidence",
    "FutureRatio",
    "ImportanceWeight",
    "LengthScale",
    "Level",
    "MinimumPrefixRatio",
    "NegativeSequenceMask",
    "OutwardMask",
    "PrefixBudgetMask",
    "RatioMask",
    "SecondMomentMask",
    "SequenceTrustMask",
    "VariationalWeight",
    "Veto",
    "clip_cov_weights",
]

Edge: TypeAlias = Literal["proximal/behavior", "policy/behavior", "policy/proximal"]
"""π_old/μ: what trainer and sampler disagree on; π/μ; π/π_old: what the update has changed."""

Level: TypeAlias = Literal["token", "sequence", "geometric"]
"""Of a ratio: the token's own, the product over its sequence, or their geometric mean."""

EDGES: Mapping[str, tuple[str, str]] = {
    "proximal/behavior": ("proximal_log_prob", "behavior_log_prob"),
    "policy/behavior": ("log_prob", "behavior_log_prob"),
    "policy/proximal": ("log_prob", "proximal_log_prob"),
}
LEVELS = ("token", "sequence", "geometric")


class Evidence(NamedTuple):
    """What a correction or a penalty may look at: the policies' log-probs of the sampled tokens, and the advantages."""

    policies: Policies
    advantages: Array

    def log_ratio(self, edge: Edge) -> Float[Array, "*tokens"]:
        """Log ratio ℓ of an edge, nats; 0 at masked tokens."""
        over, under = (getattr(self.policies, name) for name in EDGES[edge])
        return over - under

    def at_level(self, edge: Edge, level: Level) -> Float[Array, "..."]:
        """Log ratio at a level, within ±20 nats; one element a row for padded sequences."""
        ell, sequences = self.log_ratio(edge), self.policies.sequences
        if level != "token":
            ell = sequences.total(ell) if level == "sequence" else sequences.mean(ell)
        return saturated_both_ways(ell, xp=self.policies.xp)


class Correction(Protocol):
    """A detached factor of a token's gradient."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs that it needs, by the names of the arguments."""
        ...

    @property
    def counts(self) -> str | None:
        """The edge whose ratio, of the token or its sequence, multiplies the gradient; None for masks and other factors."""
        ...

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """K per token, of a shape that broadcasts to the tokens'."""
        ...


class _OnEdge:
    """A correction on one edge."""

    __slots__ = ()
    edge: Edge

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs of the edge's two policies."""
        return EDGES[self.edge]

    @property
    def counts(self) -> str | None:
        """None: a mask counts no ratio."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeight(_OnEdge):
    """Importance weight ρ within bounds: K = ρ, clamped to [low, high], or K = ρ·1[low ≤ ρ ≤ high] with ``outside="zero"``.

    With `high` alone it is truncated importance sampling, min(ρ, C).

    Parameters
    ----------
    edge, level
        Which ratio ρ is.
    low, high
        Bounds ≥ 0 and > 0, ratios; None for none.
    outside
        ``"clamp"`` or ``"zero"``: what happens to a ratio outside its bounds.
    normalize
        Divide by the mean of K over the valid tokens of this call (over its sequences, at their level). Micro-batches
        then have means of their own.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    Truncated importance sampling of what trainer and sampler disagree on: verl's and TRL's documentation of
    rollout correction; zeroing, as IcePop does: arXiv:2510.18855.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import ImportanceWeight
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(ImportanceWeight(high=2.0),))
    >>> pi, old, mu = np.log([0.5, 0.1, 0.3]), np.log([0.5, 0.1, 0.3]), np.log([0.5, 0.2, 0.1])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([1.0, 1.0, 1.0]), proximal_log_prob=old).weight.round(4)
    array([1. , 0.5, 2. ])
    """

    edge: Edge = "proximal/behavior"
    level: Level = "token"
    low: float | None = None
    high: float | None = None
    outside: Literal["clamp", "zero"] = "clamp"
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _check_choice("level", self.level, LEVELS)
        _check_choice("outside", self.outside, ("clamp", "zero"))
        check_flag("normalize", self.normalize)
        _check_bounds(self)

    @property
    def counts(self) -> str | None:
        """Its edge."""
        return self.edge

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """ρ within its bounds."""
        policies = evidence.policies
        xp = policies.xp
        ratio = xp.exp(evidence.at_level(self.edge, self.level))
        if self.outside == "zero":
            ratio = xp.where(_within(ratio, self.low, self.high), ratio, 0.0)
        else:
            ratio = ratio if self.low is None else xp.where(ratio < self.low, self.low, ratio)
            ratio = ratio if self.high is None else xp.where(ratio > self.high, self.high, ratio)
        if not self.normalize:
            return ratio
        sequences = policies.sequences
        # a NaN spoils the weight of its own token or sequence, not all others'
        known = ratio == ratio
        one, ratios = xp.where(known, xp.ones_like(ratio), 0.0), xp.where(known, ratio, 0.0)
        if self.level == "token":
            total, count = sequences.total_of_all(ratios), sequences.total_of_all(one)
        else:
            first = sequences.first_of_each()
            total, count = xp.sum(xp.where(first, ratios, 0.0)), xp.sum(xp.where(first, one, 0.0))
        mean = total / xp.where(count == 0.0, 1.0, count)
        return ratio / xp.where(mean == 0.0, 1.0, mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioMask(_OnEdge):
    """K = 1[low ≤ ρ ≤ high]: tokens or sequences whose ratio is outside a band are left out.

    Parameters
    ----------
    edge, level
        Which ratio ρ is; at ``"geometric"``, the masked importance sampling of sequences.
    low, high
        Bounds, ratios; None for none.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2510.18855 (IcePop) at the level of tokens; verl's ``rollout_rs`` by k1, whose bounds are ratios too.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import RatioMask
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(RatioMask(level="geometric", low=0.9, high=1.1),))
    >>> pi, old, mu = np.log([[0.5, 0.2], [0.5, 0.1]]), np.log([[0.5, 0.2], [0.5, 0.1]]), np.log([[0.5, 0.2], [0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0], [1.0, 1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1., 1.],
           [0., 0.]])
    """

    edge: Edge = "proximal/behavior"
    level: Level = "token"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _check_choice("level", self.level, LEVELS)
        _check_bounds(self)

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """1[low ≤ ρ ≤ high]."""
        ratio = evidence.policies.xp.exp(evidence.at_level(self.edge, self.level))
        return _indicator(_within(ratio, self.low, self.high), evidence)


Estimator: TypeAlias = Literal["k2", "k3", "binary_kl", "binary_tv", "symmetric_binary_kl"]

_ESTIMATORS: Mapping[str, Callable[[Tokens], Array]] = {
    "k2": lambda tokens: 0.5 * tokens.log_ratio * tokens.log_ratio,
    "k3": k3_of,
    "binary_kl": binary_kl_of,
    "binary_tv": lambda tokens: tokens.xp.abs(tokens.shift),
    "symmetric_binary_kl": lambda tokens: tokens.xp.maximum(binary_kl_of(tokens), binary_kl_of(_swapped(tokens))),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceMask(_OnEdge):
    """K = 1[D ≤ high]: tokens, or sequences, of too large a divergence are left out.

    Parameters
    ----------
    edge
        Between which policies.
    estimator
        D of a token: ``"k2"`` = ℓ²/2, ``"k3"`` = ρ − 1 − ℓ, the KL or TV of two outcomes (the token or another), or the
        larger of that KL's two directions. For bounds on ℓ itself (k1), see `RatioMask`.
    over
        ``"token"``, or the ``"sum"``, ``"mean"`` or ``"max"`` over the sequence.
    high
        Largest D that is kept, in nats (TV: a probability); > 0.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    verl's ``rollout_rs``; the largest of a sequence: arXiv:2512.23075 (TRM); both directions: arXiv:2606.15079 (KPop).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import DivergenceMask
    >>> from drpo_core.modes import Mode
    >>> correction = DivergenceMask(estimator="binary_tv", over="max", high=0.05)
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(correction,))
    >>> pi, old, mu = np.log([[0.5, 0.2], [0.5, 0.1]]), np.log([[0.5, 0.2], [0.5, 0.1]]), np.log([[0.5, 0.2], [0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0], [1.0, 1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1., 1.],
           [0., 0.]])
    """

    edge: Edge = "proximal/behavior"
    estimator: Estimator = "k3"
    over: Literal["token", "sum", "mean", "max"] = "token"
    high: float

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _check_choice("estimator", self.estimator, _ESTIMATORS)
        _check_choice("over", self.over, ("token", "sum", "mean", "max"))
        _set_number(self, "high")

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """1[D ≤ high]."""
        divergence = _ESTIMATORS[self.estimator](_tokens(evidence, self.edge))
        sequences = evidence.policies.sequences
        reduce = {"sum": sequences.total, "mean": sequences.mean, "max": sequences.largest}.get(self.over)
        return _indicator((divergence if reduce is None else reduce(divergence)) <= self.high, evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Veto(_OnEdge):
    """K = 0 for a whole sequence if the ratio of any of its tokens is outside [low, high], else 1.

    Parameters
    ----------
    edge
        Which ratio.
    low, high
        Bounds, ratios: what no numerical noise explains.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    verl's documentation of rollout correction (token veto); prime-rl's ``token_mask``.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import Veto
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(Veto(),))
    >>> pi, old, mu = np.log([[0.5, 0.2], [0.5, 1e-6]]), np.log([[0.5, 0.2], [0.5, 1e-6]]), np.log([[0.5, 0.2], [0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0], [1.0, 1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1., 1.],
           [0., 0.]])
    """

    edge: Edge = "proximal/behavior"
    low: float | None = 1e-4
    high: float | None = 100.0

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _check_bounds(self)

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """1 where every token is within."""
        xp = evidence.policies.xp
        ratio = xp.exp(evidence.at_level(self.edge, "token"))
        outside = xp.where(_within(ratio, self.low, self.high), 0.0, xp.ones_like(ratio))
        return _indicator(evidence.policies.sequences.largest(outside) <= 0.0, evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeSequenceMask(_OnEdge):
    """K = 0 where A < 0 and the sequence's mean of −ℓ exceeds δ, else 1: off-policy sequence masking (OPSM).

    Parameters
    ----------
    edge
        Which ratio; ``"policy/behavior"``: the mean of log μ − log π.
    delta
        δ > 0, nats.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    TRL's ``off_policy_mask_threshold`` and slime's OPSM, after DeepSeek-V3.2 (arXiv:2512.02556).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import NegativeSequenceMask
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(NegativeSequenceMask(delta=0.1),))
    >>> pi, old, mu = np.log([[0.5, 0.1], [0.5, 0.1]]), np.log([[0.5, 0.1], [0.5, 0.1]]), np.log([[0.5, 0.2], [0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0], [-1.0, -1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1., 1.],
           [0., 0.]])
    """

    edge: Edge = "policy/behavior"
    delta: float

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _set_number(self, "delta")

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """0 where A < 0 and mean(−ℓ) > δ."""
        near = evidence.policies.sequences.mean(-evidence.log_ratio(self.edge)) <= self.delta
        return _indicator(near | (evidence.advantages >= 0.0), evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTrustMask(_OnEdge):
    """K = 0 where the sequence's mean of abs(ρ − 1) exceeds δ and the token moves further away, A ℓ > 0 (VACO).

    Parameters
    ----------
    edge
        Which ratio.
    delta
        δ > 0, dimensionless.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2603.01365 (VACO).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import SequenceTrustMask
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(SequenceTrustMask(delta=0.2),))
    >>> pi, old, mu = np.log([[0.5, 0.3], [0.5, 0.3]]), np.log([[0.5, 0.3], [0.5, 0.3]]), np.log([[0.5, 0.2], [0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0], [-1.0, -1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1., 0.],
           [1., 1.]])
    """

    edge: Edge = "policy/behavior"
    delta: float

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _set_number(self, "delta")

    def factor(self, evidence: Evidence) -> Float[Array, "*tokens"]:
        """0 where mean(abs(ρ − 1)) > δ and A ℓ > 0."""
        tokens = _tokens(evidence, self.edge)
        near = evidence.policies.sequences.mean(tokens.xp.abs(tokens.ratio_minus_one)) <= self.delta
        return _indicator(near | (tokens.along_advantage(tokens.ratio_minus_one) <= 0.0), evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutwardMask(_OnEdge):
    """K = 0 where A > 0 and ℓ > ε_high, or A < 0 and ℓ < −ε_low: the token mask of GMPO.

    Parameters
    ----------
    edge
        Which ratio.
    eps_low, eps_high
        > 0, nats.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2507.20673 (GMPO), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import OutwardMask
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(OutwardMask(eps_low=0.1, eps_high=0.1),))
    >>> pi, old, mu = np.log([[0.5, 0.25], [0.5, 0.25]]), np.log([[0.5, 0.2], [0.5, 0.2]]), np.log([[0.5, 0.2], [0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0], [-1.0, -1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1., 0.],
           [1., 1.]])
    """

    edge: Edge = "policy/proximal"
    eps_low: float
    eps_high: float

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _set_number(self, "eps_low")
        _set_number(self, "eps_high")

    def factor(self, evidence: Evidence) -> Float[Array, "*tokens"]:
        """0 where the token is outward beyond ε."""
        ell, a = evidence.log_ratio(self.edge), evidence.advantages
        return _indicator(((a <= 0.0) | (ell <= self.eps_high)) & ((a >= 0.0) | (ell >= -self.eps_low)), evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedGeometricRatio(_OnEdge):
    """K = exp of the sequence's mean of ℓ̃, where ℓ̃ = min(ℓ, ε_high) if A > 0, max(ℓ, −ε_low) if A < 0, 0 if A = 0: GMPO.

    GMPO's gradient is −A K at the tokens that `OutwardMask` keeps: ``Reinforce()`` with both corrections.

    Parameters
    ----------
    edge
        Which ratio.
    eps_low, eps_high
        > 0, nats.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2507.20673 (GMPO), eq. 4.

    Examples
    --------
    Ratios 1 and 2, of which the second is clipped to e^0.4:

    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.corrections import ClippedGeometricRatio
    >>> from drpo_core.modes import Mode
    >>> from drpo_core.objectives import Reinforce
    >>> mode = Mode(Reinforce(), corrections=(ClippedGeometricRatio(eps_low=0.4, eps_high=0.4),))
    >>> pi, old = np.log([[0.5, 0.4]]), np.log([[0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, old, np.ones((1, 2)), proximal_log_prob=old).gradient.round(4)
    array([[-1.2214, -1.2214]])
    """

    edge: Edge = "policy/proximal"
    eps_low: float
    eps_high: float

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _set_number(self, "eps_low")
        _set_number(self, "eps_high")

    @property
    def counts(self) -> str | None:
        """Its edge."""
        return self.edge

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """exp(mean ℓ̃)."""
        policies, a = evidence.policies, evidence.advantages
        xp, ell = policies.xp, evidence.log_ratio(self.edge)
        of_positive = xp.where(ell > self.eps_high, self.eps_high, ell)
        of_negative = xp.where(ell < -self.eps_low, -self.eps_low, ell)
        clipped = xp.where(a > 0.0, of_positive, xp.where(a < 0.0, of_negative, 0.0))
        return xp.exp(saturated_both_ways(policies.sequences.mean(clipped), xp=xp))


@dataclass(frozen=True, slots=True)
class LengthScale:
    """K = T, the number of valid tokens of the sequence: LUSPO's factor of a sequence-level objective.

    References
    ----------
    arXiv:2602.05261 (LUSPO).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import LengthScale
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(LengthScale(),))
    >>> pi, old, mu = np.log([[0.5, 0.2, 0.1]]), np.log([[0.5, 0.2, 0.1]]), np.log([[0.5, 0.2, 0.1]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0, 1.0]]), proximal_log_prob=old).weight.round(4)
    array([[3., 3., 3.]])
    """

    arguments = ()
    counts = None

    def factor(self, evidence: Evidence) -> Float[Array, "..."]:
        """T."""
        return evidence.policies.sequences.length(evidence.advantages)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariationalWeight(_OnEdge):
    """K = φ(W) = e^λ W^k e^(−λW) of the sequence's product ratio W: VESPO's weight, largest at W = k/λ.

    Parameters
    ----------
    edge
        Which ratio.
    positive, negative
        (k, λ) where A ≥ 0 and where A < 0; positive numbers.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2602.10693 (VESPO), with the numbers (k, λ) of TRL's ``loss_type="vespo"``.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import VariationalWeight
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(VariationalWeight(edge="proximal/behavior"),))
    >>> pi, mu = np.log([[0.5, 0.2], [0.5, 0.25]]), np.log([[0.5, 0.2], [0.5, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0], [-1.0, -1.0]]), proximal_log_prob=pi).weight.round(4)
    array([[1.    , 1.    ],
           [1.1846, 1.1846]])
    """

    edge: Edge = "policy/behavior"
    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        for name in ("positive", "negative"):
            pair = getattr(self, name)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                msg = f"{name}: expected two numbers (k, λ), got {pair!r}"
                raise TypeError(msg)
            object.__setattr__(self, name, tuple(check_number(name, number, above=0.0) for number in pair))

    @property
    def counts(self) -> str | None:
        """Its edge."""
        return self.edge

    def factor(self, evidence: Evidence) -> Float[Array, "*tokens"]:
        """e^(λ + k log W − λ W)."""
        xp = evidence.policies.xp
        log_w = evidence.at_level(self.edge, "sequence")
        of_positive, of_negative = (
            xp.exp(rate + k * log_w - rate * xp.exp(log_w)) for k, rate in (self.positive, self.negative)
        )
        return xp.where(evidence.advantages < 0.0, of_negative, of_positive)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumPrefixRatio(_OnEdge):
    """K_t = min over i < t of ρ_i (1 at a sequence's first token): MinPRO's factor of the token's own ratio.

    With the token's own ratio r_t the gradient is multiplied with r_t min_{i<t} r_i.

    Parameters
    ----------
    edge
        Which ratio.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2601.22718 (MinPRO).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import MinimumPrefixRatio
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(MinimumPrefixRatio(),))
    >>> pi, old, mu = np.log([[0.4, 0.24, 0.1]]), np.log([[0.5, 0.2, 0.1]]), np.log([[0.5, 0.2, 0.1]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0, 1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1. , 0.8, 0.8]])
    """

    edge: Edge = "policy/behavior"

    def __post_init__(self) -> None:
        """Check the edge."""
        _check_choice("edge", self.edge, EDGES)

    def factor(self, evidence: Evidence) -> Float[Array, "*tokens"]:
        """The smallest ratio before each token."""
        sequences, xp = evidence.policies.sequences, evidence.policies.xp
        # at the first token there is none before it
        smallest = sequences.smallest_before(evidence.log_ratio(self.edge), nothing=0.0)
        return xp.exp(saturated_both_ways(smallest, xp=xp))


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureRatio(_OnEdge):
    """K_t = clip(exp Σ_{k≥t} γ^(k−t) ℓ_k 1[ρ_k ≤ δ], low, high): FIPO's weight by the future of a token.

    Parameters
    ----------
    edge
        Which ratio.
    delta
        δ > 0, a ratio: tokens beyond it count nothing.
    half_life
        Tokens after which γ has halved, > 0: γ = 2^(−1/half_life). The distance k − t counts masked tokens too.
    low, high
        Bounds of the weight, 0 < low < high.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2603.19835 (FIPO), whose ratio is π/π_old. Its code also bounds K to 1 where A < 0 and ρ > 10, which is not here.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import FutureRatio
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(FutureRatio(delta=3.0, half_life=1.0),))
    >>> pi, old, mu = np.log([[0.5, 0.22, 0.11]]), np.log([[0.5, 0.2, 0.1]]), np.log([[0.5, 0.2, 0.1]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0, 1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1.0741, 1.1537, 1.1   ]])
    """

    edge: Edge = "policy/behavior"
    delta: float
    half_life: float = 32.0
    low: float = 1.0
    high: float = 1.2

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        for name in ("delta", "half_life", "low", "high"):
            _set_number(self, name)
        _check_order(self.low, self.high)

    def factor(self, evidence: Evidence) -> Float[Array, "*tokens"]:
        """clip(exp of the discounted sum, low, high)."""
        sequences, xp = evidence.policies.sequences, evidence.policies.xp
        ell = evidence.at_level(self.edge, "token")
        ahead = sequences.discounted_future(xp.where(xp.exp(ell) <= self.delta, ell, 0.0), 2.0 ** (-1.0 / self.half_life))
        weight = xp.exp(saturated_both_ways(ahead, xp=xp))
        weight = xp.where(weight < self.low, self.low, weight)
        return xp.where(weight > self.high, self.high, weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixBudgetMask(_OnEdge):
    """K = 0 at tokens that diverge beyond δ, or beyond what their prefix has left of its budget, else 1 (CPPO).

    With D = abs(π − μ) of the sampled token, u_t = 1 − (1 − u_min)(t − 1)/max(T − 1, 1) over the T valid tokens, Z = u D,
    S_t = Σ_{i≤t} Z_i and U_t = Σ_{i≤t} u_i, a token is kept iff A(ρ − 1) ≤ 0, or Z_t ≤ δ and S_t ≤ δ + b U_{t−1}. Dropped
    tokens use up the budget too. CPPO multiplies the gradient by ρ: the objective ``PolicyGradient()``.

    Parameters
    ----------
    edge
        Between which policies; ``"policy/behavior"``: π and μ.
    delta
        δ > 0, a probability: the most that a first token may move.
    min_weight
        u_min in (0, 1], the weight of a last token: it may move by δ/u_min.
    budget
        δ_b > 0, a probability: what the weighted mean of D over a prefix may be.
    calibrate
        Whether b follows each sequence: the 0.9 quantile of its D (with linear interpolation), within [δ_b, 2δ_b]. Else
        b = δ_b.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2606.10968 (CPPO), eqs. 8 to 10 and 22, with its Binary-TV divergence. Defaults: its table 3, whose δ is 0.15, and
    0.2 for a mixture of experts.

    Examples
    --------
    The third token moves by less than δ, but the second has used up the budget:

    >>> import numpy as np
    >>> from drpo_core import PolicyGradient, token_loss_and_gradient
    >>> from drpo_core.corrections import PrefixBudgetMask
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PolicyGradient(), corrections=(PrefixBudgetMask(delta=0.2),))
    >>> pi, mu = np.log([[0.55, 0.39, 0.3]]), np.log([[0.5, 0.2, 0.2]])
    >>> token_loss_and_gradient(mode, pi, mu, np.ones((1, 3))).weight.round(4)
    array([[1., 1., 0.]])
    """

    edge: Edge = "policy/behavior"
    delta: float
    min_weight: float = 0.8
    budget: float = 0.02
    calibrate: bool = True

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        for name in ("delta", "min_weight", "budget"):
            _set_number(self, name)
        if self.min_weight > 1.0:
            msg = f"min_weight: expected 1 or less, got {self.min_weight:g}"
            raise ValueError(msg)
        check_flag("calibrate", self.calibrate)

    def factor(self, evidence: Evidence) -> Float[Array, "*tokens"]:
        """1 where the token moves back, or its prefix is within the budget."""
        tokens, sequences, xp = _tokens(evidence, self.edge), evidence.policies.sequences, evidence.policies.xp
        divergence = xp.abs(tokens.shift)
        before = sequences.running_total(xp.ones_like(divergence)) - 1.0
        length = sequences.length(divergence)
        slope = (1.0 - self.min_weight) / xp.where(length > 1.0, length - 1.0, 1.0)
        weighted = (1.0 - slope * before) * divergence
        spent = sequences.running_total(weighted)
        budget: Any = self.budget
        if self.calibrate:
            own = sequences.quantile(divergence, 0.9)
            budget = xp.where(own < budget, budget, xp.where(own > 2.0 * budget, 2.0 * budget, own))
        # the weights before a token: an arithmetic series
        allowed = self.delta + budget * (before - 0.5 * slope * before * (before - 1.0))
        back = tokens.along_advantage(tokens.ratio_minus_one) <= 0.0
        return _indicator(back | ((weighted <= self.delta) & (spent <= allowed)), evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondMomentMask(_OnEdge):
    """K = 0 at the tokens of largest ℓ², as many as it takes for the mean ℓ² of the rest to be below τ (M2PO).

    Tokens of equal ℓ² go or stay together. A batch-level mask: it depends on all valid tokens of the call.

    Parameters
    ----------
    edge
        Which ratio.
    tau
        τ > 0, nats².

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or a choice is unknown.

    References
    ----------
    arXiv:2510.01161 (M2PO).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.corrections import SecondMomentMask
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(PPOClip(eps=0.5), anchor=Proximal(), corrections=(SecondMomentMask(tau=0.04),))
    >>> pi, old, mu = np.log([[0.5, 0.22, 0.2]]), np.log([[0.5, 0.22, 0.2]]), np.log([[0.5, 0.2, 0.1]])
    >>> token_loss_and_gradient(mode, pi, mu, np.array([[1.0, 1.0, 1.0]]), proximal_log_prob=old).weight.round(4)
    array([[1., 1., 0.]])
    """

    edge: Edge = "proximal/behavior"
    tau: float

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        _check_choice("edge", self.edge, EDGES)
        _set_number(self, "tau")

    def factor(self, evidence: Evidence) -> Float[Array, "*tokens"]:
        """1 where ℓ² is below the smallest that must go."""
        xp, mask = evidence.policies.xp, evidence.policies.sequences.mask
        evidence.policies.sequences.need_whole_sequences()
        ell = evidence.log_ratio(self.edge)
        squares = xp.where(mask, ell * ell, xp.inf)
        if 0 in squares.shape:
            return xp.ones_like(squares)
        ordered = xp.sort(xp.reshape(squares, (-1,)))
        count = xp.cumulative_sum(xp.ones_like(ordered))
        # means of the smallest ones rise with their number, so those below τ come first; a NaN comes last
        beyond = (xp.cumulative_sum(ordered) / count >= self.tau) & (ordered == ordered)
        return _indicator(squares < xp.min(xp.where(beyond, ordered, xp.inf)), evidence)


def clip_cov_weights(
    log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    noise: Float[Array, "*tokens"],
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    candidates: Bool[Array, "*tokens"] | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """0 at a few random tokens of large covariance (A − mean A)(log π − mean log π), else 1: Clip-Cov.

    Those tokens take the most entropy from the policy. Of the valid ones with low < covariance < high, as many lose their
    gradient as a share of all valid tokens, one at least: those of the smallest noise. A mode has no room for an array of
    random numbers, so this is no correction of a mode: the result is passed as `token_weights`, beside a mode or an
    objective.

    Parameters
    ----------
    log_prob, advantages
        log π (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all arrays. The means are over the valid
        tokens of this call, that of log π over those of π > 0: a token of probability 0 has no covariance.
    mask
        True at tokens that count; the others may hold anything.
    noise
        Independent random numbers of a continuous distribution, one a token, anew for each call.
    share
        > 0: of the valid tokens, how many are chosen; rounded down.
    low, high
        Bounds of the covariance, exclusive, nats times the unit of A.
    candidates
        True at tokens that may be chosen. verl and SkyRL leave out those that PPO's clip has stopped already.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        0 or 1 per token, 0 where the mask is False; a constant, in float32 at least.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ, a number is out of its range, or `low` is not less than `high`.

    References
    ----------
    arXiv:2505.22617 (Clip-Cov); verl's ``clip_cov`` (verl/trainer/ppo/core_algos.py, 0.9.1), with its defaults.

    Examples
    --------
    Covariances 2.9, 0.8, 0.2 and 1.4, of which the band has two; the last has the smaller noise:

    >>> import numpy as np
    >>> from drpo_core.corrections import clip_cov_weights
    >>> log_prob, advantages = np.array([-0.1, -1.5, -2.0, -4.0]), np.array([2.0, 2.0, -1.0, -1.0])
    >>> clip_cov_weights(log_prob, advantages, np.ones(4, dtype=bool), np.array([0.5, 0.2, 0.1, 0.3]))
    array([1., 1., 1., 0.])
    """
    xp = check_arrays(xp=xp, log_prob=log_prob, advantages=advantages, noise=noise)
    check_mask(mask, "log_prob", log_prob, xp=xp)
    if candidates is not None:
        check_arrays(xp=xp, kind="bool", mask=mask, candidates=candidates)
    share = check_number("share", share, above=0.0)
    low, high = check_number("low", low), check_number("high", high)
    _check_order(low, high)
    dtype = compute_dtype(log_prob, advantages, xp=xp)
    one = xp.astype(mask, dtype)
    if 0 in mask.shape:
        return one
    n = xp.sum(one)
    covariance, known = covariances(constant(log_prob), constant(advantages), mask, dtype=dtype, xp=xp)
    chosen = known & (covariance > low) & (covariance < high)
    chosen = chosen if candidates is None else chosen & candidates
    order = xp.where(chosen, constant(noise), xp.inf)
    count = xp.floor(share * n)
    last = xp.astype(xp.where(count > 1.0, xp.where(count < n, count, n) - 1.0, 0.0), xp.int32)
    ordered = xp.sort(xp.reshape(in_one_piece(order, xp=xp), (-1,)))
    largest = xp.reshape(xp.take(ordered, xp.reshape(last, (1,))), ())
    return xp.where(chosen & (order <= largest), 0.0, one)


def covariances(
    log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    *,
    dtype: Any,
    xp: Namespace,
) -> tuple[Float[Array, "*tokens"], Bool[Array, "*tokens"]]:
    """Each token's share (A − mean A)(log π − mean log π) of their covariance over the valid tokens, and which have one.

    A token that π can't take (−∞, or the −10⁶ that stands for it among a mode's log-probs) has none.
    """
    # in the dtype of the arithmetic: float16 has no such number
    known = mask & (xp.astype(log_prob, dtype, copy=False) > -1e6)

    def centred(x: Array, over: Array) -> Array:
        x = xp.where(over, xp.astype(x, dtype, copy=False), 0.0)
        count = count_true(over, dtype, xp=xp)
        return x - xp.sum(x) / xp.where(count == 0.0, 1.0, count)

    return centred(advantages, mask) * centred(log_prob, known), known


def _tokens(evidence: Evidence, edge: Edge) -> Tokens:
    """The tokens of an edge, as an objective sees them."""
    over, under = (getattr(evidence.policies, name) for name in EDGES[edge])
    return Tokens.of(over, under, evidence.advantages, dtype=over.dtype, xp=evidence.policies.xp)


def _swapped(tokens: Tokens) -> Tokens:
    x, b, xp = tokens.log_prob, tokens.behavior_log_prob, tokens.xp
    return Tokens.of(b, x, tokens.advantages, dtype=x.dtype, xp=xp)


def _within(ratio: Array, low: float | None, high: float | None) -> Bool[Array, "..."]:
    """Whether low ≤ ρ ≤ high; False for a NaN."""
    inside = ratio == ratio
    inside = inside if low is None else inside & (ratio >= low)
    return inside if high is None else inside & (ratio <= high)


def _indicator(condition: Bool[Array, "..."], evidence: Evidence) -> Float[Array, "..."]:
    xp = evidence.policies.xp
    return xp.astype(condition, evidence.policies.log_prob.dtype)


def _check_choice(name: str, value: object, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if value not in tuple(known):
        msg = f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}"
        raise ValueError(msg)


def _set_number(correction: object, name: str) -> None:
    object.__setattr__(correction, name, check_number(name, getattr(correction, name), above=0.0))


def _check_bounds(correction: object) -> None:
    """Keep `low` and `high` as Python floats, or None."""
    low, high = (getattr(correction, name) for name in ("low", "high"))
    low = None if low is None else check_number("low", low, at_least=0.0)
    high = None if high is None else check_number("high", high, above=0.0)
    if low is not None and high is not None:
        _check_order(low, high)
    object.__setattr__(correction, "low", low)
    object.__setattr__(correction, "high", high)


def _check_order(low: float, high: float) -> None:
    if low >= high:
        msg = f"low: expected less than high, {high:g}, got {low:g}"
        raise ValueError(msg)
