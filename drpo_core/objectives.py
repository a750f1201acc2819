"""Objectives as values: frozen, hashable hyper-parameters that know their loss, weight and trust region.

Each delegates to the functions of its own file. Write another by giving a class the three methods of `Objective`.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

from drpo_core import cispo, dppo, drpo, policy_gradient, ppo, spo
from drpo_core.thresholds import Bounds, bounds, cap, sides, warn_if_vacuous

if TYPE_CHECKING:
    from drpo_core.ratio import Tokens
    from drpo_core.types import Array, Bool, Float

__all__ = ["CISPO", "DPPO", "DRPO", "SPO", "MaskDRPO", "Objective", "PPOClip", "PolicyGradient"]


class Objective(Protocol):
    """What makes a policy objective: its gradient weight, its loss and its trust region, per token.

    The gradient is always ∂L/∂log π = −A r w. All three methods take `drpo_core.Tokens` and return an array of the
    tokens' shape. An objective given to a JAX adapter must be hashable.

    Examples
    --------
    A surrogate whose weight decays with the log-ratio:

    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> class Damped:
    ...     def loss(self, tokens):
    ...         return -tokens.advantages * tokens.xp.log1p(tokens.ratio)
    ...     def weight(self, tokens):
    ...         return 1 / (1 + tokens.ratio)
    ...     def inside(self, tokens):
    ...         return tokens.ratio == tokens.ratio
    >>> x = np.log([0.5, 0.1])
    >>> token_loss_and_gradient(Damped(), x, x, np.array([1.0, -1.0])).gradient
    array([-0.5,  0.5])
    """

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """L, to be minimised."""
        ...

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """W in ∂L/∂log π = −A r w."""
        ...

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """Whether the token is within the trust region, whatever the sign of A; False where NaN."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Unregularised surrogate (PG-IS): w = 1, or min(1, c/r) with `max_ratio` = c.

    See `drpo_core.policy_gradient_loss` for the formula and the parameters.

    Examples
    --------
    >>> from drpo_core import PolicyGradient
    >>> PolicyGradient(max_ratio=2.0)
    PolicyGradient(max_ratio=2.0)
    """

    max_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as plain floats."""
        _cap_or_none("max_ratio", self.max_ratio)
        _to_floats(self)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.policy_gradient_loss`."""
        return policy_gradient.loss(tokens, self.max_ratio)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.policy_gradient_weight`."""
        return policy_gradient.weight(tokens, self.max_ratio)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """Every token: there is no trust region."""
        return policy_gradient.inside(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOClip:
    """PPO / GRPO ratio clipping: w = 0 for diverging tokens with abs(r − 1) > ε, else 1.

    See `drpo_core.ppo_clip_loss` for the formula and the parameters.

    Examples
    --------
    >>> from drpo_core import PPOClip
    >>> clip_higher = PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0)
    """

    eps: float | None = None
    eps_low: float | None = None
    eps_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as plain floats."""
        bounds("eps", self.eps, self.eps_low, self.eps_high)
        _cap_or_none("dual_clip", self.dual_clip, above=1.0)
        _to_floats(self)

    @property
    def region(self) -> Bounds:
        """(ε_low, ε_high)."""
        return sides(self.eps, self.eps_low, self.eps_high)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.ppo_clip_loss`."""
        return ppo.loss(tokens, self.region, self.dual_clip)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.ppo_clip_weight`."""
        return ppo.weight(tokens, self.region, self.dual_clip)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """1 − ε_low ≤ r ≤ 1 + ε_high."""
        return ppo.inside(tokens, self.region)


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPO:
    """CISPO: w = min(1, c/r) on the score-function form of the loss.

    See `drpo_core.cispo_loss` for the formula and the parameters.

    Examples
    --------
    >>> from drpo_core import CISPO
    >>> CISPO(max_ratio=5.0)
    CISPO(max_ratio=5.0)
    """

    max_ratio: float

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as plain floats."""
        cap("max_ratio", self.max_ratio)
        _to_floats(self)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.cispo_loss`."""
        return cispo.loss(tokens, self.max_ratio)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.cispo_weight`."""
        return cispo.weight(tokens, self.max_ratio)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """Every token: there is no trust region."""
        return policy_gradient.inside(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class SPO:
    """SPO: w = 1 − sign(A)(r − 1)/ε, the smooth counterpart of ratio clipping.

    See `drpo_core.spo_loss` for the formula and the parameters.

    Examples
    --------
    >>> from drpo_core import SPO
    >>> objective = SPO(eps=0.2)
    """

    eps: float | None = None
    eps_low: float | None = None
    eps_high: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as plain floats."""
        bounds("eps", self.eps, self.eps_low, self.eps_high)
        _to_floats(self)

    @property
    def region(self) -> Bounds:
        """(ε_low, ε_high)."""
        return sides(self.eps, self.eps_low, self.eps_high)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.spo_loss`."""
        return spo.loss(tokens, self.region)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.spo_weight`."""
        return spo.weight(tokens, self.region)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """1 − ε_low ≤ r ≤ 1 + ε_high."""
        return ppo.inside(tokens, self.region)


@dataclass(frozen=True, slots=True, kw_only=True)
class DPPO:
    """DPPO: w = 0 for diverging tokens with divergence > δ, else 1 (or min(1, c/r) with `max_ratio` = c).

    See `drpo_core.dppo_loss` for the formula and the parameters. With ``divergence="per_token"`` the caller passes the
    measured divergences, as ``divergence=``, to `drpo_core.token_loss_and_gradient` or an adapter.

    Examples
    --------
    >>> from drpo_core import DPPO
    >>> binary_tv, binary_kl = DPPO(delta=0.15), DPPO(delta=0.05, divergence="binary_kl")
    """

    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    divergence: str = dppo.BINARY_TV
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as plain floats."""
        dppo.check(self.delta, self.delta_low, self.delta_high, self.divergence, self.max_ratio, stacklevel=5)
        _to_floats(self)

    @property
    def region(self) -> Bounds:
        """(δ_low, δ_high)."""
        return sides(self.delta, self.delta_low, self.delta_high)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.dppo_loss`."""
        return dppo.loss(tokens, self.region, self.divergence, self.max_ratio)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.dppo_weight`."""
        return dppo.weight(tokens, self.region, self.divergence, self.max_ratio)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """Divergence ≤ δ_high where r ≥ 1, ≤ δ_low where r < 1."""
        return dppo.inside(tokens, self.region, self.divergence)


@dataclass(frozen=True, slots=True, kw_only=True)
class DRPO:
    """DRPO: w = 1 − sign(A(r − 1)) abs(π − μ)/δ, the smooth counterpart of DPPO Binary-TV.

    See `drpo_core.drpo_loss` for the formula and the parameters.

    Examples
    --------
    >>> from drpo_core import DRPO
    >>> objective = DRPO(delta=0.15)
    """

    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as plain floats."""
        warn_if_vacuous("DRPO", bounds("delta", self.delta, self.delta_low, self.delta_high))
        _to_floats(self)

    @property
    def region(self) -> Bounds:
        """(δ_low, δ_high)."""
        return sides(self.delta, self.delta_low, self.delta_high)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.drpo_loss`."""
        return drpo.loss(tokens, self.region)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.drpo_weight`."""
        return drpo.weight(tokens, self.region)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """−δ_low ≤ π − μ ≤ δ_high."""
        return drpo.inside(tokens, self.region)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskDRPO:
    """Mask-DRPO: w = 1 inside the region of DPPO Binary-TV, DRPO's weight for diverging tokens outside.

    See `drpo_core.mask_drpo_loss` for the formula and the parameters.

    Examples
    --------
    >>> from drpo_core import MaskDRPO
    >>> objective = MaskDRPO(delta=0.15)
    """

    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as plain floats."""
        warn_if_vacuous("Mask-DRPO", bounds("delta", self.delta, self.delta_low, self.delta_high))
        _to_floats(self)

    @property
    def region(self) -> Bounds:
        """(δ_low, δ_high)."""
        return sides(self.delta, self.delta_low, self.delta_high)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.mask_drpo_loss`."""
        return drpo.mask_loss(tokens, self.region)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """See `drpo_core.mask_drpo_weight`."""
        return drpo.mask_weight(tokens, self.region)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """−δ_low ≤ π − μ ≤ δ_high."""
        return drpo.inside(tokens, self.region)


def _to_floats(objective: object) -> None:
    # a NumPy scalar would promote float32 arrays to float64
    for field in fields(objective):  # type: ignore[arg-type]
        value = getattr(objective, field.name)
        if isinstance(value, numbers.Real):
            object.__setattr__(objective, field.name, float(value))


def _cap_or_none(name: str, value: float | None, *, above: float = 0.0) -> None:
    if value is not None:
        cap(name, value, above=above)
