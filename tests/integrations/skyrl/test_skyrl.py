"""SkyRL's registry, configuration, reductions, Ray and entry point, on our losses and on SkyRL's."""

import inspect
import subprocess
import sys

import pytest

pytest.importorskip("skyrl", reason="runs in the environment of `nox -s integration-skyrl`")

import ray
import torch
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.integrations.skyrl import register
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    LOSSES_WITH_OLD_LOGPROBS,
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
    sync_registries,
)
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
from skyrl.backends.skyrl_train.workers.worker_utils import reduce_metrics
from skyrl.train.config import SkyRLTrainConfig

from drpo_core import DRPO, SPO, summarize, token_diagnostics, token_loss_and_gradient
from drpo_core.objectives.configured import families_by_name

pytestmark = pytest.mark.usefixtures("compiled_only")

NAMES = [*families_by_name(), "drpo_core_gspo", "drpo_core_dual_clip"]
WITHOUT_THRESHOLDS = {f"drpo_core_{name}" for name in ("pg_is", "reinforce", "sapo", "topr")}
REDUCTIONS = ["token_mean", "sequence_mean", "seq_mean_token_sum_norm", "token_mean_legacy", "prompt_mean"]
KEYS = ("eps_clip_low", "eps_clip_high", "clip_ratio_c", "dppo.delta_low", "dppo.delta_high", "cispo.cispo_eps_clip_high")
SETTINGS = dict(zip(KEYS, (0.1, 0.15, 1.4, 0.05, 0.1, 0.3), strict=True))


def algorithm(policy_loss_type, **settings):
    """`trainer.algorithm` of SkyRL's command line."""
    settings = {"policy_loss_type": policy_loss_type, "cispo.cispo_eps_clip_low": 1.0} | SETTINGS | settings
    overrides = [f"trainer.algorithm.{key}={value}" for key, value in settings.items()]
    return SkyRLTrainConfig.from_cli_overrides(overrides).trainer.algorithm


def batch(reduction="token_mean", dtype=torch.float32):
    """What a loss is given: its tensor arguments by name, the advantages scaled by SkyRL."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 6)
    log_probs = torch.empty(shape, dtype=dtype).uniform_(-3.0, -0.05, generator=generator)
    noise = torch.empty(shape, dtype=dtype).uniform_(-0.8, 0.8, generator=generator)
    advantages = torch.empty(shape, dtype=dtype).uniform_(-2.0, 2.0, generator=generator)
    loss_mask = (torch.arange(6) < torch.tensor([[4], [6], [1], [3]])).to(dtype)
    loss_mask[1, 2] = 0.0
    behavior = (log_probs + noise).clamp(max=-1e-3)
    return {
        "log_probs": log_probs,
        "old_log_probs": behavior,
        "advantages": apply_loss_reduction_to_advantages_minibatch(
            advantages, loss_mask, reduction, 2, 8, prompt_boundaries=[(0, 2), (2, 4)]
        ),
        "loss_mask": loss_mask,
        "rollout_logprobs": behavior.clone(),
    }


def run(config, tensors=None):
    """Loss, gradient in the log-probs and metrics, called as the worker does."""
    tensors = dict(batch() if tensors is None else tensors)
    log_probs = tensors.pop("log_probs").clone().requires_grad_()
    positional = (tensors.pop("old_log_probs"), tensors.pop("advantages"))
    loss, metrics = PolicyLossRegistry.get(config.policy_loss_type)(log_probs, *positional, config=config, **tensors)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, metrics


PARITY = {
    ("regular", "drpo_core_ppo_clip"): {},
    ("dual_clip", "drpo_core_dual_clip"): {},
    ("gspo", "drpo_core_gspo"): {"eps_clip_low": 0.05},
    ("dppo", "drpo_core_dppo_tv"): {"dppo.dppo_type": "binary_tv"},
    ("dppo", "drpo_core_dppo_kl"): {"dppo.dppo_type": "binary_kl"},
    ("cispo", "drpo_core_cispo"): {},
    ("importance_sampling", "drpo_core_pg_is"): {},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("theirs", "ours"), PARITY)
def test_parity_with_skyrl(theirs, ours, reduction):
    settings = PARITY[theirs, ours] | {"loss_reduction": reduction}
    value, gradient, metrics = run(algorithm(ours, **settings), batch(reduction))
    expected_value, expected, expected_metrics = run(algorithm(theirs, **settings), batch(reduction))
    largest = float(expected.abs().max())
    assert largest > 0.0
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * largest)
    torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=1e-6)
    if theirs not in ("cispo", "importance_sampling"):
        assert 0.0 < expected_metrics["clip_ratio"] < 1.0
        assert metrics["clip_ratio"] == pytest.approx(expected_metrics["clip_ratio"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_runs_with_thresholds_of_the_command_line(name):
    loss, gradient, metrics = run(algorithm(name))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert {"clip_ratio", "dropped_fraction", "weight_min"} <= metrics.keys()
    stricter = run(algorithm(name, **{key: value / 10 for key, value in SETTINGS.items()} | {"clip_ratio_c": 1.01}))
    assert torch.equal(gradient, stricter[1]) is (name in WITHOUT_THRESHOLDS)


def test_drpo_is_the_library_summed():
    tensors = batch(dtype=torch.float64)
    loss, gradient, metrics = run(algorithm("drpo"), tensors)
    mask = tensors["loss_mask"].bool()
    objective = DRPO(delta_low=0.05, delta_high=0.1)
    tokens = (objective, tensors["log_probs"], tensors["rollout_logprobs"], tensors["advantages"])
    expected = token_loss_and_gradient(*tokens, mask=mask)
    torch.testing.assert_close(loss, expected.loss.sum(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, expected.gradient, rtol=1e-12, atol=0.0)
    assert {name: metrics[name] for name in metrics if name != "clip_ratio"} == pytest.approx(
        summarize(token_diagnostics(*tokens, mask=mask)), rel=1e-12
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name, reduction):
    config, tensors = algorithm(name), batch(reduction, torch.float64)
    whole, gradient, _ = run(config, tensors)
    parts = [run(config, {key: value[rows] for key, value in tensors.items()}) for rows in ([0], [1, 2], [3])]
    torch.testing.assert_close(sum(part[0] for part in parts), whole, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=1e-15)


class Own:
    """An objective of a user: −A r, without its gradient for converging tokens."""

    def loss(self, tokens):
        """−A r."""
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens):
        """1 where the token diverges."""
        return tokens.indicator(tokens.along_advantage(tokens.ratio_minus_one) > 0.0)


@pytest.mark.parametrize("made", [Own(), lambda _: Own()], ids=["object", "function"])
def test_any_objective(made):
    register("own", made)
    try:
        loss, gradient, metrics = run(algorithm("own"), batch(dtype=torch.float64))
    finally:
        PolicyLossRegistry.unregister("own")
    surrogate = run(algorithm("drpo_core_pg_is"), batch(dtype=torch.float64))
    torch.testing.assert_close(loss, surrogate[0], rtol=1e-12, atol=0.0)
    kept = gradient != 0.0
    assert 0 < kept.sum() < (surrogate[1] != 0.0).sum()
    torch.testing.assert_close(gradient[kept], surrogate[1][kept], rtol=1e-12, atol=0.0)
    assert metrics["outside_fraction"] == 0.0


def test_masked_tokens_may_hold_anything():
    tensors = batch()
    masked = tensors["loss_mask"] == 0
    poisoned = tensors | {
        key: tensors[key].masked_fill(masked, float("nan")) for key in ("rollout_logprobs", "old_log_probs", "advantages")
    }
    for of_clean, of_poisoned in zip(run(algorithm("drpo"), tensors), run(algorithm("drpo"), poisoned), strict=True):
        assert of_clean == of_poisoned if isinstance(of_clean, dict) else torch.equal(of_clean, of_poisoned)


def test_without_a_mask_every_token_counts():
    tensors = batch()
    ones = tensors | {"loss_mask": torch.ones_like(tensors["loss_mask"])}
    assert torch.equal(run(algorithm("drpo"), tensors | {"loss_mask": None})[1], run(algorithm("drpo"), ones)[1])


def test_a_micro_batch_without_tokens_leaves_extremes_as_they_are():
    """By SkyRL's own reduction, which takes the least of `…_min` and the largest of `…_max`."""
    tensors = batch()
    _, _, metrics = run(algorithm("drpo"), tensors)
    loss, gradient, of_none = run(algorithm("drpo"), tensors | {"loss_mask": torch.zeros_like(tensors["loss_mask"])})
    assert float(loss) == float(gradient.abs().sum()) == 0.0
    assert of_none.keys() == metrics.keys()
    reduced = reduce_metrics({name: [metrics[name], of_none[name]] for name in metrics})
    for name, figure in reduced.items():
        assert figure == (metrics[name] if name.endswith(("_min", "_max")) else pytest.approx(metrics[name] / 2))


def test_the_anchor_is_the_rollout_policy(recwarn):
    tensors = batch()
    elsewhere = run(algorithm("drpo"), tensors | {"old_log_probs": tensors["old_log_probs"] - 0.3})
    assert torch.equal(run(algorithm("drpo"), tensors)[1], elsewhere[1])
    without = run(algorithm("drpo"), tensors | {"old_log_probs": None})
    assert torch.equal(run(algorithm("drpo"), tensors)[1], without[1])
    assert not [warning for warning in recwarn if warning.category is BehaviorPolicyWarning]


def test_without_it_the_anchor_is_the_old_policy_and_warns():
    tensors = batch()
    with pytest.warns(BehaviorPolicyWarning, match=r"old_log_probs.*generator\.sampling_params\.logprobs=1"):
        fallen_back = run(algorithm("drpo"), tensors | {"rollout_logprobs": None})
    assert torch.equal(fallen_back[1], run(algorithm("drpo"), tensors)[1])
    with pytest.raises(ValueError, match="got None for both"):
        run(algorithm("drpo"), tensors | {"rollout_logprobs": None, "old_log_probs": None})


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_correcting_twice_is_refused(kind):
    with pytest.raises(ValueError, match=f"tis_ratio_type: expected null, got '{kind}'"):
        run(algorithm("drpo", **{"off_policy_correction.tis_ratio_type": kind}))


def test_masks_of_the_off_policy_correction_are_skyrls():
    correction = {
        "off_policy_correction.token_mask_is_threshold_low": 0.9,
        "off_policy_correction.token_mask_is_threshold_high": 1.1,
    }
    tensors = batch()
    tensors["old_log_probs"] = tensors["rollout_logprobs"] + 0.2 * torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
    expected_value, expected, figures = run(algorithm("dppo", **correction), tensors)
    value, gradient, metrics = run(algorithm("drpo_core_dppo_tv", **correction), tensors)
    assert not torch.equal(expected, run(algorithm("dppo"), tensors)[1])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=1e-6)
    assert figures.items() - {("clip_ratio", figures["clip_ratio"])} <= metrics.items()


def test_register_binds_thresholds():
    register("spo_bound", SPO(eps=0.3))
    try:
        bound = run(algorithm("spo_bound", eps_clip_low=0.01, eps_clip_high=0.01))
        with pytest.raises(ValueError, match="already registered"):
            register("spo_bound", SPO(eps=0.4))
    finally:
        PolicyLossRegistry.unregister("spo_bound")
    assert torch.equal(bound[1], run(algorithm("drpo_core_spo", eps_clip_low=0.3, eps_clip_high=0.3))[1])


def test_skyrl_still_calls_losses_with_these_arguments():
    """What this integration relies on: the order of arguments, and the default of the rollout's log-probs."""
    parameters = list(inspect.signature(PolicyLossRegistry.get("regular")).parameters)
    assert parameters == ["log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"]
    assert "rollout_logprobs=rollout_action_logprobs" in inspect.getsource(PolicyWorkerBase._forward_backward_micro)
    assert SkyRLTrainConfig().generator.sampling_params.logprobs == 1
    # fully asynchronous training refuses losses that need the old policy's
    assert not LOSSES_WITH_OLD_LOGPROBS & set(NAMES)


def test_losses_reach_ray_workers():
    """Through SkyRL's registry actor, to a process that has not imported this library."""

    @ray.remote
    def elsewhere(config, tensors):
        from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry  # noqa: PLC0415

        loss, metrics = PolicyLossRegistry.get(config.policy_loss_type)(**tensors, config=config)
        return float(loss), metrics

    ray.init(num_cpus=1, include_dashboard=False, logging_level="error")
    register("drpo_strict", DRPO(delta=0.01))
    try:
        sync_registries()
        for name in (*NAMES, "drpo_strict"):
            config = algorithm(name)
            loss, metrics = ray.get(elsewhere.remote(config, batch()))
            expected, _, expected_metrics = run(config)
            assert loss == pytest.approx(float(expected), rel=1e-6)
            assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    finally:
        PolicyLossRegistry.unregister("drpo_strict")
        ray.shutdown()


def train(*arguments, tmp_path):
    overrides = ["trainer.logger=console", f"trainer.policy.model.path={tmp_path / 'no_such_model'}", *arguments]
    command = [sys.executable, "-m", "skyrl.train.entrypoints.main_base", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: S603
    assert result.returncode != 0  # there is no GPU, nor this model
    return result.stdout + result.stderr


def test_one_key_makes_the_command_line_know_the_losses(tmp_path):
    """As far as the trainer's own process, where it stops for want of a model."""
    chosen = "trainer.algorithm.policy_loss_type=drpo"
    assert "invalid policy_loss_type: drpo" in train(chosen, tmp_path=tmp_path)
    entry = "trainer.override_entrypoint=drpo_torch.integrations.skyrl"
    output = train(chosen, entry, "trainer.algorithm.dppo.delta_low=0.1", tmp_path=tmp_path)
    assert "Synced registries to ray actor" in output
    assert "no_such_model" in output
    assert "invalid policy_loss_type" not in output
