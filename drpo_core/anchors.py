"""Anchors: what the importance ratio is taken against.

An anchor gives each token a log-prob a, held constant, and the ratio of an objective is R = e^(log π − a). The policies
themselves are anchors: the behaviour policy μ that sampled (R = π/μ), and the proximal policy π_old, the trainer's at
the start of the update (R = π/π_old). The others give all tokens of a sequence, or of its beginning, one ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float, Namespace
    from drpo_core._sequences import Sequences

__all__ = ["Anchor", "Behavior", "Policies", "Prefix", "Proximal", "Sequence"]


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
        """Log a per token, nats."""
        ...


@dataclass(frozen=True, slots=True)
class Behavior:
    """The behaviour policy μ that sampled the tokens: R = π/μ.

    Examples
    --------
    >>> from drpo_core.anchors import Behavior, Sequence
    >>> Sequence(Behavior())
    Sequence(of=Behavior())
    """

    arguments = ("behavior_log_prob",)
    policy = "behavior"

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log μ."""
        return policies.behavior_log_prob


@dataclass(frozen=True, slots=True)
class Proximal:
    """The proximal policy π_old, the trainer's own at the start of the update: R = π/π_old.

    References
    ----------
    arXiv:2110.00641 (Hilton et al., Batch size-invariance for policy optimization): the decoupled objective.
    """

    arguments = ("proximal_log_prob",)
    policy = "proximal"

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log π_old."""
        return policies.proximal_log_prob


@dataclass(frozen=True, slots=True)
class Sequence:
    """One ratio for a sequence: R = exp of the mean of log π − a over its valid tokens, the geometric mean of the ratios.

    The mean is held constant; a token's own log π carries the gradient, so that ∂R/∂log π = R at each token.

    Parameters
    ----------
    of
        The anchor a whose ratios are averaged.

    References
    ----------
    arXiv:2507.18071 (GSPO), eq. 7 and section 4.3 (GSPO-token).
    """

    of: Anchor

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of the inner anchor."""
        return self.of.arguments

    @property
    def policy(self) -> str:
        """That of the inner anchor."""
        return self.of.policy

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log π − mean(log π − a)."""
        return policies.log_prob - policies.sequences.mean(policies.log_prob - self.of.log_prob(policies))


@dataclass(frozen=True, slots=True)
class Prefix:
    """The causal counterpart of `Sequence`: R = exp of the mean of log π − a over the sequence's valid tokens so far.

    Parameters
    ----------
    of
        The anchor a whose ratios are averaged.
    """

    of: Anchor

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of the inner anchor."""
        return self.of.arguments

    @property
    def policy(self) -> str:
        """That of the inner anchor."""
        return self.of.policy

    def log_prob(self, policies: Policies) -> Float[Array, "*tokens"]:
        """Log π − the mean of log π − a over the tokens up to each one."""
        x, sequences, xp = policies.log_prob, policies.sequences, policies.xp
        total = sequences.running_total(x - self.of.log_prob(policies))
        count = sequences.running_total(xp.ones_like(x))
        return x - total / xp.where(count == 0.0, 1.0, count)
