"""Divergences between two policies from logits: of the whole vocabulary in one pass, or of the recorded top-K tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from drpo_core import sampled_in_top_k
from drpo_core.divergence import top_k_kl_of, top_k_outcomes, top_k_tv_of
from drpo_torch._checks import check_ids, check_shape, check_tensor, check_top_k_ids, check_untransformed
from drpo_torch._host import is_waited_for
from drpo_torch.autograd import has_memory, refuse_second_derivative
from drpo_torch.engines._namespace import namespace
from drpo_torch.vocabulary.divergence_operator import of_two_policies
from drpo_torch.vocabulary.engines import loops
from drpo_torch.vocabulary.graph import depends_on_values, gradient_like, refuse_transformed_cotangents, rows_of
from drpo_torch.vocabulary.row_map import check_row_temperature, check_temperature, row_map
from drpo_torch.vocabulary.shards import local_part, shard_of_logits
from drpo_torch.vocabulary.softmax import LARGEST_LOG_RATIO, Places, Statistics, Workspace, working_dtype

if TYPE_CHECKING:
    from types import ModuleType

    import torch.distributed as dist

    from drpo_core.loss import Engine
    from drpo_torch.vocabulary.shards import Shard
    from drpo_torch.vocabulary.softmax import Tempering
    from drpo_torch.vocabulary.support import Support

__all__ = [
    "Divergences",
    "FullDivergences",
    "Side",
    "TopK",
    "arguments_of_divergences",
    "full_divergence_rows",
    "full_divergences",
    "top_k_divergences",
    "top_k_rows",
]


class Divergences(NamedTuple):
    """`tv`, a difference of probabilities in [0, 1], and `kl` = KL(μ‖π) in nats; per token."""

    tv: torch.Tensor
    kl: torch.Tensor


def full_divergences(
    *,
    logits: torch.Tensor,
    behavior_logits: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    behavior_temperature: float | torch.Tensor | None = None,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    vocabulary_group: dist.ProcessGroup | None = None,
    engine: Engine = "auto",
) -> Divergences:
    """TV = ½ Σ_v abs(π(v) − μ(v)) and KL(μ‖π) = Σ_v μ φ(ℓ) of two policies, φ(t) = e^t − 1 − t, without a log-softmax.

    Softmaxes exist for a few rows at a time only. The backward pass computes them again, and skips rows that no cotangent
    reaches. μ is constant.

    Parameters
    ----------
    logits, behavior_logits
        Logits of π and μ, (…, V); −inf is a probability of 0. The arithmetic is in float64 if one of them is, in float32
        otherwise.
    temperature
        T > 0: π = softmax(logits / T); a number, or one per token, (…).
    behavior_temperature
        The same for μ. None: the temperature of π. Give 1 for recorded log-probs.
    support
        Restricts both policies to a `Support` a token.
    vocabulary_size
        Logits of both policies from this id on are padding. None: none are.
    vocabulary_group
        See `drpo_torch.token_log_prob`; both policies' logits are divided.
    engine
        ``"arrays"``: torch's operations. ``"compiled"``: loops that are compiled in a few seconds, once a process: by numba
        on the CPU, for the forward pass over rows that are contiguous, and not for float16; by Triton on a GPU, for both
        passes over any rows. ``"auto"``: the loops where they exist, otherwise torch's operations.

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), in the dtype of the arithmetic. In float32 a KL of 1e-7 nats still has four digits.

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor, or a temperature is not a number.
    ValueError
        If the shapes differ, a number is out of its range, an id of the support is outside the vocabulary (on the CPU), the
        engine is unknown, or ``engine="compiled"`` can't take these tensors.
    ImportError
        If ``engine="compiled"`` finds no numba, or on a GPU no Triton.
    RuntimeError
        On a second derivative, forward-mode differentiation or a transform of torch.func: not implemented.

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
    given = (logits, behavior_logits, temperature, behavior_temperature, support, vocabulary_size, engine)
    if torch.compiler.is_compiling() and vocabulary_group is None:
        return Divergences(*of_two_policies(*given))
    return Divergences(*_looking_at_values(*given, vocabulary_group))


@depends_on_values
def _looking_at_values(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    return FullDivergences.apply(*arguments_of_divergences(*given))  # type: ignore[no-any-return, no-untyped-call]


def arguments_of_divergences(
    logits: torch.Tensor,
    behavior_logits: torch.Tensor,
    temperature: float | torch.Tensor,
    behavior_temperature: float | torch.Tensor | None,
    support: Support | None,
    vocabulary_size: int | None,
    engine: Engine,
    vocabulary_group: dist.ProcessGroup | None = None,
) -> tuple[Any, ...]:
    """Those of `FullDivergences`, checked."""
    behavior_logits, vocabulary_group = local_part("behavior_logits", behavior_logits, vocabulary_group, -1)
    logits, shard = shard_of_logits(logits, vocabulary_group, vocabulary_size)
    check_untransformed("logits", logits)
    check_untransformed("behavior_logits", check_tensor("behavior_logits", behavior_logits, beside=logits))
    check_shape("behavior_logits", behavior_logits, logits.shape, "logits")
    shape = logits.shape
    known: dict[str, Any] = {"size": shard.vocabulary, "columns": shard.all_columns}
    tempering = row_map(temperature, support, None, None, leading=shape[:-1], beside=logits, **known)
    tempering = shard.narrowed(tempering)
    behavior = tempering
    if behavior_temperature is not None:
        found = check_temperature("behavior_temperature", behavior_temperature)
        found = check_row_temperature("behavior_temperature", found, shape[:-1], logits)
        behavior = tempering._replace(temperature=found)
    temperings = tempering, behavior
    flat, behavior_flat = rows_of(logits), rows_of(behavior_logits.detach())
    module = loops(engine, logits=flat, behavior_logits=behavior_flat)
    return flat, behavior_flat, temperings, module, shape[:-1], shard


def top_k_divergences(
    *,
    logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    tokens: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    top_k_ids: torch.Tensor,
    top_k_behavior_log_prob: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    vocabulary_group: dist.ProcessGroup | None = None,
) -> Divergences:
    """Top-K TV and KL(μ‖π) against recorded log μ of K tokens: reads K + 1 logits a token, once the normaliser is known.

    Differentiable in the logits and the normaliser; μ is constant.

    Parameters
    ----------
    logits
        Logits of π, (…, V).
    log_normalizer
        log Σ e^(logits / temperature), (…): see `drpo_torch.token_log_prob`.
    tokens, behavior_log_prob
        Ids of the sampled tokens and their log μ, nats; (…).
    top_k_ids, top_k_behavior_log_prob
        Ids of K tokens and their log μ, nats; (…, K). An id that comes twice counts once.
    temperature
        T > 0: π = softmax(logits / T); a number, or one per token, (…).
    support
        Restricts both policies to a `Support` a token, over which `log_normalizer` is then: both probabilities of an id
        outside it are 0, whatever is recorded. The sampled token has to be in it.
    vocabulary_size
        Logits from this id on are padding. None: none are.
    vocabulary_group
        See `drpo_torch.token_log_prob`.

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), in float64 if an array other than the temperature is, otherwise in float32.

    Raises
    ------
    TypeError
        If a dtype is wrong, or the temperature is not a number.
    ValueError
        If the shapes disagree, an id is outside the vocabulary or a sampled token outside its support (on the CPU), or a
        number is out of its range.

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
    logits, shard = shard_of_logits(logits, vocabulary_group, vocabulary_size)
    leading, vocabulary = logits.shape[:-1], shard.vocabulary
    per_token = {"log_normalizer": log_normalizer, "behavior_log_prob": behavior_log_prob}
    for name, tensor in per_token.items():
        check_shape(name, check_tensor(name, tensor, beside=logits), leading, "logits without V")
    check_shape("tokens", check_tensor("tokens", tokens, "integral", beside=logits), leading, "logits without V")
    check_tensor("top_k_ids", top_k_ids, "integral", beside=logits)
    top_k = check_tensor("top_k_behavior_log_prob", top_k_behavior_log_prob, beside=logits)
    check_top_k_ids("top_k_ids", top_k_ids, leading)
    check_shape("top_k_behavior_log_prob", top_k, top_k_ids.shape, "top_k_ids")
    check_ids("tokens", tokens, vocabulary)
    check_ids("top_k_ids", top_k_ids, vocabulary)
    known: dict[str, Any] = {"size": vocabulary, "leading": leading, "beside": logits, "columns": shard.all_columns}
    tempering = row_map(temperature, support, tokens, None, **known)
    dtype = working_dtype(logits.dtype, log_normalizer.dtype)
    # a temperature does not decide the dtype
    divisor = temperature.detach().to(dtype)[..., None] if isinstance(temperature, torch.Tensor) else tempering.temperature
    tokens, top_k_ids = tokens.to(torch.int64), top_k_ids.to(torch.int64)
    # at once, because the gradient of each gather has the size of the logits
    every = shard.gather(logits, torch.cat((tokens[..., None], top_k_ids), -1))
    log_prob = every.to(dtype) / divisor - log_normalizer[..., None]
    policy = TopK(log_prob[..., 0], log_prob[..., 1:])
    behavior = TopK(behavior_log_prob.detach(), top_k.detach())
    if tempering.support is not None:
        outside = ~tempering.support.holds(top_k_ids.reshape(-1, top_k_ids.shape[-1])).reshape(top_k_ids.shape)
        policy, behavior = policy.without(outside), behavior.without(outside)
    return top_k_rows(tokens, top_k_ids, policy, behavior)


class TopK(NamedTuple):
    """Log-probs of a policy, of the sampled token (…) and of the K recorded ones (…, K)."""

    sampled: torch.Tensor
    top_k: torch.Tensor

    def without(self, some: torch.Tensor) -> TopK:
        """The same, with no probability at some of the K tokens."""
        return self._replace(top_k=self.top_k.masked_fill(some, -torch.inf))


def top_k_rows(tokens: torch.Tensor, ids: torch.Tensor, policy: TopK, behavior: TopK) -> Divergences:
    """Top-K TV and KL from the ids of the sampled token and of the K recorded ones."""
    again = repeated(ids)
    if again is not None:
        # of an id that comes twice, all but one are as if both policies gave it no probability
        policy, behavior = policy.without(again), behavior.without(again)
    # explicit, because Dynamo can't trace its inference
    xp = namespace()
    among = sampled_in_top_k(tokens, ids, xp=xp)
    outcomes = top_k_outcomes(policy.sampled, behavior.sampled, policy.top_k, behavior.top_k, among, xp=xp)
    return Divergences(top_k_tv_of(outcomes), top_k_kl_of(outcomes))


def full_divergence_rows(
    module: ModuleType | None,
    logits: torch.Tensor,
    places: Places,
    tempering: Tempering,
    behavior_logits: torch.Tensor,
    behavior_places: Places,
    behavior: Tempering,
    shard: Shard,
) -> Divergences:
    """Full TV and KL of rows of logits (…, V), without a backward pass.

    With d = x − y − Σ μ (x − y), Σ μ e^d is 1 + K, K = Σ μ φ(d), so that ℓ = d − log1p(K) and KL = −Σ μ ℓ = log1p(K):
    π's own softmax is not needed. Both policies have the same support; each step is of these rows.
    """
    dtype = working_dtype(logits.dtype, behavior_logits.dtype)
    mine, recorded = (logits, places, tempering), (behavior_logits, behavior_places, behavior)
    if _by_sums(module, logits, shard):
        tv, kl, _ = _summed(module, *_sides(module, mine, recorded, shard), shard)
        return Divergences(tv, kl)
    if module is not None:
        tv, kl, near = module.row_divergences(logits, places, tempering, behavior_logits, behavior_places, behavior)
        for row in (~near).nonzero():
            x = tempering.at(row)(logits[places.index[row]].to(dtype))
            y = behavior.at(row)(behavior_logits[behavior_places.index[row]].to(dtype))
            tv[row], kl[row] = _distant(x, y, y.softmax(-1))
        return Divergences(tv, kl)
    count, vocabulary = len(places), logits.shape[-1]
    work, behavior_work = (Workspace(vocabulary, dtype, logits.device) for _ in range(2))
    tv, kl = (torch.empty(count, dtype=dtype, device=logits.device) for _ in range(2))
    for (step, x_buffer, p), (_, y_buffer, q) in zip(work.steps(count), behavior_work.steps(count), strict=True):
        z, behavior_z = work.take(logits, places[step].key), behavior_work.take(behavior_logits, behavior_places[step].key)
        of_step = tempering.at(step)
        x, y = of_step(z, x_buffer), behavior.at(step)(behavior_z, y_buffer)
        torch.softmax(y, -1, out=q)
        # exact near on-policy, where subtracting either normaliser first would cost the digits that matter
        d = torch.sub(x, y, out=x_buffer)
        if of_step.support is not None:
            # −inf + inf
            d.masked_fill_(of_step.support.outside(), 0.0)
        # (the softmax's sum is 1 to rounding only)
        total = q.sum(-1)
        d.sub_((torch.mul(q, d, out=p).sum(-1) / total)[:, None])
        # a NaN fails this too: of a row that holds one, or of a token that neither policy can take (−inf + inf)
        near = (d.amax(-1) <= LARGEST_LOG_RATIO).all()
        if not near:
            tv[step], kl[step] = _distant(of_step(z.to(dtype)), y, q)
            continue
        excess = torch.expm1(d, out=p)
        k = torch.sub(excess, d, out=d).mul_(q).sum(-1).div_(total)
        tv[step] = excess.sub_(k[:, None]).abs_().mul_(q).sum(-1).div_(2.0 * total * (1.0 + k))
        kl[step] = k.log1p_()
    return Divergences(tv, kl)


def _by_sums(module: ModuleType | None, logits: torch.Tensor, shard: Shard) -> bool:
    """Whether each policy's own normaliser is taken: of which rows another formula is better, the host would have to ask."""
    return shard.group is not None or is_waited_for(logits) or hasattr(module, "divergence_sums")


class Side(NamedTuple):
    """One of the two policies: this rank's part of its logits, and the statistics over all ranks."""

    logits: torch.Tensor
    places: Places
    tempering: Tempering
    whole: Statistics

    def take(self, work: Workspace, step: slice, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities of a few rows."""
        x = self.tempering.at(step)(work.take(self.logits, self.places[step].key), buffer)
        return x, self.whole.at(step).log_prob(x).exp_()


def _sides(
    module: ModuleType | None,
    mine: tuple[torch.Tensor, Places, Tempering],
    recorded: tuple[torch.Tensor, Places, Tempering],
    shard: Shard,
) -> tuple[Side, Side]:
    """Both policies with their normalisers."""
    dtype = working_dtype(mine[0].dtype, recorded[0].dtype)
    policy, behavior = (Side(*side, shard.normalizers(module, *side, dtype)) for side in (mine, recorded))
    return policy, behavior


def _summed(module: ModuleType | None, policy: Side, behavior: Side, shard: Shard) -> torch.Tensor:
    """Full TV and KL, and Σ π sign(π − μ), from both policies' normalisers: sums over the columns of all ranks, (3, rows).

    ℓ = x − y less the difference of the normalisers. What that is wrong by, KL has the square of only, as Σ μ (e^ℓ − 1) = 0.
    """
    # only Triton has kernels of them
    sums = getattr(module, "divergence_sums", _array_sums)
    return shard.total(sums(policy, behavior))


def _array_sums(policy: Side, behavior: Side) -> torch.Tensor:
    """The sums over this rank's columns."""
    logits, count = policy.logits, len(policy.places)
    pi, mu = policy.whole, behavior.whole
    work, behavior_work = (Workspace(logits.shape[-1], pi.maximum.dtype, logits.device) for _ in range(2))
    sums = torch.empty((3, count), dtype=pi.maximum.dtype, device=logits.device)
    shift = (pi.maximum - mu.maximum) + (pi.log_sum - mu.log_sum)
    for (step, x_buffer, _), (_, y_buffer, _) in zip(work.steps(count), behavior_work.steps(count), strict=True):
        (x, p), (y, q) = policy.take(work, step, x_buffer), behavior.take(behavior_work, step, y_buffer)
        ell = torch.sub(x, y, out=x_buffer).sub_(shift[step, None])
        sums[0, step], sums[1, step] = _sums(ell, p, q)
        sums[2, step] = torch.sub(p, q, out=q).sign_().mul_(p).sum(-1)
    return sums


def _sums(ell: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TV and KL of rows or parts of them from ℓ = log π − log μ, π and μ, whatever they are; ℓ is overwritten."""
    # a token that neither policy can take has ell = −inf + inf; of a NaN, p or q is one
    ell.clamp_(max=LARGEST_LOG_RATIO).nan_to_num_(nan=0.0, neginf=-torch.inf)
    # flooring μ at π e^−60 keeps every product finite
    floored = torch.maximum(q, p * torch.e**-LARGEST_LOG_RATIO)
    excess = torch.expm1(ell)
    return (excess.abs() * floored).sum(-1).mul_(0.5), excess.sub_(ell).mul_(floored).sum(-1)


class FullDivergences(torch.autograd.Function):
    """From logits (N, V) of both policies, TV and KL, in a shape of N tokens."""

    @staticmethod
    def forward(  # noqa: D102 -- torch's name
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        behavior_logits: torch.Tensor,
        temperings: tuple[Tempering, Tempering],
        module: ModuleType | None,
        shape: torch.Size,
        shard: Shard,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = temperings[0].size
        mine, recorded = logits[:, :size], behavior_logits[:, :size]
        every = Places.first(len(logits), logits.device)
        pair = (mine, every, temperings[0]), (recorded, every, temperings[1])
        if _by_sums(module, logits, shard):
            sides = _sides(module, *pair, shard)
            tv, kl, signed = _summed(module, *sides, shard)
            kept = [*(field for side in sides for field in side.whole if field is not None), signed]
        else:
            (tv, kl), kept = full_divergence_rows(module, *pair[0], *pair[1], shard), []
        ctx.save_for_backward(logits, behavior_logits, *kept)
        ctx.places, ctx.temperings, ctx.module, ctx.shard = every, temperings, module, shard
        # no views: they could not be changed in place
        return tv.reshape(shape).clone(), kl.reshape(shape).clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """∂KL/∂x = π − μ and ∂TV/∂x = ½ π (s − Σ π s), s = sign(π − μ)."""
        refuse_second_derivative()
        refuse_transformed_cotangents(*cotangents)
        logits, behavior_logits, *kept = ctx.saved_tensors
        tempering, behavior = ctx.temperings
        of_tv, of_kl = (c.reshape(-1) for c in cotangents)
        mine, recorded = (matrix[:, : tempering.size] for matrix in (logits, behavior_logits))
        if kept:
            signed, wholes = kept.pop(), [Statistics.of(kept[i : i + 3], entropy=False) for i in (0, 3)]
        if kept and hasattr(ctx.module, "divergence_gradients"):
            gradient = gradient_like(logits)
            sides = (Side(mine, ctx.places, tempering, wholes[0]), Side(recorded, ctx.places, behavior, wholes[1]))
            ctx.module.divergence_gradients(*sides, signed, of_tv, of_kl, gradient[:, : tempering.size])
            gradient[:, tempering.size :].zero_()
            return gradient, None, None, None, None, None
        gradient = torch.zeros_like(logits)
        into = gradient[:, : tempering.size]
        # rows of no influence, such as masked ones, may hold anything
        rows = Places.where((of_tv != 0.0) | (of_kl != 0.0))
        of_tv, of_kl = of_tv[rows.key], of_kl[rows.key]
        whole, behavior_whole = (each.at(rows.key) for each in wholes) if kept else (None, None)
        work, behavior_work = (Workspace(mine.shape[-1], of_kl.dtype, logits.device) for _ in range(2))
        pairs = zip(work.steps(len(rows)), behavior_work.steps(len(rows)), strict=True)
        for (step, x_buffer, p), (_, y_buffer, q) in pairs:
            key = rows[step].key
            stored, stored_behavior = work.take(mine, key), behavior_work.take(recorded, key)
            ctx.shard.softmax(tempering.at(key)(stored, x_buffer), whole, step, out=p)
            ctx.shard.softmax(behavior.at(key)(stored_behavior, y_buffer), behavior_whole, step, out=q)
            shift = torch.sub(p, q, out=q)
            sign = torch.sign(shift, out=x_buffer)
            of_step = signed[key] if kept else (p * sign).sum(-1)
            sign.sub_(of_step[:, None]).mul_(p).mul_(0.5 * of_tv[step, None])
            sign.addcmul_(shift, of_kl[step, None])
            into[key] = rows[step].counted(tempering.at(key).pull_back_(sign, stored)).to(gradient.dtype)
        return gradient, None, None, None, None, None


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


def repeated(ids: torch.Tensor) -> torch.Tensor | None:
    """True at ids that equal an earlier one on the last axis; None if there is known to be no such id."""
    if ids.shape[-1] < 2:
        return None
    if not torch.compiler.is_compiling() and has_memory(ids) and not is_waited_for(ids):
        # on the CPU it costs less to look, and NumPy sorts in a fraction of torch's time
        ordered = ids.numpy().astype(np.int32)
        ordered.sort(axis=-1)
        if not (ordered[..., 1:] == ordered[..., :-1]).any():
            return None
    none = torch.zeros_like(ids, dtype=torch.bool)
    values, order = ids.sort(dim=-1, stable=True)
    return none.scatter(-1, order, torch.cat((none[..., :1], values[..., 1:] == values[..., :-1]), dim=-1))
