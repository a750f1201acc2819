"""The losses of prime-rl: those of September 2026, and the one that was its default before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drpo_core.modes._keys import Keys, clip, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import CISPO, DPPO, IPO, IcePop
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["prime_rl"]

# each type has keys of its own, whose defaults differ
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ipo": {"eps": 0.3, "max_importance_ratio": 1e4, "adv_tau": 1.0, "loss_aggregation": "token", "score_centering": False},
    "icepop": {"ratio_low": 0.2, "ratio_high": 5.0, "adv_tau": 1.0, "loss_aggregation": "token"},
    "ppo": {"ratio_low": 0.8, "ratio_high": 1.2, "max_importance_ratio": 1e4, "adv_tau": 1.0, "loss_aggregation": "token"},
    "cispo": {"ratio_low": 0.0, "ratio_high": 5.0, "adv_tau": 1.0, "loss_aggregation": "token"},
    "default": {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "loss_aggregation": "token", "kl_tau": 1e-3},
}


def prime_rl(type: str = "ipo", /, **keys: Any) -> Mode:  # noqa: A002 -- prime-rl's word
    """A loss of prime-rl by its ``type``, under the keys and values of ``[trainer.loss]``.

    ``inference_logprobs`` of prime-rl is `behavior_log_prob`: there is no other policy.

    ===========  ==============================================================  ===========================================
    ``type``     keys                                                            what differs
    ===========  ==============================================================  ===========================================
    ``ipo``      ``eps`` (0.3), ``max_importance_ratio`` (1e4),
                 ``score_centering`` (False)
    ``icepop``   ``ratio_low`` (0.2), ``ratio_high`` (5.0)                       paper: on π_old/μ, 0.5 and 5
    ``ppo``      ``ratio_low`` (0.8), ``ratio_high`` (1.2),                      bounds are ratios, not offsets
                 ``max_importance_ratio`` (1e4)
    ``cispo``    ``ratio_low`` (0.0: no bound), ``ratio_high`` (5.0)             bounds are ratios, not offsets
    ``default``  ``dppo_mask_low``, ``dppo_mask_high`` (0.2), ``kl_tau``         until August 2026 (#3418); DPPO without
                 (1e-3): of ℓ² to the sampler                                    truncation
    ===========  ==============================================================  ===========================================

    Parameters
    ----------
    type
        See the table.
    **keys
        See the table; for each type ``adv_tau`` (1.0) and ``loss_aggregation`` (``"token"``, or ``"prompt"``: the mean of the
        prompts' means).

    Returns
    -------
    Mode
        Its gradient is prime-rl's. So is the loss, up to ``max_importance_ratio``.

    Raises
    ------
    TypeError, ValueError
        If the type, a key or a value is unknown, or a value asks for what no mode does: an ``adv_tau`` that is not 1
        (multiply the advantages with it), ``score_centering``, which needs the sampler's support, or a
        ``max_importance_ratio`` below 1e4 with ``ppo``.

    Notes
    -----
    ``ppo`` caps the ratio that multiplies the gradient where A < 0 at ``max_importance_ratio``; the mode does not.
    The word ``"token"`` for its default aggregation is a guess: the sources that were read have only ``"prompt"``.
    With ``loss_aggregation="prompt"`` the losses take the prompts' ids:
    ``reduction=functools.partial(drpo_core.reduction.prompt_mean, group_ids=ids)``.

    References
    ----------
    https://github.com/PrimeIntellect-ai/prime-rl/blob/main/src/prime_rl/trainer/rl/loss.py, in September 2026; pull requests
    3418, 3526, 3586. ``default``: the same file at commit 559b447.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.prime_rl("icepop")
    Mode(IcePop(min_ratio=0.2, max_ratio=5.0))
    """
    return made("prime-rl", "type", LOSSES, _defaults(type), type, keys)


def _ipo(keys: Keys) -> Mode:
    if keys.flag("score_centering"):
        keys.refuse("score_centering", "it needs the log-probs of the sampler's support")
    delta, cap = keys.number("eps", above=0.0), keys.number("max_importance_ratio", at_least=1.0)
    return _aggregated(keys, Mode(IPO(delta=delta, max_ratio=cap)))


def _icepop(keys: Keys) -> Mode:
    low, high = (keys.number(f"ratio_{side}", above=0.0) for side in ("low", "high"))
    return _aggregated(keys, Mode(IcePop(min_ratio=low, max_ratio=high)))


def _ppo(keys: Keys) -> Mode:
    low, high = (keys.number(f"ratio_{side}", above=0.0) for side in ("low", "high"))
    if keys.number("max_importance_ratio", at_least=1.0) < 1e4:
        keys.refuse("max_importance_ratio", "PPOClip has no such cap")
    return _aggregated(keys, Mode(clip(low, high)))


def _cispo(keys: Keys) -> Mode:
    low, high = keys.number("ratio_low", at_least=0.0), keys.number("ratio_high", at_least=1.0)
    return _aggregated(keys, Mode(CISPO(min_ratio=low or None, max_ratio=high)))


def _default(keys: Keys) -> Mode:
    low, high = (keys.number(f"dppo_mask_{side}", above=0.0) for side in ("low", "high"))
    tau = keys.number("kl_tau", at_least=0.0)
    penalties = (Penalty(coefficient=tau, estimator="square", to="behavior"),) if tau > 0.0 else ()
    return _aggregated(keys, Mode(DPPO(delta_low=low, delta_high=high), penalties=penalties))


def _aggregated(keys: Keys, mode: Mode) -> Mode:
    """The mode with the aggregation of the loss."""
    if keys.number("adv_tau", at_least=0.0) != 1.0:
        keys.refuse("adv_tau", "multiply the advantages with it")
    return replace(mode, reduction=keys.choice("loss_aggregation", {"token": "token_mean", "prompt": "prompt_mean"}))


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "ipo": _ipo,
    "icepop": _icepop,
    "ppo": _ppo,
    "cispo": _cispo,
    "default": _default,
}


def _defaults(name: object) -> Mapping[str, Any]:
    return DEFAULTS.get(name, {}) if isinstance(name, str) else {}
