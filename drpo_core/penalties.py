"""Penalties: terms of a loss that hold π near another policy, each with the gradient that it really has.

`Penalty` estimates a divergence at every token; `CovariancePenalty` acts on a few tokens of the batch.

With ℓ = log π − log q for the other policy q, at a sampled token, and β the coefficient:

==================  ==================================  =================  ================================================
`estimator`         value                               gradient           expectation of the gradient
==================  ==================================  =================  ================================================
``"k1"``            ℓ                                   1                  0 on samples of π: it is no penalty
``"k2"``            ℓ²/2                                ℓ                  ∇KL(π‖q), on samples of π
``"k3"``            e^−ℓ − 1 + ℓ                        1 − e^−ℓ           ∇KL(q‖π), on samples of π
``"k1+"``           ℓ                                   ℓ                  ∇KL(π‖q), on samples of π
``"k3+"``           e^−ℓ − 1 + ℓ                        ℓ                  ∇KL(π‖q), on samples of π
``"r·k1"``          r ℓ                                 r (ℓ + 1)          ∇KL(π‖q), on samples of μ, r = π/μ
``"r·k3"``          r (e^−ℓ − 1 + ℓ)                    r ℓ                ∇KL(π‖q), on samples of μ, r = π/μ
``"square"``        ℓ²                                  2 ℓ                2 ∇KL(π‖q), on samples of π
==================  ==================================  =================  ================================================

A "+" is the straight-through form: the value of one estimator with the gradient of k2. Expectations are per token, given
its prefix; what a token does to later ones is not in them. `docs/derivations/penalties.md` proves each by enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from drpo_core._arrays import in_one_piece
from drpo_core._checks import check_number
from drpo_core.corrections import covariances
from drpo_core.reduction import count_true

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core._arrays import Array, Bool, Float, Namespace
    from drpo_core.corrections import Evidence

__all__ = ["CovariancePenalty", "Estimator", "Penalty", "PenaltyTerm"]

Estimator: TypeAlias = Literal["k1", "k2", "k3", "k1+", "k3+", "r·k1", "r·k3", "square"]
"""A value and a gradient: see the table of this module."""

_POLICIES: Mapping[str, str] = {
    "reference": "reference_log_prob",
    "behavior": "behavior_log_prob",
    "proximal": "proximal_log_prob",
}


class PenaltyTerm(Protocol):
    """A term that is added to the loss of each valid token, with a gradient of its own."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs that it needs, by the names of the arguments."""
        ...

    def value_and_gradient(self, evidence: Evidence) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
        """The value, and its gradient in log π, per token; anything at masked tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """β times an estimator of the divergence from another policy, added to the loss of each valid token.

    It acts where A = 0 too, and no correction multiplies it. Nothing overflows: e^−ℓ and r saturate at e²⁰. The gradient
    keeps its sign there, and the value of k3 goes on along its tangent.

    Parameters
    ----------
    coefficient
        β > 0, per nat (k2 and square: per nat²).
    estimator
        Which value and gradient: see `drpo_core.penalties`.
    to
        The other policy q: ``"reference"``, ``"behavior"`` (the sampler) or ``"proximal"``.
    ratio
        What r is taken against in ``"r·k1"`` and ``"r·k3"``: ``"behavior"``, r = π/μ, or ``"proximal"``, r = π/π_old.

    Raises
    ------
    TypeError
        If the coefficient is not a real number.
    ValueError
        If it is not finite and positive, or the estimator or a policy is unknown.

    References
    ----------
    Schulman, Approximating KL divergence (2020), for k1, k2 and k3; their gradients: arXiv:2510.01555.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DRPO, token_loss_and_gradient
    >>> from drpo_core.modes import Mode
    >>> from drpo_core.penalties import Penalty
    >>> mode = Mode(DRPO(delta=0.15), penalties=(Penalty(coefficient=0.1, estimator="k2"),))
    >>> tokens = np.array([-1.0, -2.0]), np.array([-1.0, -2.0]), np.zeros(2)
    >>> token_loss_and_gradient(mode, *tokens, reference_log_prob=np.array([-1.5, -1.0])).gradient
    array([ 0.05, -0.1 ])
    """

    coefficient: float
    estimator: Estimator = "k3"
    to: Literal["reference", "behavior", "proximal"] = "reference"
    ratio: Literal["behavior", "proximal"] = "behavior"

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep the coefficient as a Python float."""
        object.__setattr__(self, "coefficient", check_number("coefficient", self.coefficient, above=0.0))
        _check_choice("estimator", self.estimator, tuple(_ESTIMATORS))
        _check_choice("to", self.to, tuple(_POLICIES))
        _check_choice("ratio", self.ratio, ("behavior", "proximal"))

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs that it needs, by the names of the arguments."""
        return (_POLICIES[self.to], *((_POLICIES[self.ratio],) if self.estimator.startswith("r·") else ()))

    def value_and_gradient(self, evidence: Evidence) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
        """β times the estimator, and its gradient in log π, per token."""
        policies = evidence.policies
        xp, x = policies.xp, policies.log_prob
        ell = x - getattr(policies, _POLICIES[self.to])
        ratio = (
            _power(x - getattr(policies, _POLICIES[self.ratio]), xp) if self.estimator.startswith("r·") else xp.ones_like(ell)
        )
        value, gradient = _ESTIMATORS[self.estimator](ell, ratio, xp)
        return self.coefficient * value, self.coefficient * gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class CovariancePenalty:
    """β abs(ℓ) at the tokens of largest covariance (A − mean A)(log π − mean log π), 0 elsewhere: KL-Cov.

    Those tokens take the most entropy from the policy. Of n valid tokens, max(1, floor(share · n)) are chosen: those of the
    largest covariance. Tokens of equal covariance are chosen together, and none of them where that would be more. So the
    choice depends on no order, and nothing is chosen where all advantages are the same. The choice is a constant. The
    gradient in log π is β sign(ℓ) at a chosen token, and 0 where ℓ = 0: the penalty does nothing before the first update
    away from q. `docs/derivations/penalties.md` derives what it follows.

    KL-Cov is ``PolicyGradient()`` at the anchor ``Proximal()`` with this penalty.

    Parameters
    ----------
    coefficient
        β > 0, per nat. It does not fade as ℓ does: where β exceeds abs(A) the token is held at q.
    share
        In (0, 1]: of the valid tokens of the call, how many are chosen; rounded down, one at least. Micro-batches choose
        each for themselves.
    to
        The other policy q of ℓ = log π − log q: ``"reference"``, ``"behavior"`` (the sampler) or ``"proximal"``.

    Raises
    ------
    TypeError
        If a number is not real.
    ValueError
        If a number is not finite and in its range, or the policy is unknown; in a loss, if ranks hold parts of sequences
        (`across`), because the order of all tokens is needed.

    References
    ----------
    arXiv:2505.22617 (KL-Cov); verl's ``kl_cov`` (verl/trainer/ppo/core_algos.py, 0.9.1), whose choice among tokens of equal
    covariance depends on their order.

    Examples
    --------
    Covariances 1.0, 0.75, −0.15 and 2.8, of which the largest is chosen:

    >>> import numpy as np
    >>> from drpo_core import PolicyGradient, token_loss_and_gradient
    >>> from drpo_core.anchors import Proximal
    >>> from drpo_core.modes import Mode
    >>> from drpo_core.penalties import CovariancePenalty
    >>> mode = Mode(PolicyGradient(), anchor=Proximal(), penalties=(CovariancePenalty(coefficient=0.5, share=0.25),))
    >>> pi, old = np.array([-0.1, -0.3, -0.7, -2.5]), np.array([-0.1, -0.3, -0.7, -2.0])
    >>> advantages = np.array([2.0, 2.0, 0.0, -1.0])
    >>> token_loss_and_gradient(mode, pi, old, advantages, proximal_log_prob=old).gradient.round(4)
    array([-2.    , -2.    ,  0.    ,  0.1065])
    """

    coefficient: float
    share: float = 2e-4
    to: Literal["reference", "behavior", "proximal"] = "proximal"

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep the numbers as Python floats."""
        object.__setattr__(self, "coefficient", check_number("coefficient", self.coefficient, above=0.0))
        object.__setattr__(self, "share", check_number("share", self.share, above=0.0))
        if self.share > 1.0:
            msg = f"share: expected 1 or less, got {self.share:g}"
            raise ValueError(msg)
        _check_choice("to", self.to, tuple(_POLICIES))

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs that it needs, by the names of the arguments."""
        return (_POLICIES[self.to],)

    def value_and_gradient(self, evidence: Evidence) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
        """β abs(ℓ) and β sign(ℓ) at the chosen tokens, else 0."""
        policies = evidence.policies
        xp, chosen = policies.xp, self._chosen(evidence)
        ell = policies.log_prob - getattr(policies, _POLICIES[self.to])
        return tuple(xp.where(chosen, self.coefficient * each, 0.0) for each in (xp.abs(ell), xp.sign(ell)))

    def _chosen(self, evidence: Evidence) -> Bool[Array, "*tokens"]:
        """Whether a token's covariance exceeds the largest of those that are too many."""
        log_prob, sequences, xp = evidence.policies.log_prob, evidence.policies.sequences, evidence.policies.xp
        sequences.need_whole_sequences()
        mask, dtype = sequences.mask, log_prob.dtype
        covariance, known = covariances(log_prob, evidence.advantages, mask, dtype=dtype, xp=xp)
        covariance = xp.where(known, covariance, -xp.inf)
        flat = xp.reshape(in_one_piece(covariance, xp=xp), (-1,))
        count = xp.floor(self.share * count_true(mask, dtype, xp=xp))
        # one more, for where none are too many
        ordered = xp.sort(xp.concat((flat, xp.reshape(xp.full_like(count, -xp.inf), (1,)))))
        place = flat.shape[0] - xp.astype(xp.where(count > 1.0, count, 1.0), xp.int32)
        return covariance > xp.reshape(xp.take(ordered, xp.reshape(place, (1,))), ())


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        msg = f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}"
        raise ValueError(msg)


def _power(ell: Array, xp: Namespace) -> Array:
    """e^min(ℓ, 20)."""
    return xp.exp(xp.where(ell > 20.0, 20.0, ell))


def _k3(ell: Array, xp: Namespace) -> Array:
    """e^−ℓ − 1 + ℓ, along its tangent below ℓ = −20."""
    beyond = ell < -20.0
    near = xp.where(beyond, -20.0, ell)
    return xp.expm1(-near) + near + xp.where(beyond, xp.expm1(-near) * (near - ell), 0.0)


_ESTIMATORS: Mapping[str, Callable[[Array, Array, Namespace], tuple[Array, Array]]] = {
    "k1": lambda ell, _, xp: (ell, xp.ones_like(ell)),
    "k2": lambda ell, _, xp: (0.5 * ell * ell, ell),  # noqa: ARG005
    "k3": lambda ell, _, xp: (_k3(ell, xp), -xp.expm1(-xp.where(ell < -20.0, -20.0, ell))),
    "k1+": lambda ell, _, xp: (ell, ell),  # noqa: ARG005
    "k3+": lambda ell, _, xp: (_k3(ell, xp), ell),
    "r·k1": lambda ell, ratio, xp: (ratio * ell, ratio * (ell + 1.0)),  # noqa: ARG005
    "r·k3": lambda ell, ratio, xp: (ratio * _k3(ell, xp), ratio * ell),
    "square": lambda ell, _, xp: (ell * ell, 2.0 * ell),  # noqa: ARG005
}
