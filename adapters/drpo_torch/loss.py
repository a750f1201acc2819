"""Per-token and reduced policy losses whose backward pass is the analytic gradient −A r w."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drpo_core import token_loss_and_gradient
from drpo_core.loss import check_engine, reduction_of
from drpo_core.modes.mode import check_others, is_whole_mode, resolve
from drpo_core.objectives.protocol import check_objective
from drpo_core.reduction import reduction_coefficients
from drpo_core.tokens import check_tokens
from drpo_torch._checks import check_shape, check_tensor, check_tensors
from drpo_torch.autograd import with_gradient
from drpo_torch.engines import Batch, run_mode, run_pass
from drpo_torch.engines._namespace import namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core import Objective
    from drpo_core._sequences import Across
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.loss import Engine
    from drpo_core.reduction import LinearReduction, Reduction

__all__ = ["linear_reduction", "policy_loss", "token_loss"]


def token_loss(
    objective: Objective,
    *,
    log_prob: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    proximal_log_prob: torch.Tensor | None = None,
    reference_log_prob: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    divergence: torch.Tensor | None = None,
    across: Across | None = None,
) -> torch.Tensor:
    """Unreduced loss L of an objective, with ∂L/∂log π = −A r w in its backward pass.

    Only `log_prob` receives a gradient, in its own dtype; the other tensors are constants, whatever their
    `requires_grad`. Only that gradient is kept for the backward pass. Works in eager mode, under `torch.compile`
    (`fullgraph=True`), autocast and `torch.func` (`grad`, `vmap`, `jacrev`).

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`, whose reduction is left to you.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
    mask
        Boolean, True at tokens that count; the others may hold anything and have loss and gradient 0.
    proximal_log_prob, reference_log_prob
        log π_old and log π_ref of the sampled tokens, where the mode needs them.
    segment_ids
        Of packed tokens: which sequence each belongs to, for a mode that looks at sequences.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    across
        Where sequences are divided over ranks: see `drpo_torch.distributed.across`.

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
    tensors = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    options: dict[str, Any] = {
        "mask": mask,
        "proximal_log_prob": proximal_log_prob,
        "reference_log_prob": reference_log_prob,
        "segment_ids": segment_ids,
        "divergence": divergence,
    }
    check_tensors(**tensors, **options)
    # outside the autograd.Function, where Dynamo could not share an objective's thresholds with the caller's code;
    # the namespace is explicit because Dynamo can't trace its inference
    with torch.no_grad():
        result = token_loss_and_gradient(objective, **tensors, **options, across=across, xp=namespace())
    return with_gradient(log_prob, result.loss, result.gradient)


def policy_loss(
    objective: Objective,
    *,
    log_prob: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    proximal_log_prob: torch.Tensor | None = None,
    reference_log_prob: torch.Tensor | None = None,
    reduction: Reduction | None = None,
    normalizer: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    divergence: torch.Tensor | None = None,
    diagnostics: bool = True,
    engine: Engine = "auto",
    across: Across | None = None,
) -> tuple[torch.Tensor, Diagnostics | None]:
    """Scalar loss of a batch of tokens to call `backward` on, and detached diagnostics.

    The final gradient is formed with the loss, in one pass over the tokens. It is all that is kept for the backward pass,
    in the dtype of `log_prob` (float16: in float32).

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; (sequences, tokens) padded or (tokens,) packed.
    mask
        Boolean, True at tokens that count; the others may hold anything.
    proximal_log_prob, reference_log_prob
        log π_old and log π_ref of the sampled tokens, where the mode needs them.
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean`, `drpo_core.sequence_mean_token_sum` or
        `drpo_core.reduction.prompt_mean`, also with arguments bound by `functools.partial`; or a `linear_reduction` of a
        function of your own. Whatever is not linear takes `token_loss`. None: the mode's own, or the mean over tokens.
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
        ``"compiled"``: one loop, which is compiled for an objective at its first use, in a second or two: by numba (extra
        `compiled`) over CPU tensors, by Triton (extra `triton`) over those of a GPU. ``"arrays"``: torch's operations, on a
        CPU in chunks that stay in the cache. ``"auto"``: compiled where that is possible. Under `torch.compile` and
        `torch.func` all are the same array expression.
    across
        Where sequences are divided over ranks: see `drpo_torch.distributed.across`.

    Returns
    -------
    loss : torch.Tensor
        0-d, float32 at least.
    diagnostics : dict or None
        See `drpo_core.token_diagnostics`; on the tensors' device, nothing is synchronised. None without `diagnostics`.

    Raises
    ------
    TypeError
        If an argument is not a tensor, a dtype is wrong, or the coefficients of the reduction are not known.
    ValueError
        If the shapes differ, a number is out of its range, or the engine is unknown or does not work on this device.
    ImportError
        If ``engine="compiled"`` finds no numba, or on a GPU no Triton.
    UntraceableError
        If ``engine="compiled"`` can't compile what the objective does, or what was compiled for a GPU gives other numbers
        there; the other engines run any.
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
    tensors = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    options: dict[str, Any] = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    others = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    check_tensors(**tensors, mask=mask, divergence=divergence, token_weights=token_weights, segment_ids=segment_ids, **others)
    check_engine(engine)
    check_objective(objective)
    # without a graph, outside the autograd.Function, where Dynamo could not share an objective's thresholds
    with torch.no_grad():
        xp, dtype = check_tokens(**tensors, mask=mask, divergence=divergence, xp=namespace())
        # in float16, a gradient divided by the number of tokens would underflow before a loss scaler's factor reaches it
        kept = dtype if log_prob.dtype == torch.float16 else log_prob.dtype
        reduction = reduction_of(objective, reduction, across=across)

        def coefficients_of(counted: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = reduction_coefficients(reduction, counted, dtype=dtype, **options, xp=xp)
            return found

        result = None
        if is_whole_mode(objective) and segment_ids is None and across is None:
            check_others(objective, others, log_prob, xp=xp)
            everything = (*tensors.values(), mask, divergence, *others.values())
            result = run_mode(objective, everything, coefficients_of, engine, dtype=dtype, diagnostics=diagnostics)
        if result is None:
            mode = resolve(
                objective,
                **tensors,
                **others,
                mask=mask,
                segment_ids=segment_ids,
                across=across,
                diagnostics=diagnostics,
                dtype=dtype,
                xp=xp,
            )
            coefficients = coefficients_of(mode.counted)
            batch = Batch(log_prob, mode.anchor_log_prob, advantages, mask, mode.scaled(coefficients), divergence)
            # what penalties add comes before anything is rounded
            unrounded = kept if mode.penalty is None else dtype
            result = run_pass(mode.objective, batch, engine, dtype=dtype, gradient_dtype=unrounded, diagnostics=diagnostics)
            result = mode.added(result, coefficients, xp=xp)
    return with_gradient(log_prob, result.loss, result.gradient.to(kept)), result.diagnostics


def linear_reduction(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LinearReduction:
    """A reduction from any linear function of the per-token losses: c = ∂function(v, mask)/∂v, at v = 0.

    So a framework's own reduction has the loss and final gradient of one pass, on every engine. Finding the coefficients
    is a forward and a backward pass of the function, which may cost more than the loss; the reductions of drpo_core need
    none, and most means are one of them with a `normalizer`.

    Parameters
    ----------
    function
        ``function(values, mask)``: values (float32 at least) and boolean mask of the tokens' shape to a 0-d tensor, linear
        in the values and made of differentiable operations. It does its own normalising: `normalizer` and `segment_ids`
        are not passed on to it.

    Returns
    -------
    LinearReduction
        For the argument `reduction` of the policy losses.

    Raises
    ------
    TypeError
        When used, if the function does not return a 0-d tensor that depends on the values, or is seen not to be linear.
    ValueError
        When used, if its value at 0 is not 0 (known on a CPU only), or `normalizer` or `segment_ids` are given.

    Examples
    --------
    >>> import torch
    >>> from drpo_core import PolicyGradient
    >>> from drpo_torch import linear_reduction, policy_loss
    >>> log_prob = torch.tensor([0.5, 0.2]).log().requires_grad_()
    >>> loss, _ = policy_loss(
    ...     PolicyGradient(),
    ...     log_prob=log_prob,
    ...     behavior_log_prob=log_prob.detach(),
    ...     advantages=torch.tensor([1.0, -1.0]),
    ...     mask=torch.tensor([True, True]),
    ...     reduction=linear_reduction(lambda values, mask: (values * mask).sum() / 4),
    ... )
    >>> loss.backward()
    >>> log_prob.grad
    tensor([-0.2500,  0.2500])
    """
    return _Linear(function)


class _Linear:
    """A linear function of values and mask, as `drpo_core.reduction.LinearReduction`."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        self._function = function

    def coefficients(
        self,
        mask: torch.Tensor,
        *,
        dtype: torch.dtype,
        normalizer: Any = None,  # noqa: ANN401
        token_weights: Any = None,  # noqa: ANN401
        segment_ids: Any = None,  # noqa: ANN401
        xp: Any = None,  # noqa: ANN401, ARG002
    ) -> torch.Tensor:
        """∂function/∂values at 0, times `token_weights`."""
        for name, value in (("normalizer", normalizer), ("segment_ids", segment_ids)):
            if value is not None:
                msg = f"{name}: expected None, because a linear_reduction does its own normalising, got {type(value).__name__}"
                raise ValueError(msg)

        def total(values: torch.Tensor) -> torch.Tensor:
            result = self._function(values, mask)
            if not isinstance(result, torch.Tensor) or result.ndim:
                got = f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
                msg = f"reduction: expected a function to a 0-d tensor, got {got}"
                raise TypeError(msg)
            if not result.requires_grad:
                msg = "reduction: expected a differentiable function of the values, got one that does not depend on them"
                raise TypeError(msg)
            return result

        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        # there is no public test for being inside a transform of torch.func
        transformed = torch._C._functorch.maybe_current_level() is not None  # noqa: SLF001
        if torch.compiler.is_compiling() or transformed or torch.is_inference_mode_enabled() or mask.is_inference():
            found: tuple[torch.Tensor, torch.Tensor] = torch.func.grad_and_value(total)(zeros)
            coefficients, at_zero = found
        else:
            # with a graph, which shows whether the derivative depends on the values
            with torch.enable_grad():
                at_zero = total(zeros.requires_grad_())
                (coefficients,) = torch.autograd.grad(at_zero, zeros, create_graph=True)
            if coefficients.requires_grad:
                msg = "reduction: expected a linear function of the values, got one whose derivative depends on them"
                raise TypeError(msg)
            # NaN is 0/0, of a batch without a valid token, where no coefficient is used
            if type(at_zero) is torch.Tensor and at_zero.device.type == "cpu" and abs(at_zero.item()) > 0.0:
                msg = f"reduction: expected a linear function, whose value at 0 is 0, got {at_zero.item():g}"
                raise ValueError(msg)
        if token_weights is None:
            return coefficients
        check_shape("token_weights", check_tensor("token_weights", token_weights), mask.shape, "mask")
        return coefficients * torch.where(mask, token_weights.detach().to(dtype), 0.0)
