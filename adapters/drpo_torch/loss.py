"""Per-token and reduced policy losses whose backward pass is the analytic gradient −A r w."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import array_api_compat.torch as xp
import torch

from drpo_core import diagnostics as statistics_of
from drpo_core import token_loss_and_gradient, token_mean
from drpo_core.ratio import check_tokens
from drpo_core.reduction import has_coefficients, reduction_coefficients
from drpo_torch.cotangent import scaled_by_cotangent
from drpo_torch.fused import ENGINES, Batch, has_memory, jitted, plain
from drpo_torch.namespace import is_transformed, namespace

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.policy_loss import PolicyLoss
    from drpo_core.reduction import Reduction

__all__ = ["policy_loss", "token_loss"]


def token_loss(
    objective: Objective,
    *,
    log_prob: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    divergence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Unreduced loss L of an objective, with ∂L/∂log π = −A r w in its backward pass.

    Only `log_prob` receives a gradient, in its own dtype; the other tensors are constants, whatever their
    `requires_grad`. Only that gradient is kept for the backward pass. Works in eager mode, under `torch.compile`
    (`fullgraph=True`), autocast and `torch.func` (`grad`, `vmap`, `jacrev`).

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
    mask
        Boolean, True at tokens that count; the others may hold anything and have loss and gradient 0.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.

    Returns
    -------
    torch.Tensor
        L per token, float32 at least.

    Raises
    ------
    TypeError
        If an argument is not a tensor or a dtype is wrong.
    ValueError
        If the shapes differ.
    RuntimeError
        On a second derivative or forward-mode differentiation, which are not implemented.

    See Also
    --------
    drpo_core.token_loss_and_gradient : the formula and its source.

    Examples
    --------
    >>> import torch
    >>> from drpo_core import DRPO
    >>> from drpo_torch import token_loss
    >>> log_prob = torch.tensor([0.5, 0.2, 0.3]).log().requires_grad_()
    >>> behavior = torch.tensor([0.25, 0.2, 0.6]).log()
    >>> advantages = torch.tensor([1.0, 1.0, -1.0])
    >>> loss = token_loss(DRPO(delta=0.5), log_prob=log_prob, behavior_log_prob=behavior, advantages=advantages)
    >>> loss.sum().backward()
    >>> log_prob.grad
    tensor([-1.0000, -1.0000,  0.2000])
    """
    _check_tensors(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantages=advantages, mask=mask, divergence=divergence
    )
    loss: torch.Tensor
    # outside the autograd.Function, where Dynamo could not share an objective's thresholds with the caller's code;
    # the namespace is explicit because Dynamo can't trace its inference
    with torch.no_grad():
        result = token_loss_and_gradient(
            objective, log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=namespace()
        )
    loss, _ = _WithGradient.apply(log_prob, result.loss, result.gradient)  # type: ignore[no-untyped-call]
    return loss


def policy_loss(
    objective: Objective,
    *,
    log_prob: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    reduction: Reduction = token_mean,
    normalizer: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    divergence: torch.Tensor | None = None,
    diagnostics: bool = True,
    engine: Literal["eager", "compile", "jit"] = "eager",
) -> tuple[torch.Tensor, Diagnostics]:
    """Scalar loss of a batch of tokens to call `backward` on, and detached diagnostics.

    With a reduction of `drpo_core` the final gradient is formed with the loss, in one pass over the tokens. It is all that
    is kept for the backward pass, in the dtype of `log_prob` (float16: in float32).

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; (sequences, tokens) padded or (tokens,) packed.
    mask
        Boolean, True at tokens that count; the others may hold anything.
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean`, `drpo_core.sequence_mean_token_sum` (with its
        horizon bound by `functools.partial`) or a function with the same arguments.
    normalizer
        Denominator of the whole batch, where this call sees a micro-batch or a shard of it.
    token_weights
        Detached factors of the per-token losses (truncated importance weights, say).
    segment_ids
        Of packed tokens: which sequence each belongs to.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    diagnostics
        Whether to compute them, in the same pass over the tokens.
    engine
        ``"eager"``: torch's operations, on the CPU piece by piece. ``"compile"``: one loop made by `torch.compile`, in
        some ten seconds a kind of objective. ``"jit"``: one loop made by numba in a second or two for each objective,
        which must be hashable; CPU only, extra `jit`. Under `torch.compile`, `torch.func` and with a reduction of your
        own they are all the same plain expression.

    Returns
    -------
    loss : torch.Tensor
        0-d, float32 at least.
    diagnostics : dict
        See `drpo_core.diagnostics`; on the tensors' device, nothing is synchronised. Empty without `diagnostics`.

    Raises
    ------
    TypeError
        If an argument is not a tensor or a dtype is wrong.
    ValueError
        If the shapes differ, or the engine is unknown or does not work on this device.
    ImportError
        If ``engine="jit"`` finds no numba.
    UntraceableError
        If ``engine="jit"`` can't compile what the objective does; the other engines run any.
    RuntimeError
        On a second derivative or forward-mode differentiation, which are not implemented.

    Examples
    --------
    >>> import torch
    >>> from drpo_core import DRPO, summarize
    >>> from drpo_torch import policy_loss
    >>> log_prob = torch.tensor([[0.5, 0.2, 0.3]]).log().requires_grad_()
    >>> loss, diagnostics = policy_loss(
    ...     DRPO(delta=0.5),
    ...     log_prob=log_prob,
    ...     behavior_log_prob=torch.tensor([[0.25, 0.2, float("nan")]]).log(),
    ...     advantages=torch.tensor([[1.0, 1.0, -1.0]]),
    ...     mask=torch.tensor([[True, True, False]]),
    ... )
    >>> loss.backward()
    >>> log_prob.grad
    tensor([[-0.5000, -0.5000,  0.0000]])
    >>> summarize(diagnostics)["attenuated_fraction"]
    0.5
    """
    tensors = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages, "mask": mask}
    _check_tensors(**tensors, divergence=divergence, token_weights=token_weights, segment_ids=segment_ids)
    if engine not in (*ENGINES, "jit"):
        msg = f"engine: expected one of 'eager', 'compile', 'jit', got {engine!r}"
        raise ValueError(msg)
    _, found = check_tokens(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
    dtype = cast("torch.dtype", found)
    weights = None if token_weights is None else token_weights.detach()
    options = {"normalizer": normalizer, "token_weights": weights, "segment_ids": segment_ids}
    if not has_coefficients(reduction):
        losses = token_loss(objective, **tensors, divergence=divergence)
        loss = reduction(losses, mask, **options, xp=xp)
        with torch.no_grad():
            return loss, statistics_of(objective, **tensors, divergence=divergence, xp=xp) if diagnostics else {}
    # in float16, a gradient divided by the number of tokens would underflow before a loss scaler's factor reaches it
    kept = dtype if log_prob.dtype == torch.float16 else log_prob.dtype
    every = {**tensors, "token_weights": weights, "segment_ids": segment_ids, "divergence": divergence}
    # outside the autograd.Function, where Dynamo could not share an objective's thresholds with the caller's code
    with torch.no_grad():
        if engine == "jit" and not torch.compiler.is_compiling() and has_memory(*every.values()):
            result = jitted(
                objective,
                every,
                reduction=reduction,
                normalizer=normalizer,
                gradient_dtype=kept,
                diagnostics=diagnostics,
            )
        else:
            found = reduction_coefficients(reduction, mask, dtype=dtype, **options, xp=namespace())
            coefficients = cast("torch.Tensor", found)
            batch = Batch(log_prob, behavior_log_prob, advantages, mask, coefficients, divergence, dtype, kept)
            result = ENGINES.get(engine, plain)(objective, batch, diagnostics=diagnostics)
    if torch.compiler.is_compiling() or is_transformed(log_prob):
        loss, _ = _WithGradient.apply(log_prob, result.loss, result.gradient)  # type: ignore[no-untyped-call]
    else:
        loss, _ = _WithFinalGradient.apply(log_prob, result)  # type: ignore[no-untyped-call]
    return loss, result.diagnostics or {}


class _WithGradient(torch.autograd.Function):
    """A loss with its gradient in `log_prob`; backward multiplies that gradient, all that is kept, by the cotangent.

    The gradient is an output so that asking for its derivative arrives in `backward` instead of being lost.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_prob: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG004
        return loss.clone(), gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:  # noqa: ANN401
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:  # noqa: ANN401
        of_loss, of_gradient = cotangents
        # (Dynamo passes zeros for it, and AOTAutograd refuses double backward itself)
        if of_gradient is not None and not torch.compiler.is_compiling():
            raise RuntimeError(_SECOND_DERIVATIVE)
        (gradient,) = ctx.saved_tensors
        return None if of_loss is None else (of_loss * gradient).to(ctx.dtype), None, None


class _WithFinalGradient(torch.autograd.Function):
    """`_WithGradient` of a scalar loss for where no transform of torch looks on: with no second array in backward."""

    @staticmethod
    def forward(ctx: Any, log_prob: torch.Tensor, result: PolicyLoss) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(result.gradient)
        ctx.dtype = log_prob.dtype
        return result.loss, result.gradient

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:  # noqa: ANN401
        of_loss, of_gradient = cotangents
        if of_gradient is not None:
            raise RuntimeError(_SECOND_DERIVATIVE)
        if of_loss is None:
            return None, None
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # the graph of this backward pass is wanted, and leads back here
            return (of_loss * gradient).to(ctx.dtype), None
        return scaled_by_cotangent(gradient.detach(), of_loss).to(ctx.dtype), None


_SECOND_DERIVATIVE = "drpo_torch: the second derivative of a policy loss is not implemented (double backward, hessian)"


def _check_tensors(**tensors: object) -> None:
    """Raise for what is neither a tensor nor None; the core names a None that it can't do without."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            msg = f"{name}: expected a torch.Tensor, got {type(tensor).__name__}"
            raise TypeError(msg)
