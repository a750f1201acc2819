"""Any linear reduction as the coefficients that a loss with its final gradient is formed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_core._checks import check_dtype, check_shape
from drpo_jax._checks import check_jax_arrays

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.reduction import LinearReduction

__all__ = ["linear_reduction"]


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear function of values and mask, as a `drpo_core.reduction.LinearReduction`."""

    function: Callable[[jax.Array, jax.Array], jax.Array]

    def coefficients(
        self,
        mask: jax.Array,
        *,
        dtype: Any,  # noqa: ANN401 -- a dtype of the namespace
        normalizer: float | jax.Array | None = None,
        token_weights: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        xp: Any = jnp,  # noqa: ANN401, ARG002 -- the namespace, which is jax.numpy
    ) -> jax.Array:
        """∂f(v)/∂v times the token weights, an array of the mask's shape; anything at masked tokens."""
        for name, value in (("normalizer", normalizer), ("segment_ids", segment_ids)):
            if value is not None:
                msg = f"{name}: expected None, as the function of a linear_reduction divides by itself, got {value!r}"
                raise ValueError(msg)
        zeros = jnp.zeros_like(mask, dtype=dtype)
        value = self._value(zeros, mask)
        try:
            (coefficients,) = jax.linear_transpose(lambda values: self.function(values, mask), zeros)(jnp.ones_like(value))
        except Exception as error:
            # the function itself has run: what fails is transposing it, in as many ways as JAX has operations
            msg = (
                f"linear_reduction: expected a function that is linear in its values, got {self.function!r}, of which JAX "
                f"says {type(error).__name__}: {error}; reduce token_loss with it instead"
            )
            raise TypeError(msg) from error
        if token_weights is None:
            return coefficients  # type: ignore[no-any-return]
        check_jax_arrays(token_weights=token_weights)
        check_dtype("token_weights", token_weights, "real floating", xp=jnp)
        check_shape("token_weights", token_weights, "mask", mask)
        return coefficients * jnp.where(mask, token_weights.astype(dtype), 0.0)  # type: ignore[no-any-return]

    def _value(self, zeros: jax.Array, mask: jax.Array) -> jax.Array:
        """f(0), if it is a floating-point scalar and, where JAX knows its value, 0."""
        value: Any = self.function(zeros, mask)
        if not isinstance(value, jax.Array) or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype} of shape {value.shape}" if isinstance(value, jax.Array) else type(value).__name__
            msg = f"linear_reduction: expected a function to a 0-d floating-point jax.Array, got {got} from {self.function!r}"
            raise TypeError(msg)
        if jax.typeof(value).manual_axis_type.varying != jax.typeof(zeros).manual_axis_type.varying:
            msg = (
                "linear_reduction: expected a function of this device's values, got a sum over devices from "
                f"{self.function!r}; sum the losses of the devices with jax.lax.psum instead"
            )
            raise ValueError(msg)
        known = not isinstance(value, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer)
        # without a valid token, a mean is 0/0
        if known and float(value) != 0.0 and bool(jnp.any(mask)):
            msg = (
                f"linear_reduction: expected a function that is 0 where all values are, got {float(value)!r} from "
                f"{self.function!r}; add a constant to the loss instead"
            )
            raise ValueError(msg)
        return value


def linear_reduction(function: Callable[[jax.Array, jax.Array], jax.Array]) -> LinearReduction:
    """A linear function of per-token values and a mask as a `reduction` of the policy losses: f(v) = Σ c v.

    The coefficients c = ∂f/∂v do not depend on the values. They are found once a call, by transposing the function, and
    then loss, final gradient and diagnostics are formed in one pass, as for the reductions of drpo_core. Use it for a
    framework's own reduction. Nothing of a masked token counts, whatever the function makes of it. Under `shard_map` it
    gives the share of this device: it may divide by a count over all devices, but `jax.lax.psum` then sums the losses.

    Parameters
    ----------
    function
        f: per-token losses and the boolean mask, arrays of one shape, to a 0-d array; linear in the losses, operation by
        operation, as JAX sees it. It may ignore the mask. Under `jit` it is a part of the program, like an objective.

    Returns
    -------
    LinearReduction
        For the argument `reduction` of the policy losses. The `token_weights` of a loss are factors of c; `normalizer`
        and `segment_ids` must be None, as the function divides by itself. Two of the same function are equal, so that
        `jit` compiles once.

    Raises
    ------
    TypeError
        If the function is not callable; when a loss uses it, if it does not give a floating-point scalar, or is not linear.
    ValueError
        When a loss uses it: if zeros do not give 0, where JAX knows the value (so not under `jit`), if it sums over
        devices, or if `normalizer` or `segment_ids` are given.

    See Also
    --------
    drpo_jax.token_loss : the values, to be reduced by a function that is not linear.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import PolicyGradient
    >>> from drpo_jax import linear_reduction, policy_loss
    >>> def over_width(values, mask):
    ...     return jnp.where(mask, values, 0.0).sum(axis=-1).mean() / values.shape[-1]
    >>> def loss(log_prob):
    ...     return policy_loss(
    ...         PolicyGradient(),
    ...         log_prob=log_prob,
    ...         behavior_log_prob=jnp.full((2, 2), -1.0),
    ...         advantages=jnp.ones((2, 2)),
    ...         mask=jnp.array([[True, True], [True, False]]),
    ...         reduction=linear_reduction(over_width),
    ...     )[0]
    >>> jax.grad(loss)(jnp.full((2, 2), -1.0)).tolist()
    [[-0.25, -0.25], [-0.25, 0.0]]
    """
    given: object = function
    if not callable(given):
        msg = f"function: expected a function of values and a mask, got {type(given).__name__}"
        raise TypeError(msg)
    return _Linear(function)
