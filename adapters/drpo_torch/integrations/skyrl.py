"""SkyRL: every objective as a policy loss, chosen by `trainer.algorithm.policy_loss_type`.

Name this module in `trainer.override_entrypoint`: SkyRL imports it and calls its `main`, which is SkyRL's own with these
losses registered. Thresholds are those of SkyRL's own losses, below `trainer.algorithm`:

===========================  ======================================================================================
`policy_loss_type`           objective
===========================  ======================================================================================
`drpo`                       ``DRPO(delta_low=dppo.delta_low, delta_high=dppo.delta_high)``
`drpo_core_mask_drpo`        ``MaskDRPO(delta_low=dppo.delta_low, delta_high=dppo.delta_high)``
`drpo_core_dppo_tv`          ``DPPO(delta_low=dppo.delta_low, delta_high=dppo.delta_high)``
`drpo_core_dppo_kl`          the same with ``divergence="binary_kl"``
`drpo_core_ppo_clip`         ``PPOClip(eps_low=eps_clip_low, eps_high=eps_clip_high)``
`drpo_core_dual_clip`        ``PPOClip(eps_low=eps_clip_low, eps_high=eps_clip_high, dual_clip=clip_ratio_c)``
`drpo_core_gspo`             ``PPOClip(eps_low=eps_clip_low, eps_high=eps_clip_high)`` of the sequence's ratio
`drpo_core_spo`              ``SPO(eps_low=eps_clip_low, eps_high=eps_clip_high)``
`drpo_core_cispo`            ``CISPO(max_ratio=1 + cispo.cispo_eps_clip_high)``
`drpo_core_pg_is`            ``PolicyGradient()``
`drpo_core_reinforce`        ``Reinforce()``
`drpo_core_sapo`             ``SAPO(tau_positive=1.0, tau_negative=1.05)``
`drpo_core_icepop`           ``IcePop(min_ratio=1 - eps_clip_low, max_ratio=1 + eps_clip_high)``
`drpo_core_ipo`              ``IPO(delta_low=dppo.delta_low, delta_high=dppo.delta_high)``
`drpo_core_topr`             ``TOPR()``
===========================  ======================================================================================

The names are those of `drpo_core.objectives.OBJECTIVES`; `register` adds another objective, or one with its thresholds bound.
"""

from __future__ import annotations

import math
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import compute_off_policy_correction
from skyrl.backends.skyrl_train.utils.ppo_utils import register_policy_loss

from drpo_core import summarize
from drpo_core.diagnostics import Mean
from drpo_core.modes.mode import refuse_mode
from drpo_core.objectives.configured import at_clip_range, families_by_name, resolved
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.integrations.anchor import sequence_anchor
from drpo_torch.loss import policy_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Family

__all__ = ["main", "register"]


def register(name: str, objective: Objective | Callable[[Any], Objective], *, sequence_level: bool = False) -> None:
    """Make an objective available to SkyRL as a `policy_loss_type`.

    Call it before SkyRL starts Ray, which takes it to every worker: in a module of yours that has `main` as well and that
    `trainer.override_entrypoint` names.

    Parameters
    ----------
    name
        The `policy_loss_type`.
    objective
        An objective with its thresholds, or a function of `trainer.algorithm` that returns one.
    sequence_level
        Take the importance ratio of the sequence, the geometric mean of its tokens' ratios, instead of the token's.
        With `PPOClip` this is GSPO (arXiv:2507.18071, eq. 14). Diagnostics then describe that ratio.

    Raises
    ------
    ValueError
        If SkyRL has a policy loss of that name, or the objective is a mode: SkyRL reduces by `loss_reduction`.

    Examples
    --------
    >>> from drpo_core import DRPO
    >>> from drpo_torch.integrations.skyrl import register
    >>> register("drpo_strict", DRPO(delta=0.05))
    """
    refuse_mode(objective, "SkyRL")

    def loss(
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor | None,
        advantages: torch.Tensor,
        config: Any,  # noqa: ANN401
        loss_mask: torch.Tensor | None = None,
        rollout_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        behavior_log_prob = _anchor(old_log_probs, rollout_logprobs)
        weights = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        weights, corrections = _corrected(weights, old_log_probs, rollout_logprobs, config.off_policy_correction)
        mask = weights > 0
        value, statistics = policy_loss(
            refuse_mode(resolved(objective, config), "SkyRL"),
            log_prob=log_probs,
            behavior_log_prob=sequence_anchor(log_probs, behavior_log_prob, mask) if sequence_level else behavior_log_prob,
            advantages=advantages,
            mask=mask,
            normalizer=1.0,  # the sum: SkyRL has divided the advantages by what its loss_reduction says
            token_weights=weights.to(log_probs.dtype),
        )
        assert statistics is not None
        return value, _metrics(statistics) | corrections

    register_policy_loss(name)(loss)


def main() -> None:
    """SkyRL's training with the losses of this module: `skyrl.train.entrypoints.main_base.main`.

    Examples
    --------
    ::

        python -m skyrl.train.entrypoints.main_base \
          trainer.override_entrypoint=drpo_torch.integrations.skyrl trainer.algorithm.policy_loss_type=drpo ...
    """
    from skyrl.train.entrypoints import main_base  # noqa: PLC0415 -- it imports all of SkyRL

    # what led here, and no field of SkyRL's configuration
    sys.argv = [argument for argument in sys.argv if not argument.startswith("trainer.override_entrypoint=")]
    main_base.main()


def _anchor(old_log_probs: torch.Tensor | None, rollout_logprobs: torch.Tensor | None) -> torch.Tensor:
    """Log μ as the inference engine reports it, else as the training engine recomputes it."""
    if rollout_logprobs is not None:
        return rollout_logprobs
    if old_log_probs is None:
        msg = "rollout_logprobs, old_log_probs: expected at least one of them, got None for both"
        raise ValueError(msg)
    msg = (
        "the anchor is old_log_probs, which the training engine recomputes before the update: not the log-probs that tokens "
        "were sampled with. SkyRL passes those as rollout_logprobs with generator.sampling_params.logprobs=1"
    )
    warnings.warn(msg, BehaviorPolicyWarning, stacklevel=4)
    return old_log_probs


def _corrected(
    weights: torch.Tensor,
    old_log_probs: torch.Tensor | None,
    rollout_logprobs: torch.Tensor | None,
    correction: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss mask after SkyRL's masks for tokens and sequences of which π_old is too far from μ."""
    if correction.tis_ratio_type is not None:
        msg = (
            f"off_policy_correction.tis_ratio_type: expected null, got {correction.tis_ratio_type!r}; the importance ratio to "
            "the rollout policy corrects for its mismatch already"
        )
        raise ValueError(msg)
    if old_log_probs is None or rollout_logprobs is None:
        return weights, {}
    _, figures, weights = compute_off_policy_correction(old_log_probs, rollout_logprobs, weights, correction)
    return weights, figures


_NEUTRAL = {"_min": math.inf, "_max": -math.inf}
"""By the last letters of a metric's name, which tell SkyRL how to reduce it: what leaves that reduction as it is."""


def _metrics(statistics: Diagnostics) -> dict[str, float]:
    """Diagnostics, and the share of diverging tokens outside the region under SkyRL's name."""
    low, high = (cast("Mean", statistics[f"outside_{sign}_diverging_fraction"]) for sign in ("negative", "positive"))
    clipped = Mean(low.total + high.total, statistics["ratio_mean"].count)
    figures = summarize({**statistics, "clip_ratio": clipped})
    # where a micro-batch or rank counted nothing; every one of them must have the same names
    return {name: _NEUTRAL.get(name[-4:], 0.0) if math.isnan(figure) else figure for name, figure in figures.items()}


def _of(family: Family, config: Any, cap: float | None = None) -> Objective:  # noqa: ANN401
    """At the thresholds that SkyRL's own loss of this kind has."""
    ranges = {
        "delta": (config.dppo.delta_low, config.dppo.delta_high),
        "max_ratio": (config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high),
    }
    low, high = ranges.get(str(family.threshold), (config.eps_clip_low, config.eps_clip_high))
    objective: Objective = at_clip_range(family, low, high, cap=cap)
    return objective


_FAMILIES = families_by_name()
for _name, _family in _FAMILIES.items():
    register(_name, partial(_of, _family))
register("drpo_core_gspo", partial(_of, _FAMILIES["drpo_core_ppo_clip"]), sequence_level=True)
register("drpo_core_dual_clip", lambda config: _of(_FAMILIES["drpo_core_ppo_clip"], config, config.clip_ratio_c))
