"""The modes of ROLL against its formulas, sequence by sequence, and its keys."""

import pytest
import torch
from framework_rows import assert_same, batch, keeps_some

from drpo_core import PPOClip, modes
from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import DivergenceMask, ImportanceWeight, RatioMask
from drpo_core.modes import Mode
from drpo_core.modes._roll import DEFAULTS, FILTER, IS_WEIGHT, LOSSES


def at_level(tokens, level):
    """ROLL's sum or mean over a sequence, for each of its tokens."""
    if level == "token":
        return tokens
    return (tokens.sum() if level == "sequence" else tokens.mean()).expand_as(tokens)


def kept(row, filters):
    mask = torch.ones_like(row.a.expand_as(row.old))
    for each in filters:
        rule = {**FILTER, **each}
        if not rule["enabled"]:
            continue
        ratio = torch.exp(at_level(row.old - row.mu, rule["agg_type"]))
        diff = at_level(torch.exp(row.old) - torch.exp(row.mu), rule["agg_type"])
        for kind, statistic in (("ratio", ratio), ("diff", diff)):
            if rule[f"{kind}_enabled"]:
                mask = mask * (statistic >= rule[f"{kind}_low"]) * (statistic <= rule[f"{kind}_high"])
    return mask


def mean(tokens, mask):
    return (tokens * mask).sum() / mask.sum().clamp(min=1.0)


def policy_loss(name, c, x, row, mask):
    """Tokens of the loss."""
    ell = x - row.old
    if c["importance_sampling"] == "seq":
        ell = mean(ell, mask).expand_as(ell)
    ratio = torch.exp(ell)
    if name == "ppo":
        low, high = (c["pg_clip_low"], c["pg_clip_high"]) if c["use_pg_clip_range"] else (c["pg_clip"], c["pg_clip"])
        loss = -torch.minimum(ratio * row.a, torch.clamp(ratio, 1.0 - low, 1.0 + high) * row.a)
        dual = -torch.maximum(-loss, (1.0 + 2.0 * c["pg_clip"]) * row.a)
        return dual if c["dual_clip_loss"] and row.a < 0 else loss
    ratio = ratio.detach()
    score = 1.0 if row.a > 0 else 0.0
    low, high = 1.0 - c["cispo_epsilon_low"], 1.0 + c["cispo_epsilon_high"]
    factor = {
        "vanilla": torch.ones_like(ratio),
        "kimi15": torch.ones_like(ratio),
        "tis": torch.clamp(ratio, c["tis_lower_bound"], c["tis_upper_bound"]),
        "topr": torch.ones_like(ratio) if score > 0 else torch.clamp(ratio, 0.0, 1.0),
        "cispo": torch.clamp(ratio, low, high),
    }[name]
    if name == "cispo" and c["cispo_use_unified_mask"]:
        factor = factor * ~(((row.a > 0) & (ratio > high)) | ((row.a < 0) & (ratio < low)))
    square = c["kimi15_tau"] * 0.5 * (x - row.old) ** 2 if name == "kimi15" else 0.0
    return -factor * row.a * x + square


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}
    correction = c["train_infer_correction"] or {}
    weight, filters = {**IS_WEIGHT, **correction.get("is_weight", {})}, correction.get("filters", ())
    recompute, mode = c["enable_old_logprobs_recompute"], c["loss_agg_mode"]

    def aggregated(tokens, masks):
        counted = masks if recompute else [torch.ones_like(mask) for mask in masks]
        if mode == "token-mean":
            return sum(each.sum() for each in tokens) / sum(each.sum() for each in counted)
        of_row = mean if mode == "seq-mean-token-mean" else lambda each, mask: (each * mask).sum()
        return sum(map(of_row, tokens, masks)) / sum(bool(each.any()) for each in counted)

    def loss(rows):
        masks = [kept(row, filters) for row in rows]
        if filters:
            keeps_some(masks)
        policy, kl = [], []
        for row, mask in zip(rows, masks, strict=True):
            # the filtered mask of the batch multiplies the log-probs too
            x = row.x * mask if recompute else row.x
            tokens = policy_loss(name, c, x, row, mask)
            if weight["enabled"]:
                rho, bound = torch.exp(at_level(row.old - row.mu, weight["weight_type"])), weight["upper_bound"]
                tokens = tokens * (rho if bound is None else torch.clamp(rho, 0.0, bound))
            policy.append(tokens)
            kl.append(torch.clamp(torch.exp(row.ref - x) - (row.ref - x) - 1.0, -10.0, 10.0) * mask)
        total = aggregated(policy, masks)
        return total + c["kl_loss_coef"] * aggregated(kl, masks) if c["use_kl_loss"] else total

    return loss


def weighing(level, bound):
    return {"train_infer_correction": {"is_weight": {"enabled": True, "weight_type": level, "upper_bound": bound}}}


def filtering(*filters, recompute=True, **keys):
    correction = {"filters": [{"enabled": True, **each} for each in filters]}
    return {"train_infer_correction": correction, "enable_old_logprobs_recompute": recompute, **keys}


KL = {"use_kl_loss": True, "kl_loss_coef": 0.2}
TOKENS = {"ratio_low": 0.97, "ratio_high": 1.02}
GEOMETRIC = {"agg_type": "geometric", "ratio_low": 0.99, "ratio_high": 1.01}
PRODUCT = {"agg_type": "sequence", "ratio_low": 0.95, "ratio_high": 1.05}
SHIFT = {"ratio_enabled": False, "diff_enabled": True, "diff_low": -0.004, "diff_high": 0.004}
OWN = {
    "ppo": {"pg_clip": 0.04, "dual_clip_loss": True},
    "vanilla": {},
    "tis": {"tis_lower_bound": 0.95},
    "topr": {},
    "cispo": {"cispo_epsilon_low": 0.05},
    "kimi15": {"kimi15_tau": 0.3},
}
COMMON = [
    {},
    {"loss_agg_mode": "token-mean", **KL},
    {"loss_agg_mode": "seq-mean-token-sum", **KL},
    weighing("token", 1.02),
    weighing("geometric", 1.005),
    weighing("sequence", None),
    filtering(TOKENS, SHIFT, **KL),
    filtering(GEOMETRIC, loss_agg_mode="token-mean", **KL),
    filtering(TOKENS, loss_agg_mode="seq-mean-token-sum"),
    filtering(PRODUCT, recompute=False),
    filtering(TOKENS, recompute=False, loss_agg_mode="seq-mean-token-sum"),
]
RANGE = {"use_pg_clip_range": True, "pg_clip_low": 0.03, "pg_clip_high": 0.06}
SEQ = {"importance_sampling": "seq"}
UNIFIED = {"cispo_use_unified_mask": True, "cispo_epsilon_low": 0.3, "cispo_epsilon_high": 0.4}
CASES = [
    *((name, {**own, **keys}) for name, own in OWN.items() for keys in COMMON if name != "kimi15"),
    *(("kimi15", {**OWN["kimi15"], **keys}) for keys in [*COMMON[:3], *COMMON[6:9]]),
    ("tis", {}),
    ("ppo", {"pg_clip": 0.05}),
    ("ppo", {**RANGE, "pg_clip": 0.02, "dual_clip_loss": True}),
    ("ppo", {**RANGE, **SEQ, "loss_agg_mode": "token-mean"}),
    ("ppo", {**RANGE, **SEQ, **weighing("sequence", 1.05)}),
    ("ppo", {**RANGE, **SEQ, **filtering(GEOMETRIC, **KL)}),
    ("cispo", {**UNIFIED, **KL}),
    ("cispo", {**UNIFIED, **filtering(PRODUCT, recompute=False)}),
]


@pytest.mark.parametrize(("name", "keys"), CASES, ids=str)
def test_loss_and_gradient(name, keys):
    filtered = "filters" in keys.get("train_infer_correction", ())
    same_value = name != "topr" and not (filtered and keys.get("loss_agg_mode") == "token-mean")
    arrays = batch(drift=0.4 if "cispo_use_unified_mask" in keys else 0.1, mismatch=0.03)
    assert_same(modes.roll(name, **keys), theirs(name, **keys), value=same_value, arrays=arrays)


def test_every_name_has_cases():
    assert OWN.keys() == LOSSES.keys()


def test_mode_is_the_value():
    assert modes.roll() == Mode(PPOClip(eps_low=0.2, eps_high=0.2), anchor=Proximal(), reduction="sequence_mean_token_mean")
    correction = {"is_weight": {"enabled": True, "detach": False}, "filters": [{"enabled": True, "diff_enabled": True}, {}]}
    assert modes.roll(
        "ppo",
        dual_clip_loss=True,
        train_infer_correction=correction,
        enable_old_logprobs_recompute=True,
        loss_agg_mode="token-mean",
    ) == Mode(
        PPOClip(eps_low=0.2, eps_high=0.2, dual_clip=1.4),
        anchor=Proximal(),
        corrections=(
            RatioMask(low=0.8, high=1.2),
            DivergenceMask(estimator="binary_tv", high=0.2),
            ImportanceWeight(high=1.2),
        ),
        count_masked=False,
    )
    assert modes.roll("ppo", importance_sampling="seq").anchor == Sequence(Proximal())
    off = {"is_weight": {"weight_type": "segment"}, "filters": [{"agg_type": "segment"}]}
    assert modes.roll(train_infer_correction=off) == modes.roll(use_kl_loss=True) == modes.roll()


def corrected(**parts):
    return {"train_infer_correction": parts, "enable_old_logprobs_recompute": True}


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("grpo", {}, "pg_variant: expected 'ppo', .* got 'grpo'"),
        ("ppo", {"clip": 0.2}, "clip: expected keys of ROLL among pg_clip"),
        ("ppo", {"pg_clip_low": 0.1}, "pg_clip_low: ROLL's 'ppo' with these settings reads"),
        ("cispo", SEQ, "importance_sampling: ROLL's 'cispo'"),
        ("vanilla", {"ratio_type": "token"}, "ratio_type: ROLL's 'vanilla'"),
        ("ppo", {"ratio_type": "segment"}, "ratio_type: .* run of tokens"),
        ("topr", {"topr_negative_weight": 0.5}, "topr_negative_weight: .* objective"),
        ("cispo", {**UNIFIED, "cispo_epsilon_low": 1.0}, "cispo_use_unified_mask: .* < 1"),
        ("cispo", {**UNIFIED, **filtering(TOKENS)}, "train_infer_correction: .* unified mask"),
        ("ppo", {"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_agg_mode: .* padded width"),
        ("ppo", {"loss_agg_mode": "mean"}, "loss_agg_mode: expected 'token-mean'"),
        ("ppo", {"entropy_loss_coef": 0.1}, "entropy_loss_coef: .* logits"),
        ("ppo", {"rl_loss_coef": 0.0}, "rl_loss_coef: .* multiply"),
        ("ppo", {"length_loss_weight": True}, "length_loss_weight: .* token_weights"),
        ("ppo", {"use_topr_loss": True}, "use_topr_loss: .* reads it"),
        ("kimi15", weighing("token", 1.2), "train_infer_correction: .* quadratic"),
        ("ppo", {**SEQ, **weighing("token", 1.2)}, "train_infer_correction: .* differentiated as one"),
        ("ppo", {**SEQ, **filtering(TOKENS)}, "train_infer_correction: .* tokens that are left"),
        ("ppo", filtering(TOKENS, recompute=False), "train_infer_correction: .* and over all sequences"),
        ("ppo", filtering(PRODUCT, recompute=False, **KL), "train_infer_correction: .* drop penalties"),
        ("kimi15", filtering(PRODUCT, recompute=False), "train_infer_correction: .* drop penalties"),
        ("ppo", filtering(PRODUCT, recompute=False, loss_agg_mode="token-mean"), "train_infer_correction: .* does not apply"),
        ("ppo", weighing("segment", 1.2), "weight_type: .* run of tokens"),
        ("ppo", weighing("prefix", 1.2), "weight_type: expected 'token'"),
        ("ppo", filtering({"agg_type": "segment"}), "agg_type: .* run of tokens"),
        ("ppo", filtering({**SHIFT, "diff_low": -0.1}), "diff_enabled: .* absolute"),
        ("ppo", filtering({**SHIFT, "agg_type": "geometric"}), "diff_enabled: .* of tokens"),
        ("ppo", filtering({"diff_high": 0.1}), "diff_high: ROLL's filters's 'ppo' with these settings reads"),
        ("ppo", filtering({"low": 0.1}), "low: expected keys of ROLL's filters among enabled"),
        ("ppo", corrected(masks=[]), "masks: expected keys of ROLL's train_infer_correction among is_weight"),
        ("ppo", corrected(filters={"enabled": True}), "filters: expected a list"),
        ("ppo", corrected(is_weight=True), "is_weight: expected a dict of enabled"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.roll(name, **keys)
