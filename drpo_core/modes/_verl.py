"""The policy losses of verl 0.9.1, with its rollout correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Proximal, Sequence
from drpo_core.corrections import (
    ClippedGeometricRatio,
    DivergenceMask,
    ImportanceWeight,
    OutwardMask,
    RatioMask,
)
from drpo_core.modes._keys import AT_RANDOM, Keys, chosen, cispo, covariance_penalty, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import DPPO, SAPO, PolicyGradient, PPOClip, Reinforce
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.anchors import Anchor
    from drpo_core.corrections import Correction, Edge
    from drpo_core.objectives import Objective
    from drpo_core.penalties import PenaltyTerm

__all__ = ["VERL_PRESETS", "verl"]

DEFAULTS: Mapping[str, Any] = {
    # actor_rollout_ref.actor
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "loss_agg_mode": "token-mean",
    "loss_scale_factor": None,
    "use_kl_loss": False,
    "kl_loss_coef": 0.001,
    "kl_loss_type": "low_var_kl",
    # actor_rollout_ref.actor.policy_loss
    "dro_beta": None,
    "kl_cov_ratio": 0.0002,
    "ppo_kl_coef": 0.1,
    # algorithm.rollout_correction
    "rollout_is": None,
    "rollout_is_threshold": 2.0,
    "rollout_is_batch_normalize": False,
    "rollout_rs": None,
    "rollout_rs_threshold": None,
    "bypass_mode": False,
    "loss_type": "ppo_clip",
}


def verl(loss_mode: str = "vanilla", /, **keys: Any) -> Mode:
    """A policy loss of verl 0.9.1 by its ``loss_mode``, under the keys and values of verl's configuration.

    ``old_log_probs`` of verl is `proximal_log_prob` here, ``rollout_log_probs`` `behavior_log_prob`; with
    ``bypass_mode=True`` verl has only the latter.

    ========================  ==================================================  ==========================================
    ``loss_mode``             keys, besides those of all                          what differs
    ========================  ==================================================  ==========================================
    ``vanilla``               ``clip_ratio_low``, ``clip_ratio_high`` (0.2),      the dual clip is on by default
                              ``clip_ratio_c`` (3.0)
    ``gspo``                  ``clip_ratio_low``, ``clip_ratio_high``             paper: 3e-4, 4e-4, and means of sequences
    ``sapo``                  ``tau_pos`` (1.0), ``tau_neg`` (1.05)               ``loss_agg_mode`` is ignored: always
                                                                                  ``"seq-mean-token-mean"``
    ``gpg``                   none
    ``geo_mean``              ``clip_ratio_low``, ``clip_ratio_high``, nats       GMPO; paper: 0.4. ``loss_agg_mode`` is
                                                                                  ignored, and empty rows count
    ``dro``                   ``dro_beta``, which has no default
    ``kl_cov``                ``kl_cov_ratio`` (0.0002), ``ppo_kl_coef`` (0.1)    β would be 1 if it were null; each
                                                                                  micro-batch chooses a token at least
    ``cispo``                 ``clip_ratio_low``, ``clip_ratio_high``             paper: no lower bound
    ``dppo_tv``, ``dppo_kl``  ``clip_ratio_low``, ``clip_ratio_high``: the δ;     paper: the cap is 20
                              ``clip_ratio_c`` (3.0): the cap of the ratio
    ``bypass_mode``           ``loss_type``: ``"ppo_clip"`` with the keys of      weights of ``rollout_is`` on π/μ, for
                              ``vanilla``, or ``"reinforce"``                     ``"reinforce"`` only
    ========================  ==================================================  ==========================================

    Parameters
    ----------
    loss_mode
        See the table. ``clip_cov`` is no mode, because it chooses tokens at random: see
        `drpo_core.corrections.clip_cov_weights`.
    **keys
        ``loss_agg_mode`` (``"token-mean"``, ``"token-sum"``, ``"seq-mean-token-sum"``, ``"seq-mean-token-mean"``,
        ``"seq-mean-token-sum-norm"``, which needs ``loss_scale_factor``); ``use_kl_loss`` with ``kl_loss_coef`` (0.001) and
        ``kl_loss_type`` (``"low_var_kl"``); ``rollout_is`` (``"token"``, ``"sequence"``) with ``rollout_is_threshold``
        (2.0, or ``"0.5_5.0"``) and ``rollout_is_batch_normalize``; ``rollout_rs`` (``"token_k1"``, ``"seq_mean_k3"``, …,
        several with commas) with ``rollout_rs_threshold``; ``bypass_mode``, which makes ``vanilla`` ``bypass_mode``.
        ``clip_ratio`` counts only where ``clip_ratio_low`` or ``clip_ratio_high`` is None, as in verl.

    Returns
    -------
    Mode
        Its gradient is verl's. So is the loss, except that of ``dppo_tv``, ``dppo_kl`` (verl: −A min(r, c) log π) and
        ``geo_mean`` (verl: −A times the sequence's ratio).

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for
        what no mode does: the ``"abs"`` KL, ``rollout_is`` with ``dro`` and ``kl_cov``, whose penalties verl multiplies too,
        ``rollout_rs`` with ``kl_cov``, which verl applies before it chooses tokens, or rules for single tokens with ``gspo``
        and ``geo_mean``, which verl applies before it averages.

    Notes
    -----
    verl clamps log-ratios at ±20 (gspo at 10) and drops the gradient beyond, its k3 at a value of 10; it adds 1e-8 to the
    length of sequences and to 1 − p. Among tokens of equal covariance, its ``kl_cov`` chooses by their order. Its
    denominators are those of the response mask that ``rollout_rs`` leaves. Where a batch is split, verl's trainer counts
    rejected rows in means over sequences and, with ``bypass_mode``, rejected tokens: pass that number as `normalizer`.

    References
    ----------
    https://github.com/volcengine/verl/blob/v0.9.1/verl/trainer/ppo/core_algos.py and rollout_corr_helper.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.verl("vanilla", clip_ratio_low=0.2, clip_ratio_high=0.28, rollout_is="token", rollout_is_threshold=2.0)
    Mode(PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0), anchor=Proximal(), corrections=(ImportanceWeight(high=2.0),))
    >>> modes.verl("vanilla", **modes.VERL_PRESETS["bypass_ppo_clip"])
    Mode(PPOClip(eps_low=0.2, eps_high=0.2, dual_clip=3.0))
    """
    return made("verl", "loss_mode", LOSSES, DEFAULTS, loss_mode, keys, no_modes={"clip_cov": AT_RANDOM})


_SEQ_IS = {"rollout_is": "sequence", "rollout_is_threshold": 2.0}
_TOKEN_IS = {"rollout_is": "token", "rollout_is_threshold": 2.0}
_ICEPOP = {"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"}
_GEO_RS = {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.999_1.001"}
_K3_RS = {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.01}
_SEQ_RS = {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_2.0"}
_BYPASS_CLIP = {"bypass_mode": True, "loss_type": "ppo_clip"}
_BYPASS_PG = {"bypass_mode": True, "loss_type": "reinforce"}

VERL_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "decoupled_token_is": _TOKEN_IS,
    "decoupled_seq_is": _SEQ_IS,
    "decoupled_token_icepop": _ICEPOP,
    "decoupled_seq_is_rs": {**_SEQ_IS, **_SEQ_RS},
    "decoupled_geo_rs": _GEO_RS,
    "decoupled_geo_rs_seq_tis": {**_GEO_RS, **_SEQ_IS},
    "decoupled_geo_rs_token_tis": {**_GEO_RS, **_TOKEN_IS},
    "decoupled_k3_rs": _K3_RS,
    "decoupled_k3_rs_seq_tis": {**_K3_RS, **_SEQ_IS},
    "decoupled_k3_rs_token_tis": {**_K3_RS, **_TOKEN_IS},
    "bypass_ppo_clip": _BYPASS_CLIP,
    "bypass_ppo_clip_geo_rs": {**_BYPASS_CLIP, **_GEO_RS},
    "bypass_ppo_clip_k3_rs": {**_BYPASS_CLIP, **_K3_RS},
    "bypass_pg_is": {**_BYPASS_PG, **_SEQ_IS},
    "bypass_pg_token_icepop": {**_BYPASS_PG, **_ICEPOP},
    "bypass_pg_geo_rs": {**_BYPASS_PG, **_GEO_RS},
    "bypass_pg_geo_rs_seq_tis": {**_BYPASS_PG, **_GEO_RS, **_SEQ_IS},
    "bypass_pg_geo_rs_token_tis": {**_BYPASS_PG, **_GEO_RS, **_TOKEN_IS},
    "disabled": {},
}
"""The presets of verl's ``RolloutCorrectionConfig``, by the names of its methods, at their default thresholds."""


def _vanilla(keys: Keys) -> Mode:
    return _bypass(keys) if keys.flag("bypass_mode") else _mode(keys, _clip(keys))


def _gspo(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    return _mode(keys, PPOClip(eps_low=low, eps_high=high), anchor=Sequence(Proximal()), over_sequences=True)


def _sapo(keys: Keys) -> Mode:
    taus = {"tau_positive": keys.number("tau_pos", above=0.0), "tau_negative": keys.number("tau_neg", above=0.0)}
    return _mode(keys, SAPO(**taus), reduction="seq-mean-token-mean")


def _gpg(keys: Keys) -> Mode:
    return _mode(keys, Reinforce())


def _geo_mean(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    if keys["rollout_is"] == "token":
        keys.refuse("rollout_is", "verl multiplies with the geometric mean of the tokens' weights")
    geometric = ClippedGeometricRatio(eps_low=low, eps_high=high), OutwardMask(eps_low=low, eps_high=high)
    # verl divides by the number of rows, rejected ones too
    options: Any = {"reduction": "seq-mean-token-mean", "over_sequences": True, "count_masked": True}
    return _mode(keys, Reinforce(), corrections=geometric, **options)


def _dro(keys: Keys) -> Mode:
    if keys["rollout_is"] is not None:
        keys.refuse("rollout_is", "verl multiplies the quadratic penalty with the weights too")
    beta = keys.number("dro_beta", above=0.0)
    return _mode(keys, Reinforce(), penalties=(Penalty(coefficient=beta, estimator="k2", to="proximal"),))


def _kl_cov(keys: Keys) -> Mode:
    if keys["rollout_is"] is not None:
        keys.refuse("rollout_is", "verl multiplies the penalty with the weights too")
    if keys["rollout_rs"] is not None:
        keys.refuse("rollout_rs", "verl chooses among the tokens that are left")
    return _mode(keys, PolicyGradient(), penalties=covariance_penalty(keys, "kl_cov_ratio"))


def _cispo(keys: Keys) -> Mode:
    return _mode(keys, cispo(*_bounds(keys)))


def _dppo_tv(keys: Keys) -> Mode:
    return _mode(keys, _dppo(keys, "binary_tv"))


def _dppo_kl(keys: Keys) -> Mode:
    return _mode(keys, _dppo(keys, "binary_kl"))


def _bypass(keys: Keys) -> Mode:
    if keys.choice("loss_type", {"ppo_clip": True, "reinforce": False}):
        # verl computes these weights for its metrics only: the clipped ratio is π/μ already
        keys.ignore("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize")
        return _mode(keys, _clip(keys), anchor=Behavior(), edge="policy/behavior", weighted=False)
    return _mode(keys, Reinforce(), anchor=Behavior(), edge="policy/behavior")


def _bypass_mode(keys: Keys) -> Mode:
    keys.ignore("bypass_mode")
    return _bypass(keys)


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "vanilla": _vanilla,
    "gspo": _gspo,
    "sapo": _sapo,
    "gpg": _gpg,
    "geo_mean": _geo_mean,
    "dro": _dro,
    "kl_cov": _kl_cov,
    "cispo": _cispo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "bypass_mode": _bypass_mode,
}


def _bounds(keys: Keys) -> tuple[float, float]:
    """clip_ratio_low and clip_ratio_high, or clip_ratio for one that is None."""
    low, high = (
        keys.number("clip_ratio" if keys[key] is None else key, above=0.0) for key in ("clip_ratio_low", "clip_ratio_high")
    )
    return low, high


def _clip(keys: Keys) -> PPOClip:
    low, high = _bounds(keys)
    return PPOClip(eps_low=low, eps_high=high, dual_clip=keys.number("clip_ratio_c", above=1.0))


def _dppo(keys: Keys, divergence: str) -> DPPO:
    low, high = _bounds(keys)
    return DPPO(delta_low=low, delta_high=high, divergence=divergence, max_ratio=keys.number("clip_ratio_c", above=0.0))


def _mode(
    keys: Keys,
    objective: Objective,
    *,
    anchor: Anchor | None = None,
    corrections: tuple[Correction, ...] = (),
    penalties: tuple[PenaltyTerm, ...] = (),
    edge: Edge = "proximal/behavior",
    weighted: bool = True,
    reduction: str | None = None,
    over_sequences: bool = False,
    count_masked: bool = False,
) -> Mode:
    """The objective with verl's rollout correction, KL loss and aggregation."""
    if edge == "proximal/behavior" and keys.flag("bypass_mode"):
        keys.refuse("bypass_mode", "verl would replace it by 'bypass_mode'")
    masks = _rejections(keys, edge)
    if over_sequences and any(
        mask.level == "token" if isinstance(mask, RatioMask) else mask.over == "token" for mask in masks
    ):
        keys.refuse("rollout_rs", "verl averages over the tokens that are left")
    weights = _weights(keys, edge) if weighted else ()
    penalties = (*penalties, *_kl_loss(keys))
    if reduction is None:
        name, horizon = _reduction(keys)
    else:
        keys.ignore("loss_agg_mode")
        if keys["use_kl_loss"] and keys["loss_agg_mode"] != reduction:
            keys.refuse("loss_agg_mode", f"verl aggregates its KL by it, and its loss by {reduction!r}")
        name, horizon = REDUCTIONS[reduction], None
    return Mode(
        objective,
        anchor=Proximal() if anchor is None else anchor,
        corrections=(*corrections, *masks, *weights),
        penalties=penalties,
        reduction=name,
        horizon=horizon,
        count_masked=count_masked or not masks,
    )


REDUCTIONS: Mapping[str, str] = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-mean": "sequence_mean_token_mean",
    "seq-mean-token-sum-norm": "sequence_mean_token_sum",
}


def _reduction(keys: Keys) -> tuple[str, float | None]:
    """Name and horizon of the aggregation."""
    name = keys.choice("loss_agg_mode", REDUCTIONS)
    # verl's own default is the padded width, which changes from batch to batch
    if keys["loss_agg_mode"] != "seq-mean-token-sum-norm":
        return name, None
    if keys["loss_scale_factor"] is None:
        msg = "loss_scale_factor: expected a number with loss_agg_mode='seq-mean-token-sum-norm' (verl's default is the width)"
        raise ValueError(msg)
    return name, keys.number("loss_scale_factor", above=0.0)


_KL: Mapping[str, str] = {
    "kl": "k1",
    "k1": "k1",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
    "kl+": "k1+",
    "k1+": "k1+",
    "mse+": "k2",
    "k2+": "k2",
    "low_var_kl+": "k3+",
    "k3+": "k3+",
}


def _kl_loss(keys: Keys) -> tuple[Penalty, ...]:
    if not keys.flag("use_kl_loss"):
        return ()
    estimator: Any = keys.choice("kl_loss_type", _KL)
    coefficient = keys.number("kl_loss_coef", at_least=0.0)
    return (Penalty(coefficient=coefficient, estimator=estimator),) if coefficient > 0.0 else ()


def _weights(keys: Keys, edge: Edge) -> tuple[ImportanceWeight, ...]:
    level: Any = keys.choice("rollout_is", {None: None, "token": "token", "sequence": "sequence"})
    if level is None:
        return ()
    low, high = _limits("rollout_is_threshold", keys["rollout_is_threshold"])
    outside: Any = "clamp" if low is None else "zero"
    normalize = keys.flag("rollout_is_batch_normalize")
    return (ImportanceWeight(edge=edge, level=level, low=low, high=high, outside=outside, normalize=normalize),)


_RULES: Mapping[str, tuple[str, str]] = {
    f"{name}_k{k}": (over, f"k{k}")
    for name, over in (("token", "token"), ("seq_sum", "sum"), ("seq_mean", "mean"), ("seq_max", "max"))
    for k in (1, 2, 3)
    if (name, k) != ("seq_max", 1)
}
_LEVELS: Mapping[str, str] = {"token": "token", "sum": "sequence", "mean": "geometric"}


def _rejections(keys: Keys, edge: Edge) -> tuple[RatioMask | DivergenceMask, ...]:
    """The masks of rollout_rs, each with its threshold."""
    if keys["rollout_rs"] is None:
        return ()
    names = list(dict.fromkeys(_parts("rollout_rs", keys["rollout_rs"])))
    limits = _parts("rollout_rs_threshold", keys["rollout_rs_threshold"])
    limits = limits * len(names) if len(limits) == 1 else limits
    if len(limits) != len(names):
        msg = f"rollout_rs_threshold: expected one, or one for each of {', '.join(names)}, got {len(limits)}"
        raise ValueError(msg)
    return tuple(_rejection(name, limit, edge) for name, limit in zip(names, limits, strict=True))


def _rejection(name: str, limit: str, edge: Edge) -> RatioMask | DivergenceMask:
    over, estimator = chosen("rollout_rs", name, _RULES)
    low, high = _limits("rollout_rs_threshold", limit)
    if estimator == "k1":
        # verl's bounds are on e^k1 = μ/π_old; one number c stands for 1/c and c
        level: Any = _LEVELS[over]
        return RatioMask(edge=edge, level=level, low=1.0 / high, high=high if low is None else 1.0 / low)
    if low is not None:
        msg = f"rollout_rs_threshold: expected one number for {name}, got {limit!r}"
        raise ValueError(msg)
    divergence: Any = {"edge": edge, "estimator": estimator, "over": over, "high": high}
    return DivergenceMask(**divergence)


def _parts(key: str, value: object) -> list[str]:
    parts = [part.strip() for part in str(value).split(",") if part.strip()]
    if value is None or not parts:
        msg = f"{key}: expected a text such as 'seq_mean_k1' and '0.99_1.01', got {value!r}"
        raise ValueError(msg)
    return parts


def _limits(key: str, value: object) -> tuple[float | None, float]:
    """(low, high) of "low_high", or (None, high) of one number."""
    try:
        numbers = [float(part) for part in str(value).split("_")]
    except ValueError:
        numbers = []
    if isinstance(value, bool) or len(numbers) not in (1, 2) or min(numbers) <= 0.0:
        msg = f"{key}: expected a positive number or a text such as '0.5_5.0', got {value!r}"
        raise ValueError(msg)
    return (numbers[0] if len(numbers) == 2 else None), numbers[-1]
