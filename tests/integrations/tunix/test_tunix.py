"""The tunix integration against the installed tunix: a 2-layer Qwen3 with random weights and a tokenizer of letters."""

# ruff: noqa: D102 -- the methods of tunix's interfaces

from __future__ import annotations

import inspect
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest

tunix = pytest.importorskip("tunix", reason="tunix is not installed: nox -s integration-tunix")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from drpo_jax.integrations.tunix import log_diagnostics, register  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.models.qwen3.model import ModelConfig, Qwen3  # noqa: E402
from tunix.rl import algo_core, common, function_registry  # noqa: E402
from tunix.rl.agentic import agentic_grpo_learner as agentic  # noqa: E402
from tunix.rl.agentic.parser.chat_template_parser.parser import BaseChatTemplateParser, TokenConfig  # noqa: E402
from tunix.rl.grpo.dapo_learner import DAPOConfig, DAPOLearner  # noqa: E402
from tunix.rl.grpo.drgrpo_learner import DrGRPOConfig, DrGRPOLearner  # noqa: E402
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner  # noqa: E402
from tunix.rl.ppo.ppo_learner import PPOConfig  # noqa: E402
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role  # noqa: E402
from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig  # noqa: E402
from tunix.rl.rollout.vanilla_rollout import VanillaRollout  # noqa: E402

from drpo_core import DRPO, BehaviorPolicyWarning, PPOClip, token_diagnostics  # noqa: E402
from drpo_core.objectives.configured import families_by_name  # noqa: E402

# tunix and what it imports warn of their own deprecations; ours are asserted
pytestmark = pytest.mark.filterwarnings("ignore", "error::drpo_core.BehaviorPolicyWarning")

PAD, EOS, BOS = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 3 + len(LETTERS)
PROMPTS = ["abc", "bcd", "hij", "xyz"]
WIDTH = 8
AGGREGATIONS = [
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-scale",
    "seq-mean-token-sum",
    "sequence-mean-token-sum-norm",
]


class Tokenizer:
    """Letters; the five methods that tunix asks of a tokenizer."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [BOS] + [3 + LETTERS.index(letter) for letter in text if letter in LETTERS]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(LETTERS[i - 3] for i in ids if i >= 3)

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return PAD


class Bigram(nnx.Module):
    """The smallest model that tunix can score: what it does with the log-probs is tested, not how they come about."""

    def __init__(self) -> None:
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY)))

    def __call__(self, tokens: jax.Array, **_: object) -> tuple[jax.Array, None]:
        return self.table[...][tokens], None


def qwen3() -> Qwen3:
    config = ModelConfig(
        num_layers=2,
        vocab_size=VOCABULARY,
        embed_dim=32,
        hidden_dim=64,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return Qwen3(config, rngs=nnx.Rngs(0))


def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    del prompts
    return [text.count("a") / WIDTH for text in completions]


# --- the loss function itself ---


def example(**changes: Any) -> common.TrainExample:
    """A batch with ragged completions and an off-policy anchor that is far enough for every clip to bite."""
    rng = np.random.default_rng(0)
    mask = np.arange(WIDTH) < np.array([8, 5, 1, 6])[:, None]
    prompts = jnp.asarray(rng.integers(3, VOCABULARY, size=(4, 3)))
    completions = jnp.asarray(np.where(mask, rng.integers(3, VOCABULARY, size=mask.shape), PAD))
    log_prob = common.compute_per_token_logps(*nnx.split(Bigram()), prompts, completions, pad_id=PAD, eos_id=EOS)
    fields = {
        "prompt_ids": prompts,
        "prompt_mask": jnp.ones((4, 3), dtype=bool),
        "completion_ids": completions,
        "completion_mask": jnp.asarray(mask),
        "advantages": jnp.asarray([1.3, -0.7, 0.4, -1.1]),
        "old_per_token_logps": log_prob + jnp.asarray(rng.normal(scale=0.6, size=mask.shape), dtype=jnp.float32),
        "ref_per_token_logps": log_prob + jnp.asarray(rng.normal(scale=0.3, size=mask.shape), dtype=jnp.float32),
    }
    return common.TrainExample(**fields | changes)


def config_of(*, make: type = GRPOConfig, **fields: Any) -> Any:
    """A configuration, with the attributes that its class does not declare set as a user sets them."""
    declared = {name for name in fields if name in inspect.signature(make).parameters}
    config = make(**{name: fields[name] for name in declared})
    for name, value in ({"temperature": 1.0} | fields).items():
        if name not in declared:
            setattr(config, name, value)
    return config


def evaluate(name: str, batch: common.TrainExample, config: Any) -> tuple[float, dict[str, Any], np.ndarray]:
    """Loss, aux and flat gradient of a registered loss, as the trainer computes them."""
    function = function_registry.get_policy_loss_fn(name)

    @nnx.jit
    def step(model: Bigram, batch: common.TrainExample) -> Any:
        def of_model(model: Bigram, batch: common.TrainExample) -> Any:
            return function(model, batch, algo_config=config, pad_id=PAD, eos_id=EOS)

        return nnx.value_and_grad(of_model, has_aux=True)(model, batch)

    (loss, aux), gradients = step(Bigram(), batch)
    return float(loss), jax.device_get(aux), flat(gradients)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


SETTINGS = [
    *({"loss_agg_mode": mode} for mode in AGGREGATIONS),
    *({"loss_agg_mode": mode, "loss_algo": "gspo-token", "epsilon": 0.01} for mode in AGGREGATIONS[:2]),
    *({"beta": 0.1, "kl_loss_mode": mode} for mode in ("kl", "mse_kl", "low_var_kl")),
    {"beta": 0.1, "kl_loss_mode": "low_var_kl", "kl_clamp_value": 0.05},
    {"epsilon_high": 0.4, "epsilon_c": 1.5},
    {"temperature": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ppo_clip_is_tunix_own_grpo_loss(settings: dict[str, Any]) -> None:
    config = config_of(**{"beta": 0.0, **settings})
    if settings.get("temperature", 1.0) == 1.0:
        ours = evaluate("drpo_core_ppo_clip", example(), config)
    else:
        with pytest.warns(BehaviorPolicyWarning, match="recomputes it at temperature 1"):
            ours = evaluate("drpo_core_ppo_clip", example(), config)
    theirs = evaluate("grpo", example(), config)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6, abs=1e-6)
    scale = np.abs(theirs[2]).max()
    assert scale > 1e-3
    np.testing.assert_allclose(ours[2] / scale, theirs[2] / scale, rtol=0, atol=1e-6)
    assert theirs[1]["pg_clipfrac"] > 0.0
    # tunix's clipped_mean is of the clipped branch alone, ours of the objective's loss
    for name in theirs[1].keys() & ours[1].keys() - {"pg_loss/clipped_mean"}:
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=1e-5, abs=1e-6), name
    # the rest is of PPO's dual clip and logged by no GRPO learner
    assert theirs[1].keys() - ours[1].keys() == {"pg_clipfrac_lower"}


def test_importance_weights_and_token_advantages_as_in_tunix() -> None:
    """What the agentic learner (sampler_is) and sequence packing give a loss."""
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.uniform(0.2, 2.0, size=(4, WIDTH)), dtype=jnp.float32)
    token_advantages = jnp.asarray(rng.normal(size=(4, WIDTH)), dtype=jnp.float32)
    config = config_of(make=agentic.GRPOConfig, sampler_is="token", beta=0.0)
    batch = example(sampler_is_weights=weights, advantages=token_advantages)
    with pytest.warns(BehaviorPolicyWarning, match="sampler_is=None"):
        ours = evaluate("drpo_core_ppo_clip", batch, config)
    theirs = evaluate("grpo", batch, config)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-6 * np.abs(theirs[2]).max())
    for name in ("sampler_is/weight_mean", "sampler_is/weight_min", "advantage/max", "advantage/nonzero_frac"):
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=1e-6), name


def test_packed_sequences_as_in_tunix() -> None:
    """Two sequences a row, as `max_seq_token_per_tpu` packs them: no prompts, everything per token."""
    rng = np.random.default_rng(2)
    ids = jnp.asarray(rng.integers(3, VOCABULARY, size=(2, 12)))
    fields = {
        "prompt_ids": jnp.zeros((2, 0), dtype=ids.dtype),
        "prompt_mask": jnp.zeros((2, 0), dtype=bool),
        "completion_ids": ids,
        "completion_mask": jnp.asarray(np.tile([0, 0, 1, 1, 1, 1], (2, 2))),
        "advantages": jnp.asarray(rng.normal(size=(2, 12)), dtype=jnp.float32),
        "old_per_token_logps": jnp.asarray(rng.normal(-3.3, 0.5, size=(2, 12)), dtype=jnp.float32),
        "ref_per_token_logps": None,
        "segment_ids": jnp.asarray(np.repeat([[1, 2]], 6, axis=1).repeat(2, axis=0)),
        "segment_positions": jnp.asarray(np.tile(np.arange(6), (2, 2))),
    }
    batch, config = common.TrainExample(**fields), config_of(beta=0.0)
    ours, theirs = (evaluate(name, batch, config) for name in ("drpo_core_ppo_clip", "grpo"))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-6 * np.abs(theirs[2]).max())
    with pytest.raises(ValueError, match="packed sequences"):
        evaluate("drpo_core_ppo_clip", batch, config_of(loss_algo="gspo-token"))


@pytest.mark.parametrize("filler", [np.nan, np.inf, 1e30])
def test_masked_positions_may_hold_anything(filler: float) -> None:
    plain = example(sampler_is_weights=jnp.ones((4, WIDTH)))
    mask = plain.completion_mask
    # an advantage a token in both: of other shapes, XLA may add in another order
    plain = plain.replace(advantages=jnp.broadcast_to(plain.advantages[:, None], mask.shape))
    names = ("old_per_token_logps", "ref_per_token_logps", "sampler_is_weights")
    filled = plain.replace(
        **{name: jnp.where(mask, getattr(plain, name), filler) for name in names},
        advantages=jnp.where(mask, plain.advantages, filler),
    )
    config = config_of(epsilon=0.1)
    clean, dirty = (evaluate("drpo", batch, config) for batch in (plain, filled))
    assert dirty[0] == clean[0]
    np.testing.assert_array_equal(dirty[2], clean[2])
    for name, value in clean[1].items():
        np.testing.assert_array_equal(dirty[1][name], value, err_msg=name)


def test_thresholds_are_read_or_bound() -> None:
    register("bound", DRPO(delta_low=0.02, delta_high=0.03))
    bound = evaluate("bound", example(), config_of())
    read = evaluate("drpo", example(), config_of(epsilon=0.02, epsilon_high=0.03))
    np.testing.assert_array_equal(bound[2], read[2])
    ends = [evaluate("drpo", example(), config_of(epsilon=eps))[2] for eps in (0.02, 0.05)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-4
    capped = config_of(epsilon=0.1, epsilon_c=1.5, beta=0.0)
    dapo = config_of(make=DAPOConfig, epsilon=0.2, epsilon_high=0.28)
    for config, objective in [
        (capped, PPOClip(eps_low=0.1, eps_high=0.1, dual_clip=1.5)),
        (dapo, PPOClip(eps_low=0.2, eps_high=0.28)),
    ]:
        register("bound", lambda _, objective=objective: objective)
        of_both = [evaluate(name, example(), config)[2] for name in ("drpo_core_ppo_clip", "bound")]
        np.testing.assert_array_equal(*of_both)


class Own:
    """An objective of a user: −A r, without its gradient for converging tokens."""

    def loss(self, tokens: Any) -> Any:
        """−A r."""
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens: Any) -> Any:
        """1 where the token diverges."""
        return tokens.indicator(tokens.along_advantage(tokens.ratio_minus_one) > 0.0)


def test_any_objective() -> None:
    register("own", Own())
    config = config_of(beta=0.0)
    loss, aux, gradient = evaluate("own", example(), config)
    surrogate = evaluate("drpo_core_pg_is", example(), config)
    assert loss == pytest.approx(surrogate[0], rel=1e-6)
    assert np.abs(gradient - surrogate[2]).max() > 1e-3
    assert float(aux["trust_region/outside_fraction"].total) == 0.0


def test_warns_of_an_anchor_that_is_not_mu() -> None:
    with pytest.warns(BehaviorPolicyWarning, match="num_iterations > 1"):
        _, aux, _ = evaluate("drpo", example(old_per_token_logps=None), config_of())
    assert float(aux["is_ratio/max"]) == float(aux["is_ratio/min"]) == 1.0
    with pytest.warns(BehaviorPolicyWarning, match="the temperature of sampling"):
        evaluate("drpo", example(), config_of(temperature=0.9))
    for fields in ({"use_rollout_logps": False}, {"sampler_is": "token"}):
        with pytest.warns(BehaviorPolicyWarning, match="the trainer recomputes it"):
            evaluate("drpo", example(), config_of(make=agentic.GRPOConfig, **fields))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BehaviorPolicyWarning)
        evaluate("drpo", example(), config_of())
        evaluate("drpo", example(), config_of(make=agentic.GRPOConfig, temperature=0.9))


def test_refuses_what_it_would_ignore() -> None:
    for name in ("drpo", "drpo_core_mask_drpo", "drpo_core_dppo_tv"):
        with pytest.raises(ValueError, match="loss_algo: expected 'grpo' with"):
            evaluate(name, example(), config_of(loss_algo="gspo-token"))
    with pytest.raises(ValueError, match="expected the configuration of a GRPO learner, got PPOConfig"):
        evaluate("drpo", example(), PPOConfig())
    with pytest.raises(ValueError, match="Unsupported loss aggregation mode"):
        evaluate("drpo", example(), config_of(loss_agg_mode="mean"))
    with pytest.raises(LookupError, match="drop"):
        learner(policy_loss_fn="drop")


# --- whole runs ---


class FreshRollout(VanillaRollout):
    """Draws from a new key every time: the vanilla rollout uses key 0 for each request unless told a seed."""

    def __init__(self, *, rollout_actor: Any, tokenizer: Any, rollout_config: RolloutConfig, **_: object) -> None:
        of = rollout_actor.config
        cache = CacheConfig(rollout_config.kv_cache_size, of.num_layers, of.num_kv_heads, of.head_dim)
        super().__init__(rollout_actor, tokenizer, cache)
        self._keys = itertools.count()

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **options: Any) -> Any:
        seeded = RolloutConfig(**{**vars(rollout_config), "seed": next(self._keys)})
        return super().generate(prompts, seeded, **options)


def cluster(*, steps: int, optimizer: Any, micro: int, rollout: dict[str, Any], engine: Any = "vanilla") -> RLCluster:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    training = RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=1000,
        max_steps=steps,
        mini_batch_size=len(PROMPTS),
        train_micro_batch_size=micro,
        rollout_micro_batch_size=len(PROMPTS),
        compute_logps_micro_batch_size=len(PROMPTS),
    )
    config = ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
        rollout_engine=engine,
        training_config=training,
        rollout_config=RolloutConfig(
            **{"max_tokens_to_generate": WIDTH, "max_prompt_length": WIDTH, "kv_cache_size": 32, "temperature": 1.0, **rollout}
        ),
    )
    return RLCluster(actor=qwen3(), reference=qwen3(), tokenizer=Tokenizer(), cluster_config=config)


def learner(
    *,
    make: type = GRPOLearner,
    config: type = GRPOConfig,
    steps: int = 4,
    optimizer: Any = None,
    micro: int = 2,
    rollout: dict[str, Any] | None = None,
    **fields: Any,
) -> Any:
    over = cluster(steps=steps, optimizer=optimizer or optax.adam(3e-3), micro=micro, rollout=rollout or {})
    return make(over, config(**{"num_generations": 4, "num_iterations": 2, "epsilon": 0.05, **fields}), [letters_a])


def letters_a(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Something that even random weights are rewarded for: early letters."""
    del prompts
    return [sum(LETTERS.index(letter) < 13 for letter in text) / WIDTH for text in completions]


def train(made: Any) -> tuple[np.ndarray, dict[str, list[float]]]:
    """The weights at the end, and the metrics that were logged for the actor."""
    made.train([{"prompts": list(PROMPTS)} for _ in range(100)])
    trainer = made.rl_cluster.actor_trainer
    weights = flat(nnx.state(trainer.model, nnx.Param))
    (logged,) = (modes["train"] for prefix, modes in trainer.metrics_logger._metrics.items() if prefix == "actor")
    return weights, {name: [float(value) for value in values] for name, values in logged.items()}


@pytest.mark.parametrize("loss_algo", ["grpo", "gspo-token"])
def test_a_run_with_ppo_clip_is_a_run_with_tunix_own_loss(loss_algo: str) -> None:
    """SGD, as Adam blows up the rounding of tiny gradients."""
    runs = []
    for name in ("grpo", "drpo_core_ppo_clip"):
        fields = {"policy_loss_fn": name, "loss_algo": loss_algo, "epsilon": 0.01}
        runs.append(train(learner(optimizer=optax.sgd(0.1), **fields)))
    (theirs, their_log), (ours, our_log) = runs
    assert np.abs(theirs - ours).max() < 1e-6
    start = flat(nnx.state(qwen3(), nnx.Param))
    assert np.abs(theirs - start).max() > 1e-3
    assert their_log.keys() == our_log.keys()
    for name in ("loss", "kl", "pg_clipfrac", "grad_norm"):
        assert our_log[name] == pytest.approx(their_log[name], rel=1e-4, abs=1e-6), name
    assert max(our_log["pg_clipfrac"]) > 0.0


def test_trains_with_every_objective_and_no_two_alike() -> None:
    ends = {}
    for name in families_by_name():
        made = learner(policy_loss_fn=name)
        log_diagnostics(made)
        weights, logged = train(made)
        assert np.isfinite(weights).all(), name
        assert all(len(values) == 4 for values in logged.values()), name
        assert logged["trust_region/invalid_fraction"] == [0.0] * 4
        # the second update on a batch is off-policy
        assert logged["trust_region/ratio_max"][0] == pytest.approx(1.0, abs=1e-5)
        assert logged["trust_region/ratio_max"][1] > 1.01
        ends[name] = weights
    for one, other in itertools.combinations(ends, 2):
        assert np.abs(ends[one] - ends[other]).max() > 1e-6, (one, other)


def test_reward_rises() -> None:
    over = cluster(steps=30, optimizer=optax.adam(3e-3), micro=2, rollout={}, engine=FreshRollout)
    config = GRPOConfig(policy_loss_fn="drpo", epsilon=0.15, num_generations=4, num_iterations=2, beta=0.0)
    train(GRPOLearner(over, config, reward))
    rewards = over._rl_metrics_logger.get_metric_history("rewards", "score/mean", "train")
    assert len(rewards) == 15
    assert np.mean(rewards[:3]) < 0.1
    assert np.mean(rewards[-3:]) > 0.7


def test_diagnostics_do_not_depend_on_the_micro_batch() -> None:
    """Completions are ragged, so that a mean of the micro-batches' means would differ."""
    whole = example()
    parts = [jax.tree.map(lambda leaf, rows=rows: leaf[rows], whole) for rows in (slice(1), slice(1, 4))]
    aux, *auxes = (evaluate("drpo", batch, config_of(epsilon=0.05))[1] for batch in (whole, *parts))
    made = learner(policy_loss_fn="drpo")
    log_diagnostics(made)
    logged = made.rl_cluster.actor_trainer.rl_metrics_to_log
    names = [name for name in logged if name.startswith("trust_region/")]
    assert {name.removeprefix("trust_region/") for name in names} == set(token_diagnostics(DRPO(delta=0.1), *3 * [np.zeros(1)]))
    for name in names:
        assert logged[name]([part[name] for part in auxes]) == pytest.approx(logged[name]([aux[name]]), rel=1e-5), name
    mean_of_means = np.mean([part["trust_region/ratio_mean"].value for part in auxes])
    assert logged["trust_region/ratio_mean"]([aux["trust_region/ratio_mean"]]) != pytest.approx(mean_of_means, rel=1e-2)


def test_log_diagnostics_keeps_what_is_logged_and_refuses_other_losses() -> None:
    made = learner(policy_loss_fn="drpo")
    before = dict(made.rl_cluster.actor_trainer.rl_metrics_to_log)
    log_diagnostics(made)
    after = made.rl_cluster.actor_trainer.rl_metrics_to_log
    assert before == {name: after[name] for name in before}
    with pytest.raises(ValueError, match="tunix's own"):
        log_diagnostics(learner(policy_loss_fn="grpo"))


@pytest.mark.parametrize(
    ("make", "config", "fields"),
    [
        (DAPOLearner, DAPOConfig, {"overlong_buffer": None, "epsilon": 0.1, "epsilon_high": 0.2}),
        (DrGRPOLearner, DrGRPOConfig, {"epsilon": 0.1}),
    ],
)
def test_other_grpo_learners(make: type, config: type, fields: dict[str, Any]) -> None:
    made = learner(make=make, config=config, policy_loss_fn="drpo", steps=2, **fields)
    log_diagnostics(made)
    weights, logged = train(made)
    assert np.isfinite(weights).all()
    assert logged["trust_region/ratio_max"][1] > 1.01


class Chat(BaseChatTemplateParser):
    """No template: the prompt as it is."""

    def _init_tokens(self) -> TokenConfig:
        return TokenConfig()

    def _init_generation_prompt(self) -> str:
        return ""


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_agentic_learner_anchors_at_what_was_sampled_with(temperature: float) -> None:
    rollout = {"return_logprobs": True, "temperature": temperature}
    over = cluster(steps=4, optimizer=optax.adam(3e-3), micro=4, rollout=rollout, engine=FreshRollout)
    config = agentic.GRPOConfig(
        policy_loss_fn="drpo", epsilon=0.05, num_generations=4, num_iterations=2, max_response_length=WIDTH, max_concurrency=1
    )
    made = agentic.GRPOLearner(over, config, [letters_a], chat_parser=Chat(over.tokenizer))
    log_diagnostics(made)
    weights, logged = train(made)
    assert np.isfinite(weights).all()
    assert logged["trust_region/log_ratio_abs_mean"][0] < 1e-4
    assert logged["trust_region/log_ratio_abs_mean"][1] > 1e-3
    assert logged["advantage/nonzero_frac"][0] > 0.0


# --- what the next release of tunix can break ---


def test_tunix_is_as_the_integration_expects() -> None:
    expected = ["model", "train_example", "algo_config", "pad_id", "eos_id", "kwargs"]
    assert list(inspect.signature(function_registry.get_policy_loss_fn("grpo")).parameters) == expected
    own = function_registry.get_policy_loss_fn("grpo")
    result = own(Bigram(), example(), algo_config=config_of(), pad_id=PAD, eos_id=EOS)
    assert isinstance(result, tuple)  # later releases return a LossOutput
    assert "return_logits" in inspect.signature(common.compute_per_token_logps).parameters
    assert list(inspect.signature(common.aggregate_loss).parameters)[:3] == [
        "per_token_loss",
        "completion_mask",
        "loss_agg_mode",
    ]
    assert algo_core.masked_mean(jnp.ones(3), jnp.ones(3)) == pytest.approx(1.0)
    # the agentic learner logs these of every loss and fails without one
    aux = evaluate("drpo", example(), config_of())[1]
    source = inspect.getsource(agentic.GRPOLearner.__init__)
    named = {line.split('"')[1] for line in source.splitlines() if line.strip().startswith('"') and "np.m" in line}
    assert len(named) == 18
    assert named <= aux.keys()


def test_the_page_runs() -> None:
    """docs/integrations/tunix.md, whose last block is a whole run."""
    page = (Path(__file__).parents[3] / "docs" / "integrations" / "tunix.md").read_text()
    blocks = [block.split("\n```", 1)[0] for block in page.split("```py\n")[1:]]
    names: dict[str, Any] = {}
    exec(blocks[-1], names)  # noqa: S102 -- our own page
    rewards = names["learner"].rl_cluster._rl_metrics_logger.get_metric_history("rewards", "score/mean", "train")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.5
    for block in blocks[:-1]:
        exec(block, names)  # noqa: S102
    assert callable(function_registry.get_policy_loss_fn("drpo_strict"))
