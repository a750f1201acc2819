"""The modes of SkyRL against its formulas, sequence by sequence, and its keys."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from framework_rows import assert_same, batch, kl_cov

from drpo_core import DPPO, PPOClip, modes
from drpo_core.anchors import Behavior, Proximal
from drpo_core.corrections import ImportanceWeight, RatioMask, Veto
from drpo_core.modes import DoubleRatioWarning, Mode
from drpo_core.modes._keys import Keys
from drpo_core.modes._skyrl import DEFAULTS, LOSSES
from drpo_core.reduction import prompt_mean

REDUCED = tuple(name for name in LOSSES if name != "kl_cov")
NAMES = tuple(name for name in REDUCED if name != "importance_sampling")


def clipped(row, ell, c):
    ratio = torch.exp(ell)
    return -torch.minimum(ratio * row.a, torch.clamp(ratio, 1.0 - c["eps_clip_low"], 1.0 + c["eps_clip_high"]) * row.a)


def regular(row, c):
    return clipped(row, row.x - row.old, c)


def dual_clip(row, c):
    loss = regular(row, c)
    return torch.minimum(-row.a * c["clip_ratio_c"], loss) if row.a < 0 else loss


def gspo(row, c):
    return clipped(row, row.x - row.x.detach() + (row.x - row.old).mean().detach(), c)


def sapo(row, c):
    tau = c["tau_pos"] if row.a > 0 else c["tau_neg"]
    return -row.a * torch.sigmoid(tau * (torch.exp(row.x - row.old) - 1.0)) * 4.0 / tau


def cispo(row, c):
    ratio = torch.exp(row.x - (row.mu if c["cispo_anchor"] == "rollout" else row.old))
    return -row.a * torch.clamp(ratio, 1.0 - c["cispo_eps_clip_low"], 1.0 + c["cispo_eps_clip_high"]).detach() * row.x


def dppo(row, c):
    p, q = row.x.exp().detach(), row.mu.exp()
    shift = p - q
    divergence = shift.abs() if c["dppo_type"] == "binary_tv" else q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    away = shift > 0 if row.a > 0 else shift < 0
    masked = away & (divergence > (c["delta_high"] if row.a > 0 else c["delta_low"]))
    return -row.a * torch.exp(row.x - row.mu) * (~masked)


def rollout_is(row, c):
    ratio = torch.exp(row.x - row.mu)
    inside = (ratio > 1.0 - c["eps_clip_low"]) & (ratio < 1.0 + c["eps_clip_high"])
    return -torch.where(inside, ratio, 0.0).detach() * row.a * row.x


def importance_sampling(row, _):
    return -torch.exp(row.x - row.old) * row.a


THEIRS = {
    "regular": regular,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "dppo": dppo,
    "rollout_is": rollout_is,
    "importance_sampling": importance_sampling,
}


def correction(row, c):
    """Weights and masks of a row's tokens."""
    ell = row.old - row.mu
    ratio, total, mean = torch.exp(ell), math.exp(ell.sum()), math.exp(ell.mean())
    factor = torch.ones_like(ratio)
    if c["tis_ratio_type"] == "token":
        factor = factor * torch.clamp(ratio, max=c["token_tis_ratio_clip_high"])
    if c["tis_ratio_type"] == "sequence":
        factor = factor * min(total, c["sequence_tis_ratio_clip_high"])
    if c["sequence_mask_metric"] == "geometric":
        factor = factor * (c["geo_mask_low"] <= mean <= c["geo_mask_high"])
    if c["sequence_mask_metric"] == "product":
        factor = factor * (c["product_mask_low"] <= total <= c["product_mask_high"])
    low, high = c["outlier_token_is_threshold_low"], c["outlier_token_is_threshold_high"]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    factor = factor * bool(((ratio >= low) & (ratio <= high)).all())
    low, high = c["token_mask_is_threshold_low"], c["token_mask_is_threshold_high"]
    return factor if low is None else factor * ((ratio >= low) & (ratio <= high))


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}

    def loss(rows):
        tokens = sum(len(row.x) for row in rows)
        total = 0.0
        for row in rows:
            factor = 1.0 if name == "importance_sampling" else correction(row, c)
            scale = {
                "token_mean": tokens,
                "sequence_mean": len(rows) * len(row.x),
                "seq_mean_token_sum_norm": len(rows) * (c["max_seq_len"] or 1),
            }[c["loss_reduction"]]
            total = total + (THEIRS[name](row, c) * factor).sum() / scale
            if c["use_kl_loss"]:
                gap = row.ref - row.x
                kl = {"k1": -gap, "k2": 0.5 * gap * gap, "k3": torch.exp(gap) - gap - 1.0}[c["kl_estimator_type"]]
                total = total + c["kl_loss_coef"] * kl.mean() / len(rows)
        return total

    return loss


def check(name, **keys):
    arrays = batch(drift=0.1, mismatch=0.03)
    assert_same(modes.skyrl(name, **keys), theirs(name, **keys), value=name != "rollout_is", arrays=arrays)


SETTINGS = {
    "cispo": {"cispo_eps_clip_low": 0.05, "cispo_eps_clip_high": 0.1},
    "dppo": {"delta_low": 0.02, "delta_high": 0.03},
    "sapo": {},
    "importance_sampling": {},
    "dual_clip": {"eps_clip_low": 0.05, "eps_clip_high": 0.1, "clip_ratio_c": 1.15},
}


def settings(name):
    return SETTINGS.get(name, {"eps_clip_low": 0.05, "eps_clip_high": 0.1})


@pytest.mark.parametrize(
    "reduction",
    [
        {},
        {"loss_reduction": "sequence_mean"},
        {"loss_reduction": "seq_mean_token_sum_norm", "max_seq_len": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", REDUCED)
def test_loss_and_gradient(name, reduction):
    check(name, **settings(name), **reduction)


@pytest.mark.parametrize("share", [1e-6, 0.05, 0.2])
def test_kl_cov_sums(share):
    """The advantages are divided before, by sequence here, which changes the choice; the penalty is not."""
    arrays = batch(1)
    arrays["advantages"] = arrays["advantages"] / arrays["mask"].sum(axis=1, keepdims=True) / len(arrays["mask"])
    mode = modes.skyrl("kl_cov", kl_cov_frac=share, ppo_kl_coef=0.3, loss_reduction=None)
    assert_same(mode, lambda rows: torch.cat(kl_cov(rows, share=share, beta=0.3)).sum(), arrays=arrays)


def test_prompt_mean():
    ids = np.array([3, 1, 3, 3, 0, 1, 5, 5, 5, 5, 0, 3, 1, 0, 3, 5])

    def loss(rows):
        groups = [[regular(row, DEFAULTS) for row, i in zip(rows, ids, strict=True) if i == prompt] for prompt in set(ids)]
        return torch.stack([torch.cat(group).mean() for group in groups]).mean()

    mode = modes.skyrl(loss_reduction="prompt_mean")
    assert_same(mode, loss, reduction=partial(prompt_mean, group_ids=ids))


def test_variants():
    check("cispo", cispo_anchor="rollout", **settings("cispo"))
    check("dppo", dppo_type="binary_kl", delta_low=1e-3, delta_high=2e-3)
    check("cispo", cispo_eps_clip_high=0.05)


CORRECTIONS = [
    {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.02},
    {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.05},
    {"sequence_mask_metric": "geometric"},
    {"sequence_mask_metric": "product", "product_mask_low": 0.95, "product_mask_high": 1.05},
    {"outlier_token_is_threshold_low": 0.95},
    {"outlier_token_is_threshold_low": 0.94, "outlier_token_is_threshold_high": 1.05},
    {"token_mask_is_threshold_low": 0.97, "token_mask_is_threshold_high": 1.02},
    {"token_mask_is_threshold_low": 0.97, "token_mask_is_threshold_high": 1.02, "tis_ratio_type": "token"},
    {"tis_ratio_type": "sequence", "sequence_mask_metric": "geometric", "outlier_token_is_threshold_high": 1.06},
]


@pytest.mark.parametrize("keys", CORRECTIONS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dppo", "rollout_is")])
def test_off_policy_correction(name, keys):
    check(name, **settings(name), **keys)


@pytest.mark.parametrize("name", ["dppo", "rollout_is"])
def test_weights_on_a_ratio_to_the_sampler_warn(name):
    with pytest.warns(DoubleRatioWarning, match="proximal/behavior"):
        check(name, **settings(name), tis_ratio_type="token")
    check(name, **settings(name), sequence_mask_metric="geometric")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_loss(kind):
    check("regular", use_kl_loss=True, kl_estimator_type=kind, kl_loss_coef=0.3, loss_reduction="sequence_mean")


def test_mode_is_the_value():
    assert modes.skyrl() == Mode(PPOClip(eps_low=0.2, eps_high=0.2), anchor=Proximal())
    assert modes.skyrl("dppo") == Mode(DPPO(delta_low=0.2, delta_high=0.2), anchor=Behavior())
    assert modes.skyrl(
        tis_ratio_type="token",
        outlier_token_is_threshold_high=100,
        token_mask_is_threshold_low=0.5,
        token_mask_is_threshold_high=2,
    ).corrections == (Veto(low=None, high=100.0), RatioMask(low=0.5, high=2.0), ImportanceWeight(high=2.0))


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("clip_cov", {}, r"policy_loss_type: .* is no Mode: .* drpo_core.corrections.clip_cov_weights\(.* token_weights"),
        ("cross_entropy", {}, "policy_loss_type: .* no advantages"),
        ("kl_cov", {}, "loss_reduction: .* with 'token_mean' is no Mode: .* not the penalty.* pass None"),
        ("kl_cov", {"loss_reduction": None, "use_kl_loss": True}, "use_kl_loss: .* by sequence"),
        ("kl_cov", {"loss_reduction": None, "kl_cov_frac": 2}, "kl_cov_frac: expected 1 or less, got 2"),
        ("kl_cov", {"loss_reduction": None, "tis_ratio_type": "token"}, "tis_ratio_type: SkyRL's 'kl_cov'"),
        ("regular", {"eps": 0.2}, "eps: expected keys of SkyRL among eps_clip_low"),
        ("regular", {"delta_low": 0.2}, "delta_low: SkyRL's 'regular' with these settings reads"),
        ("regular", {"loss_reduction": "token_mean_legacy"}, "loss_reduction: expected None, .* got 'token_mean_legacy'"),
        ("regular", {"loss_reduction": "seq_mean_token_sum_norm"}, "max_seq_len: expected a real number"),
        ("regular", {"use_kl_loss": True}, "use_kl_loss: .* by sequence"),
        ("regular", {"use_kl_loss": True, "loss_reduction": "sequence_mean", "kl_estimator_type": "abs"}, "got 'abs'"),
        ("regular", {"token_mask_is_threshold_low": 0.5}, "token_mask_is_threshold_high: .* both bounds"),
        ("regular", {"token_mask_is_threshold_high": 0.5}, "token_mask_is_threshold_low: .* both bounds"),
        (
            "regular",
            {"token_mask_is_threshold_low": 0.5, "token_mask_is_threshold_high": 2, "tis_ratio_type": "sequence"},
            "token_mask_is_threshold_low: .* that are left",
        ),
        ("cispo", {"cispo_anchor": "rollout", "tis_ratio_type": "token"}, "tis_ratio_type: .* refuses"),
        ("rollout_is", {"eps_clip_low": 1.0}, "eps_clip_low: .* no bound"),
        ("dppo", {"dppo_type": "tv"}, "dppo_type: expected 'binary_tv', 'binary_kl', got 'tv'"),
        ("importance_sampling", {"tis_ratio_type": "token"}, "tis_ratio_type: SkyRL's 'importance_sampling'"),
        ("regular", {"geo_mask_low": 0.5}, "geo_mask_low: SkyRL's 'regular'"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.skyrl(name, **keys)


def test_every_key_is_read_by_some_loss():
    read = {"kl_loss_coef", "kl_estimator_type", "max_seq_len"}
    for name, loss in LOSSES.items():
        for given in ({"tis_ratio_type": "token"}, {"tis_ratio_type": "sequence"}):
            for metric in ("geometric", "product"):
                values = {**({} if name in ("dppo", "rollout_is") else given), "sequence_mask_metric": metric}
                values |= {"loss_reduction": None} if name == "kl_cov" else {}
                keys = Keys("SkyRL", name, DEFAULTS, values)
                loss(keys)
                read |= keys.read.keys()
    assert read == DEFAULTS.keys()
