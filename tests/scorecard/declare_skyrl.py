"""SkyRL: the losses of its `PolicyLossRegistry`, which return masked sums.

The reduction is SkyRL's own: `apply_loss_reduction_to_advantages_minibatch` folds it into the advantages before the loss.
A denominator of the whole batch takes its place where the kit gives one, as when SkyRL scales a minibatch and then
walks through its micro-batches. SkyRL's `safe_exp_delta` computes in float32.
"""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any

import typing_extensions
from row import Row

from drpo_core import CISPO, DPPO, PolicyGradient, PPOClip
from drpo_core.testing import from_function

# on Python < 3.12 pydantic refuses typing.TypedDict, which SkyRL's request types use; no loss depends on it
typing.TypedDict = typing_extensions.TypedDict

from loguru import logger  # noqa: E402
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, apply_loss_reduction_to_advantages_minibatch  # noqa: E402
from skyrl.train.config import AlgorithmConfig  # noqa: E402
from skyrl.train.config.config import CISPOConfig, DPPOConfig  # noqa: E402

logger.disable("skyrl")

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from drpo_core.testing import Implementation

PACKAGES = ("skyrl", "torch")


def policy_loss(loss_type: str, reduction: str = "token_mean", **settings: Any) -> Callable[..., torch.Tensor]:
    """A registered loss with its reduction, as a function of the kit's arguments."""
    function = PolicyLossRegistry.get(loss_type)
    config = AlgorithmConfig(policy_loss_type=loss_type, loss_reduction=reduction, **settings)

    def loss(
        log_prob: torch.Tensor,
        behavior_log_prob: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        normalizer: float | None = None,
    ) -> torch.Tensor:
        loss_mask = mask.to(log_prob.dtype)
        if normalizer is None:
            rows, width = mask.shape
            scaled = apply_loss_reduction_to_advantages_minibatch(advantages, loss_mask, reduction, rows, width)
        elif reduction == "token_mean":
            scaled = advantages / normalizer
        else:
            scaled = advantages / (normalizer * loss_mask.sum(dim=-1, keepdim=True).clamp(min=1))
        value, _ = function(log_prob, behavior_log_prob, scaled, config=config, loss_mask=loss_mask, rollout_logprobs=None)
        return value

    return loss


def of_objective(objective: PPOClip | CISPO | DPPO | PolicyGradient) -> Implementation:
    """The registered loss that implements an objective, with its thresholds."""
    settings: dict[str, Any]
    form = "ratio"
    match objective:
        case PPOClip():
            low, high = objective.region
            mode = "regular" if objective.dual_clip is None else "dual_clip"
            settings = {"eps_clip_low": low, "eps_clip_high": high}
            if objective.dual_clip is not None:
                settings["clip_ratio_c"] = objective.dual_clip
        case DPPO(divergence="binary_tv" | "binary_kl", max_ratio=None):
            low, high = objective.region
            mode, settings = "dppo", {"dppo": DPPOConfig(dppo_type=objective.divergence, delta_low=low, delta_high=high)}
        case CISPO():
            mode, form = "cispo", "score"
            settings = {"cispo": CISPOConfig(cispo_eps_clip_low=1.0, cispo_eps_clip_high=objective.max_ratio - 1.0)}
        case PolicyGradient(max_ratio=None):
            mode, settings = "importance_sampling", {}
        case _:
            msg = f"SkyRL has no loss for {objective!r}"
            raise TypeError(msg)
    return _implementation(mode, "token_mean", settings, objective=objective, form=form, family=of_objective)


def _implementation(mode: str, reduction: str, settings: dict[str, Any], **claims: Any) -> Implementation:
    kind = getattr(settings.get("dppo"), "dppo_type", "")
    return from_function(
        policy_loss(mode, reduction, **settings),
        "torch",
        name=f"skyrl {mode}{' ' + kind if kind else ''}",
        call_source=(
            "from declare_skyrl import *  # tests/scorecard\n\n"
            f"function = policy_loss({mode!r}, {reduction!r}, **{settings!r})"
        ),
        reduction={"token_mean": "token_mean", "sequence_mean": "sequence_mean_token_mean"}[reduction],
        dtypes=("float32",),
        **claims,
    )


def rows() -> list[Row]:
    """Every row of SkyRL."""
    clamp = "log-ratio clamped to ±20"
    called = 'policy loss `"{}"`, `loss_reduction="{}"`, {}'
    return [
        Row(
            implementation=of_objective(PPOClip(eps_low=0.2, eps_high=0.28)),
            called=called.format("regular", "token_mean", "clip 0.2 / 0.28"),
            boundary=clamp,
        ),
        Row(
            implementation=of_objective(PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0)),
            called=called.format("dual_clip", "token_mean", "clip 0.2 / 0.28, `clip_ratio_c=3`"),
            boundary=clamp,
        ),
        Row(
            implementation=of_objective(DPPO(delta_low=0.1, delta_high=0.2)),
            called=called.format("dppo", "token_mean", "`binary_tv`, δ 0.1 / 0.2"),
            boundary=clamp,
        ),
        Row(
            implementation=of_objective(DPPO(delta_low=0.03, delta_high=0.05, divergence="binary_kl")),
            called=called.format("dppo", "token_mean", "`binary_kl`, δ 0.03 / 0.05"),
            boundary=clamp,
        ),
        Row(
            implementation=of_objective(CISPO(max_ratio=5.0)),
            called=called.format("cispo", "token_mean", "clip 1 / 4: the ratio is clamped to [0, 5]"),
            boundary=clamp,
        ),
        Row(
            implementation=of_objective(PolicyGradient()),
            called=called.format("importance_sampling", "token_mean", "no settings"),
        ),
        Row(
            implementation=_implementation(
                "gspo", "sequence_mean", {"eps_clip_low": 3e-4, "eps_clip_high": 4e-4}, form="score", local=False
            ),
            called=called.format("gspo", "sequence_mean", "clip 3e-4 / 4e-4"),
            counts_empty_rows=True,
            boundary="sequence-level ratio, clamped at e¹⁰",
        ),
        Row(
            implementation=_implementation("sapo", "sequence_mean", {}),
            called=called.format("sapo", "sequence_mean", "τ 1 / 1.05"),
            counts_empty_rows=True,
            boundary=clamp,
        ),
    ]
