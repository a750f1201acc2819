"""verl: every objective as a policy loss, chosen by `actor_rollout_ref.actor.policy_loss.loss_mode`.

verl imports this module itself, through the entry-point group `verl.plugins`, wherever drpo-core is installed.
Thresholds are the actor's own keys, because verl's configuration refuses unknown ones:

==============================  ================================================================================
`loss_mode`                     objective
==============================  ================================================================================
`drpo`                          ``DRPO(delta_low=clip_ratio_low, delta_high=clip_ratio_high)``
`drpo_core_mask_drpo`           ``MaskDRPO(delta_low=clip_ratio_low, delta_high=clip_ratio_high)``
`drpo_core_dppo_tv`             ``DPPO(delta_low=clip_ratio_low, delta_high=clip_ratio_high, max_ratio=clip_ratio_c)``
`drpo_core_dppo_kl`             the same with ``divergence="binary_kl"``
`drpo_core_ppo_clip`            ``PPOClip(eps_low=clip_ratio_low, eps_high=clip_ratio_high, dual_clip=clip_ratio_c)``
`drpo_core_gspo`                ``PPOClip(eps_low=clip_ratio_low, eps_high=clip_ratio_high)`` of the sequence's ratio
`drpo_core_spo`                 ``SPO(eps_low=clip_ratio_low, eps_high=clip_ratio_high)``
`drpo_core_cispo`               ``CISPO(max_ratio=1 + clip_ratio_high)``
`drpo_core_pg_is`               ``PolicyGradient(max_ratio=clip_ratio_c)``
`drpo_core_reinforce`           ``Reinforce()``
`drpo_core_sapo`                ``SAPO(tau_positive=1.0, tau_negative=1.05)``
`drpo_core_icepop`              ``IcePop(min_ratio=1 - clip_ratio_low, max_ratio=1 + clip_ratio_high)``
`drpo_core_ipo`                 ``IPO(delta_low=clip_ratio_low, delta_high=clip_ratio_high, max_ratio=clip_ratio_c)``
`drpo_core_topr`                ``TOPR()``
==============================  ================================================================================

``clip_ratio_c: null`` means no cap. The names are those of `drpo_core.objectives.OBJECTIVES`; `register` adds another
objective, or one with its thresholds bound.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from drpo_core import sequence_mean_token_mean, sequence_mean_token_sum, summarize, token_mean
from drpo_core.modes.mode import refuse_mode
from drpo_core.objectives.configured import at_clip_range, families_by_name, resolved
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.integrations.anchor import sequence_anchor
from drpo_torch.loss import linear_reduction, policy_loss

try:
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
except ImportError as error:
    # verl itself logs the failure of a plug-in at debug level only, and then knows no such loss_mode
    warnings.warn(
        f"drpo-core registers no policy loss: this verl has no verl.trainer.ppo.core_algos.{error.name}", stacklevel=2
    )
    raise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Family
    from drpo_core.reduction import Reduction

__all__ = ["register"]


def register(name: str, objective: Objective | Callable[[Any], Objective], *, sequence_level: bool = False) -> None:
    """Make an objective available to verl as a `loss_mode`.

    Call it in a module that verl imports in every process: name the module in the environment variable
    `VERL_USE_EXTERNAL_MODULES`.

    Parameters
    ----------
    name
        The `loss_mode`.
    objective
        An objective with its thresholds, or a function of the actor's configuration that returns one.
    sequence_level
        Take the importance ratio of the sequence, the geometric mean of its tokens' ratios, instead of the token's.
        With `PPOClip` this is GSPO (arXiv:2507.18071, eq. 14). Diagnostics then describe that ratio.

    Raises
    ------
    ValueError
        If the objective is a mode: verl aggregates by `loss_agg_mode`, and has weights of its own.

    Examples
    --------
    >>> from drpo_core import DRPO
    >>> from drpo_torch.integrations.verl import register
    >>> register("drpo_strict", DRPO(delta=0.05))
    """
    refuse_mode(objective, "verl")

    def loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,  # noqa: ANN401
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        _check_anchor(config, rollout_is_weights)
        mask = response_mask.bool()
        reduction, normalizer = _reduction(loss_agg_mode, mask.shape[-1], config.global_batch_info)
        value, statistics = policy_loss(
            refuse_mode(resolved(objective, config), "verl"),
            log_prob=log_prob,
            behavior_log_prob=sequence_anchor(log_prob, old_log_prob, mask) if sequence_level else old_log_prob,
            advantages=advantages,
            mask=mask,
            reduction=reduction,
            normalizer=normalizer,
            token_weights=rollout_is_weights,
        )
        assert statistics is not None
        return value, _metrics(statistics)

    register_policy_loss(name)(loss)


def _reduction(mode: str, width: int, options: Mapping[str, Any]) -> tuple[Reduction, float | None]:
    """What `agg_loss` does with these options, as a reduction of drpo-core and its normalizer.

    verl multiplies by the number of ranks, because gradients are averaged over them.
    """
    ranks, scale = options.get("dp_size", 1), options.get("loss_scale_factor")
    tokens, sequences = options.get("batch_num_tokens"), options.get("global_batch_size")
    known: dict[str, tuple[Reduction, float | None]] = {
        "token-mean": (token_mean, tokens),
        "token-sum": (token_mean, 1.0),
        "seq-mean-token-sum": (sequence_mean_token_sum, sequences),
        "seq-mean-token-sum-norm": (
            partial(sequence_mean_token_sum, horizon=width if scale is None else scale),
            sequences,
        ),
        "seq-mean-token-mean": (sequence_mean_token_mean, sequences),
    }
    if mode in known:
        reduction, count = known[mode]
        if count is not None:
            return reduction, count / ranks
        if ranks == 1:
            return reduction, None
    # a mode of another release of verl, or what verl refuses
    return linear_reduction(lambda values, mask: agg_loss(values, mask, mode, **options)), None


def _clip_range(config: Any) -> tuple[float, float]:  # noqa: ANN401
    """(low, high), with verl's own fallback on `clip_ratio`."""
    low, high = (config.clip_ratio if side is None else side for side in (config.clip_ratio_low, config.clip_ratio_high))
    return low, high


def _of(family: Family, config: Any) -> Objective:  # noqa: ANN401
    objective: Objective = at_clip_range(family, *_clip_range(config), cap=config.clip_ratio_c)
    return objective


def _check_anchor(config: Any, rollout_is_weights: torch.Tensor | None) -> None:  # noqa: ANN401
    """Warn unless the actor's configuration says that `old_log_prob` is the rollout engine's; refuse a contradiction."""
    if not config.get("use_rollout_log_probs", False):
        msg = (
            "old_log_prob is not known to be the behaviour policy's: unless algorithm.rollout_correction.bypass_mode is true, "
            "verl recomputes it with the training engine, and the trust region lies around that policy. Set "
            "algorithm.rollout_correction.bypass_mode=true, actor_rollout_ref.rollout.calculate_log_probs=true and "
            "+actor_rollout_ref.actor.use_rollout_log_probs='${algorithm.rollout_correction.bypass_mode}'"
        )
        warnings.warn(msg, BehaviorPolicyWarning, stacklevel=3)
    elif rollout_is_weights is not None:
        msg = (
            "rollout_is_weights: expected None, as use_rollout_log_probs says that old_log_prob is the behaviour policy's and "
            "the importance ratio corrects for it already; but verl computes these weights only where it is not. Set "
            "algorithm.rollout_correction.bypass_mode=true"
        )
        raise ValueError(msg)


def _metrics(statistics: Diagnostics) -> dict[str, float]:
    """Diagnostics under verl's prefix, two of them also under verl's names."""
    figures = summarize(statistics)
    figures["ppo_kl"] = figures["k1_mean"]
    figures["pg_clipfrac"] = figures["outside_positive_diverging_fraction"] + figures["outside_negative_diverging_fraction"]
    # verl averages over micro-batches and ranks, which must all have the same names: 0 where nothing was counted, as
    # its own masked means have
    return {f"actor/{name}": 0.0 if math.isnan(figure) else figure for name, figure in figures.items()}


_FAMILIES = families_by_name()
for _name, _family in _FAMILIES.items():
    register(_name, partial(_of, _family))
register(
    "drpo_core_gspo",
    lambda config: at_clip_range(_FAMILIES["drpo_core_ppo_clip"], *_clip_range(config)),
    sequence_level=True,
)
