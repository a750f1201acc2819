"""The policy losses of SkyRL (0.4, commit a956457 of August 2026), with its off-policy correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, RatioMask, Veto
from drpo_core.modes._keys import AT_RANDOM, Keys, cispo, covariance_penalty, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import DPPO, SAPO, IcePop, PolicyGradient, PPOClip
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.anchors import Anchor
    from drpo_core.corrections import Correction
    from drpo_core.objectives import Objective
    from drpo_core.penalties import PenaltyTerm

__all__ = ["skyrl"]

DEFAULTS: Mapping[str, Any] = {
    "eps_clip_low": 0.2,
    "eps_clip_high": 0.2,
    "clip_ratio_c": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "cispo_eps_clip_low": 1.0,
    "cispo_eps_clip_high": 4.0,
    "cispo_anchor": "old",
    "dppo_type": "binary_tv",
    "delta_low": 0.2,
    "delta_high": 0.2,
    "kl_cov_frac": 0.2,
    "ppo_kl_coef": 1.0,
    "loss_reduction": "token_mean",
    "max_seq_len": None,
    # SkyRL's own default is True
    "use_kl_loss": False,
    "kl_loss_coef": 0.001,
    "kl_estimator_type": "k3",
    # off_policy_correction
    "tis_ratio_type": None,
    "token_tis_ratio_clip_high": 2.0,
    "sequence_tis_ratio_clip_high": 5.0,
    "sequence_mask_metric": None,
    "geo_mask_high": 1.01,
    "geo_mask_low": 0.99,
    "product_mask_high": 2.0,
    "product_mask_low": 0.5,
    "outlier_token_is_threshold_low": None,
    "outlier_token_is_threshold_high": None,
    "token_mask_is_threshold_low": None,
    "token_mask_is_threshold_high": None,
}


def skyrl(policy_loss_type: str = "regular", /, **keys: Any) -> Mode:
    """A policy loss of SkyRL by its ``policy_loss_type``, under the keys and values of ``trainer.algorithm``.

    ``old_log_probs`` of SkyRL is `proximal_log_prob` here, ``rollout_logprobs`` `behavior_log_prob`. Keys of a section, such
    as ``dppo.delta_low``, are given without its name.

    =======================  ====================================================  =========================================
    ``policy_loss_type``     keys, besides those of all                            what differs
    =======================  ====================================================  =========================================
    ``regular``              ``eps_clip_low``, ``eps_clip_high`` (0.2)
    ``dual_clip``            the same, and ``clip_ratio_c`` (3.0)
    ``gspo``                 as ``regular``                                        paper: 3e-4, 4e-4
    ``sapo``                 ``tau_pos`` (1.0), ``tau_neg`` (1.05)
    ``cispo``                ``cispo_eps_clip_low`` (1.0: no bound),               the defaults are ScaleRL's
                             ``cispo_eps_clip_high`` (4.0), ``cispo_anchor``
                             (``"old"``, ``"rollout"``)
    ``dppo``                 ``dppo_type`` (``"binary_tv"``, ``"binary_kl"``),     the ratio is not truncated; TIS on top of
                             ``delta_low``, ``delta_high`` (0.2)                   it counts π_old/μ twice: a warning
    ``rollout_is``           ``eps_clip_low``, ``eps_clip_high``                   IcePop on π/μ; TIS on top: as ``dppo``
    ``importance_sampling``  none, and none of the correction                      against ``old_log_probs``
    ``kl_cov``               ``kl_cov_frac`` (0.2), ``ppo_kl_coef`` (1.0), and     the penalty is a sum, whatever
                             none of the correction; ``loss_reduction`` has to     ``loss_reduction`` says: one of many tokens
                             be None                                               outweighs the loss. verl's share: 2e-4
    =======================  ====================================================  =========================================

    Parameters
    ----------
    policy_loss_type
        See the table. ``clip_cov`` is no mode, because it chooses tokens at random: see
        `drpo_core.corrections.clip_cov_weights`. Nor is ``cross_entropy``, which has no advantages.
    **keys
        ``loss_reduction`` (``"token_mean"``, ``"sequence_mean"``, ``"prompt_mean"``, ``"seq_mean_token_sum_norm"``, which
        needs ``max_seq_len``; or None, a sum: for advantages that are divided already, as SkyRL's own functions get them);
        ``tis_ratio_type`` (``"token"``, ``"sequence"``) with ``token_tis_ratio_clip_high`` (2.0) or
        ``sequence_tis_ratio_clip_high`` (5.0); ``sequence_mask_metric`` (``"geometric"``, ``"product"``) with
        ``geo_mask_low``, ``geo_mask_high``, ``product_mask_low``, ``product_mask_high``;
        ``outlier_token_is_threshold_low`` and ``_high``; ``token_mask_is_threshold_low`` and ``_high``, which need each other;
        ``use_kl_loss`` with ``kl_loss_coef`` (0.001) and ``kl_estimator_type`` (``"k3"``).

    Returns
    -------
    Mode
        Its gradient is SkyRL's. So is the loss, except that of ``rollout_is`` (SkyRL: −A r log π inside the bounds).

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for
        what no mode does: ``"token_mean_legacy"``; any reduction with ``kl_cov``, because SkyRL divides the advantages by
        it and not the penalty; a KL loss, which SkyRL always averages by sequence, with another reduction (so
        ``use_kl_loss`` is False here unless it is given, True in SkyRL); a token mask with weights or masks of sequences,
        which SkyRL takes over the tokens that are left.

    Warns
    -----
    DoubleRatioWarning
        If TIS multiplies a ratio that is π/μ already.

    Notes
    -----
    SkyRL computes ratios in float32. Its denominators count rows without valid tokens, and tokens that a mask leaves out.
    Among tokens of equal covariance, its ``kl_cov`` chooses by their order.
    With ``"prompt_mean"`` the losses take the prompts' ids:
    ``reduction=functools.partial(drpo_core.reduction.prompt_mean, group_ids=ids)``.

    References
    ----------
    https://github.com/NovaSky-AI/SkyRL/blob/a956457/skyrl/backends/skyrl_train/utils/ppo_utils.py and
    off_policy_correction_utils.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.skyrl("dppo", delta_low=0.15, delta_high=0.15)
    Mode(DPPO(delta_low=0.15, delta_high=0.15))
    """
    return made("SkyRL", "policy_loss_type", LOSSES, DEFAULTS, policy_loss_type, keys, no_modes=_NO_MODES)


_NO_MODES = {"clip_cov": AT_RANDOM, "cross_entropy": "it has no advantages"}


def _regular(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    return _mode(keys, PPOClip(eps_low=low, eps_high=high))


def _dual_clip(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    return _mode(keys, PPOClip(eps_low=low, eps_high=high, dual_clip=keys.number("clip_ratio_c", above=1.0)))


def _gspo(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    return _mode(keys, PPOClip(eps_low=low, eps_high=high), Sequence(Proximal()))


def _sapo(keys: Keys) -> Mode:
    return _mode(keys, SAPO(tau_positive=keys.number("tau_pos", above=0.0), tau_negative=keys.number("tau_neg", above=0.0)))


def _cispo(keys: Keys) -> Mode:
    low, high = (keys.number(f"cispo_eps_clip_{side}", at_least=0.0) for side in ("low", "high"))
    on_rollout = keys.choice("cispo_anchor", {"old": False, "rollout": True})
    if on_rollout and keys["tis_ratio_type"] is not None:
        keys.refuse("tis_ratio_type", "SkyRL refuses it with cispo_anchor='rollout'")
    return _mode(keys, cispo(low, high), Behavior() if on_rollout else Proximal())


def _dppo(keys: Keys) -> Mode:
    divergence = keys.choice("dppo_type", {name: name for name in ("binary_tv", "binary_kl")})
    low, high = (keys.number(f"delta_{side}", above=0.0) for side in ("low", "high"))
    return _mode(keys, DPPO(delta_low=low, delta_high=high, divergence=divergence), Behavior())


def _rollout_is(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    if low >= 1.0:
        keys.refuse("eps_clip_low", "it is no bound")
    return _mode(keys, IcePop(min_ratio=1.0 - low, max_ratio=1.0 + high), Behavior())


def _importance_sampling(keys: Keys) -> Mode:
    return _mode(keys, PolicyGradient(), corrected=False)


def _kl_cov(keys: Keys) -> Mode:
    if keys["loss_reduction"] is not None:
        divided = "SkyRL divides the advantages by it, and not the penalty, which is a sum over the chosen tokens"
        how = "pass None, and advantages times drpo_core.reduction.reduction_coefficients; or see modes.verl('kl_cov')"
        keys.refuse("loss_reduction", f"{divided}: {how}")
    return _mode(keys, PolicyGradient(), penalties=covariance_penalty(keys, "kl_cov_frac"), corrected=False)


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "regular": _regular,
    "dual_clip": _dual_clip,
    "gspo": _gspo,
    "sapo": _sapo,
    "cispo": _cispo,
    "dppo": _dppo,
    "rollout_is": _rollout_is,
    "importance_sampling": _importance_sampling,
    "kl_cov": _kl_cov,
}


def _bounds(keys: Keys) -> tuple[float, float]:
    return keys.number("eps_clip_low", above=0.0), keys.number("eps_clip_high", above=0.0)


REDUCTIONS: Mapping[str | None, str] = {
    None: "token_sum",
    "token_mean": "token_mean",
    "sequence_mean": "sequence_mean_token_mean",
    "prompt_mean": "prompt_mean",
    "seq_mean_token_sum_norm": "sequence_mean_token_sum",
}


def _mode(
    keys: Keys,
    objective: Objective,
    anchor: Anchor | None = None,
    *,
    penalties: tuple[PenaltyTerm, ...] = (),
    corrected: bool = True,
) -> Mode:
    """The objective with SkyRL's off-policy correction, reduction and KL loss."""
    reduction = keys.choice("loss_reduction", REDUCTIONS)
    norm = reduction == "sequence_mean_token_sum"
    return Mode(
        objective,
        anchor=Proximal() if anchor is None else anchor,
        corrections=_corrections(keys) if corrected else (),
        penalties=(*penalties, *_kl_loss(keys)),
        reduction=reduction,
        horizon=keys.number("max_seq_len", above=0.0) if norm else None,
    )


def _kl_loss(keys: Keys) -> tuple[Penalty, ...]:
    if not keys.flag("use_kl_loss"):
        return ()
    if keys["loss_reduction"] != "sequence_mean":
        keys.refuse("use_kl_loss", "SkyRL averages its KL by sequence, and the loss by loss_reduction")
    estimator: Any = keys.choice("kl_estimator_type", {name: name for name in ("k1", "k2", "k3")})
    coefficient = keys.number("kl_loss_coef", at_least=0.0)
    return (Penalty(coefficient=coefficient, estimator=estimator),) if coefficient > 0.0 else ()


_LEVELS: Mapping[Any, Any] = {None: None, "token": "token", "sequence": "sequence"}


def _corrections(keys: Keys) -> tuple[Correction, ...]:
    """Masks of tokens and of sequences, and the truncated weight."""
    outlier = _pair(keys, "outlier_token_is_threshold")
    # SkyRL's mask of tokens needs both bounds, that of outliers one
    token = _pair(keys, "token_mask_is_threshold")
    if None in token and token != (None, None):
        missing = "low" if token[0] is None else "high"
        keys.refuse(f"token_mask_is_threshold_{missing}", "SkyRL masks tokens where both bounds are given only")
    metric = keys.choice("sequence_mask_metric", {None: None, "geometric": "geo", "product": "product"})
    level = keys.choice("tis_ratio_type", _LEVELS)
    if token != (None, None) and (metric or level == "sequence"):
        keys.refuse("token_mask_is_threshold_low", "SkyRL takes the ratio of a sequence over the tokens that are left")
    parts: list[Correction] = []
    if outlier != (None, None):
        parts.append(Veto(low=outlier[0], high=outlier[1]))
    if token != (None, None):
        parts.append(RatioMask(low=token[0], high=token[1]))
    if level is not None:
        high = keys.number(f"{level}_tis_ratio_clip_high", above=0.0)
        parts.append(ImportanceWeight(level=level, high=high))
    if metric is not None:
        low, upper = _pair(keys, f"{metric}_mask")
        parts.append(RatioMask(level="geometric" if metric == "geo" else "sequence", low=low, high=upper))
    return tuple(parts)


def _pair(keys: Keys, stem: str) -> tuple[float | None, float | None]:
    """The bounds low and high of a stem, or None."""
    return keys.optional(f"{stem}_low", at_least=0.0), keys.optional(f"{stem}_high", above=0.0)
