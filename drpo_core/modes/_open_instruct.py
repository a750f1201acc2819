"""The losses of open-instruct's GRPO (commit e6c3044 of August 2026)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Proximal
from drpo_core.corrections import ImportanceWeight, RatioMask, SequenceTrustMask
from drpo_core.modes._keys import Keys, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import CISPO, PPOClip
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.corrections import Correction
    from drpo_core.objectives import Objective

__all__ = ["open_instruct"]

DEFAULTS: Mapping[str, Any] = {
    "clip_lower": 0.2,
    "clip_higher": 0.272,
    "beta": 0.05,
    "kl_estimator": 2,
    "load_ref_policy": True,
    "use_vllm_logprobs": False,
    "use_rho_correction": True,
    "rho_clamp_lower_bound": 0.0,
    "rho_clamp_upper_bound": 2.0,
    "rho_mask_lower_bound": 0.0,
    "rho_mask_upper_bound": 0.0,
    "rho_mask_sequence_level": False,
    "rho_mask_tv_divergence": False,
    "loss_denominator": "token",
}


def open_instruct(loss_fn: str = "dapo", /, **keys: Any) -> Mode:
    """A loss of open-instruct's GRPO by its ``loss_fn``, under the keys and values of its experiment's configuration.

    The trainer's old log-probs are `proximal_log_prob` here, vLLM's `behavior_log_prob`.

    ===========  ==================================================  =======================================================
    ``loss_fn``  keys, besides those of all                          what differs
    ===========  ==================================================  =======================================================
    ``dapo``     ``clip_lower`` (0.2), ``clip_higher`` (0.272)       a KL penalty and weights on π_old/μ are on by default
    ``cispo``    ``clip_higher``                                     the same
    ===========  ==================================================  =======================================================

    Parameters
    ----------
    loss_fn
        See the table.
    **keys
        ``beta`` (0.05) with ``kl_estimator`` (2: k3; 0: k1, 1: k2, 3: k1 times the ratio) and ``load_ref_policy``;
        ``use_vllm_logprobs``; ``use_rho_correction`` (True) with ``rho_clamp_lower_bound`` (0: none),
        ``rho_clamp_upper_bound`` (2.0), ``rho_mask_lower_bound``, ``rho_mask_upper_bound`` (0: none),
        ``rho_mask_sequence_level`` (the geometric mean, as a weight too) and ``rho_mask_tv_divergence`` (VACO's mask).

    Returns
    -------
    Mode
        Its loss and gradient are open-instruct's.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for what no
        mode does: a ``loss_denominator`` that is not ``"token"``; a lower bound of VACO's mask.

    Notes
    -----
    open-instruct holds log π_old/μ within ±10 nats.

    References
    ----------
    https://github.com/allenai/open-instruct/blob/e6c3044/open_instruct/grpo_utils.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.open_instruct("dapo", beta=0.0)
    Mode(PPOClip(eps_low=0.2, eps_high=0.272), anchor=Proximal(), corrections=(ImportanceWeight(high=2.0),))
    """
    return made("open-instruct", "loss_fn", LOSSES, DEFAULTS, loss_fn, keys)


def _dapo(keys: Keys) -> Mode:
    low, high = keys.number("clip_lower", above=0.0), keys.number("clip_higher", above=0.0)
    return _mode(keys, PPOClip(eps_low=low, eps_high=high))


def _cispo(keys: Keys) -> Mode:
    return _mode(keys, CISPO(max_ratio=1.0 + keys.number("clip_higher", above=0.0)))


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {"dapo": _dapo, "cispo": _cispo}


def _mode(keys: Keys, objective: Objective) -> Mode:
    if keys["loss_denominator"] != "token":
        keys.refuse("loss_denominator", "a mode divides by what it counts: pass a normalizer")
    anchor = Behavior() if keys.flag("use_vllm_logprobs") else Proximal()
    # with vLLM's log-probs as the old ones, open-instruct's π_old/μ is 1
    corrections = () if isinstance(anchor, Behavior) else _corrections(keys)
    return Mode(objective, anchor=anchor, corrections=corrections, penalties=_kl(keys, anchor.policy))


def _corrections(keys: Keys) -> tuple[Correction, ...]:
    if not keys.flag("use_rho_correction"):
        return ()
    level: Any = "geometric" if keys.flag("rho_mask_sequence_level") else "token"
    # 0 stands for no bound
    low, high = (keys.number(f"rho_clamp_{side}_bound", at_least=0.0) or None for side in ("lower", "upper"))
    weight = ImportanceWeight(level=level, low=low, high=high)
    low, high = (keys.number(f"rho_mask_{side}_bound", at_least=0.0) or None for side in ("lower", "upper"))
    if keys.flag("rho_mask_tv_divergence"):
        if low is not None or high is None:
            keys.refuse("rho_mask_tv_divergence", "it needs an upper bound alone")
        return SequenceTrustMask(edge="proximal/behavior", delta=high or 0.0), weight
    return (weight,) if low is None and high is None else (RatioMask(level=level, low=low, high=high), weight)


def _kl(keys: Keys, ratio: Any) -> tuple[Penalty, ...]:
    beta = keys.number("beta", at_least=0.0)
    if beta == 0.0 or not keys.flag("load_ref_policy"):
        return ()
    estimator: Any = keys.choice("kl_estimator", {0: "k1", 1: "k2", 2: "k3", 3: "r·k1"})
    return (Penalty(coefficient=beta, estimator=estimator, ratio=ratio if estimator == "r·k1" else "behavior"),)
