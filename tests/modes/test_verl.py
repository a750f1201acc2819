"""The modes of verl against what verl 0.9.1's own functions returned (tests/data/family_verl.npz), and its keys."""

from pathlib import Path

import numpy as np
import pytest
import torch
from framework_rows import assert_same, batch, kl_cov

from drpo_core import PPOClip, modes, policy_loss_and_gradient
from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import DivergenceMask, ImportanceWeight, RatioMask
from drpo_core.modes import Mode
from drpo_core.modes._verl import DEFAULTS, LOSSES
from drpo_core.penalties import Penalty

RECORDED = dict(np.load(Path(__file__).parents[1] / "data" / "family_verl.npz"))
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
KEYS = {
    "vanilla": CLIP,
    "gspo": {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04},
    "sapo": {},
    "gpg": {},
    "dro": {"dro_beta": 0.1},
    "cispo": {},
    "dppo_tv": {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0},
    "dppo_kl": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0},
}
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
# verl adds 1e-8 to the length of each sequence
TOLERANCE = {"token-mean": 1e-12, "seq-mean-token-sum": 1e-12, "seq-mean-token-mean": 1e-7}
WITH_THEIR_OWN_LOSS = ("dppo_tv", "dppo_kl", "geo_mean")
# the recorded presets have 0.99–1.01 in the place of 0.999–1.001
GEOMETRIC = {"rollout_rs_threshold": "0.99_1.01"}
PRESETS = {
    "decoupled_token_is": {},
    "decoupled_seq_is": {},
    "decoupled_geo_rs": GEOMETRIC,
    "decoupled_geo_rs_token_tis": GEOMETRIC,
    "bypass_ppo_clip": {},
}


def computed(mode):
    arrays = (RECORDED[name] for name in ("log_prob", "behavior_log_prob", "advantages"))
    others = {name: RECORDED[name] for name in ("mask", *mode.arguments)}
    return policy_loss_and_gradient(mode, *arrays, **others)


def assert_as_recorded(mode, key, tolerance, *, loss=True):
    result = computed(mode)
    gradient = RECORDED[f"{key}__grad"]
    np.testing.assert_allclose(result.gradient, gradient, rtol=0.0, atol=tolerance * np.abs(gradient).max())
    if loss:
        np.testing.assert_allclose(result.loss, RECORDED[f"{key}__loss"], rtol=tolerance)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss_mode", KEYS)
def test_loss_and_gradient_are_verls(loss_mode, aggregation):
    mode = modes.verl(loss_mode, loss_agg_mode=aggregation, **KEYS[loss_mode])
    tolerance = 1e-7 if loss_mode == "sapo" else TOLERANCE[aggregation]
    key = f"{loss_mode}__{aggregation.replace('-', '_')}"
    assert_as_recorded(mode, key, tolerance, loss=loss_mode not in WITH_THEIR_OWN_LOSS)


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.2, 1.0])
def test_kl_cov(share):
    """Formulas: verl's own function gives the same to 1e-13, as tests/integrations/verl sees where verl is installed."""
    keys = {"kl_cov_ratio": share, "ppo_kl_coef": 0.7}

    def losses(rows):
        return kl_cov(rows, share=share, beta=0.7)

    for seed in range(3):
        arrays = batch(seed)
        assert_same(modes.verl("kl_cov", **keys), lambda rows: torch.cat(losses(rows)).mean(), arrays=arrays)
        mode = modes.verl("kl_cov", **keys, loss_agg_mode="seq-mean-token-mean")
        assert_same(mode, lambda rows: torch.stack([row.mean() for row in losses(rows)]).mean(), arrays=arrays)
    assert modes.verl("kl_cov", ppo_kl_coef=0.0).penalties == ()


def test_geo_mean_is_verls():
    assert_as_recorded(modes.verl("geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4), "geo_mean__seq_mean", 1e-7, loss=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_verls(preset):
    mode = modes.verl("vanilla", **CLIP, **{**modes.VERL_PRESETS[preset], **PRESETS[preset]})
    assert_as_recorded(mode, f"preset_{preset}", 1e-12)


@pytest.mark.parametrize("key", [key for key in RECORDED if key.startswith(("is_weight", "rejection"))])
def test_corrections_are_verls(key):
    """Gradient of REINFORCE with the correction over that without it is the recorded factor."""
    kind, rule, threshold, *normalized = key.split("__")
    if kind == "rejection":
        keys = {"rollout_rs": rule, "rollout_rs_threshold": threshold}
    else:
        keys = {
            "rollout_is": rule,
            "rollout_is_threshold": threshold,
            "rollout_is_batch_normalize": normalized == ["normalized"],
        }
    mode = modes.verl("gpg", loss_agg_mode="token-sum", **keys)
    mask, advantages = RECORDED["mask"], RECORDED["advantages"]
    expected = np.where(mask, -advantages * RECORDED[key], 0.0)
    np.testing.assert_allclose(computed(mode).gradient, expected, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("kl_loss_type", ["kl", "k1", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+", "low_var_kl+"])
def test_kl_loss_is_verls(kl_loss_type):
    key = {"kl": "k1", "mse": "k2"}.get(kl_loss_type, kl_loss_type.replace("low_var_kl", "k3"))
    common = {"loss_agg_mode": "token-sum"}
    without = computed(modes.verl("gpg", **common))
    result = computed(modes.verl("gpg", use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type=kl_loss_type, **common))
    mask = RECORDED["mask"]
    value, gradient = (np.where(mask, RECORDED[f"kl__{key}__{name}"], 0.0) for name in ("value", "grad"))
    np.testing.assert_allclose(result.gradient - without.gradient, 0.5 * gradient, rtol=0.0, atol=1e-12)
    np.testing.assert_allclose(result.loss - without.loss, 0.5 * value.sum(), rtol=1e-9)


def test_mode_is_the_value():
    assert modes.verl(
        "gspo",
        clip_ratio_low=3e-4,
        clip_ratio_high=4e-4,
        loss_agg_mode="seq-mean-token-mean",
        rollout_is="sequence",
        rollout_rs="seq_mean_k1,seq_max_k3",
        rollout_rs_threshold="2.0,0.1",
        use_kl_loss=True,
    ) == Mode(
        PPOClip(eps_low=3e-4, eps_high=4e-4),
        anchor=Sequence(Proximal()),
        corrections=(
            RatioMask(level="geometric", low=0.5, high=2.0),
            DivergenceMask(estimator="k3", over="max", high=0.1),
            ImportanceWeight(level="sequence", high=2.0),
        ),
        penalties=(Penalty(coefficient=0.001),),
        reduction="sequence_mean_token_mean",
        count_masked=False,
    )
    assert modes.verl("gpg", loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=512).horizon == 512.0
    assert modes.verl("vanilla", clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None).objective.eps_high == 0.1
    assert modes.verl("bypass_mode") == modes.verl("vanilla", bypass_mode=True)


@pytest.mark.parametrize("preset", modes.VERL_PRESETS)
def test_presets_make_modes(preset):
    mode = modes.verl("vanilla", **modes.VERL_PRESETS[preset])
    assert Mode.from_dict(mode.to_dict()) == mode
    assert mode.arguments == (() if preset.startswith("bypass") else ("proximal_log_prob",))


@pytest.mark.parametrize(
    ("loss_mode", "keys", "message"),
    [
        ("clip_cov", {}, r"loss_mode: .* is no Mode: .* drpo_core.corrections.clip_cov_weights\(log_prob, .* token_weights"),
        ("kl_cov", {"rollout_is": "token"}, "rollout_is: .* penalty"),
        ("kl_cov", {"rollout_rs": "token_k3", "rollout_rs_threshold": 1.0}, "rollout_rs: .* that are left"),
        ("kl_cov", {"kl_cov_ratio": 1.5}, "kl_cov_ratio: expected 1 or less, got 1.5"),
        ("kl_cov", {"clip_ratio_low": 0.2}, "clip_ratio_low: verl's 'kl_cov'"),
        ("vanilla", {"eps": 0.2}, "eps: expected keys of verl among clip_ratio, .*loss_type"),
        ("vanilla", {"loss_agg_mode": "mean"}, "loss_agg_mode: expected 'token-mean', .* got 'mean'"),
        ("vanilla", {"loss_agg_mode": []}, r"loss_agg_mode: expected .* got \[\]"),
        ("vanilla", {"tau_pos": 1.0, "dro_beta": 1.0}, "tau_pos, dro_beta: verl's 'vanilla' with these settings reads"),
        ("vanilla", {"clip_ratio": 0.3}, "clip_ratio: verl's 'vanilla'"),
        ("vanilla", {"clip_ratio_c": 1.0}, "clip_ratio_c: expected a finite number greater than 1"),
        ("gspo", {"clip_ratio_c": 3.0}, "clip_ratio_c: verl's 'gspo'"),
        ("gspo", {"bypass_mode": True}, "bypass_mode: .* would replace it"),
        ("gspo", {"rollout_rs": "token_k3", "rollout_rs_threshold": 1.0}, "rollout_rs: .* averages over the tokens"),
        ("geo_mean", {"rollout_is": "token"}, "rollout_is: .* geometric mean"),
        ("dro", {}, "dro_beta: expected a real number, got NoneType"),
        ("dro", {"dro_beta": 1.0, "rollout_is": "token"}, "rollout_is: .* penalty"),
        ("sapo", {"use_kl_loss": True}, "loss_agg_mode: .* KL"),
        ("gpg", {"use_kl_loss": True, "kl_loss_type": "abs"}, "kl_loss_type: expected 'kl', .* got 'abs'"),
        ("gpg", {"use_kl_loss": 1}, "use_kl_loss: expected True or False, got 1"),
        ("gpg", {"kl_loss_coef": 0.1}, "kl_loss_coef: verl's 'gpg'"),
        ("gpg", {"rollout_is": "geometric"}, "rollout_is: expected None, 'token', 'sequence', got 'geometric'"),
        ("gpg", {"rollout_is_threshold": 3.0}, "rollout_is_threshold: verl's 'gpg'"),
        ("gpg", {"rollout_is": "token", "rollout_is_threshold": "0_2"}, "rollout_is_threshold: expected a positive number"),
        ("gpg", {"rollout_is": "token", "rollout_is_threshold": "1_2_3"}, "rollout_is_threshold: expected a positive number"),
        ("gpg", {"rollout_is": "token", "rollout_is_threshold": True}, "rollout_is_threshold: expected a positive number"),
        ("gpg", {"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2}, "rollout_rs: expected 'token_k1', .*'seq_max_k1'"),
        ("gpg", {"rollout_rs": "seq_mean_k3"}, "rollout_rs_threshold: expected a text"),
        ("gpg", {"rollout_rs": "token_k3", "rollout_rs_threshold": "1_2"}, "rollout_rs_threshold: expected one number"),
        ("gpg", {"rollout_rs": "token_k2,token_k3,token_k1", "rollout_rs_threshold": "1,2"}, "rollout_rs_threshold: .* got 2"),
        ("gpg", {"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_scale_factor: expected a number with loss_agg_mode="),
    ],
)
def test_errors_name_the_key(loss_mode, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.verl(loss_mode, **keys)


def test_every_key_is_read_by_some_loss():
    settings = {"use_kl_loss": True, "rollout_is": "sequence", "rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 1.0}
    common = {**settings, "loss_agg_mode": "seq-mean-token-mean", "dro_beta": 1.0}
    from drpo_core.modes._keys import Keys  # noqa: PLC0415

    read = {"loss_scale_factor", "clip_ratio"}
    for name, loss in LOSSES.items():
        given = common | ({"rollout_is": None} if name in ("dro", "kl_cov") else {})
        given |= {"rollout_rs": None} if name == "kl_cov" else {}
        keys = Keys("verl", name, DEFAULTS, given)
        loss(keys)
        read |= keys.read.keys()
    assert read == DEFAULTS.keys()
