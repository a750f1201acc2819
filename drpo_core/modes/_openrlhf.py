"""The policy losses of OpenRLHF 0.11.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Proximal, Sequence
from drpo_core.corrections import DivergenceMask, ImportanceWeight, RatioMask
from drpo_core.modes._keys import Keys, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import PPOClip
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.corrections import Correction

__all__ = ["openrlhf"]

DEFAULTS: Mapping[str, Any] = {
    "actor.eps_clip": 0.2,
    "actor.eps_clip_low_high": None,
    "actor.dual_clip": None,
    "actor.loss_agg_mode": "token-mean",
    "algo.advantage.is_correction_level": "off",
    "algo.advantage.is_correction_mode": "mask",
    "algo.advantage.is_correction_gating": "ratio",
    "algo.advantage.is_correction_threshold": (0.5, 5.0),
    "algo.kl.use_loss": False,
    "algo.kl.init_coef": 0.01,
    "algo.kl.estimator": "k1",
    "algo.kl.unbiased_gradient": False,
}
_IS = "algo.advantage.is_correction_"


def openrlhf(policy_loss_type: str = "ppo", /, **keys: Any) -> Mode:
    """A policy loss of OpenRLHF 0.11.2 by its ``actor.policy_loss_type``, under the names of its command line.

    Names with dots are given in a dict: ``modes.openrlhf("ppo", **{"actor.dual_clip": 3.0})``. ``old_log_probs`` of
    OpenRLHF is `proximal_log_prob` here, ``rollout_log_probs`` `behavior_log_prob`.

    ====================  ==========================================================  ======================================
    ``policy_loss_type``  keys, besides those of all                                  what differs
    ====================  ==========================================================  ======================================
    ``ppo``               ``algo.advantage.is_correction_mode`` (``"mask"``,
                          ``"clip"``), ``_gating`` (``"ratio"``, ``"binary_kl"``,
                          ``"tv"``), ``_threshold`` ((0.5, 5.0))
    ``gspo``              none of the above                                           always means of sequences; with a
                                                                                      correction level the ratio is π/μ
    ====================  ==========================================================  ======================================

    Parameters
    ----------
    policy_loss_type
        See the table.
    **keys
        ``actor.eps_clip`` (0.2) or ``actor.eps_clip_low_high``; ``actor.dual_clip`` (None); ``actor.loss_agg_mode``
        (``"token-mean"``, ``"seq-mean-token-mean"``); ``algo.advantage.is_correction_level`` (``"off"``, ``"token"``,
        ``"seq"``); ``algo.kl.use_loss`` with ``algo.kl.init_coef`` (0.01) and ``algo.kl.estimator`` (``"k1"``).

    Returns
    -------
    Mode
        Its loss and gradient are OpenRLHF's.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for
        what no mode does: ``algo.kl.unbiased_gradient``; a KL loss, which OpenRLHF averages over tokens, with a loss
        that it averages over sequences.

    Notes
    -----
    The default KL, k1, is no penalty as a loss: its gradient has expectation 0. OpenRLHF drops the gradient where log-ratios
    exceed 20 (``ppo``) or the KL 10, and holds probabilities within 1e-6 of 0 and 1 for its divergences.

    References
    ----------
    https://github.com/OpenRLHF/OpenRLHF/blob/v0.11.2/openrlhf/models/loss.py, openrlhf/models/utils.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.openrlhf("gspo", **{"actor.eps_clip_low_high": (3e-4, 4e-4)})
    Mode(PPOClip(eps_low=0.0003, eps_high=0.0004), anchor=Sequence(Proximal()), reduction='sequence_mean_token_mean')
    """
    return made("OpenRLHF", "policy_loss_type", LOSSES, DEFAULTS, policy_loss_type, keys)


def _ppo(keys: Keys) -> Mode:
    names = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean_token_mean"}
    reduction = keys.choice("actor.loss_agg_mode", names)
    corrections = _corrections(keys)
    return Mode(_clip(keys), Proximal(), corrections, _kl(keys, reduction), reduction)


def _gspo(keys: Keys) -> Mode:
    keys.ignore("actor.loss_agg_mode")
    anchor = Proximal() if _level(keys) == "off" else Behavior()
    reduction = "sequence_mean_token_mean"
    return Mode(_clip(keys), Sequence(anchor), (), _kl(keys, reduction), reduction)


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {"ppo": _ppo, "gspo": _gspo}


def _clip(keys: Keys) -> PPOClip:
    both = keys["actor.eps_clip_low_high"]
    if both is None:
        low = high = keys.number("actor.eps_clip", above=0.0)
    else:
        low, high = keys.pair("actor.eps_clip_low_high")
    return PPOClip(eps_low=low, eps_high=high, dual_clip=keys.optional("actor.dual_clip", above=1.0))


def _level(keys: Keys) -> str:
    return keys.choice(f"{_IS}level", {name: name for name in ("off", "token", "seq")})


def _corrections(keys: Keys) -> tuple[Correction, ...]:
    level = _level(keys)
    if level == "off":
        return ()
    clip = keys.choice(f"{_IS}mode", {"mask": False, "clip": True})
    gating = keys.choice(f"{_IS}gating", {"ratio": "ratio", "binary_kl": "binary_kl", "tv": "binary_tv"})
    # one number is an upper bound
    two = isinstance(keys[f"{_IS}threshold"], (tuple, list))
    low, high = keys.pair(f"{_IS}threshold") if two else (0.0, keys.number(f"{_IS}threshold"))
    if clip and (level == "seq" or gating != "ratio"):
        keys.refuse(f"{_IS}mode", "OpenRLHF clips the ratio of tokens only")
    if gating != "ratio":
        if low > 0.0:
            keys.refuse(f"{_IS}threshold", "a divergence has an upper bound only")
        estimator: Any = gating
        over: Any = "token" if level == "token" else "mean"
        return DivergenceMask(estimator=estimator, over=over, high=high), ImportanceWeight()
    if level == "seq":
        return RatioMask(level="geometric", low=low or None, high=high), ImportanceWeight()
    return (ImportanceWeight(low=low or None, high=high, outside="clamp" if clip else "zero"),)


def _kl(keys: Keys, reduction: str) -> tuple[Penalty, ...]:
    if not keys.flag("algo.kl.use_loss"):
        return ()
    if keys.flag("algo.kl.unbiased_gradient"):
        keys.refuse("algo.kl.unbiased_gradient", "the value of one estimator with another's gradient times a ratio")
    if reduction != "token_mean":
        keys.refuse("algo.kl.use_loss", "OpenRLHF averages its KL over tokens, and the loss over sequences")
    estimator: Any = keys.choice("algo.kl.estimator", {name: name for name in ("k1", "k2", "k3")})
    coefficient = keys.number("algo.kl.init_coef", at_least=0.0)
    return (Penalty(coefficient=coefficient, estimator=estimator),) if coefficient > 0.0 else ()
