"""The actor losses of AReaL 1.0.4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Proximal, Sequence
from drpo_core.corrections import DivergenceMask, ImportanceWeight, RatioMask, Veto
from drpo_core.modes._keys import ONE_RATIO, Keys, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import SAPO, PPOClip

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.corrections import Correction
    from drpo_core.objectives import Objective

__all__ = ["areal"]

DEFAULTS: Mapping[str, Any] = {
    "eps_clip": 0.2,
    "eps_clip_higher": None,
    "c_clip": None,
    "sapo_tau_pos": 1.0,
    "sapo_tau_neg": 1.05,
    "importance_sampling_level": "token",
    "use_decoupled_loss": False,
    "recompute_logprob": False,
    "rejection_sampling": None,
    "m2_threshold": None,
}
REJECTION: Mapping[str, Any] = {
    "level": "token",
    "action": "mask",
    "metric": "ratio",
    "agg": "mean",
    "upper": 5.0,
    "lower": None,
}


def areal(loss: str = "ppo", /, **keys: Any) -> Mode:
    """An actor loss of AReaL 1.0.4, under the keys and values of its ``actor`` section.

    ``old_logprobs`` of AReaL is `behavior_log_prob` here, ``proximal_logprobs`` `proximal_log_prob`, which the loss has
    with ``use_decoupled_loss=True`` or ``recompute_logprob=True`` only.

    ==========  ================================================================  ==========================================
    ``loss``    keys, besides those of all                                        what differs
    ==========  ================================================================  ==========================================
    ``ppo``     ``eps_clip`` (0.2), ``eps_clip_higher`` (``eps_clip``),           without ``rejection_sampling`` the
                ``c_clip`` (None): the dual clip; ``use_decoupled_loss`` with     decoupled loss lacks π_old/μ
                ``rejection_sampling``
    ``sapo``    ``sapo_tau_pos`` (1.0), ``sapo_tau_neg`` (1.05)                   ``use_sapo_loss=True`` in AReaL
    ==========  ================================================================  ==========================================

    Parameters
    ----------
    loss
        See the table.
    **keys
        ``importance_sampling_level`` (``"token"``, or ``"sequence"``: GSPO); ``recompute_logprob``; ``rejection_sampling``, a
        dict of ``level`` (``"token"``, ``"sequence"``), ``action`` (``"mask"``, ``"clamp"``), ``metric`` (``"ratio"``,
        ``"kl_k1"``, ``"kl_k2"``), ``agg`` (``"mean"``, ``"sum"``, ``"max"``), ``upper`` (5.0) and ``lower`` (None).

    Returns
    -------
    Mode
        Its loss and gradient are AReaL's.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for what no
        mode does: ``"kl_k3"``, which AReaL computes as e^−ℓ − 1 + ℓ of ℓ = log π_old/μ (its documentation has e^ℓ − 1 − ℓ);
        a clamp by anything but the ratio and its mean; a lower bound of k2 or of a largest value; masks and weights of
        tokens with ``importance_sampling_level="sequence"``, where AReaL averages over the tokens that are left, and
        differentiates the ratio as one of the sequence; ``m2_threshold``, with
        which AReaL always leaves one token: use `drpo_core.corrections.SecondMomentMask`.

    Notes
    -----
    With ``use_decoupled_loss=True`` and no ``rejection_sampling``, AReaL weighs with nothing: π_old/μ is missing from the
    gradient. Masked tokens count in its denominator. It averages the advantages of a sequence at that level. For
    ``prox_logp_method="loglinear"`` see `drpo_core.anchors.interpolated_proximal_log_prob`.

    References
    ----------
    https://github.com/inclusionAI/AReaL/blob/v1.0.4/areal/utils/functional/functional.py and areal/api/cli_args.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.areal("ppo", use_decoupled_loss=True, rejection_sampling={"action": "clamp", "upper": 2.0})
    Mode(PPOClip(eps_low=0.2, eps_high=0.2), anchor=Proximal(), corrections=(ImportanceWeight(high=2.0),))
    """
    return made("AReaL", "loss", LOSSES, DEFAULTS, loss, keys)


def _ppo(keys: Keys) -> Mode:
    low = keys.number("eps_clip", above=0.0)
    high = low if keys["eps_clip_higher"] is None else keys.number("eps_clip_higher", above=0.0)
    objective = PPOClip(eps_low=low, eps_high=high, dual_clip=keys.optional("c_clip", above=1.0))
    # AReaL computes π_old anew for the decoupled loss in any case
    recomputed = keys.flag("recompute_logprob")
    if not keys.flag("use_decoupled_loss"):
        return _mode(keys, objective, decoupled=recomputed)
    if keys["m2_threshold"] is not None:
        keys.refuse("m2_threshold", "AReaL leaves at least one token")
    corrections = () if keys["rejection_sampling"] is None else _rejection(keys, keys["rejection_sampling"])
    return _mode(keys, objective, corrections, decoupled=True)


def _sapo(keys: Keys) -> Mode:
    positive, negative = (keys.number(f"sapo_tau_{sign}", above=0.0) for sign in ("pos", "neg"))
    return _mode(keys, SAPO(tau_positive=positive, tau_negative=negative), decoupled=keys.flag("recompute_logprob"))


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {"ppo": _ppo, "sapo": _sapo}


def _mode(keys: Keys, objective: Objective, corrections: tuple[Correction, ...] = (), *, decoupled: bool) -> Mode:
    anchor = Proximal() if decoupled else Behavior()
    at_sequences = keys.choice("importance_sampling_level", {"token": False, "sequence": True})
    return Mode(objective, anchor=Sequence(anchor) if at_sequences else anchor, corrections=corrections)


def _rejection(keys: Keys, given: object) -> tuple[Correction, ...]:
    """AReaL's rejection sampling: a mask or a clamp, and the weight that is left."""
    if not isinstance(given, Mapping):
        msg = f"rejection_sampling: expected a dict of {', '.join(REJECTION)}, got {given!r}"
        raise TypeError(msg)
    rules = Keys("AReaL's rejection_sampling", "ppo", REJECTION, given)
    level, action = (rules.choice(key, {name: name for name in names}) for key, names in _CHOICES.items())
    metric = rules.choice("metric", {name: name for name in ("ratio", "kl_k1", "kl_k2")})
    low, high = rules.optional("lower"), rules.number("upper")
    token = level == "token"
    if token and action == "mask" and keys["importance_sampling_level"] == "sequence":
        keys.refuse("rejection_sampling", "AReaL averages over the tokens that are left")
    over = "token" if token else rules.choice("agg", {"mean": "mean", "sum": "sum", "max": "max"})
    # AReaL's weight of a sequence is the geometric mean for the ratio, and the tokens' own for the estimators
    weight_level: Any = "token" if token or metric != "ratio" else "geometric"
    if weight_level == "token" and keys["importance_sampling_level"] == "sequence":
        keys.refuse("rejection_sampling", ONE_RATIO)
    made = _clamped(rules, metric, over, weight_level) if action == "clamp" else None
    if made is None and metric == "ratio" and over in ("token", "mean"):
        made = (ImportanceWeight(level=weight_level, low=low, high=high, outside="zero"),)
    made = (_mask(rules, metric, over), ImportanceWeight(level=weight_level)) if made is None else made
    rules.ignore("agg")
    rules.check_all_read()
    return made


def _power(ell: float) -> float:
    """e^ℓ, finite and positive."""
    return math.exp(min(max(ell, -700.0), 700.0))


_CHOICES: Mapping[str, tuple[str, ...]] = {"level": ("token", "sequence"), "action": ("mask", "clamp")}


def _clamped(rules: Keys, metric: str, over: str, level: Any) -> tuple[Correction, ...]:
    if over != "token" and (metric != "ratio" or over != "mean"):
        rules.refuse("action", "it clamps the weights of the sequences alone that another number is beyond the bounds of")
    return (ImportanceWeight(level=level, low=rules.optional("lower"), high=rules.number("upper")),)


_LEVELS: Mapping[str, Any] = {"token": "token", "sum": "sequence", "mean": "geometric"}


def _mask(rules: Keys, metric: str, over: Any) -> Correction:
    low, high = rules.optional("lower"), rules.number("upper")
    if low is not None and (metric == "kl_k2" or over == "max"):
        rules.refuse("lower", "there is no mask of this library with it")
    if metric == "kl_k2":
        return DivergenceMask(estimator="k2", over=over, high=high)
    if metric == "kl_k1":
        # bounds of ℓ, not of the ratio, which saturates at e²⁰
        low, high = None if low is None else _power(low), _power(high)
    return Veto(low=None, high=high) if over == "max" else RatioMask(level=_LEVELS[over], low=low, high=high)
