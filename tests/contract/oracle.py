"""What every function should give: naive float64 torch, differentiated by autograd, and 50 digits for the objectives.

Each function takes the arguments of the one it stands for, as float64 tensors, and returns its outputs by path. Nothing
here is shared with the code under test.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import mode_oracles
import numpy as np
import torch
from contract.axes import Measured, Recorded, Reduction
from torch import Tensor

from drpo_core import PolicyGradient
from drpo_core.modes import Mode
from drpo_core.testing import oracle as digits

SATURATION = 20.0
UNDERFLOW = 1e-18
SIZE = " (size)"
"""What the path of an output ends with that is no output, but the size its rounding errors are relative to."""

UNDECIDED = " (undecided)"
"""What the path of an output ends with that is no output, but says which of its elements rounding decides."""

LINEAR_DIVISOR = 5.0
"""What the linear function of these tests divides a sum by."""
ROUNDING = 2.0**-25
"""Half a float32 rounding below 1: what a probability that is written as 1 may fall short of it."""

Outputs = dict[str, Any]
"""Tensors by path; None where the definition leaves it to rounding."""


# --- two policies, elementwise ---------------------------------------------------------------------------------------------


def log_ratio(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    both = torch.isneginf(log_prob) & torch.isneginf(behavior_log_prob)
    return {"": torch.where(both, 0.0, log_prob) - torch.where(both, 0.0, behavior_log_prob)}


def importance_ratio(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    ell = log_ratio(log_prob, behavior_log_prob)[""]
    return {"": ell.clamp(max=SATURATION).exp()}


def probability_shift(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    """π − μ from the difference of the logarithms, which has its digits where the probabilities are alike."""
    x, b = log_prob, behavior_log_prob
    ell = log_ratio(x, b)[""]
    more = x >= b
    up, down = torch.where(more, -ell, 0.0), torch.where(more, 0.0, ell)
    return {"": torch.where(more, -x.exp() * torch.expm1(up), b.exp() * torch.expm1(down))}


def binary_tv(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    return {"": probability_shift(log_prob, behavior_log_prob)[""].abs()}


def _xlogy(mass: Tensor, ratio_of_logs: Tensor) -> Tensor:
    """Mass times a logarithm; 0 where the mass is 0."""
    return torch.where(mass == 0.0, 0.0, mass * torch.where(mass == 0.0, 0.0, ratio_of_logs))


def binary_kl(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    x, b = log_prob, behavior_log_prob
    rest_pi, rest_mu = -torch.expm1(x), -torch.expm1(b)
    # a probability of 1 is one to rounding only
    rest_pi = torch.where((rest_pi == 0.0) & (rest_mu > 0.0), ROUNDING, rest_pi)
    logs = torch.log(torch.where(rest_mu == 0.0, 1.0, rest_mu)) - torch.log(torch.where(rest_pi == 0.0, 1.0, rest_pi))
    return {"": _xlogy(b.exp(), log_ratio(b, x)[""]) + _xlogy(rest_mu, logs)}


def k1(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    return {"": -log_ratio(log_prob, behavior_log_prob)[""]}


def k2(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    return {"": log_ratio(log_prob, behavior_log_prob)[""] ** 2 / 2}


def k3(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    """The estimator r − 1 − ℓ, continued beyond ℓ = 20 along its tangent."""
    ell = log_ratio(log_prob, behavior_log_prob)[""]
    bounded = ell.clamp(max=SATURATION)
    return {"": torch.expm1(bounded) - bounded + math.expm1(SATURATION) * (ell - SATURATION).clamp(min=0.0)}


def full_tv(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    return {"": binary_tv(log_prob, behavior_log_prob)[""].sum(-1) / 2}


def full_kl(log_prob: Tensor, behavior_log_prob: Tensor, **_: Any) -> Outputs:
    x, b = log_prob, behavior_log_prob
    # Σ μ φ(ℓ): what rounded probabilities lack to 1 is corrected for
    return {"": (_xlogy(b.exp(), log_ratio(b, x)[""]) + x.exp() - b.exp()).sum(-1)}


def _outcomes(
    log_prob: Tensor, behavior_log_prob: Tensor, top_x: Tensor, top_b: Tensor, among: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of the K tokens, the sampled one and the rest, and the logs of all but the rest."""

    def appended(top: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
        logs = torch.cat((top, torch.where(among, -torch.inf, sampled)[..., None]), -1)
        largest, where = logs.max(-1, keepdim=True)
        others = logs.scatter(-1, where, -torch.inf).exp().sum(-1)
        rest = (-torch.expm1(largest[..., 0]) - others).clamp(min=0.0)
        return logs, torch.cat((logs.exp(), rest[..., None]), -1)

    (x, p), (b, q) = appended(top_x, log_prob), appended(top_b, behavior_log_prob)
    return p, q, x, b


def top_k_tv(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    top_k_log_prob: Tensor,
    top_k_behavior_log_prob: Tensor,
    sampled_in_top_k: Tensor,
    **_: Any,
) -> Outputs:
    p, q, _, _ = _outcomes(log_prob, behavior_log_prob, top_k_log_prob, top_k_behavior_log_prob, sampled_in_top_k)
    d = (p - q)[..., :-1]
    # what the rest gained the others lost, whatever rounding has left of their sums
    return {"": (d.abs().sum(-1) + d.sum(-1).abs()) / 2}


def top_k_kl(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    top_k_log_prob: Tensor,
    top_k_behavior_log_prob: Tensor,
    sampled_in_top_k: Tensor,
    **_: Any,
) -> Outputs:
    p, q, x, b = _outcomes(log_prob, behavior_log_prob, top_k_log_prob, top_k_behavior_log_prob, sampled_in_top_k)
    known = _xlogy(q[..., :-1], log_ratio(b, x)[""]).sum(-1)
    # the rest's mass is known to the rounding of the others': within it, μ's is nothing and π's is that rounding
    rounding = _rounding_of_rest(b)
    counts = q[..., -1] > rounding
    rest_q = torch.where(counts, q[..., -1], 1.0)
    rest_p = torch.where(counts, torch.maximum(p[..., -1], _rounding_of_rest(x)), 1.0)
    kl = known + torch.where(counts, rest_q * (rest_q.log() - rest_p.log()), 0.0)
    # and what one policy gained from the other there, to the rounding of what the others gained
    gained = _epsilon(b) * b.shape[-1] * (p - q).abs().sum(-1)
    return {"": kl, UNDECIDED: (q[..., -1] > 0.0) & (q[..., -1] < 4.0 * torch.maximum(rounding, gained))}


def _rounding_of_rest(logs: Tensor) -> Tensor:
    """Of 1 − Σ p."""
    return logs.shape[-1] * _epsilon(logs) * -torch.expm1(logs.max(-1).values)


def _epsilon(numbers: Tensor) -> float:
    """Of float32, if the numbers are of no more digits, else of float64."""
    return 2.0**-23 if bool((numbers == numbers.float().double()).all()) else 2.0**-52


def sampled_in_top_k(tokens: Tensor, top_k_ids: Tensor, **_: Any) -> Outputs:
    return {"": (top_k_ids == tokens[..., None]).any(-1)}


# --- sequences -------------------------------------------------------------------------------------------------------------


def _sequences(mask: Tensor, segment_ids: Tensor | None) -> list[Tensor]:
    """For each sequence, which tokens are its own: packed ones by their ids, else rows."""
    if segment_ids is not None:
        return [segment_ids == i for i in segment_ids.unique()]
    if 0 in mask.shape:
        return []
    rows = mask.reshape(-1, mask.shape[-1]) if mask.ndim else mask.reshape(1, 1)
    every = []
    for i in range(len(rows)):
        own = torch.zeros_like(rows)
        own[i] = True
        every.append(own.reshape(mask.shape))
    return every


def count(reduction: Reduction, mask: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    if reduction.name == "token_mean":
        return mask.sum().double()
    return torch.tensor(float(sum(bool((own & mask).any()) for own in _sequences(mask, segment_ids))), dtype=torch.float64)


def coefficients(
    reduction: Reduction,
    mask: Tensor,
    *,
    normalizer: float | None = None,
    token_weights: Tensor | None = None,
    segment_ids: Tensor | None = None,
    bound_token_weights: Tensor | None = None,
) -> Tensor:
    """What each token's loss is multiplied with; 0 at masked tokens."""
    bound = dict(reduction.bound)
    normalizer = bound.get("normalizer") if normalizer is None else normalizer
    weights = bound_token_weights if token_weights is None and "token_weights" in bound else token_weights
    c = mask.double()
    if reduction.name == "linear":
        c, normalizer = c / LINEAR_DIVISOR, 1.0
    if reduction.name == "sequence_mean_token_mean":
        for own in _sequences(mask, segment_ids):
            c = torch.where(own, c / max(int((own & mask).sum()), 1), c)
    if reduction.name == "sequence_mean_token_sum":
        c = c / bound.get("horizon", 1.0)
    divisor = count(reduction, mask, segment_ids) if normalizer is None else torch.tensor(float(normalizer))
    c = c / (divisor if float(divisor) else 1.0)
    return c if weights is None else torch.where(mask, c * weights, 0.0)


def reduced(values: Tensor, c: Tensor, path: str = "") -> Outputs:
    """Σ c v, and the size of what is added up: rounding errors are relative to that."""
    terms = torch.where(c != 0.0, c * torch.where(c != 0.0, values, 0.0), 0.0)
    return {path: terms.sum(), path + SIZE: terms.detach().abs().sum()}


def group_advantages(
    rewards: Tensor,
    *,
    group_ids: Tensor | None = None,
    divide_by_std: bool = False,
    divide_by_mean: bool = False,
    std_offset: float = 1e-6,
    leave_one_out: bool = False,
    **_: Any,
) -> Outputs:
    result = torch.zeros_like(rewards)
    for own in _groups(rewards, group_ids):
        r = rewards[own]
        if len(r) < 2 or bool((r == r[0]).all()):
            continue
        a = r - r.mean()
        a = a * len(r) / (len(r) - 1) if leave_one_out else a
        result[own] = a / (r.std() + std_offset) if divide_by_std else a / r.mean() if divide_by_mean else a
    return {"": result}


def _groups(rewards: Tensor, group_ids: Tensor | None) -> list[Tensor]:
    """For each group, which rewards are its own."""
    if group_ids is not None:
        return [group_ids == i for i in group_ids.unique()]
    return _sequences(torch.ones_like(rewards) == 1, None)


def length_weighted_advantages(rewards: Tensor, lengths: Tensor, *, group_ids: Tensor | None = None, **_: Any) -> Outputs:
    result, size = torch.zeros_like(rewards), rewards.abs().max() if rewards.numel() else torch.zeros(())
    for own in _groups(rewards, group_ids):
        r, t = rewards[own], lengths[own].double()
        if not bool((r == r[0]).all()):
            result[own] = r - (float((t * r).sum() / t.sum()) if t.sum() else 0.0)
    return {"": result, SIZE: size}


def reward_decoupled_advantages(rewards: Tensor, *, weights: Any = None, **options: Any) -> Outputs:
    weights = (1.0,) * rewards.shape[-1] if weights is None else weights
    each = [w * group_advantages(r, **options)[""] for w, r in zip(weights, rewards.unbind(-1), strict=True)]
    return {"": sum(each), SIZE: sum(a.abs() for a in each).max() if each[0].numel() else torch.zeros(())}


def pass_at_k_advantages(
    rewards: Tensor,
    *,
    k: int,
    group_ids: Tensor | None = None,
    divide_by_std: bool = False,
    std_offset: float = 1e-6,
    **_: Any,
) -> Outputs:
    """Σ_j (R − R_j) P(j is the best of k − 1 others), over the samples j that are lower."""
    result = torch.zeros_like(rewards)
    for own in _groups(rewards, group_ids):
        r, order = rewards[own].sort(stable=True)
        n, drawn = len(r), min(k, len(r)) - 1
        # of the others in their order, the m-th lower one is the best where all other drawn ones are before it
        chance = torch.tensor(
            [math.comb(m, drawn - 1) / math.comb(n - 1, drawn) if drawn else 0.0 for m in range(n)], dtype=torch.float64
        )
        lower = [c.cumsum(0) - c for c in (chance, chance * r)]
        a = torch.empty_like(r)
        a[order] = r * lower[0] - lower[1]
        a = torch.where(rewards[own] == r[0], 0.0, a)
        std = float(r.std()) + std_offset if n > 1 else std_offset
        result[own] = a / (std or 1.0) if divide_by_std else a
    return {"": result}


def whitened_advantages(advantages: Tensor, mask: Tensor, *, std_offset: float = 1e-8, **_: Any) -> Outputs:
    result, a = torch.zeros_like(advantages), advantages[mask]
    if len(a) > 1 and not bool((a == a[0]).all()):
        result[mask] = (a - a.mean()) / (a.std() + std_offset)
    return {"": result}


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float = 1.0, trace_decay: float = 0.95, **_: Any
) -> Outputs:
    """Token by token from the end of each sequence, as if only the valid ones were there."""
    result = torch.zeros_like(rewards)
    for own in _sequences(mask, None):
        places = (own & mask).nonzero()
        following = estimate = 0.0
        for place in map(tuple, places.flip(0).tolist()):
            delta = float(rewards[place]) + discount * following - float(values[place])
            estimate = delta + discount * trace_decay * estimate
            following = float(values[place])
            result[place] = estimate
    return {"": result}


def informative_groups(rewards: Tensor, *, low: float = -math.inf, high: float = math.inf, **_: Any) -> Outputs:
    kept = torch.zeros_like(rewards) == 1.0
    for own in _sequences(~kept, None):
        r = rewards[own]
        kept |= own & bool((r != r[0]).any() and low < float(r.mean()) < high)
    groups = len(rewards)
    count = int(kept.any(-1).sum()) if rewards.numel() else 0
    return {"kept": kept, "groups_kept": torch.tensor(count), "groups_removed": torch.tensor(groups - count)}


def interpolated_proximal_log_prob(log_prob: Tensor, behavior_log_prob: Tensor, staleness: Tensor, **_: Any) -> Outputs:
    rows = zip(*(t.reshape(-1).tolist() for t in (log_prob, behavior_log_prob, staleness)), strict=True)
    found = [b if d <= 1 else x if x == -math.inf else (1 - 1 / d) * x + b / d for x, b, d in rows]
    return {"": torch.tensor(found, dtype=torch.float64).reshape(log_prob.shape)}


def clip_cov_weights(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    noise: Tensor,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    candidates: Tensor | None = None,
    **_: Any,
) -> Outputs:
    weights = mask.double()
    known = mask & ~torch.isneginf(log_prob)
    if bool(known.any()):
        covariance = torch.where(known, log_prob - log_prob[known].mean(), 0.0) * (advantages - advantages[mask].mean())
        chosen = known & (covariance > low) & (covariance < high)
        chosen = chosen if candidates is None else chosen & candidates
        count = max(int(share * int(mask.sum())), 1)
        if bool(chosen.any()):
            last = noise[chosen].sort().values[: min(count, int(mask.sum()))][-1]
            weights = torch.where(chosen & (noise <= last), 0.0, weights)
    return {"": weights}


def expand_advantages(advantages: Tensor, mask: Tensor, *, segment_ids: Tensor | None = None, **_: Any) -> Outputs:
    per_token = (
        advantages[:, None].expand(mask.shape) if segment_ids is None else advantages[torch.where(mask, segment_ids, 0)]
    )
    return {"": torch.where(mask, per_token, 0.0)}


# --- policy losses ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 << 16)
def _token(objective: Any, x: float, b: float, a: float, divergence: float | None) -> tuple[float, float, float, bool]:
    """L, ∂L/∂log π, w, and whether the token is inside the trust region, whatever the sign of its advantage."""
    low, high = digits.thresholds(objective) or (math.inf, math.inf)
    kind, measured = type(objective).__name__, getattr(objective, "divergence", None)
    if measured in {"per_token", "binary_kl"}:
        if measured == "binary_kl":
            divergence = float(binary_kl(*(torch.tensor(v, dtype=torch.float64) for v in (x, b)))[""])
        inside = divergence is not None and divergence <= (high if x >= b else low)
        known = _surrogate(objective, x, b, a)
        return (*known, inside) if inside or not a * (x - b) > 0 else (0.0, 0.0, 0.0, inside)
    if kind == "CISPO" and objective.min_ratio is None and x == -math.inf:
        return (*_surrogate(objective, x, b, a), True)  # where π = 0, r log π has the limit 0
    known = digits.reference(objective, x, b, a)
    if kind == "TokenwiseClip":
        # at π = 1 a Bernoulli KL is infinite, and its bound nearer to the ratio than a rounding: it is the bound, and kept
        most = digits.token_bound(objective.bounds, b, up=x >= b)[0]
        inside = abs(math.expm1(min(x - b, SATURATION))) <= most * (1.0 + 2.0**-50)
        known = known if known.jump > 2.0**-50 else digits.reference(PolicyGradient(), x, b, a)
    elif kind in {"PPOClip", "SPO"}:
        inside = -low <= math.expm1(min(x - b, SATURATION)) <= high
    elif kind == "IcePop":
        inside = objective.min_ratio <= math.exp(min(x - b, SATURATION)) <= objective.max_ratio
    else:
        inside = -low <= math.exp(x) - math.exp(b) <= high
    return known.loss, known.gradient, known.weight, inside


def _surrogate(objective: Any, x: float, b: float, a: float) -> tuple[float, float, float]:
    """−A r, or its truncation, without a trust region."""
    loss, weight, gradient, *_ = digits.reference(PolicyGradient(max_ratio=objective.max_ratio), x, b, a)
    return loss, gradient, weight


class _Step(torch.autograd.Function):
    """Log π less itself: 0, whose derivative is 1 where log π is −∞ too."""

    @staticmethod
    def forward(_: Any, log_prob: Tensor) -> Tensor:
        return torch.zeros_like(log_prob)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


class Parts:
    """What a mode adds to an objective, from the scalar oracles: the anchor, K, the penalties, and which tokens count."""

    def __init__(self, mode: Any, arrays: dict[str, Tensor | None], mask: Tensor, segment_ids: Tensor | None) -> None:
        self.mode, self.statistics = mode, {}
        places, rows = [], []
        for own in _sequences(mask, segment_ids):
            place = (own & mask).reshape(-1).nonzero()[:, 0].tolist()
            # FIPO's distances count masked tokens; packed ones are counted in their sequence
            inside = own.reshape(-1).nonzero()[:, 0].tolist()
            flat = {name: None if a is None else a.reshape(-1).tolist() for name, a in arrays.items()}
            rows.append([mode_oracles.Token(inside.index(i), *(_bounded(flat[name], i) for name in _FIELDS)) for i in place])
            places.append(place)

        def spread(values: list[list[float]]) -> Tensor:
            result = torch.zeros(mask.numel(), dtype=torch.float64)
            for place, row in zip(places, values, strict=True):
                result[place] = torch.tensor(row, dtype=torch.float64)
            return result.reshape(mask.shape)

        self.anchor, self.factor, self.counted = arrays["behavior_log_prob"], mask.double(), mask
        if type(mode.anchor).__name__ == "Proximal":
            self.anchor = arrays["proximal_log_prob"]
        elif type(mode.anchor).__name__ != "Behavior":
            self.anchor = spread([mode_oracles.anchor_log_prob(mode.anchor, row) for row in rows])
        for correction in mode.corrections:
            k = spread(mode_oracles.CORRECTIONS[type(correction)](correction, rows))
            self.factor = self.factor * k
            if correction.counts is None and not mode.count_masked:
                self.counted = self.counted & (k != 0.0)
            self.statistics |= _of_factor(type(correction).__name__, k[mask])
        penalties = [[tuple(map(sum, zip(*(_penalty(p, t) for p in mode.penalties)))) for t in r] for r in rows]
        self.penalty = [
            spread([[t[i] for t in r] for r in penalties]) if mode.penalties else 0.0 * self.factor for i in (0, 1)
        ]


def _penalty(p: Any, t: mode_oracles.Token) -> tuple[float, float]:
    """Value and gradient; of k3 along its tangent below ℓ = −20."""
    ell = t.policy - {"reference": t.reference, "behavior": t.behavior, "proximal": t.proximal}[p.to]
    if p.estimator != "k3" or ell >= -SATURATION:
        return mode_oracles.penalty(p, t)
    value, slope = mode_oracles.penalty(p, t._replace(policy=t.policy - ell - SATURATION))
    return value + slope * (ell + SATURATION), slope


_FIELDS = ("log_prob", "behavior_log_prob", "proximal_log_prob", "reference_log_prob", "advantages")


def _bounded(values: list[float] | None, i: int) -> float:
    """Log-probs within 10⁶ nats, as where they are added up."""
    return math.nan if values is None else max(values[i], -1e6)


def _of_factor(name: str, k: Tensor) -> Outputs:
    """Statistics of a correction."""
    word = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
    n, nan = k.numel(), torch.tensor(torch.nan, dtype=torch.float64)
    return {
        f"{word}_masked_fraction": (k == 0.0).double().mean() if n else nan,
        f"{word}_mean": k.mean() if n else nan,
        f"{word}_max": k.max() if n else -torch.tensor(math.inf, dtype=torch.float64),
        f"{word}_effective_sample_size": k.sum() ** 2 / ((k**2).sum() * n) if n and bool((k != 0.0).any()) else nan,
    }


def reduction_of(objective: Any, reduction: Reduction | None) -> Reduction:
    """The one that is given, else a mode's own, else the mean over tokens."""
    if reduction is None and isinstance(objective, Mode):
        if objective.reduction == "token_sum":
            return Reduction("token_mean", (("normalizer", 1.0),))
        horizon = () if objective.horizon is None else (("horizon", objective.horizon),)
        return Reduction(objective.reduction, horizon)
    return reduction or Reduction("token_mean")


class Tokens:
    """Per token: the loss as a function of log π with its analytic derivative, the gradient, the weight; masked ones are 0."""

    def __init__(
        self,
        objective: Any,
        log_prob: Tensor,
        behavior_log_prob: Tensor,
        advantages: Tensor,
        mask: Tensor,
        divergence: Tensor | None,
        segment_ids: Tensor | None = None,
        **others: Tensor | None,
    ) -> None:
        x, b, a = log_prob.detach(), behavior_log_prob, advantages
        parts = None
        if isinstance(objective, Mode):
            arrays = {"log_prob": x, "behavior_log_prob": b, "advantages": a}
            arrays |= {name: others.get(name) for name in ("proximal_log_prob", "reference_log_prob")}
            parts = Parts(objective, arrays, mask, segment_ids)
            objective, b = objective.objective, parts.anchor
        d = x if divergence is None else divergence
        rows = [
            _token(objective, *row) if m else (0.0, 0.0, 0.0, True)
            for *row, m in zip(*(t.reshape(-1).tolist() for t in (x, b, a, d, mask)), strict=True)
        ]
        columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T.reshape(4, *x.shape)
        value, self.gradient, self.weight, inside = columns
        self.inside = inside == 1.0
        # of the objective alone: what diagnostics are of
        self.final, self.corrected, self.counted, self.of_corrections = self.gradient, self.weight, mask, {}
        if parts is not None:
            self.counted, self.of_corrections, self.corrected = parts.counted, parts.statistics, parts.factor * self.weight
            value, self.final = (
                parts.factor * each + torch.where(parts.counted, penalty, 0.0)
                for each, penalty in zip((value, self.gradient), parts.penalty, strict=True)
            )
        self.loss = value + self.final * torch.where(mask, _Step.apply(log_prob), 0.0)
        self.mask, self.x, self.b, self.a = mask, x, b, a

    def diagnostics(self, path: str, *, rounded: bool = False) -> Outputs:
        """Statistics by the path to them, from their definitions; of log-probs that the function rounds itself or not."""
        mask = self.mask
        x, b, a, w = (t[mask] for t in (self.x, self.b, self.a, self.weight))
        ell = log_ratio(x, b)[""]
        r = ell.clamp(max=SATURATION).exp()
        tv, k3s = binary_tv(x, b)[""], k3(x, b)[""]
        active = a != 0.0
        outside, away = ~self.inside[mask], a * ell
        nan = torch.tensor(torch.nan, dtype=torch.float64)

        def mean(values: Tensor, over: Tensor | None = None) -> Tensor:
            values = values.double() if over is None else values[over].double()
            return values.mean() if values.numel() else nan

        def mean_and_size(name: str, values: Tensor) -> Outputs:
            return {name: mean(values), name + SIZE: mean(values.abs())}

        def extreme(values: Tensor, which: str) -> Tensor:
            if values.numel():
                return getattr(values, which)()
            return torch.tensor(math.inf if which == "amin" else -math.inf, dtype=torch.float64)

        def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
            return numerator / denominator if float(denominator) else nan

        mass, moved = (a.abs() * r)[active], self.gradient[mask][active].abs()
        rho = moved / a.abs()[active]
        figures = {
            "ratio_mean": mean(r),
            "ratio_max": extreme(r, "amax"),
            "log_ratio_abs_mean": mean(ell.abs()),
            **mean_and_size("k1_mean", -ell),
            "k3_mean": mean(k3s),
            "binary_tv_mean": mean(tv),
            "binary_tv_max": extreme(tv, "amax"),
            "invalid_fraction": mean(torch.zeros_like(r)),
            "outside_fraction": mean(outside, active),
            "outside_positive_diverging_fraction": mean(outside & (a > 0) & (away > 0), active),
            "outside_positive_converging_fraction": mean(outside & (a > 0) & (away < 0), active),
            "outside_negative_diverging_fraction": mean(outside & (a < 0) & (away > 0), active),
            "outside_negative_converging_fraction": mean(outside & (a < 0) & (away < 0), active),
            "dropped_fraction": mean(w == 0.0, active),
            "attenuated_fraction": mean((w > 0.0) & (w < 1.0), active),
            "amplified_fraction": mean(w > 1.0, active),
            "corrective_fraction": mean(w < 0.0, active),
            **mean_and_size("weight_mean", w[active]),
            "weight_min": extreme(w[active], "amin"),
            "weight_max": extreme(w[active], "amax"),
            "gradient_mass_kept": quotient(moved.sum(), mass.sum()),
            "effective_sample_size": quotient(rho.sum() ** 2, (rho**2).sum() * rho.numel()),
        }
        unknown = []
        if rho.numel() and bool((rho < UNDERFLOW).all()):
            unknown += ["gradient_mass_kept", "effective_sample_size"]  # float32 has no squares of these
        if bool((mass < UNDERFLOW).all()):
            unknown += ["gradient_mass_kept"]  # float32 has no such ratios
        if bool(((rounded | (w != 1.0)) & ((w - 1.0).abs() < ROUNDING * 64)).any()):
            unknown += ["attenuated_fraction", "amplified_fraction"]  # float32 rounds these to 1
        figures |= dict.fromkeys(unknown)
        figures |= self.of_corrections
        return {f"{path}/{name}".lstrip("/"): value for name, value in figures.items()}


def token_loss_and_gradient(
    objective: Any,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    divergence: Tensor | None = None,
    segment_ids: Tensor | None = None,
    proximal_log_prob: Tensor | None = None,
    reference_log_prob: Tensor | None = None,
    **_: Any,
) -> Outputs:
    mask = torch.ones_like(log_prob) == 1.0 if mask is None else mask
    others = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    tokens = Tokens(objective, log_prob, behavior_log_prob, advantages, mask, divergence, segment_ids, **others)
    return {"loss": tokens.loss, "gradient": tokens.final, "weight": tokens.corrected}


def token_loss(objective: Any, **arguments: Any) -> Outputs:
    return {"": token_loss_and_gradient(objective, **arguments)["loss"]}


def token_diagnostics(
    objective: Any,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    divergence: Tensor | None = None,
    **_: Any,
) -> Outputs:
    mask = torch.ones_like(log_prob) == 1.0 if mask is None else mask
    return Tokens(objective, log_prob, behavior_log_prob, advantages, mask, divergence).diagnostics("")


def summary(objective: Any, *arrays: Tensor, **arguments: Any) -> Outputs:
    """Diagnostics as numbers: NaN where nothing was counted."""
    figures = token_diagnostics(objective, *arrays, **arguments)
    extremes = {name for name in figures if name.endswith(("_max", "_min"))}
    return {n: torch.where(torch.isinf(f), torch.nan, f) if n in extremes else f for n, f in figures.items()}


def policy_loss(
    objective: Any,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    reduction: Reduction | None = None,
    diagnostics: bool = True,
    divergence: Tensor | None = None,
    final_gradient: bool = False,
    rounded: bool = False,
    proximal_log_prob: Tensor | None = None,
    reference_log_prob: Tensor | None = None,
    **options: Any,
) -> Outputs:
    others = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    ids = options.get("segment_ids")
    tokens = Tokens(objective, log_prob, behavior_log_prob, advantages, mask, divergence, ids, **others)
    c = coefficients(reduction_of(objective, reduction), tokens.counted, **_reduction_options(options))
    outputs = reduced(tokens.loss, c, "loss")
    if final_gradient:
        outputs["gradient"] = c * tokens.final
    return outputs | (tokens.diagnostics("diagnostics", rounded=rounded) if diagnostics else {})


def policy_loss_and_gradient(objective: Any, *arrays: Tensor, **arguments: Any) -> Outputs:
    return policy_loss(objective, *arrays, **arguments, final_gradient=True)


def _reduction_options(options: dict[str, Any]) -> dict[str, Any]:
    known = ("normalizer", "token_weights", "segment_ids", "bound_token_weights")
    return {name: options[name] for name in known if name in options}


# --- score centring --------------------------------------------------------------------------------------------------------

_FAR = -80.0
"""Log of a probability of the tail, which is taken as 0."""


def score_centering(objective: Any, *arrays: Tensor, **arguments: Any) -> Outputs:
    """Per token, and the constants C_v that are its gradient."""
    term, sizes, gradient, size = _centering_term(objective, *arrays, **arguments)
    return {"loss": term, "loss" + SIZE: sizes.sum(), "gradient": gradient, "gradient" + SIZE: size}


def score_centering_term(objective: Any, **arguments: Any) -> Outputs:
    term, sizes, _, size = _centering_term(objective, **arguments)
    return {"": term, SIZE: sizes.sum(), "gradients" + SIZE: size}


def _centering_term(
    objective: Any,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantages: Tensor,
    *,
    tail: bool = False,
    mask: Tensor | None = None,
    proximal_log_prob: Tensor | None = None,
    divergence: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ C_v log π_v, its size, C_v, which is a constant, and the size of the largest of these."""
    counts = torch.ones_like(advantages) == 1.0 if mask is None else mask
    x, b, old, a, d = (
        None if t is None else t[counts] for t in (log_prob, behavior_log_prob, proximal_log_prob, advantages, divergence)
    )
    of_tail = None if not tail else _tail(x.detach(), b, old)
    c, size = _outcome_coefficients(objective, x.detach(), b, old, a, d, of_tail)
    none = torch.isneginf(x)
    logs = torch.where(none, _Step.apply(x), x)
    term, sizes, gradient = torch.zeros_like(advantages), torch.zeros_like(advantages), torch.zeros_like(log_prob.detach())
    gradient[counts], sizes[counts] = c, (size * logs.detach().abs()).sum(-1)
    return term.masked_scatter(counts, (c * logs).sum(-1)), sizes, gradient, size.max() if size.numel() else torch.zeros(())


def _tail(x: Tensor, b: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log μ and log π_old at a token of the tail whose log π is `_FAR`, and μ_T/π_T: 0 where that is of rounding errors."""
    pi, mu = _rest(x), _rest(b)
    exists = (pi > _rounding_of_rest(x)) & (mu > _rounding_of_rest(b))
    pi, mu = torch.where(exists, pi, 1.0), torch.where(exists, mu, 1.0)
    rest_old = None if old is None else torch.where(exists, torch.maximum(_rest(old), _rounding_of_rest(old)), 1.0)
    of_old = None if rest_old is None else _FAR + (rest_old / pi).log()
    return _FAR + (mu / pi).log(), of_old, torch.where(exists, mu / pi, 0.0)


def _rest(logs: Tensor) -> Tensor:
    """The mass 1 − Σ p."""
    largest, where = logs.max(-1, keepdim=True)
    return -torch.expm1(largest[..., 0]) - logs.scatter(-1, where, -torch.inf).exp().sum(-1)


def _outcome_coefficients(
    objective: Any,
    x: Tensor,
    b: Tensor,
    old: Tensor | None,
    a: Tensor,
    divergence: Tensor | None,
    of_tail: tuple[Tensor, Tensor | None, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """C_v = −μ_v g_v; with a tail, C_v = −μ_v g_v + α g_T π_v. And the sizes of what is added up."""
    every = [x, b, old, a[:, None], None if divergence is None else divergence[:, None]]
    if of_tail is not None:
        columns = [torch.full_like(a, _FAR), *of_tail[:2]]
        every[:3] = (None if t is None else torch.cat((t, c[:, None]), -1) for t, c in zip(every[:3], columns, strict=True))
    # a large batch is a few tokens, repeated
    rows = torch.cat([t for t in every if t is not None], -1).numpy()
    _, some, at = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    g = _outcome_gradients(objective, *(None if t is None else t[some] for t in every))[at.reshape(-1)]
    if of_tail is None:
        return -b.exp() * g, (b.exp() * g).abs()
    own, of_others = -b.exp() * g[:, :-1], of_tail[2][:, None] * g[:, -1:] * x.exp()
    return own + of_others, own.abs() + of_others.abs()


def _outcome_gradients(
    objective: Any, x: Tensor, b: Tensor, old: Tensor | None, a: Tensor, divergence: Tensor | None
) -> Tensor:
    """The objective's own gradient at each outcome of a few tokens, as if each were a sequence of one token."""
    if isinstance(objective, Mode):
        objective = dataclasses.replace(objective, penalties=())
    x, b, old, a, d = (None if t is None else t.expand(x.shape)[..., None] for t in (x, b, old, a, divergence))
    # nothing is expected of what the sampler never takes
    return Tokens(objective, x, b, a, ~torch.isneginf(b), d, proximal_log_prob=old).final[..., 0]


# --- vocabulary ------------------------------------------------------------------------------------------------------------


def tempered(
    logits: Tensor, temperature: float | Tensor = 1.0, support: Tensor | None = None, vocabulary_size: int | None = None
) -> Tensor:
    """The policy's logits: over T, −∞ outside the support, without the padding."""
    z = logits[..., :vocabulary_size] / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    return z if support is None else torch.where(support, z, -torch.inf)


def _picked(log_probs: Tensor, ids: Tensor, support: Tensor | None = None) -> Tensor:
    """Outside the support a constant."""
    found = log_probs.gather(-1, ids)
    return found if support is None else torch.where(support.gather(-1, ids), found, -torch.inf)


def _entropy(log_probs: Tensor) -> Tensor:
    return -_xlogy(log_probs.exp(), log_probs).sum(-1)


def token_log_prob(
    *,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    top_k_ids: Tensor | None = None,
    top_k: int | None = None,
    temperature: float | Tensor = 1.0,
    support: Tensor | None = None,
    vocabulary_size: int | None = None,
    entropy: bool = False,
    order: Tensor | None = None,
    **_: Any,
) -> Outputs:
    counts = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    z = tempered(torch.where(counts[..., None], logits, 0.0), temperature, support, vocabulary_size)
    x = z.log_softmax(-1)

    def log_prob(ids: Tensor) -> Tensor:
        return torch.where(counts[..., None], _picked(x, torch.where(counts[..., None], ids, 0), support), 0.0)

    outputs = {"log_prob": log_prob(tokens[..., None])[..., 0], "log_normalizer": torch.where(counts, z.logsumexp(-1), 0.0)}
    if top_k is not None:
        of_rows = tempered((logits if order is None else order).detach(), 1.0, support, vocabulary_size)
        top_k_ids = of_rows.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    if top_k_ids is not None:
        outputs |= {"top_k_log_prob": log_prob(top_k_ids), "top_k_ids": torch.where(counts[..., None], top_k_ids, 0)}
    return outputs | ({"entropy": torch.where(counts, _entropy(x), 0.0)} if entropy else {})


def full_divergences(
    *,
    logits: Tensor,
    behavior_logits: Tensor,
    temperature: float | Tensor = 1.0,
    behavior_temperature: float | Tensor | None = None,
    support: Tensor | None = None,
    vocabulary_size: int | None = None,
    **_: Any,
) -> Outputs:
    others = support, vocabulary_size
    x = tempered(logits, temperature, *others).log_softmax(-1)
    behavior_temperature = temperature if behavior_temperature is None else behavior_temperature
    b = tempered(behavior_logits, behavior_temperature, *others).log_softmax(-1).detach()
    # φ has no cancellation where the two are alike
    return {"tv": full_tv(x, b)[""], "kl": full_kl(x, b)[""]}


def top_k_divergences(
    *,
    logits: Tensor,
    log_normalizer: Tensor,
    tokens: Tensor,
    behavior_log_prob: Tensor,
    top_k_ids: Tensor,
    top_k_behavior_log_prob: Tensor,
    temperature: float | Tensor = 1.0,
    support: Tensor | None = None,
    vocabulary_size: int | None = None,
    **_: Any,
) -> Outputs:
    x = tempered(logits, temperature, None, vocabulary_size) - log_normalizer[..., None]
    if support is not None:
        # of neither policy
        top_k_behavior_log_prob = torch.where(support.gather(-1, top_k_ids), top_k_behavior_log_prob, -torch.inf)
    top_k = _picked(x, top_k_ids, support), top_k_behavior_log_prob
    arrays = (_picked(x, tokens[..., None])[..., 0], behavior_log_prob, *top_k)
    among = sampled_in_top_k(tokens, top_k_ids)[""]
    kl = top_k_kl(*arrays, among)
    return {"tv": top_k_tv(*arrays, among)[""]} | {f"kl{path}": of for path, of in kl.items()}


def _head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    if softcap is None:
        return z
    # tanh by e^(−2 abs(z)/cap), whose derivative has its digits where that of torch.tanh, 1 − tanh², has lost them
    t = torch.exp(-2.0 * (z / softcap).abs())
    return softcap * torch.sign(z) * -torch.expm1(-2.0 * (z / softcap).abs()) / (1.0 + t)


def _behavior_logits(of: str, recorded: dict[str, Any], vocabulary_size: int | None) -> Tensor:
    """Recorded logits, or those of a recorded head."""
    if of != "head":
        return recorded["behavior_logits"]
    hidden, weight, bias = (recorded[f"behavior_{name}"] for name in ("hidden", "weight", "bias"))
    return _head_logits(hidden, weight[:vocabulary_size], bias[:vocabulary_size], recorded["behavior_softcap"])


def _measure(
    divergence: Any, logits: Tensor, tokens: Tensor, b: Tensor, recorded: dict[str, Any], mapped: dict[str, Any]
) -> Any:
    """The divergence per token that a loss measures of constant logits."""
    if not isinstance(divergence, Measured):
        return divergence
    logits = logits.detach()
    if divergence.of == "top_k":
        names = ("top_k_ids", "top_k_behavior_log_prob")
        normalizer = tempered(logits, **mapped).logsumexp(-1)
        arrays = {"log_normalizer": normalizer, "tokens": tokens, "behavior_log_prob": b}
        both = top_k_divergences(logits=logits, **arrays, **{name: recorded[name] for name in names}, **mapped)
    else:
        behavior = _behavior_logits(divergence.of, recorded, mapped["vocabulary_size"])
        temperature = recorded["behavior_temperature"]
        both = full_divergences(logits=logits, behavior_logits=behavior, behavior_temperature=temperature, **mapped)
    return both[divergence.kind]


def _centred(
    centering: Recorded,
    objective: Any,
    logits: Tensor,
    recorded: dict[str, Any],
    mapped: dict[str, Any],
    per_token: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """The score-centring term over recorded ids and a tail, or over the support; its size; and that of its gradient."""
    support, size = mapped["support"], mapped["vocabulary_size"]
    x = tempered(logits, **mapped).log_softmax(-1)
    if centering is not Recorded.TOP_K:
        behavior = _behavior_logits(centering, recorded, size)
        b = tempered(behavior, recorded["behavior_temperature"], support, size).log_softmax(-1)
        value, sizes, _, of_gradient = _centering_term(objective, x, b, **per_token)
        return value, sizes, of_gradient
    ids = recorded["top_k_ids"]
    head = {name: recorded.get(f"top_k_{name}") for name in ("behavior_log_prob", "proximal_log_prob")}
    if support is not None:
        inside = support.gather(-1, ids)
        head = {name: None if log is None else torch.where(inside, log, -torch.inf) for name, log in head.items()}
    value, sizes, _, of_gradient = _centering_term(objective, _picked(x, ids, support), **head, tail=True, **per_token)
    return value, sizes, of_gradient


def logits_policy_loss(
    objective: Any,
    *,
    logits: Tensor,
    tokens: Tensor,
    behavior_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reduction: Reduction | None = None,
    divergence: Any = None,
    temperature: float | Tensor = 1.0,
    support: Tensor | None = None,
    vocabulary_size: int | None = None,
    entropy: bool = False,
    entropy_coefficient: float = 0.0,
    centering: Recorded | None = None,
    recorded: dict[str, Any] | None = None,
    diagnostics: bool = True,
    **options: Any,
) -> Outputs:
    mapped = {"temperature": temperature, "support": support, "vocabulary_size": vocabulary_size}
    known = token_log_prob(logits=logits, tokens=tokens, mask=mask, entropy=True, **mapped)
    measured = _measure(divergence, logits, tokens, behavior_log_prob, recorded or {}, mapped)
    outputs = policy_loss(
        objective,
        known["log_prob"],
        behavior_log_prob,
        advantages,
        mask=mask,
        reduction=reduction,
        divergence=measured,
        diagnostics=diagnostics,
        rounded=True,
        **_reduction_options(options),
        **{name: options[name] for name in ("proximal_log_prob", "reference_log_prob") if name in options},
    )
    terms = []
    if entropy_coefficient:
        terms.append((-entropy_coefficient * known["entropy"], known["entropy"], torch.zeros(())))
    if centering is not None:
        per_token = {"advantages": advantages, "mask": mask, "divergence": measured}
        terms.append(_centred(centering, objective, logits, recorded or {}, mapped, per_token))
    for term, sizes, of_gradient in terms:
        c = coefficients(reduction_of(objective, reduction), mask, **_reduction_options(options))
        more = {"loss": reduced(term, c)[""], "loss" + SIZE: reduced(sizes.detach(), c)[SIZE]}
        outputs |= {path: outputs[path] + more[path] for path in more}
        outputs["gradients" + SIZE] = of_gradient * c.abs().max() if c.numel() else torch.zeros(())
    figures = ("log_prob", "entropy") if entropy else ("log_prob",)
    return outputs | {name: known[name].detach() for name in figures}


def linear_log_prob(
    *, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_softcap: float | None = None, **arguments: Any
) -> Outputs:
    # a tanh of large logits is the same for many of them
    order, logits = (_without_padding(hidden, weight, bias, cap, **arguments) for cap in (None, logit_softcap))
    return token_log_prob(logits=logits, order=order, **arguments)


def _without_padding(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    vocabulary_size: int | None = None,
    **_: Any,
) -> Tensor:
    """Logits of the vocabulary: what the padding holds enters no product."""
    bias = None if bias is None else bias[:vocabulary_size]
    return _head_logits(hidden, weight[:vocabulary_size], bias, softcap)


def linear_policy_loss(
    objective: Any,
    *,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    **arguments: Any,
) -> Outputs:
    logits = _without_padding(hidden, weight, bias, logit_softcap, **arguments)
    return logits_policy_loss(objective, logits=logits, **arguments)
