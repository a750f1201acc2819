"""TRL: a `GRPOTrainer` whose policy loss is an objective of drpo-core, given as one argument.

Only `_compute_loss` is replaced. Generation, rewards, advantages, accumulation and logging are TRL's own, and so is the
aggregation that `GRPOConfig.loss_type` names ("dapo", "grpo", "bnpo", "dr_grpo"). `epsilon`, `epsilon_high` and `delta`
of the configuration are not read: the objective has its own thresholds.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from trl import GRPOTrainer

from drpo_core import merge_diagnostics, sequence_mean_token_mean, summarize, token_mean
from drpo_core.diagnostics import Mean, map_diagnostics
from drpo_core.modes.mode import refuse_mode
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.loss import policy_loss

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
else:
    _Trainer = object

__all__ = ["PolicyLossMixin", "PolicyLossTrainer"]

_AGGREGATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")


class PolicyLossMixin(_Trainer):  # type: ignore[misc]
    """Replaces the policy loss of a `trl.GRPOTrainer`, or of a subclass of it that keeps its `_compute_loss`.

    The behaviour policy's log-probs, log μ, are `sampling_per_token_logps`, which TRL has from vLLM or from a
    `rollout_func`. Without them the anchor is `old_per_token_logps`, which the trainer recomputes before its first update
    on a batch, else the current policy itself, detached; either is announced by a `BehaviorPolicyWarning`. A sampling
    log-prob that is NaN, which vLLM returns for a token that it can't score, is replaced by the next of these. TRL's own
    importance weights for vLLM are not applied, because the ratio π/μ corrects for that mismatch already.

    Logged beside TRL's own metrics: the statistics of `drpo_core.token_diagnostics` as ``trust_region/<name>``, and under its
    names `entropy`, `kl`, ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` and ``clip_ratio/region_mean``, the shares of
    all tokens that diverge outside the objective's trust region with A < 0, A > 0 and either.

    Parameters
    ----------
    *args, **kwargs
        As for `trl.GRPOTrainer`.
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.

    Raises
    ------
    ValueError
        If `args` asks for what an objective replaces or the mixin does not do: another `loss_type`,
        ``importance_sampling_level="sequence"``, or an entropy bonus.

    Examples
    --------
    ::

        class Trainer(PolicyLossMixin, GRPOTrainer):
            pass

        Trainer(model, reward_funcs, args=GRPOConfig(num_iterations=2), train_dataset=data, objective=DRPO(delta=0.15))
    """

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:  # noqa: ANN401 -- GRPOTrainer's own
        refuse_mode(objective, "TRL")
        super().__init__(*args, **kwargs)
        self.objective = objective
        _refuse(self.args, entropy_bonus=self._entropy_bonus_enabled)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:  # noqa: ANN401
        completion_mask = inputs["completion_mask"]
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        score = self._get_per_token_logps_and_entropies
        log_prob, entropies, aux_loss = score(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            completion_mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            # what a multimodal model is given besides; whichever of it this release of TRL knows
            **{name: inputs[name] for name in inspect.signature(score).parameters if name in inputs},
        )
        behavior_log_prob = _anchor(log_prob.detach(), inputs)
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        weights = None
        if self.off_policy_mask_threshold is not None:
            weights = self.get_off_policy_mask(
                advantages=advantages,
                per_token_logps=log_prob,
                sampling_per_token_logps=behavior_log_prob,
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            ).expand_as(log_prob)
        if self.top_entropy_quantile < 1.0:
            high_entropy = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
            weights = high_entropy if weights is None else weights * high_entropy

        mask = mask.bool()
        mode = "train" if self.model.training else "eval"
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        reduction = sequence_mean_token_mean if self.loss_type == "grpo" else token_mean
        normalizer = self._normalizer(mask, inputs["num_items_in_batch"], accumulated)
        loss, statistics = policy_loss(
            self.objective,
            log_prob=log_prob,
            behavior_log_prob=behavior_log_prob,
            advantages=advantages.expand_as(log_prob),
            mask=mask,
            reduction=reduction,
            normalizer=normalizer,
            token_weights=None if weights is None else weights.to(log_prob.dtype),
        )
        assert statistics is not None
        statistics["entropy"] = _mean(entropies, mask)
        if self.beta != 0.0:
            to_reference = torch.where(mask, inputs["ref_per_token_logps"] - log_prob, 0.0)
            penalty = torch.exp(to_reference) - to_reference - 1
            if self.args.use_bias_correction_kl:
                penalty = penalty * torch.exp(torch.where(mask, log_prob - behavior_log_prob, 0.0))
            loss = loss + self.beta * reduction(penalty, mask, normalizer=normalizer)
            statistics["kl"] = _mean(penalty, mask)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        for name, figure in self._figures(statistics).items():
            self._metrics[mode][name].append(figure)
        return loss

    def _normalizer(self, mask: torch.Tensor, num_items: torch.Tensor, accumulated: float) -> torch.Tensor | float:
        """What TRL divides the sum of tokens by, or with "grpo" the sum of the sequences' means."""
        if self.loss_type == "dapo":
            normalizer: torch.Tensor = num_items.clamp(min=1.0) / self.accelerator.num_processes
            # the count is of the generation batch, of which one accumulation window is a part
            if self.model.training:
                normalizer = normalizer * (accumulated / self.args.steps_per_generation)
            return normalizer
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1.0) * accumulated
        rows: int = mask.size(0)
        return rows * accumulated * (1 if self.loss_type == "grpo" else self.max_completion_length)

    def _figures(self, statistics: Diagnostics) -> dict[str, float]:
        """Statistics of all ranks, under TRL's kind of names, with one collective and one transfer."""
        counted = statistics["ratio_mean"].count
        low, high = (cast("Mean", statistics[f"outside_{sign}_diverging_fraction"]) for sign in ("negative", "positive"))
        named = {f"trust_region/{name}" if "_" in name else name: value for name, value in statistics.items()}
        named |= {
            "clip_ratio/low_mean": Mean(low.total, counted),
            "clip_ratio/high_mean": Mean(high.total, counted),
            "clip_ratio/region_mean": Mean(low.total + high.total, counted),
        }
        mine = torch.stack([field for statistic in named.values() for field in statistic])
        ranks = [iter(rank) for rank in self.accelerator.gather(mine.unsqueeze(0))]
        return summarize(merge_diagnostics(*(map_diagnostics(lambda _, rank=rank: next(rank), named) for rank in ranks)))


class PolicyLossTrainer(PolicyLossMixin, GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` with an `objective`; see `PolicyLossMixin`."""


def _refuse(args: Any, *, entropy_bonus: bool) -> None:  # noqa: ANN401
    """Raise for a setting that would silently have no effect."""
    if args.loss_type not in _AGGREGATIONS:
        msg = (
            f"loss_type: expected one of {', '.join(_AGGREGATIONS)}, got {args.loss_type!r}; with an objective it names the "
            "aggregation only"
        )
        raise ValueError(msg)
    if args.importance_sampling_level != "token":
        msg = f"importance_sampling_level: expected 'token', got {args.importance_sampling_level!r}"
        raise ValueError(msg)
    if entropy_bonus:
        msg = "entropy_coef, use_adaptive_entropy: expected no entropy bonus; the policy loss of an objective has none"
        raise ValueError(msg)


def _anchor(log_prob: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Log μ as sampled, else as recomputed, else the current policy's."""
    sampled, old = inputs.get("sampling_per_token_logps"), inputs.get("old_per_token_logps")
    fallback: torch.Tensor = log_prob if old is None else old
    if sampled is not None:
        return torch.where(torch.isnan(sampled), fallback, sampled)
    remedy = (
        "Only a rollout_func that returns the log-probs it sampled with, or use_vllm=True, gives TRL the behaviour policy's: "
        "sampling_per_token_logps"
    )
    if old is None:
        msg = (
            "no log-probs of the behaviour policy, nor old ones: the anchor is the current policy, so that every ratio is 1, "
            "no threshold matters and all objectives have the same gradient (TRL keeps old_per_token_logps if "
            f"num_iterations > 1 or steps_per_generation > gradient_accumulation_steps). {remedy}"
        )
    else:
        msg = (
            "the anchor is old_per_token_logps, which the trainer recomputes with its own forward pass: not the log-probs "
            "that tokens were sampled with, from which they differ by the inference engine's rounding and by any top-p, "
            f"top-k or min-p truncation. {remedy}"
        )
    warnings.warn(msg, BehaviorPolicyWarning, stacklevel=3)
    return fallback


def _mean(values: torch.Tensor, mask: torch.Tensor) -> Mean:
    values = torch.where(mask, values.detach(), 0.0)
    return Mean(values.sum(), mask.sum().to(values.dtype))
