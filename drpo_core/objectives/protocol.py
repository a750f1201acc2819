"""What makes an objective, the library's or a user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["Objective", "check_objective", "inside_of", "ratio_weight_of", "weight_of"]


class Objective(Protocol):
    """A policy objective: its gradient weight and its loss, per token.

    The gradient is always ∂L/∂log π = −A r w. Both methods take `drpo_core.Tokens` and return an array of the tokens'
    shape. An objective with a trust region also has a method ``inside(tokens)``: True where the token is within it,
    whatever the sign of A, and False where anything is NaN. Without one, no token counts as outside. One whose weight has
    the ratio in its denominator also has a method ``ratio_weight(tokens)``: r w, which is finite where r is 0. One
    whose r w does not depend on r has an attribute ``counts_ratio = False``: a mode may then weigh it on every edge.

    Under `jax.jit` an objective is static, so it must be hashable.

    Examples
    --------
    A surrogate whose weight decays with the ratio:

    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> class Damped:
    ...     def loss(self, tokens):
    ...         return -tokens.advantages * tokens.xp.log1p(tokens.ratio)
    ...     def weight(self, tokens):
    ...         return 1 / (1 + tokens.ratio)
    >>> x = np.log([0.5, 0.1])
    >>> token_loss_and_gradient(Damped(), x, x, np.array([1.0, -1.0])).gradient
    array([-0.5,  0.5])
    """

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """Per-token loss L, to be minimised."""
        ...

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """Gradient weight w in ∂L/∂log π = −A r w."""
        ...


def check_objective(objective: object) -> None:
    """Raise `TypeError` unless the object has the methods of an objective."""
    if isinstance(objective, type):
        msg = f"objective: expected an instance such as DRPO(delta=0.15), got the class {objective.__name__}"
        raise TypeError(msg)
    missing = [name for name in ("loss", "weight") if not callable(getattr(objective, name, None))]
    if missing:
        msg = f"objective: expected methods loss and weight, got {type(objective).__name__} without {' and '.join(missing)}"
        raise TypeError(msg)


def loss_of(objective: Objective, tokens: Tokens) -> Float[Array, "*tokens"]:
    """The objective's loss, of the tokens' shape."""
    return _checked(objective, "loss", objective.loss(tokens), "real floating", tokens)


def weight_of(objective: Objective, tokens: Tokens) -> Float[Array, "*tokens"]:
    """The objective's weight, of the tokens' shape."""
    return _checked(objective, "weight", objective.weight(tokens), "real floating", tokens)


def ratio_weight_of(objective: Objective, tokens: Tokens) -> Float[Array, "*tokens"] | None:
    """The objective's own r w; None if it is the product."""
    method = getattr(objective, "ratio_weight", None)
    return None if method is None else _checked(objective, "ratio_weight", method(tokens), "real floating", tokens)


def inside_of(objective: Objective, tokens: Tokens) -> Bool[Array, "*tokens"]:
    """The objective's trust region; every token that is not NaN, if it has none."""
    inside = getattr(objective, "inside", None)
    if inside is None:
        return tokens.log_ratio == tokens.log_ratio
    return _checked(objective, "inside", inside(tokens), "bool", tokens)


def _checked(objective: Objective, method: str, result: Array, kind: str, tokens: Tokens) -> Array:
    """What the objective returned, if it is an array of the tokens' shape and of this kind of dtype."""
    expected, got = tuple(tokens.log_ratio.shape), getattr(result, "shape", None)
    if not hasattr(result, "dtype") or got is None or tuple(got) != expected:
        given = type(result).__name__ if got is None else f"shape {tuple(got)}"
        msg = f"{type(objective).__name__}.{method}: expected an array of the tokens' shape, {expected}, got {given}"
        raise TypeError(msg)
    if type(result) is type(tokens.log_ratio) and not tokens.xp.isdtype(result.dtype, kind):
        msg = f"{type(objective).__name__}.{method}: expected a {kind} dtype, got {result.dtype}"
        raise TypeError(msg)
    return result
