"""The modes of TRL against its formulas, sequence by sequence, and its keys. TRL itself: tests/parity."""

import math

import pytest
import torch
from framework_rows import assert_same, batch

from drpo_core import PPOClip, modes
from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, NegativeSequenceMask
from drpo_core.modes import Mode
from drpo_core.modes._keys import Keys
from drpo_core.modes._trl import DEFAULTS, LOSSES
from drpo_core.penalties import Penalty


def theirs(loss_type, **keys):
    """TRL's loss as a function of rows."""
    c = {**DEFAULTS, **({"epsilon": 0.4} if loss_type == "gmpo" else {}), **keys}
    c["epsilon_high"] = c["epsilon"] if c["epsilon_high"] is None else c["epsilon_high"]
    return lambda rows: reduced([of_row(row, loss_type, c) for row in rows], loss_type, c)


def of_row(row, loss_type, c):
    """The losses of a row's tokens."""
    ell = row.x - (row.old if c["use_vllm"] else row.mu)
    weight = torch.exp(ell.mean() if c["importance_sampling_level"] == "sequence" else ell)
    corrected = c["use_vllm"] and c["vllm_importance_sampling_correction"]
    if loss_type == "gmpo":
        loss = gmpo(row.a, ell, c)
    elif loss_type == "vespo":
        loss = -vespo(row, ell, c, corrected=corrected).detach() * row.a * row.x
    elif loss_type == "cispo":
        loss = -torch.clamp(weight, max=c["epsilon_high"]).detach() * row.a * row.x
    elif loss_type == "sapo":
        tau = c["sapo_temperature_pos"] if row.a > 0 else c["sapo_temperature_neg"]
        loss = -row.a * torch.sigmoid(tau * (weight - 1.0)) * 4.0 / tau
    else:
        bounded = weight if c["delta"] is None else torch.clamp(weight, max=c["delta"])
        clipped = torch.clamp(weight, 1.0 - c["epsilon"], 1.0 + c["epsilon_high"])
        loss = -torch.minimum(bounded * row.a, clipped * row.a)
    threshold = c["off_policy_mask_threshold"]
    if threshold is not None and row.a < 0 and (row.mu - row.x).mean() > threshold:
        loss = loss * 0.0
    if corrected and loss_type not in ("vespo", "gmpo"):
        loss = loss * sampler(row, c)
    kl = torch.exp(row.ref - row.x) - (row.ref - row.x) - 1.0
    kl = kl * weight if c["use_bias_correction_kl"] and loss_type != "gmpo" else kl
    return (loss + c["beta"] * kl).expand(ell.shape)


def gmpo(a, ell, c):
    clipped = torch.clamp(ell, -c["epsilon"], c["epsilon_high"])
    return -a * torch.exp((torch.minimum(ell, clipped) if a > 0 else torch.maximum(ell, clipped)).mean())


def vespo(row, ell, c, *, corrected):
    """The Gamma weight of a sequence's product ratio."""
    sign = "pos" if row.a >= 0 else "neg"
    k, rate = c[f"vespo_k_{sign}"], c[f"vespo_lambda_{sign}"]
    log_w = ell.sum()
    if corrected:
        log_w = log_w + torch.clamp(torch.log(sampler(row, c)), min=math.log(1e-8)).sum()
    log_w = torch.clamp(log_w, math.log(1e-8), 20.0)
    return torch.exp(rate + k * log_w - rate * torch.exp(log_w))


def sampler(row, c):
    """The sampler's ratio, one of the sequence or one a token."""
    level, kind = c["vllm_importance_sampling_mode"].split("_")
    diff = row.old - row.mu
    ratio = torch.exp(diff.sum() if level == "sequence" else diff)
    low, high = c["vllm_importance_sampling_clip_min"], c["vllm_importance_sampling_clip_max"]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if kind == "truncate":
        return torch.clamp(ratio, low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def reduced(losses, loss_type, c):
    if loss_type in ("grpo", "sapo", "gmpo"):
        return sum(each.mean() for each in losses) / len(losses)
    total = sum(each.sum() for each in losses)
    if loss_type == "luspo":
        return total / len(losses)
    return total / (len(losses) * c["max_completion_length"] if loss_type == "dr_grpo" else sum(map(len, losses)))


def check(loss_type, *, arrays=None, **keys):
    tolerance = 1e-7 if keys.get("vllm_importance_sampling_clip_min") and loss_type == "vespo" else 1e-9
    mode = modes.trl(loss_type, **keys)
    assert_same(mode, theirs(loss_type, **keys), value=loss_type != "gmpo", tolerance=tolerance, arrays=arrays)


EPSILON = {name: {"epsilon": 0.1, "epsilon_high": 0.15} for name in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "gmpo")}
EPSILON["cispo"] = {"epsilon_high": 1.1}


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient(loss_type, beta):
    check(loss_type, beta=beta, **EPSILON.get(loss_type, {}))


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "gmpo"])
def test_at_sequences(loss_type):
    keys = {**EPSILON.get(loss_type, {}), "importance_sampling_level": "sequence"}
    check(loss_type, beta=0.2, use_bias_correction_kl=False, **keys)
    check(loss_type, **keys)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("bounds", [(None, 1.04), (0.97, 1.04), (0.97, None), (None, None)])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_with_vllm(loss_type, bounds, mode):
    low, high = bounds
    if ("truncate" in mode and bounds == (None, None)) or (loss_type == "vespo" and mode != "token_mask"):
        # TRL refuses these itself, but for VESPO's truncation
        return
    names = ("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_mode")
    sampling = dict(zip(names, (low, high, mode), strict=True))
    # so that single tokens are outside the bounds, in some sequences
    arrays = batch(drift=0.05, mismatch=0.02)
    check(loss_type, **EPSILON.get(loss_type, {}), use_vllm=True, beta=0.3, arrays=arrays, **sampling)


@pytest.mark.parametrize("keys", [{}, {"use_vllm": True}, {"use_vllm": True, "vllm_importance_sampling_correction": False}])
@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
def test_off_policy_mask(loss_type, keys):
    by_token = {"vllm_importance_sampling_mode": "token_mask"} if loss_type == "vespo" and keys == {"use_vllm": True} else {}
    check(loss_type, off_policy_mask_threshold=0.02, **keys, **by_token)


@pytest.mark.parametrize("mode", ["sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo", "luspo"])
def test_sequences_with_vllm(loss_type, mode):
    sampling = {"use_vllm": True, "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.05}
    check(loss_type, **EPSILON.get(loss_type, {}), importance_sampling_level="sequence", **sampling)


def test_delta_is_the_dual_clip():
    check("grpo", delta=1.3, epsilon=0.1)


def test_gmpo_with_vllm():
    check("gmpo", epsilon=0.05, use_vllm=True, beta=0.1)


def test_mode_is_the_value():
    assert modes.trl(
        "dr_grpo", epsilon=3e-4, epsilon_high=4e-4, importance_sampling_level="sequence", use_vllm=True, beta=0.04,
        use_bias_correction_kl=False, off_policy_mask_threshold=0.5, vllm_importance_sampling_mode="sequence_truncate",
    ) == Mode(
        PPOClip(eps_low=3e-4, eps_high=4e-4),
        anchor=Sequence(Proximal()),
        corrections=(NegativeSequenceMask(delta=0.5), ImportanceWeight(level="sequence", high=3.0)),
        penalties=(Penalty(coefficient=0.04),),
        reduction="sequence_mean_token_sum",
        horizon=512.0,
    )  # fmt: skip
    assert modes.trl() == modes.trl("dapo") == Mode(PPOClip(eps_low=0.2, eps_high=0.2))
    assert modes.trl("gmpo").corrections[0].eps_high == 0.4
    assert modes.trl("cispo").objective.max_ratio == 0.2


@pytest.mark.parametrize(
    ("loss_type", "keys", "message"),
    [
        ("ppo", {}, "loss_type: expected 'grpo', .* got 'ppo'"),
        ("grpo", {"eps": 0.2}, "eps: expected keys of TRL among epsilon"),
        ("grpo", {"max_completion_length": 9}, "max_completion_length: TRL's 'grpo' with these settings reads"),
        ("cispo", {"epsilon": 0.1, "epsilon_high": 5.0}, "epsilon: TRL's 'cispo'"),
        ("grpo", {"delta": 1.1}, "delta: .* cuts the gradient"),
        ("grpo", {"importance_sampling_level": "batch"}, "importance_sampling_level: expected 'token', 'sequence'"),
        ("grpo", {"importance_sampling_level": "sequence", "beta": 0.1}, "use_bias_correction_kl: .* broadcasts"),
        (
            "grpo",
            {"importance_sampling_level": "sequence", "use_vllm": True, "vllm_importance_sampling_mode": "token_mask"},
            "vllm_importance_sampling_mode: .* differentiated as one",
        ),
        ("grpo", {"use_bias_correction_kl": False}, "use_bias_correction_kl: TRL's 'grpo'"),
        ("grpo", {"top_entropy_quantile": 0.2}, "top_entropy_quantile: .* logits"),
        ("grpo", {"entropy_coef": 0.2}, "entropy_coef: .* logits"),
        ("grpo", {"vllm_importance_sampling_clip_max": 2.0}, "vllm_importance_sampling_clip_max: TRL's 'grpo'"),
        ("grpo", {"use_vllm": True, "vllm_importance_sampling_mode": "token"}, "vllm_importance_sampling_mode: expected"),
        ("vespo", {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}, "_mode: .* factor"),
        ("vespo", {"use_vllm": True}, "vllm_importance_sampling_mode: .*'sequence_mask' .* TRL refuses"),
        (
            "grpo",
            {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "vllm_importance_sampling_mode: .* without a bound",
        ),
        ("gmpo", {"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold: TRL's 'gmpo'"),
        ("sapo", {"sapo_temperature_pos": 0.0}, "sapo_temperature_pos: expected a finite number greater than 0"),
        ("grpo", {"use_vllm": "yes"}, "use_vllm: expected True or False"),
    ],
)
def test_errors_name_the_key(loss_type, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.trl(loss_type, **keys)


def test_every_key_is_read_by_some_loss():
    read = set()
    given = {"use_vllm": True, "beta": 0.1, "off_policy_mask_threshold": 0.1, "vllm_importance_sampling_mode": "token_mask"}
    for name, loss in LOSSES.items():
        keys = Keys("TRL", name, DEFAULTS, given)
        loss(keys)
        read |= keys.read.keys()
    assert read == DEFAULTS.keys()
