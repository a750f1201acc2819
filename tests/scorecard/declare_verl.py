"""verl: the policy losses registered in `verl.trainer.ppo.core_algos`, called as `verl.workers.utils.losses.ppo_loss` does.

The mask is boolean, and the denominator of the whole batch arrives in `config.global_batch_info`, as from verl's engines.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from row import Row
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

from drpo_core import CISPO, DPPO, PPOClip
from drpo_core.testing import from_function

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import torch

    from drpo_core.testing import Implementation

PACKAGES = ("verl", "torch", "tensordict", "transformers")

NO_DUAL_CLIP = 1e30


def policy_loss(loss_mode: str, loss_agg_mode: str, settings: dict[str, float]) -> Callable[..., torch.Tensor]:
    """A registered loss as a function of the kit's arguments."""
    function = get_policy_loss_fn(loss_mode)
    counted = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"

    def loss(
        log_prob: torch.Tensor,
        behavior_log_prob: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        normalizer: float | None = None,
    ) -> torch.Tensor:
        config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)
        if normalizer is not None:
            config.global_batch_info.update(dp_size=1, **{counted: normalizer})
        value, _ = function(
            old_log_prob=behavior_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=None,
        )
        return value

    return loss


def of_objective(objective: PPOClip | CISPO | DPPO) -> Implementation:
    """The registered loss that implements an objective, with its thresholds."""
    match objective:
        case PPOClip():
            mode, form = "vanilla", "ratio"
            low, high = objective.region
            cap = NO_DUAL_CLIP if objective.dual_clip is None else objective.dual_clip
        case DPPO(divergence="binary_tv" | "binary_kl"):
            mode, form = {"binary_tv": "dppo_tv", "binary_kl": "dppo_kl"}[objective.divergence], "score"
            low, high = objective.region
            cap = NO_DUAL_CLIP if objective.max_ratio is None else objective.max_ratio
        case CISPO():
            # the ratio is clamped to [1 − low, 1 + high]
            mode, form, low, high, cap = "cispo", "score", 1.0, objective.max_ratio - 1.0, NO_DUAL_CLIP
        case _:
            msg = f"verl has no loss for {objective!r}"
            raise TypeError(msg)
    settings = {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": cap}
    return _implementation(mode, "token-mean", settings, objective=objective, form=form, family=of_objective)


def _implementation(mode: str, aggregation: str, settings: dict[str, float], **claims: Any) -> Implementation:
    return from_function(
        policy_loss(mode, aggregation, settings),
        "torch",
        name=f"verl {mode}",
        call_source=(
            f"from declare_verl import policy_loss  # tests/scorecard\n\n"
            f"function = policy_loss({mode!r}, {aggregation!r}, {settings!r})"
        ),
        **{"reduction": aggregation.replace("seq-", "sequence_").replace("-", "_"), "dtypes": ("float32",), **claims},
    )


def _called(mode: str, aggregation: str, settings: str) -> str:
    return f'`compute_policy_loss_{mode}`, `loss_agg_mode="{aggregation}"`, {settings}'


def rows() -> list[Row]:
    """Every row of verl."""
    clamp = "log-ratio clamped to ±20"
    structural = partial(_implementation, aggregation="seq-mean-token-mean")
    return [
        Row(
            implementation=of_objective(PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0)),
            called=_called("vanilla", "token-mean", "clip 0.2 / 0.28, `clip_ratio_c=3`"),
            boundary=clamp,
        ),
        Row(
            implementation=of_objective(DPPO(delta_low=0.1, delta_high=0.2, max_ratio=20.0)),
            called=_called("dppo_tv", "token-mean", "δ 0.1 / 0.2, `clip_ratio_c=20` set explicitly"),
            boundary=clamp,
        ),
        Row(
            implementation=of_objective(DPPO(delta_low=0.03, delta_high=0.05, divergence="binary_kl", max_ratio=20.0)),
            called=_called("dppo_kl", "token-mean", "δ 0.03 / 0.05, `clip_ratio_c=20` set explicitly"),
            boundary=clamp,
        ),
        Row(
            implementation=structural(
                "gspo", settings={"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, form="score", local=False
            ),
            called=_called("gspo", "seq-mean-token-mean", "clip 3e-4 / 4e-4"),
            boundary="sequence-level ratio, clamped at e¹⁰",
        ),
        Row(
            implementation=of_objective(CISPO(max_ratio=5.0)),
            called=_called("cispo", "token-mean", "clip 1 / 4: the ratio is clamped to [0, 5]"),
            boundary=clamp,
        ),
        Row(
            implementation=structural("sapo", settings={"tau_pos": 1.0, "tau_neg": 1.05}),
            called=_called("sapo", "seq-mean-token-mean", "τ 1 / 1.05"),
            boundary=clamp,
        ),
    ]
