"""torchrl: a `GRPOLoss` whose policy loss is an objective of drpo-core, given as one argument.

Masks, log-probs, entropy bonus, KL penalties, aggregation and torchrl's own entries of the output are those of
`torchrl.objectives.llm.GRPOLoss`; the per-token loss and `clip_fraction` are the objective's.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torchrl.objectives.llm import GRPOLoss, LLMLossOutput

from drpo_core import PolicyGradient, token_diagnostics
from drpo_core.modes.mode import refuse_mode
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.loss import linear_reduction, policy_loss, token_loss

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.objectives.llm import GRPOLoss as _Loss
    from torchrl.objectives.llm import LLMLossOutput as _Output

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics, Statistic
else:
    _Loss, _Output = GRPOLoss, LLMLossOutput

__all__ = ["STATISTICS", "PolicyLossModule", "PolicyLossOutput"]

STATISTICS = tuple(token_diagnostics(PolicyGradient(), *(torch.zeros(1) for _ in range(3))))
"""Names of the statistics of `drpo_core.token_diagnostics`."""


class PolicyLossOutput(_Output):  # type: ignore[misc]
    """torchrl's entries and, as 0-d tensors without gradient, the statistics of `drpo_core.token_diagnostics` by name."""

    __annotations__ = dict.fromkeys(STATISTICS, "torch.Tensor | None")
    vars().update(dict.fromkeys(STATISTICS))

    def mean(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Mean of torchrl's own entries: with ``reduce=True``, the scalar that its recipes call `backward` on.

        That is an average over all entries, of which only losses have gradients: more entries would shrink them.
        """
        return LLMLossOutput.from_tensordict(self.to_tensordict().exclude(*STATISTICS)).mean(*args, **kwargs)


class PolicyLossModule(_Loss):  # type: ignore[misc]
    """Replaces the policy loss of `torchrl.objectives.llm.GRPOLoss`.

    The behaviour policy's log-probs, log μ, are what `tensor_keys.sample_log_prob` names, by default what the collector's
    policy wrote: ``("log_probs", "full")``. A `BehaviorPolicyWarning` says where they are not the sampling policy's. The
    output has the statistics of `drpo_core.token_diagnostics` as entries, over the tokens of the masking strategy;
    `clip_fraction` is the share of tokens outside the objective's trust region, among those with A ≠ 0.

    Parameters
    ----------
    actor_network
        As for `GRPOLoss`.
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    **kwargs
        As for `GRPOLoss`.

    Raises
    ------
    ValueError
        If the objective is a mode, as torchrl aggregates by itself, or an argument would have no effect: `clip_epsilon`, as
        the objective has its own thresholds; `clip_value` or `gamma`, which torchrl does not read; ``reduction="sum"`` or an
        unknown `aggregation`, which torchrl takes for a token mean.

    Examples
    --------
    ::

        loss_fn = PolicyLossModule(policy, objective=DRPO(delta=0.15))
        output = loss_fn(batch)
        output.loss_objective.backward()
    """

    output_type = PolicyLossOutput
    out_keys: list[str]
    _tokens: dict[str, Any]
    _statistics: Diagnostics
    _stand_in: torch.Tensor

    def __init__(self, actor_network: Any = None, *, objective: Objective, **kwargs: Any) -> None:  # noqa: ANN401
        refuse_mode(objective, "torchrl")
        _refuse(kwargs)
        super().__init__(actor_network, **kwargs)
        self.objective = objective
        self.out_keys = [*self.out_keys, *STATISTICS]
        if self.masking_strategy == "generic":
            msg = (
                "masking_strategy='generic' counts the prompt's tokens, which the behaviour policy did not sample; 'sft' "
                "counts those of the response, 'rlhf' those of the assistant"
            )
            warnings.warn(msg, BehaviorPolicyWarning, stacklevel=2)

    def forward(self, tensordict: TensorDictBase) -> PolicyLossOutput:
        """Losses and statistics of a batch; see `GRPOLoss`."""
        output: PolicyLossOutput = super().forward(self._aligned(tensordict))
        for name, statistic in self._statistics.items():
            output.set(name, _value(statistic))
        output.set("clip_fraction", _value(self._statistics["outside_fraction"]))
        del self._tokens, self._statistics, self._stand_in  # with the graph that they hold
        return output

    def _aligned(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Advantages padded on the left: torchrl pads ragged ones on the right, and the tokens they belong to on the left."""
        advantages = tensordict.get(self.tensor_keys.advantage, None, as_padded_tensor=True, padding_side="left")
        return tensordict if advantages is None else tensordict.copy().set(self.tensor_keys.advantage, advantages)

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple[Any, ...]:
        log_weight, dist, kl_approx, mask = super()._log_weight(tensordict, adv_shape)
        keys = self.tensor_keys
        behavior_log_prob = tensordict.get(keys.sample_log_prob, as_padded_tensor=True, padding_side="left", padding_value=0.0)
        if keys.sample_log_prob == keys.ref_log_probs:
            _warn(f"tensor_keys.sample_log_prob names the reference policy's log-probs, {keys.ref_log_probs!r}")
        elif bool((dist.mask & ~torch.isfinite(behavior_log_prob)).any()):
            _warn(
                f"{keys.sample_log_prob!r} has no log-prob for some of the tokens that masking_strategy="
                f"{self.masking_strategy!r} selects, and torchrl leaves those out of the loss"
            )
        self._tokens = {"log_prob": tensordict["_cur_log_prob"], "behavior_log_prob": behavior_log_prob, "mask": mask}
        return log_weight, dist, kl_approx, mask

    def _compute_policy_objective(
        self, log_weight: torch.Tensor, advantage: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses, if torchrl is not to aggregate them; else a stand-in, until torchrl gives the mask to aggregate by."""
        self._tokens["advantages"] = advantage.expand_as(log_weight).squeeze(-1)
        self._stand_in, clip_fraction = log_weight, log_weight.new_zeros(())
        if "none" not in (self.aggregation, self.reduction):
            return self._stand_in, clip_fraction
        with torch.no_grad():
            self._statistics = token_diagnostics(self.objective, **self._tokens)
        return token_loss(self.objective, **self._tokens).unsqueeze(-1), clip_fraction

    def _aggregate_loss_value(
        self, value: torch.Tensor, mask: torch.Tensor, tensordict: TensorDictBase | None = None
    ) -> torch.Tensor:
        """Torchrl's aggregation: of the policy loss by its coefficients, in one pass with gradient and statistics."""
        aggregate = super()._aggregate_loss_value
        if value is not self._stand_in:
            aggregated: torch.Tensor = aggregate(value, mask, tensordict=tensordict)
            return aggregated
        shape = torch.Size()

        def total(values: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            nonlocal shape
            result: torch.Tensor = aggregate(values.unsqueeze(-1), mask, tensordict=tensordict)
            shape = result.shape
            return result.sum()

        tokens: dict[str, Any] = self._tokens
        loss, statistics = policy_loss(self.objective, **tokens, reduction=linear_reduction(total))
        assert statistics is not None
        self._statistics = statistics
        return loss.reshape(shape)


_AGGREGATIONS = (None, "token_mean", "prompt_mean", "none")
_REDUCTIONS = (None, "mean", "none")


def _refuse(arguments: dict[str, Any]) -> None:
    """Raise for an argument that would silently have no effect."""
    for name in ("clip_epsilon", "clip_value", "gamma"):
        if arguments.get(name) is not None:
            msg = f"{name}: expected none, got {arguments[name]!r}; the objective has its own thresholds, and nothing reads it"
            raise ValueError(msg)
    for name, known in {"aggregation": _AGGREGATIONS, "reduction": _REDUCTIONS}.items():
        if arguments.get(name) not in known:
            msg = f"{name}: expected one of {', '.join(map(repr, known))}, got {arguments[name]!r}, which has no effect"
            raise ValueError(msg)


def _warn(problem: str) -> None:
    msg = f"{problem}; the trust region lies around the policy that these log-probs belong to"
    warnings.warn(msg, BehaviorPolicyWarning, stacklevel=4)


def _value(statistic: Statistic) -> torch.Tensor:
    """0 where nothing was counted, so that averages over batches stay finite."""
    return torch.where(statistic.count > 0, statistic.value, 0.0)
