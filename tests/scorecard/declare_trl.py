"""TRL: `GRPOTrainer._compute_loss`, from the log-probs on.

The trainer is a subclass whose `__init__` sets the attributes that `_compute_loss` reads, from a real `GRPOConfig`, and
whose `_get_per_token_logps_and_entropies` returns the given log-probs instead of running a model. Everything between
the log-probs and the scalar is TRL's own.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from row import Row
from trl import GRPOConfig, GRPOTrainer

from drpo_core import CISPO, PPOClip
from drpo_core.testing import from_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.testing import Implementation

PACKAGES = ("trl", "torch", "transformers", "accelerate")

REDUCTIONS = {
    "dapo": "token_mean",
    "cispo": "token_mean",
    "grpo": "sequence_mean_token_mean",
    "sapo": "sequence_mean_token_mean",
    "dr_grpo": "sequence_mean_token_sum",
}
HORIZON = 16


class LossOnly(GRPOTrainer):
    """A trainer without model, data and generation: just its loss."""

    def __init__(self, **settings: Any) -> None:
        """Set what `_compute_loss` reads, as `GRPOTrainer.__init__` does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = GRPOConfig(
                output_dir=tempfile.gettempdir(),
                use_cpu=True,
                bf16=False,
                report_to="none",
                steps_per_generation=1,
                per_device_train_batch_size=8,
                max_completion_length=HORIZON,
                **settings,
            )
        self.args = args
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Identity().train()
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.aux_loss_enabled = False
        self._entropy_bonus_enabled = False
        self.current_gradient_accumulation_steps = 1
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        for name in (
            "top_entropy_quantile",
            "off_policy_mask_threshold",
            "importance_sampling_level",
            "beta",
            "loss_type",
            "use_vllm",
            "vllm_importance_sampling_correction",
            "max_completion_length",
        ):
            setattr(self, name, getattr(args, name))
        self.given: torch.Tensor

    def _get_per_token_logps_and_entropies(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor, None]:
        del args, kwargs
        return self.given, torch.zeros_like(self.given.detach()), None


def policy_loss(loss_type: str, **settings: Any) -> Callable[..., torch.Tensor]:
    """One loss type as a function of the kit's arguments."""
    trainer = LossOnly(loss_type=loss_type, **settings)
    # "dapo" and "cispo" are given the number of tokens of the whole batch, the others have no such input
    counts_tokens = REDUCTIONS[loss_type] == "token_mean"

    def loss(
        log_prob: torch.Tensor,
        behavior_log_prob: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        normalizer: float | None = None,
    ) -> torch.Tensor:
        trainer.given = log_prob
        trainer._metrics["train"].clear()  # noqa: SLF001
        mask = mask.int()
        ids = torch.zeros(mask.shape, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": behavior_log_prob,
        }
        if counts_tokens:
            inputs["num_items_in_batch"] = mask.sum() if normalizer is None else torch.tensor(normalizer)
        return trainer._compute_loss(None, inputs)  # noqa: SLF001

    return loss


def clipped(objective: PPOClip, loss_type: str = "dapo") -> Implementation:
    """The clipped losses; `delta` is TRL's name of the dual clip."""
    low, high = objective.region
    return _implementation(
        loss_type,
        {"epsilon": low, "epsilon_high": high, "delta": objective.dual_clip},
        objective=objective,
        family=lambda other: clipped(other, loss_type),
    )


def cispo(objective: CISPO) -> Implementation:
    """CISPO, where `epsilon_high` is the cap itself."""
    return _implementation("cispo", {"epsilon_high": objective.max_ratio}, objective=objective, form="score", family=cispo)


def _implementation(loss_type: str, settings: dict[str, Any], **claims: Any) -> Implementation:
    return from_function(
        policy_loss(loss_type, **settings),
        "torch",
        name=f"trl {loss_type}",
        call_source=(
            f"from declare_trl import policy_loss  # tests/scorecard\n\nfunction = policy_loss({loss_type!r}, **{settings!r})"
        ),
        reduction=REDUCTIONS[loss_type],
        takes_normalizer=REDUCTIONS[loss_type] == "token_mean",
        horizon=float(HORIZON),
        dtypes=("float32",),
        **claims,
    )


def rows() -> list[Row]:
    """Every row of TRL."""
    local = "divided by the number of accumulation steps, which is exact where micro-batches have equally many rows"
    called = '`GRPOTrainer._compute_loss`, `loss_type="{}"`, {}'
    region = PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0)
    settings = "ε 0.2 / 0.28, `delta=3`"
    return [
        Row(implementation=clipped(region), called=called.format("dapo", settings)),
        Row(
            implementation=clipped(region, "grpo"),
            called=called.format("grpo", settings),
            boundary=local,
            counts_empty_rows=True,
        ),
        Row(
            implementation=clipped(region, "dr_grpo"),
            called=called.format("dr_grpo", f"{settings}, `max_completion_length={HORIZON}`"),
            boundary=local,
            counts_empty_rows=True,
        ),
        Row(implementation=cispo(CISPO(max_ratio=5.0)), called=called.format("cispo", "`epsilon_high=5`")),
        Row(
            implementation=_implementation("sapo", {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}),
            called=called.format("sapo", "temperatures 1 / 1.05"),
            boundary=local,
            counts_empty_rows=True,
        ),
    ]
