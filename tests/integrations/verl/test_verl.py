"""verl's own worker path, with its nested tensors and its configuration, on our losses and on verl's."""

import copy
import subprocess
import sys
from functools import cache

import pytest

pytest.importorskip("verl", reason="runs in the environment of `nox -s integration-verl`")

import torch
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.integrations.verl import register
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from drpo_core import DRPO, SPO, summarize, token_diagnostics, token_loss_and_gradient
from drpo_core.objectives.configured import families_by_name

NAMES = [*families_by_name(), "drpo_core_gspo"]
WITHOUT_THRESHOLDS = {f"drpo_core_{name}" for name in ("reinforce", "sapo", "topr")}
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
ANCHORED = "+actor_rollout_ref.actor.use_rollout_log_probs=${algorithm.rollout_correction.bypass_mode}"
BYPASS = "algorithm.rollout_correction.bypass_mode=true"
PROMPTS, RESPONSES = (3, 2, 5, 1), (4, 6, 1, 3)


@cache
def actor(loss_mode, *overrides, anchored=True):
    """The actor's configuration as a worker gets it: verl's YAML with command-line overrides."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode}",
                "actor_rollout_ref.actor.use_dynamic_bsz=true",
                *([ANCHORED, BYPASS] if anchored else []),
                *(f"actor_rollout_ref.actor.{override}" for override in overrides),
            ],
        )
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(*, rows=range(4), dp_size=1, weights=False, dtype=torch.float32):
    """Log-probs of whole sequences, as a model's output, and the data of a micro-batch; both as nested tensors."""
    generator = torch.Generator().manual_seed(1)

    def draw(lengths, low, high):
        return [torch.empty(n, dtype=dtype).uniform_(low, high, generator=generator) for n in lengths]

    log_prob = draw([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)], -3.0, -0.05)
    # where the model's log-prob of a response token is: one position earlier
    of_response = [x[-r - 1 : -1] for x, r in zip(log_prob, RESPONSES, strict=True)]
    fields = {
        "old_log_probs": [(x + e).clamp(max=-1e-3) for x, e in zip(of_response, draw(RESPONSES, -0.8, 0.8), strict=True)],
        "advantages": draw(RESPONSES, -2.0, 2.0),
        "response_mask": [torch.arange(r) != 2 for r in RESPONSES],
        "prompts": [torch.zeros(p, dtype=torch.int64) for p in PROMPTS],
        "responses": [torch.zeros(r, dtype=torch.int64) for r in RESPONSES],
    }
    if weights:
        fields["rollout_is_weights"] = draw(RESPONSES, 0.2, 2.0)
    tokens = sum(int(mask.sum()) for mask in fields["response_mask"])
    data = TensorDict({name: nested([values[i] for i in rows]) for name, values in fields.items()}, batch_size=len(rows))
    tu.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=tokens, global_batch_size=4)
    return nested([log_prob[i] for i in rows]).detach().requires_grad_(), data


def run(config, **kwargs):
    """Loss, gradient in the model's log-probs and metrics of verl's worker path."""
    log_prob, data = batch(**kwargs)
    loss, metrics = ppo_loss(config, {"log_probs": log_prob}, data)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return loss.detach(), gradient.values(), metrics


PARITY = {
    ("vanilla", "drpo_core_ppo_clip"): ["clip_ratio_low=0.2", "clip_ratio_high=0.28", "clip_ratio_c=1.6"],
    ("gspo", "drpo_core_gspo"): ["clip_ratio_low=0.05", "clip_ratio_high=0.1"],
    ("dppo_tv", "drpo_core_dppo_tv"): ["clip_ratio_low=0.05", "clip_ratio_high=0.1", "clip_ratio_c=1.5"],
    ("dppo_kl", "drpo_core_dppo_kl"): ["clip_ratio_low=0.02", "clip_ratio_high=0.04", "clip_ratio_c=1.5"],
    # verl clamps from both sides, and CISPO from above: 1 leaves the lower side open
    ("cispo", "drpo_core_cispo"): ["clip_ratio_low=1.0", "clip_ratio_high=0.3"],
}
pytestmark = pytest.mark.usefixtures("compiled_only")
SAME_VALUE = ("vanilla", "gspo", "cispo")  # DPPO's are those of its score form, which has the same gradient


@pytest.mark.filterwarnings("ignore::drpo_torch.integrations.BehaviorPolicyWarning")
@pytest.mark.parametrize("weights", [False, True], ids=["", "rollout_is_weights"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("theirs", "ours"), PARITY)
def test_parity_with_verl(theirs, ours, aggregation, weights):
    overrides = [*PARITY[theirs, ours], f"loss_agg_mode={aggregation}"]
    value, gradient, metrics = run(actor(ours, *overrides, anchored=False), weights=weights)
    expected_value, expected, expected_metrics = run(actor(theirs, *overrides, anchored=False), weights=weights)
    tolerance = 1e-6 * float(expected.abs().max())
    assert float(expected.abs().max()) > 0.0
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=tolerance)
    if theirs in SAME_VALUE:
        torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=1e-6)
    if theirs != "gspo":
        assert metrics["actor/ppo_kl"].aggregate() == pytest.approx(expected_metrics["actor/ppo_kl"].aggregate(), rel=1e-5)
    if theirs != "cispo":
        clipped = expected_metrics["actor/pg_clipfrac"].aggregate()
        assert 0.0 < clipped < 1.0
        assert metrics["actor/pg_clipfrac"].aggregate() == pytest.approx(clipped, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_runs_with_thresholds_from_yaml(name):
    overrides = ["clip_ratio_low=0.1", "clip_ratio_high=0.15", "clip_ratio_c=4.0"]
    loss, gradient, metrics = run(actor(name, *overrides))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert {"actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac", "actor/dropped_fraction"} <= metrics.keys()
    stricter = run(actor(name, *(f"{key.split('=')[0]}=1e-3" for key in overrides[:2]), "clip_ratio_c=1.001"))
    assert torch.equal(gradient, stricter[1]) is (name in WITHOUT_THRESHOLDS)


def test_drpo_through_the_worker_is_the_library():
    _, data = batch(dtype=torch.float64)
    loss, gradient, metrics = run(actor("drpo", "clip_ratio_low=0.05", "clip_ratio_high=0.15"), dtype=torch.float64)
    padded = data.select("old_log_probs", "advantages", "response_mask").to_padded_tensor()
    output, _ = batch(dtype=torch.float64)
    log_prob = torch.nn.utils.rnn.pad_sequence(
        [x[-r - 1 : -1] for x, r in zip(output.unbind(), RESPONSES, strict=True)], batch_first=True
    ).detach()
    tokens = (DRPO(delta_low=0.05, delta_high=0.15), log_prob, padded["old_log_probs"], padded["advantages"])
    mask = padded["response_mask"].bool()
    expected = token_loss_and_gradient(*tokens, mask=mask)
    torch.testing.assert_close(loss, expected.loss.sum() / mask.sum(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient.sum(), expected.gradient.sum() / mask.sum(), rtol=1e-12, atol=0.0)
    for name, figure in summarize(token_diagnostics(*tokens, mask=mask)).items():
        assert metrics[f"actor/{name}"].aggregate() == pytest.approx(figure, rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_and_ranks_add_up(name, aggregation):
    """What verl scales by the number of ranks and averages over them is the loss and gradient of the whole batch."""
    config = actor(name, f"loss_agg_mode={aggregation}", "loss_scale_factor=6")
    whole, gradient, _ = run(config, dtype=torch.float64)
    ranks = [[[0], [3]], [[1, 2]]]
    parts = [[run(config, rows=rows, dp_size=2, dtype=torch.float64) for rows in rank] for rank in ranks]
    assert sum(part[0] for rank in parts for part in rank) / 2 == pytest.approx(float(whole), rel=1e-12, abs=1e-15)
    in_order = torch.cat([parts[0][0][1], parts[1][0][1], parts[0][1][1]]) / 2
    torch.testing.assert_close(in_order, gradient, rtol=1e-12, atol=1e-15)


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
        loss, gradient, metrics = run(actor("own"), dtype=torch.float64)
        surrogate = run(actor("drpo_core_pg_is", "clip_ratio_c=null"), dtype=torch.float64)
    finally:
        del POLICY_LOSS_REGISTRY["own"]
    torch.testing.assert_close(loss, surrogate[0], rtol=1e-12, atol=0.0)
    kept = gradient != 0.0
    assert 0 < kept.sum() < (surrogate[1] != 0.0).sum()
    torch.testing.assert_close(gradient[kept], surrogate[1][kept], rtol=1e-12, atol=0.0)
    assert metrics["actor/outside_fraction"].aggregate() == 0.0


def with_aggregation(config, mode):
    """The configuration with a mode that verl's own check would not let through."""
    changed = copy.copy(config)
    object.__setattr__(changed, "loss_agg_mode", mode)
    return changed


def test_an_aggregation_that_only_verl_knows(monkeypatch):
    """One of another release, say: verl's own function, differentiated."""

    def first_rows(values, mask, mode, **options):
        assert mode == "first-rows"
        return agg_loss(values[:2], mask[:2], "token-mean", **options)

    monkeypatch.setitem(register.__globals__, "agg_loss", first_rows)
    _, gradient, _ = run(actor("drpo"), dtype=torch.float64)
    loss, found, _ = run(with_aggregation(actor("drpo"), "first-rows"), dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(PROMPTS) + torch.tensor(RESPONSES))
    torch.testing.assert_close(found, torch.where(rows < 2, gradient, 0.0), rtol=1e-12, atol=0.0)
    assert torch.isfinite(loss)


def test_an_unknown_aggregation_is_refused_by_verl():
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
        run(with_aggregation(actor("drpo"), "mean"))


def test_ranks_need_the_count_of_the_whole_batch():
    log_prob, data = batch(dp_size=2)
    tu.assign_non_tensor(data, batch_num_tokens=None)
    with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
        ppo_loss(actor("drpo"), {"log_probs": log_prob}, data)


def test_masked_tokens_may_hold_anything():
    config = actor("drpo")
    log_prob, data = batch()
    loss, _ = ppo_loss(config, {"log_probs": log_prob}, data)
    data["old_log_probs"].values()[~data["response_mask"].values()] = float("nan")
    poisoned, _ = ppo_loss(config, {"log_probs": log_prob}, data)
    assert torch.equal(loss, poisoned)


def test_a_micro_batch_without_tokens_leaves_metrics_finite():
    log_prob, data = batch()
    data["response_mask"].values().fill_(False)  # noqa: FBT003 -- torch's signature
    loss, metrics = ppo_loss(actor("drpo"), {"log_probs": log_prob}, data)
    assert float(loss) == 0.0
    assert all(abs(metric.aggregate()) < float("inf") for metric in metrics.values())


def test_unknown_anchor_warns():
    with pytest.warns(BehaviorPolicyWarning, match=r"bypass_mode=true.*calculate_log_probs=true.*use_rollout_log_probs"):
        run(actor("drpo", anchored=False))


def test_known_anchor_does_not_warn(recwarn):
    run(actor("drpo"))
    assert not [w for w in recwarn if w.category is BehaviorPolicyWarning]


def test_correcting_twice_is_refused():
    with pytest.raises(ValueError, match="rollout_is_weights: expected None"):
        run(actor("drpo"), weights=True)


def test_no_cap_when_null():
    capped, free = (run(actor("drpo_core_pg_is", f"clip_ratio_c={c}"))[1] for c in ("1.2", "null"))
    assert not torch.equal(capped, free)
    torch.testing.assert_close(free, run(actor("drpo_core_pg_is", "clip_ratio_c=1e9"))[1], rtol=0.0, atol=0.0)


def test_one_clip_ratio_where_the_sides_are_null():
    one = run(actor("drpo", "clip_ratio=0.07", "clip_ratio_low=null", "clip_ratio_high=null"))
    two = run(actor("drpo", "clip_ratio_low=0.07", "clip_ratio_high=0.07"))
    assert torch.equal(one[1], two[1])


def test_register_binds_thresholds():
    register("spo_bound", SPO(eps=0.3))
    try:
        bound = run(actor("spo_bound", "clip_ratio_low=0.01", "clip_ratio_high=0.01"))
    finally:
        del POLICY_LOSS_REGISTRY["spo_bound"]
    assert torch.equal(bound[1], run(actor("drpo_core_spo", "clip_ratio_low=0.3", "clip_ratio_high=0.3"))[1])


def test_verl_still_calls_losses_with_these_keywords():
    """What this integration relies on: the registry, the keywords and the anchor flag of the actor's configuration."""
    assert get_policy_loss_fn("drpo") is POLICY_LOSS_REGISTRY["drpo"]
    assert actor("drpo", anchored=False).get("use_rollout_log_probs") is False
    assert {"clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "global_batch_info"} <= set(actor("drpo"))


def test_importing_verl_registers_everything():
    """Through the entry point alone, without an import of this library, and without a warning."""
    code = (
        "import verl, sys; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as registry\n"
        f"missing = set({NAMES!r}) - registry.keys(); sys.exit(f'not registered: {{missing}}' if missing else 0)"
    )
    result = subprocess.run(  # noqa: S603 -- this interpreter
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "drpo-core registers no policy loss" not in result.stderr
