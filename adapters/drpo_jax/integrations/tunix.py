"""tunix: importing this module registers every objective as a policy loss, chosen by ``GRPOConfig(policy_loss_fn=…)``.

Thresholds are the fields that tunix's own loss reads, `epsilon`, `epsilon_high` (else `epsilon`) and `epsilon_c` (else
none); set as an attribute what the dataclass of your learner does not declare:

==============================  ======================================================================================
`policy_loss_fn`                objective
==============================  ======================================================================================
`drpo`                          ``DRPO(delta_low=epsilon, delta_high=epsilon_high)``
`drpo_core_mask_drpo`           ``MaskDRPO(delta_low=epsilon, delta_high=epsilon_high)``
`drpo_core_dppo_tv`             ``DPPO(delta_low=epsilon, delta_high=epsilon_high, max_ratio=epsilon_c)``
`drpo_core_dppo_kl`             the same with ``divergence="binary_kl"``
`drpo_core_ppo_clip`            ``PPOClip(eps_low=epsilon, eps_high=epsilon_high, dual_clip=epsilon_c)``
`drpo_core_spo`                 ``SPO(eps_low=epsilon, eps_high=epsilon_high)``
`drpo_core_cispo`               ``CISPO(max_ratio=1 + epsilon_high)``
`drpo_core_pg_is`               ``PolicyGradient(max_ratio=epsilon_c)``
`drpo_core_reinforce`           ``Reinforce()``
`drpo_core_sapo`                ``SAPO(tau_positive=1.0, tau_negative=1.05)``
`drpo_core_icepop`              ``IcePop(min_ratio=1 - epsilon, max_ratio=1 + epsilon_high)``
`drpo_core_ipo`                 ``IPO(delta_low=epsilon, delta_high=epsilon_high, max_ratio=epsilon_c)``
`drpo_core_topr`                ``TOPR()``
==============================  ======================================================================================

The names are those of `drpo_core.objectives.OBJECTIVES`; `register` adds another objective, or one with its thresholds bound.
`loss_agg_mode`, `beta`, `kl_loss_mode`,
`kl_clamp_value` and ``loss_algo="gspo-token"`` mean what they mean for tunix's own loss, and are computed by its functions.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import common
from tunix.rl.algo_core import compute_entropy_from_logits, masked_mean
from tunix.rl.function_registry import register_policy_loss_fn

from drpo_core import PolicyGradient, importance_ratio, merge_diagnostics, summarize, token_diagnostics
from drpo_core.modes.mode import refuse_mode
from drpo_core.objectives import family_of
from drpo_core.objectives.configured import at_clip_range, families_by_name, resolved
from drpo_jax import linear_reduction, policy_loss, token_loss
from drpo_jax.integrations import BehaviorPolicyWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics, Mean, Statistic
    from drpo_core.objectives import Family

__all__ = ["log_diagnostics", "register"]

_PREFIX = "trust_region/"


def register(name: str, objective: Objective | Callable[[Any], Objective]) -> None:
    """Make an objective available to tunix as a `policy_loss_fn`; before the learner is made.

    Parameters
    ----------
    name
        The `policy_loss_fn`.
    objective
        An objective with its thresholds, or a function of the learner's configuration that returns one.

    Raises
    ------
    ValueError
        If the objective is a mode: tunix aggregates by `loss_agg_mode`.

    Examples
    --------
    >>> from drpo_core import DRPO
    >>> from drpo_jax.integrations.tunix import register
    >>> register("drpo_strict", DRPO(delta=0.05))
    """
    refuse_mode(objective, "tunix")

    def loss(
        model: nnx.Module,
        train_example: Any,  # noqa: ANN401
        algo_config: Any,  # noqa: ANN401
        pad_id: int,
        eos_id: int,
        **_: object,
    ) -> tuple[jax.Array, dict[str, Any]]:
        if not hasattr(algo_config, "loss_agg_mode"):
            msg = f"algo_config: expected the configuration of a GRPO learner, got {type(algo_config).__name__}"
            raise ValueError(msg)
        return _loss(refuse_mode(resolved(objective, algo_config), "tunix"), model, train_example, algo_config, pad_id, eos_id)

    register_policy_loss_fn(name)(loss)


def log_diagnostics(learner: Any) -> None:  # noqa: ANN401
    """Have a learner log the diagnostics of an objective as ``trust_region/<name>``, beside what it logs already.

    A learner of tunix logs those metrics of a loss that it names itself; call this once, between making and training it.
    Figures are of all tokens of an optimizer step, not means of the micro-batches' means; NaN where nothing was counted.

    Parameters
    ----------
    learner
        A `GRPOLearner`, `DAPOLearner` or `DrGRPOLearner`, or the agentic one, whose `policy_loss_fn` is an objective.

    Raises
    ------
    ValueError
        If its `policy_loss_fn` is one of tunix's own, which has no such diagnostics.

    Examples
    --------
    ::

        learner = GRPOLearner(cluster, GRPOConfig(policy_loss_fn="drpo", epsilon=0.15, num_iterations=2), reward_fns)
        log_diagnostics(learner)
        learner.train(dataset)
    """
    if learner.algo_config.policy_loss_fn in {"grpo", "ppo"}:
        msg = f"learner: expected an objective as its policy_loss_fn, got {learner.algo_config.policy_loss_fn!r}, tunix's own"
        raise ValueError(msg)
    trainer = learner.rl_cluster.actor_trainer
    trainer.with_rl_metrics_to_log(trainer.rl_metrics_to_log | {_PREFIX + name: _summary for name in _DIAGNOSTICS})


def _loss(
    objective: Objective,
    model: nnx.Module,
    example: Any,  # noqa: ANN401
    config: Any,  # noqa: ANN401
    pad_id: int,
    eos_id: int,
) -> tuple[jax.Array, dict[str, Any]]:
    log_prob, logits = common.compute_per_token_logps(
        *nnx.split(model),
        prompt_tokens=example.prompt_ids,
        completion_tokens=example.completion_ids,
        pad_id=pad_id,
        eos_id=eos_id,
        stop_gradient=False,
        return_logits=True,
        segment_ids=example.segment_ids,
        segment_positions=example.segment_positions,
        temperature=config.temperature,
    )
    mask = example.completion_mask.astype(bool)
    aggregate = partial(common.aggregate_loss, completion_mask=mask, loss_agg_mode=config.loss_agg_mode)
    advantages = example.advantages.astype(jnp.float32)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
    _check_anchor(example, config)
    behavior_log_prob = jax.lax.stop_gradient(log_prob) if example.old_per_token_logps is None else example.old_per_token_logps
    if config.loss_algo == "gspo-token":
        _check_sequence_level(objective, example)
        behavior_log_prob = _sequence_anchor(log_prob, behavior_log_prob, mask)

    tokens = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob.astype(jnp.float32), "advantages": advantages}
    weights = example.sampler_is_weights
    reduction = linear_reduction(lambda values, _: aggregate(values))
    loss, statistics = policy_loss(objective, **tokens, mask=mask, reduction=reduction, token_weights=weights)
    assert statistics is not None
    of_objective = loss
    figures = {"kl": jnp.zeros(()), "kl_loss": jnp.zeros(())}
    if example.ref_per_token_logps is not None:
        reference = jnp.where(mask, example.ref_per_token_logps, log_prob)
        kl = common.compute_kl_divergence(log_prob, reference, config.kl_loss_mode, clamp_value=config.kl_clamp_value)
        figures = {"kl": masked_mean(kl, mask), "kl_loss": aggregate(kl)}
        if config.beta:
            loss = loss + config.beta * figures["kl_loss"]
    figures |= {"pg_loss": of_objective, "entropy": aggregate(compute_entropy_from_logits(jax.lax.stop_gradient(logits)))}

    losses = token_loss(objective, **tokens, mask=mask)
    figures |= _tunix_metrics(statistics, **tokens, losses=losses, weights=weights, mask=mask)
    return loss, jax.lax.stop_gradient(figures) | {_PREFIX + name: statistic for name, statistic in statistics.items()}


def _check_anchor(example: Any, config: Any) -> None:  # noqa: ANN401
    """Warn unless `old_per_token_logps` is what the rollout worker says it sampled with."""
    if example.old_per_token_logps is None:
        msg = (
            "no old_per_token_logps: the anchor is the current policy, so that every ratio is 1, no threshold matters and all "
            "objectives have the same gradient. Set num_iterations > 1; in the agentic learner, use_rollout_logps=True and "
            "return_logprobs=True in the RolloutConfig"
        )
    elif not getattr(config, "use_rollout_logps", True) or getattr(config, "sampler_is", None) is not None:
        msg = (
            "old_per_token_logps is not the behaviour policy's: the trainer recomputes it, and the trust region lies around "
            "that policy. Set use_rollout_logps=True and sampler_is=None: the ratio to what was sampled with corrects for the "
            "mismatch already"
        )
    elif not hasattr(config, "use_rollout_logps") and config.temperature != 1.0:
        msg = (
            "old_per_token_logps is not known to be the behaviour policy's: the vanilla rollout recomputes it at temperature "
            f"1, but the temperature of sampling and of log π is {config.temperature}. Set temperature=1.0 in the "
            "RolloutConfig, or use the agentic learner, which records what was sampled with"
        )
    else:
        return
    warnings.warn(msg, BehaviorPolicyWarning, stacklevel=4)


def _check_sequence_level(objective: Objective, example: Any) -> None:  # noqa: ANN401
    if family_of(objective).threshold == "delta":
        msg = (
            f"loss_algo: expected 'grpo' with {type(objective).__name__}, whose trust region is of tokens' probabilities, "
            "got 'gspo-token', the ratio of sequences"
        )
        raise ValueError(msg)
    if example.segment_ids is not None:
        msg = "loss_algo: expected 'grpo' with packed sequences, got 'gspo-token', which would mix the sequences of a row"
        raise ValueError(msg)


def _sequence_anchor(log_prob: jax.Array, behavior_log_prob: jax.Array, mask: jax.Array) -> jax.Array:
    """Log π − mean ℓ: the anchor to which every token has the mean log-ratio of its sequence."""
    log_ratio = jnp.where(mask, log_prob - behavior_log_prob, 0.0)
    mean = log_ratio.sum(axis=-1, keepdims=True) / jnp.clip(mask.sum(axis=-1, keepdims=True), min=1)
    return jax.lax.stop_gradient(log_prob - mean)


def _tunix_metrics(
    statistics: Diagnostics,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    losses: jax.Array,
    weights: jax.Array | None,
    mask: jax.Array,
) -> dict[str, jax.Array]:
    """What tunix's learners log of their own loss, under their names."""
    weights = jnp.ones_like(losses) if weights is None else weights
    ratio = importance_ratio(log_prob, jnp.where(mask, behavior_log_prob, log_prob), xp=jnp)
    low, high = (cast("Mean", statistics[f"outside_{sign}_diverging_fraction"]) for sign in ("negative", "positive"))

    def mean(x: jax.Array) -> jax.Array:
        average: jax.Array = masked_mean(jnp.where(mask, x, 0.0), mask)
        return average

    largest = partial(jnp.max, where=mask, initial=-jnp.inf)
    smallest = partial(jnp.min, where=mask, initial=jnp.inf)
    return {
        "pg_clipfrac": (low.total + high.total) / jnp.clip(mask.sum(), min=1),
        "ppo_kl": statistics["k1_mean"].value,
        "is_ratio/mean": mean(ratio),
        "is_ratio/max": largest(ratio),
        "is_ratio/min": smallest(ratio),
        "log_ratio/abs_mean": statistics["log_ratio_abs_mean"].value,
        "pg_loss/unclipped_mean": mean(-advantages * ratio),
        "pg_loss/clipped_mean": mean(losses),
        "advantage/abs_mean": mean(jnp.abs(advantages)),
        "advantage/max": largest(advantages),
        "advantage/min": smallest(advantages),
        "advantage/nonzero_frac": mean(1.0 * (jnp.abs(advantages) > 1e-8)),
        "sampler_is/weight_mean": mean(weights),
        "sampler_is/weight_min": smallest(weights),
    }


def _summary(parts: Sequence[Statistic]) -> float:
    """One statistic of the micro-batches of a step, as of the whole."""
    return summarize(merge_diagnostics(*({"all": part} for part in jax.device_get(parts))))["all"]


_DIAGNOSTICS = tuple(token_diagnostics(PolicyGradient(), *3 * [np.zeros(1)]))


def _of(family: Family, config: Any) -> Objective:  # noqa: ANN401
    """At the learner's thresholds, with tunix's own fallback on `epsilon`."""
    high, cap = (getattr(config, name, None) for name in ("epsilon_high", "epsilon_c"))
    objective: Objective = at_clip_range(family, config.epsilon, config.epsilon if high is None else high, cap=cap)
    return objective


for _name, _family in families_by_name().items():
    register(_name, partial(_of, _family))
