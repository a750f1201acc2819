"""TRL: `_compute_loss` of its trainers on a stand-in for the trainer, with log-probs in the place of a model's."""

import math
from collections import defaultdict
from types import SimpleNamespace

import torch
from tensors import by_autograd
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

from drpo_core.modes._trl import DEFAULTS

FUNCTION = "`GRPOTrainer._compute_loss` and `GMPOTrainer._compute_loss`; the ratio of vLLM's sampler is a formula"
PACKAGES = ("trl", "torch")
EPSILON = {"epsilon": 0.1, "epsilon_high": 0.15}
CASES = [
    *((name, EPSILON) for name in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "gmpo")),
    ("cispo", {"epsilon_high": 1.1}),
    ("sapo", {}),
    ("vespo", {}),
    ("grpo", {"delta": 1.3}),
]
VARIANTS = [
    {},
    {"beta": 0.2},
    {"beta": 0.2, "use_bias_correction_kl": False, "importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.02},
    {"use_vllm": True, "vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.02},
]
SAMPLING = [
    {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": 1.3}
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    for low in (None, 0.7)
]


def _settings():
    for name, keys in CASES:
        if name == "gmpo":
            yield name, keys
            continue
        yield from ((name, {**keys, **variant}) for variant in VARIANTS)
        for sampling in SAMPLING:
            if name != "vespo" or sampling["vllm_importance_sampling_mode"] == "token_mask":
                yield name, {**keys, "use_vllm": True, "beta": 0.2, **sampling}


SETTINGS = tuple(_settings())

# SAPO and VESPO choose between Python numbers by the advantage, in torch's default dtype
torch.set_default_dtype(torch.float64)


def own_value(name, _keys):
    """TRL: −A times the ratio of the sequence."""
    return name == "gmpo"


def theirs(loss_type, keys):
    """Loss and gradient of TRL's method."""
    values = {**DEFAULTS, **({"epsilon": 0.4} if loss_type == "gmpo" else {}), **keys}
    vllm = values["use_vllm"]

    def loss(batch):
        x, sampling, old = (batch[name] for name in ("log_prob", "behavior_log_prob", "proximal_log_prob"))
        mask = batch["mask"]
        trainer = SimpleNamespace(
            **{name: values[name] for name in values if name not in ("epsilon", "epsilon_high")},
            args=SimpleNamespace(**values, steps_per_generation=1),
            epsilon_low=values["epsilon"],
            epsilon_high=values["epsilon"] if values["epsilon_high"] is None else values["epsilon_high"],
            loss_type=loss_type,
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(
                num_processes=1, gather=lambda array: array, reduce=lambda array, **_options: array, sync_gradients=True
            ),
            _get_per_token_logps_and_entropies=lambda *_args, **_options: (x, torch.zeros_like(x), None),
            aux_loss_enabled=False,
            _entropy_bonus_enabled=False,
            use_adaptive_entropy=False,
            current_gradient_accumulation_steps=1,
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            _metrics={"train": defaultdict(list)},
        )
        ids = torch.zeros_like(mask, dtype=torch.int64)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": mask.to(torch.float64),
            "advantages": batch["advantages"][:, 0],
            "old_per_token_logps": old if vllm else sampling,
            "ref_per_token_logps": batch["reference_log_prob"],
            "num_items_in_batch": mask.sum().to(torch.float64),
        }
        if vllm:
            inputs["sampling_per_token_logps"] = sampling
            if values["vllm_importance_sampling_correction"]:
                inputs["importance_sampling_ratio"] = sampler_ratio((old - sampling) * mask, values)
        method = GMPOTrainer if loss_type == "gmpo" else GRPOTrainer
        return method._compute_loss(trainer, trainer.model, inputs)

    return by_autograd(loss)


def sampler_ratio(log_ratio, values):
    """What TRL puts into the inputs of its loss while it generates, in our words: it is no function of its own there."""
    level, kind = values["vllm_importance_sampling_mode"].split("_")
    ratio = torch.exp(log_ratio.sum(dim=-1, keepdim=True) if level == "sequence" else log_ratio)
    low, high = values["vllm_importance_sampling_clip_min"], values["vllm_importance_sampling_clip_max"]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if kind == "truncate":
        return torch.clamp(ratio, low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)
