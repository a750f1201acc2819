"""ms-swift: the loss of its GRPO trainer on a stand-in for the trainer; all that is not torch is a placeholder."""

from collections import defaultdict
from types import SimpleNamespace

from sources import isolate

PLACEHOLDERS = (
    "accelerate", "swift.dataset", "swift.rewards", "swift.rl_core", "swift.rlhf_trainers.arguments",
    "swift.rlhf_trainers.gkd_helpers", "swift.rlhf_trainers.rollout_mixin", "swift.rlhf_trainers.utils",
    "swift.sequence_parallel", "swift.template", "swift.trainers", "swift.utils", "transformers", "trl",
)  # fmt: skip


class _Base:
    """The trainer of TRL, of which ms-swift deletes two methods."""

    def __init__(self):
        """Deleted."""

    def log(self):
        """Deleted."""


values = {"trl": {"GRPOTrainer": _Base}, "accelerate.utils": {"gather_object": lambda given: given}}
isolate("swift", placeholders=PLACEHOLDERS, values=values)

import torch  # noqa: E402
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer  # noqa: E402
from tensors import by_autograd  # noqa: E402
from test_ms_swift import CLIP, EPSILON, VARIANTS  # noqa: E402

from drpo_core.modes._ms_swift import DEFAULTS, LOSSES  # noqa: E402

FUNCTION = "`GRPOTrainer._compute_loss_and_metrics`"
PACKAGES = ("ms-swift", "torch")
AT_SEQUENCES = {"importance_sampling_level": "sequence"}
TRUNCATED = {"rollout_importance_sampling_mode": "sequence_truncate", "rollout_importance_sampling_threshold": 1.01}
METHODS = (
    "_compute_fipo_influence", "_get_rollout_is_correction", "_apply_rollout_importance_sampling",
    "_compute_sequence_level_ratios", "_compute_off_policy_sequence_mask", "_compute_rollout_offpolicy_metrics",
    "_compute_is_correction_metrics", "_undo_gradient_accumulation_scaling", "_compute_loss_and_metrics",
)  # fmt: skip


def _settings():
    for name in LOSSES:
        own = EPSILON.get(name, CLIP)
        for keys in VARIANTS:
            if name != "fipo" or "importance_sampling_level" not in keys:
                yield name, {**own, **keys}
        if name != "fipo":
            yield name, {**own, **AT_SEQUENCES}
            yield name, {**own, **AT_SEQUENCES, **TRUNCATED, "beta": 0.0}
    yield "fipo", {**CLIP, "fipo_safety_threshold": None}
    yield "fipo", {**CLIP, "fipo_safety_threshold": None, "fipo_clip_high_only": False, "fipo_decay_rate": 2.0}
    yield "fipo", {**CLIP, "delta": 1.3, "fipo_clip_range": 0.5}
    yield "grpo", {"epsilon": 0.05, "delta": 1.2}


SETTINGS = tuple(_settings())


def own_value(name, keys):
    """Where `delta` leaves no gradient the threshold changes the constant."""
    return name == "fipo" and {**DEFAULTS, **keys}["fipo_safety_threshold"] is not None


def theirs(name, keys):
    """Loss and gradient of ms-swift."""
    c = {**DEFAULTS, **keys}
    high = c["epsilon"] if c["epsilon_high"] is None else c["epsilon_high"]

    def loss(batch):
        x, mask = batch["log_prob"], batch["mask"]
        trainer = SimpleNamespace(
            **{key: c[key] for key in c if key not in ("epsilon", "epsilon_high", "delta")},
            epsilon_low=c["epsilon"],
            epsilon_high=high,
            loss_type=name,
            fipo_gamma=2.0 ** (-1.0 / c["fipo_decay_rate"]),
            args=SimpleNamespace(delta=c["delta"], log_entropy=False, top_entropy_quantile=1.0, gradient_accumulation_steps=1),
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(num_processes=1, gather_for_metrics=lambda tensor: tensor),
            _get_per_token_logps_and_entropies=lambda *_arguments, **_options: (x, None),
            compute_entropy=False,
            overlong_filter=False,
            kl_in_reward=False,
            log_rollout_offpolicy_metrics=False,
            disable_rollout_importance_sampling=False,
            _has_teacher=False,
            sdar_loss_coef=0.0,
            chord_sft_iterator=None,
            model_accepts_loss_kwargs=False,
            compute_loss_func=None,
            current_gradient_accumulation_steps=1,
            _metrics={"train": defaultdict(list)},
        )
        for method in METHODS:
            setattr(trainer, method, getattr(GRPOTrainer, method).__get__(trainer))
        grpo_batch = SimpleNamespace(
            completion_mask=mask,
            truncated_mask=torch.zeros(len(mask), dtype=torch.bool),
            advantages=batch["advantages"],
            old_per_token_logps=batch["proximal_log_prob"],
            rollout_per_token_logps=batch["behavior_log_prob"],
            ref_per_token_logps=batch["reference_log_prob"],
            num_items_in_batch=mask.sum(),
        )
        return trainer._compute_loss_and_metrics(trainer.model, {}, grpo_batch)[0]

    return by_autograd(loss)
