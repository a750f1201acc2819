"""AReaL: its loss functions and its rejection sampling, with what its actor passes for the policies."""

from sources import isolate

PLACEHOLDERS = (
    "areal.engine", "areal.infra", "areal.utils.logging", "areal.utils.name_resolve", "areal.utils.pkg_version",
    "areal.utils.seqpack", "einops", "hydra", "omegaconf", "torchdata", "uvloop", "yaml",
)  # fmt: skip
isolate("areal", placeholders=PLACEHOLDERS)

import torch  # noqa: E402
from areal.api.cli_args import RejectionSamplingConfig  # noqa: E402
from areal.utils.functional.functional import ppo_actor_loss_fn, sapo_loss_fn  # noqa: E402
from tensors import by_autograd  # noqa: E402
from test_areal import CLIP, RULES, VARIANTS  # noqa: E402

from drpo_core.modes._areal import DEFAULTS  # noqa: E402

FUNCTION = "`ppo_actor_loss_fn`, `sapo_loss_fn` and `apply_rejection_sampling` of `areal.utils.functional`, padded and packed"
PACKAGES = ("areal", "torch")
DECOUPLED = {**CLIP, "use_decoupled_loss": True}
SETTINGS = [
    *VARIANTS,
    *(("ppo", {**DECOUPLED, "rejection_sampling": rule, "importance_sampling_level": level}) for rule, level in RULES),
]


def theirs(name, keys):
    """Loss and gradient of AReaL."""
    c = {**DEFAULTS, **keys}
    rule = None if c["rejection_sampling"] is None else RejectionSamplingConfig(**c["rejection_sampling"])
    recomputed = c["use_decoupled_loss"] or c["recompute_logprob"]

    def loss(batch):
        # a difference of one of them is one of the mean
        width = batch["mask"].shape[1]
        packed = {key: value.reshape(-1) for key, value in batch.items()}
        starts = torch.arange(0, batch["mask"].numel() + 1, width)
        return (of(batch, None) + of(packed, starts)) / 2.0

    def of(batch, starts):
        x, advantages, mask = batch["log_prob"], batch["advantages"], batch["mask"]
        old = batch["proximal_log_prob" if c["recompute_logprob"] else "behavior_log_prob"]
        level = {"importance_sampling_level": c["importance_sampling_level"], "cu_seqlens": starts}
        if name == "sapo":
            return sapo_loss_fn(x, old, advantages, c["sapo_tau_pos"], c["sapo_tau_neg"], mask, **level)[0]
        value, _ = ppo_actor_loss_fn(
            x,
            batch["proximal_log_prob"] if recomputed else old,
            old,
            advantages,
            c["eps_clip"],
            mask,
            eps_clip_higher=c["eps_clip_higher"],
            c_clip=c["c_clip"],
            rejection_sampling=rule,
            **level,
        )
        return value

    return by_autograd(loss)
