"""ROLL: `loss_func` of its workers on a stand-in for the worker, with log-probs in the place of a model's.

The counts of tokens and of samples, and the masks that multiply log-probs, are those of its strategies and its pipeline.
"""

from types import MethodType, SimpleNamespace

from sources import checkout, isolate

RELEASE = "8eb27cc"
PLACEHOLDERS = (
    "codetiming", "imageio", "roll.configs", "roll.distributed", "roll.pipeline.agentic.agentic_config",
    "roll.pipeline.agentic.agentic_pipeline", "roll.pipeline.base_worker", "roll.pipeline.rlvr.rlvr_config",
    "roll.pipeline.rlvr.utils", "roll.platforms", "roll.utils.kl_controller", "roll.utils.logging", "tensordict",
)  # fmt: skip
values = {
    "roll.pipeline.agentic.agentic_pipeline": {"get_episode_scores": lambda data: data.batch["scores"]},
    "roll.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
}
isolate("roll", root=checkout("roll", RELEASE), placeholders=PLACEHOLDERS, values=values)

import torch  # noqa: E402
from roll.pipeline.agentic.agentic_actor_pg_worker import ActorWorker as AgenticWorker  # noqa: E402
from roll.pipeline.rlvr.actor_pg_worker import ActorPGWorker  # noqa: E402
from roll.pipeline.rlvr.actor_worker import ActorWorker  # noqa: E402
from roll.utils.train_infer_corrections import apply_train_infer_correction_to_batch  # noqa: E402
from tensors import by_autograd  # noqa: E402
from test_roll import CASES  # noqa: E402

from drpo_core.modes._roll import DEFAULTS, FILTER, IS_WEIGHT  # noqa: E402

FUNCTION = (
    "`loss_func` of both workers of `roll/pipeline/rlvr` and of that of `roll/pipeline/agentic`; `train_infer_corrections`"
)
PACKAGES = ("torch",)
SETTINGS = CASES
METHODS = ("vanilla_pg", "ppo", "tis", "topr", "cispo", "kimi15")


def own_value(name, keys):
    """ROLL's TOPR, and its token mean over what filters drop."""
    filtered = "filters" in keys.get("train_infer_correction", ())
    return name == "topr" or (filtered and keys.get("loss_agg_mode") == "token-mean")


def theirs(name, keys):
    """Loss and gradient of ROLL."""
    c = {**DEFAULTS, **keys}
    given = c["train_infer_correction"] or {}
    correction = SimpleNamespace(
        is_weight=SimpleNamespace(**{**IS_WEIGHT, **given.get("is_weight", {})}),
        filters=[SimpleNamespace(**{**FILTER, **each}) for each in given.get("filters", ())],
    )
    config = SimpleNamespace(**{**c, "train_infer_correction": correction}, actor_train=SimpleNamespace(**c, pg_variant=name))
    # ratios of sequences are RLVR's
    at_sequences = c["importance_sampling"] == "seq"
    kinds = [ActorWorker if name == "ppo" else ActorPGWorker, *([] if at_sequences else [AgenticWorker])]

    def loss(batch):
        # a difference of one of them is one of the mean
        return sum(of(kind, batch) for kind in kinds) / len(kinds)

    def of(kind, batch):
        mask = batch["mask"].long()
        rows = ("proximal_log_prob", "behavior_log_prob", "reference_log_prob", "advantages")
        old, rollout, reference, advantages = (batch[row] * mask for row in rows)
        data = SimpleNamespace(
            batch={
                # its masks are of inputs, of which the first has no log-prob
                "response_mask": torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1),
                "final_response_mask": mask.clone(),
                "old_log_probs": old,
                "infer_logprobs": rollout,
                "ref_log_probs": reference,
                "advantages": advantages,
                "input_ids": None,
                "scores": batch["advantages"][:, 0],
            },
            non_tensor_batch={},
        )
        if config.enable_old_logprobs_recompute:
            apply_train_infer_correction_to_batch(config, data, update_mask_keys=["response_mask", "final_response_mask"])
        counted = {
            "response_mask": data.batch["response_mask"][:, 1:],
            "final_response_mask": data.batch["final_response_mask"],
        }
        data.meta_info = {
            "batch_num_tokens": {key: value.sum() for key, value in counted.items()},
            "global_valid_samples": {key: value.any(dim=-1).sum() for key, value in counted.items()},
        }

        def log_probs(logits, attention_mask, **_options):
            return logits * attention_mask[:, 1:]

        worker = SimpleNamespace(
            pipeline_config=config,
            strategy=SimpleNamespace(
                op_compute_log_probs=log_probs, op_compute_entropy=lambda logits, **_options: torch.zeros_like(logits)
            ),
            logger=SimpleNamespace(info=print, warning=print),
            get_old_log_probs_with_cache=lambda data, _log_probs: data.batch["old_log_probs"],
            _get_pg_metrics=lambda *_arguments, **_options: {},
            _pg_config_cache={},
            **dict.fromkeys(
                ("_pg_variant_logged", "_topr_sample_logged", "_cispo_config_logged", "_kimi15_config_logged"), True
            ),
        )
        for method in ("compute_sample_weights", "_get_or_cache_config", *(f"_compute_{each}_loss" for each in METHODS)):
            if hasattr(kind, method):
                setattr(worker, method, MethodType(getattr(kind, method), worker))
        return kind.loss_func(worker, data, batch["log_prob"])[0]

    return by_autograd(loss)
