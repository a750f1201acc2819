"""Divergences between two policies from logits: of the whole vocabulary in one pass, or of the recorded top-K tokens."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import array_api_compat.torch as xp
import torch

from drpo_core import sampled_in_top_k
from drpo_core.divergence import top_k_kl_of, top_k_outcomes, top_k_tv_of
from drpo_torch.softmax import Tempering, Workspace, eager, working_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Divergences", "FullDivergence", "LinearHead", "TopKDivergence", "full_divergences", "top_k_divergences"]

# e^60 is finite in float32, and a probability e^60 times smaller than its counterpart is as good as none
LARGEST_LOG_RATIO = 60.0


class Divergences(NamedTuple):
    """`tv`, a difference of probabilities in [0, 1], and `kl` = KL(μ‖π) in nats; per token."""

    tv: torch.Tensor
    kl: torch.Tensor


class LinearHead(NamedTuple):
    """What logits can be recomputed from: `hidden` (…, H), `weight` (V, H), `bias` (V,) and a soft-cap."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_softcap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopKDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, from recorded log μ of K tokens.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    ids, behavior_log_prob
        Ids of the K recorded tokens and their log μ, nats; (…, K).

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import TopKDivergence
    >>> recorded = TopKDivergence(
    ...     kind="tv", ids=torch.tensor([[3, 5]]), behavior_log_prob=torch.tensor([[0.6, 0.3]]).log()
    ... )
    """

    kind: str
    ids: torch.Tensor
    behavior_log_prob: torch.Tensor

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        _check_kind(self.kind)
        if self.ids.shape != self.behavior_log_prob.shape:
            got = tuple(self.behavior_log_prob.shape)
            msg = f"behavior_log_prob: expected the shape of ids, {tuple(self.ids.shape)}, got {got}"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, over the whole vocabulary.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    behavior
        Logits or log-probs of μ, (…, V), or the `LinearHead` to recompute them from, chunk by chunk.
    temperature
        μ is softmax(behavior / temperature): 1 for recorded log-probs.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import FullDivergence
    >>> recorded = FullDivergence(kind="kl", behavior=torch.randn(4, 10).log_softmax(-1))
    """

    kind: str
    behavior: torch.Tensor | LinearHead
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        _check_kind(self.kind)


@eager
def full_divergences(
    *,
    logits: torch.Tensor,
    behavior_logits: torch.Tensor,
    temperature: float = 1.0,
    behavior_temperature: float | None = None,
    engine: Literal["eager", "jit"] = "eager",
) -> Divergences:
    """TV = ½ Σ_v abs(π(v) − μ(v)) and KL(μ‖π) = Σ_v μ φ(ℓ) of two policies, φ(t) = e^t − 1 − t, without a log-softmax.

    The softmaxes exist for a few rows at a time, which is also so in the backward pass; it recomputes them. μ is constant.

    Parameters
    ----------
    logits, behavior_logits
        Of π and μ, (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    temperature
        π = softmax(logits / temperature).
    behavior_temperature
        The same for μ; None for that of π, 1 for recorded log-probs.
    engine
        Of the forward pass: ``"eager"`` for torch's operations, ``"jit"`` for loops that numba compiles in a second or
        two, once a process; CPU only, extra `jit`. Of different dtypes the divergences are always torch's.

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), float32 at least. In float32 a KL of 1e-7 nats still has four digits.

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor.
    ValueError
        If the shapes differ, or the engine is unknown or can't take these tensors.
    ImportError
        If ``engine="jit"`` finds no numba.
    RuntimeError
        On a second derivative, which is not implemented.

    References
    ----------
    arXiv:2602.04879 (DPPO); `drpo_core.full_tv` and `drpo_core.full_kl` for log-probs.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import full_divergences
    >>> tv, kl = full_divergences(
    ...     logits=torch.tensor([[0.5, 0.3, 0.2]]).log(), behavior_logits=torch.tensor([[0.4, 0.3, 0.3]]).log()
    ... )
    >>> round(tv.item(), 5), round(kl.item(), 5)
    (0.1, 0.03238)
    """
    check_float(logits=logits, behavior_logits=behavior_logits)
    check_same_shape("behavior_logits", behavior_logits, "logits", logits)
    temperature = check_positive("temperature", temperature)
    if behavior_temperature is not None:
        behavior_temperature = check_positive("behavior_temperature", behavior_temperature)
    tempering, behavior = Tempering(temperature), Tempering(behavior_temperature or temperature)
    shape = logits.shape
    flat, behavior_flat = logits.reshape(-1, shape[-1]), behavior_logits.detach().reshape(-1, shape[-1])
    tv, kl = _FullDivergences.apply(flat, behavior_flat, tempering, behavior, is_jit(engine, logits))  # type: ignore[no-untyped-call]
    return Divergences(tv.reshape(shape[:-1]), kl.reshape(shape[:-1]))


def top_k_divergences(
    *,
    logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    tokens: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    top_k_ids: torch.Tensor,
    top_k_behavior_log_prob: torch.Tensor,
    temperature: float = 1.0,
) -> Divergences:
    """Top-K TV and KL(μ‖π) against recorded log μ of K tokens: reads K + 1 logits a token, once the normaliser is known.

    Parameters
    ----------
    logits
        Of π, (…, V).
    log_normalizer
        log Σ e^(logits / temperature), (…): see `drpo_torch.selective_log_prob`.
    tokens, behavior_log_prob
        Ids of the sampled tokens and their log μ, nats; (…).
    top_k_ids, top_k_behavior_log_prob
        Ids of K distinct tokens and their log μ, nats; (…, K).
    temperature
        π = softmax(logits / temperature).

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), float32 at least.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes disagree.

    See Also
    --------
    drpo_core.top_k_tv, drpo_core.top_k_kl : the formulas and their source.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import top_k_divergences
    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> tv, kl = top_k_divergences(
    ...     logits=logits,
    ...     log_normalizer=logits.logsumexp(-1),
    ...     tokens=torch.tensor([0]),
    ...     behavior_log_prob=torch.tensor([0.4]).log(),
    ...     top_k_ids=torch.tensor([[0, 1]]),
    ...     top_k_behavior_log_prob=torch.tensor([[0.4, 0.3]]).log(),
    ... )
    >>> round(tv.item(), 5), round(kl.item(), 5)
    (0.1, 0.03238)
    """
    check_float(logits=logits, log_normalizer=log_normalizer, top_k_behavior_log_prob=top_k_behavior_log_prob)
    temperature = check_positive("temperature", temperature)
    dtype = working_dtype(logits.dtype)

    def log_prob(ids: torch.Tensor) -> torch.Tensor:
        return logits.gather(-1, ids).to(dtype) / temperature - log_normalizer[..., None]

    sampled, top_k = log_prob(tokens[..., None])[..., 0], log_prob(top_k_ids)
    among = sampled_in_top_k(tokens, top_k_ids, xp=xp)
    outcomes = top_k_outcomes(sampled, behavior_log_prob, top_k, top_k_behavior_log_prob, among, xp=xp)
    return Divergences(top_k_tv_of(outcomes), top_k_kl_of(outcomes))


def full_divergence_rows(
    logits: torch.Tensor, behavior_logits: torch.Tensor, tempering: Tempering, behavior: Tempering, *, jit: bool = False
) -> Divergences:
    """Full TV and KL of each row (rows, V), without a backward pass.

    With d = x − y − Σ μ (x − y), Σ μ e^d is 1 + K, K = Σ μ φ(d), so that ℓ = d − log1p(K) and KL = −Σ μ ℓ = log1p(K):
    π's own softmax is not needed.
    """
    contiguous = logits.stride(-1) == behavior_logits.stride(-1) == 1
    capped = tempering.softcap is not None or behavior.softcap is not None
    if jit and contiguous and not capped and logits.dtype == behavior_logits.dtype:
        from drpo_torch.rows import row_divergences  # noqa: PLC0415 -- numba is an extra, and slow to import

        tv, kl, near = row_divergences(logits, tempering.temperature, behavior_logits, behavior.temperature)
        for row in (~near).nonzero()[:, 0].tolist():
            x, y = tempering(logits[row]), behavior(behavior_logits[row])
            tv[row], kl[row] = _distant(x, y, y.softmax(-1))
        return Divergences(tv, kl)
    count, vocabulary = logits.shape
    work, behavior_work = Workspace(vocabulary, logits), Workspace(vocabulary, behavior_logits)
    result = torch.empty((2, count), dtype=work.x.dtype, device=logits.device)
    for (step, x_buffer, p), (_, y_buffer, q) in zip(work.steps(count), behavior_work.steps(count), strict=True):
        x, y = tempering(logits[step], x_buffer), behavior(behavior_logits[step], y_buffer)
        torch.softmax(y, -1, out=q)
        # exact near on-policy, where subtracting either normaliser first would cost the digits that matter
        d = torch.sub(x, y, out=x_buffer)
        # (the softmax's sum is 1 to rounding only)
        total = q.sum(-1)
        d.sub_((torch.mul(q, d, out=p).sum(-1) / total)[:, None])
        # a NaN fails this too: of a row that holds one, or of a token that neither policy can take (−inf + inf)
        near = (d.amax(-1) <= LARGEST_LOG_RATIO).all()
        if not near:
            result[:, step] = torch.stack(_distant(tempering(logits[step]), y, q))
            continue
        excess = torch.expm1(d, out=p)
        k = torch.sub(excess, d, out=d).mul_(q).sum(-1).div_(total)
        result[0, step] = excess.sub_(k[:, None]).abs_().mul_(q).sum(-1).div_(2.0 * total * (1.0 + k))
        result[1, step] = k.log1p_()
    return Divergences(result[0], result[1])


class _FullDivergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        behavior_logits: torch.Tensor,
        tempering: Tempering,
        behavior: Tempering,
        jit: bool,  # noqa: FBT001 -- Function.apply takes no keywords
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(logits, behavior_logits)
        ctx.temperings = tempering, behavior
        tv, kl = full_divergence_rows(logits, behavior_logits, tempering, behavior, jit=jit)
        return tv, kl

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """∂KL/∂x = π − μ and ∂TV/∂x = ½ π (s − Σ π s), s = sign(π − μ)."""
        refuse_second_derivative()
        logits, behavior_logits = ctx.saved_tensors
        tempering, behavior = ctx.temperings
        of_tv, of_kl = cotangents
        gradient = torch.zeros_like(logits)
        # rows of no influence, such as masked ones, may hold anything
        rows = ((of_tv != 0.0) | (of_kl != 0.0)).nonzero()[:, 0]
        work, behavior_work = Workspace(logits.shape[-1], logits), Workspace(logits.shape[-1], behavior_logits)
        for (step, x_buffer, p), (_, y_buffer, q) in zip(work.steps(len(rows)), behavior_work.steps(len(rows)), strict=True):
            here = rows[step]
            torch.softmax(tempering(logits[here], x_buffer), -1, out=p)
            torch.softmax(behavior(behavior_logits[here], y_buffer), -1, out=q)
            shift = torch.sub(p, q, out=q)
            sign = torch.sign(shift)
            sign.sub_(torch.linalg.vecdot(p, sign)[:, None]).mul_(p).mul_(0.5 * of_tv[here, None])
            sign.addcmul_(shift, of_kl[here, None])
            gradient[here] = tempering.pull_back_(sign, logits[here]).to(gradient.dtype)
        return gradient, None, None, None, None


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        msg = "drpo_torch: the second derivative at vocabulary scale is not implemented (create_graph, hessian)"
        raise RuntimeError(msg)


def check_float(**tensors: object) -> None:
    """Raise unless each is a floating-point tensor; the keywords name them in errors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            msg = f"{name}: expected a torch.Tensor, got {type(tensor).__name__}"
            raise TypeError(msg)
        if not tensor.is_floating_point():
            msg = f"{name}: expected a real floating dtype, got {tensor.dtype}"
            raise TypeError(msg)


def check_same_shape(name: str, tensor: torch.Tensor, reference_name: str, reference: Sequence[int] | torch.Tensor) -> None:
    """Raise unless the tensor has exactly this shape."""
    expected = tuple(reference.shape if isinstance(reference, torch.Tensor) else reference)
    if tuple(tensor.shape) != expected:
        msg = f"{name}: expected the shape of {reference_name}, {expected}, got {tuple(tensor.shape)}"
        raise ValueError(msg)


def is_jit(engine: str, logits: torch.Tensor) -> bool:
    """Whether this engine is numba's loops; raises if there is no such engine, or it can't take these logits."""
    if engine not in ("eager", "jit"):
        msg = f"engine: expected 'eager' or 'jit', got {engine!r}"
        raise ValueError(msg)
    if engine == "eager":
        return False
    if logits.device.type != "cpu" or logits.dtype == torch.float16:
        msg = f"engine: 'jit' takes float32, float64 and bfloat16 on the CPU, got {logits.dtype} on {logits.device}"
        raise ValueError(msg)
    if find_spec("numba") is None:
        msg = "engine: 'jit' needs numba: pip install 'drpo-core[jit]'"
        raise ImportError(msg)
    return True


def check_positive(name: str, value: float) -> float:
    """Raise unless the number is finite and above 0."""
    if not 0.0 < value < float("inf"):
        msg = f"{name}: expected a finite number greater than 0, got {value!r}"
        raise ValueError(msg)
    return float(value)


def _distant(x: torch.Tensor, y: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TV and KL of rows that may hold −inf, NaN, or ratios too large for e^d."""
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    ell = (log_p - log_q).clamp_(max=LARGEST_LOG_RATIO)
    # a token that neither policy can take has ell = −inf + inf; nan_to_num also hides the NaN of rows that hold one
    invalid = torch.isnan(log_p.amax(-1) + log_q.amax(-1))
    ell.nan_to_num_(nan=0.0, neginf=-torch.inf)
    p = log_p.exp_()
    # flooring μ at π e^−60 keeps every product finite
    floored = torch.maximum(q, p * torch.e**-LARGEST_LOG_RATIO)
    kl = (torch.expm1(ell) - ell).mul_(floored).sum(-1)
    tv = (p - q).abs_().sum(-1).mul_(0.5)
    return tv.masked_fill_(invalid, torch.nan), kl.masked_fill_(invalid, torch.nan)


def _check_kind(kind: str) -> None:
    if kind not in ("tv", "kl"):
        msg = f"kind: expected 'tv' or 'kl', got {kind!r}"
        raise ValueError(msg)
