"""Penalties: terms of a loss that hold π near another policy, each with the gradient that it really has.

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
from typing import TYPE_CHECKING, Literal, TypeAlias

from drpo_core._checks import check_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core._arrays import Array, Float, Namespace
    from drpo_core.anchors import Policies

__all__ = ["Estimator", "Penalty"]

Estimator: TypeAlias = Literal["k1", "k2", "k3", "k1+", "k3+", "r·k1", "r·k3", "square"]
"""A value and a gradient: see the table of this module."""

_POLICIES: Mapping[str, str] = {
    "reference": "reference_log_prob",
    "behavior": "behavior_log_prob",
    "proximal": "proximal_log_prob",
}


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
        known_of = {"estimator": tuple(_ESTIMATORS), "to": tuple(_POLICIES), "ratio": ("behavior", "proximal")}
        for name, known in known_of.items():
            if getattr(self, name) not in known:
                msg = f"{name}: expected one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}"
                raise ValueError(msg)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs that it needs, by the names of the arguments."""
        return (_POLICIES[self.to], *((_POLICIES[self.ratio],) if self.estimator.startswith("r·") else ()))

    def value_and_gradient(self, policies: Policies) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
        """β times the estimator, and its gradient in log π, per token."""
        xp, x = policies.xp, policies.log_prob
        ell = x - getattr(policies, _POLICIES[self.to])
        ratio = (
            _power(x - getattr(policies, _POLICIES[self.ratio]), xp) if self.estimator.startswith("r·") else xp.ones_like(ell)
        )
        value, gradient = _ESTIMATORS[self.estimator](ell, ratio, xp)
        return self.coefficient * value, self.coefficient * gradient


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
