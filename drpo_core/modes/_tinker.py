"""The losses of Tinker (documentation of tinker 0.38)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.modes._keys import Keys, clip, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import CISPO, PolicyGradient, Reinforce
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["tinker"]

DEFAULTS: Mapping[str, Any] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "beta": None}


def tinker(loss_fn: str, /, **keys: Any) -> Mode:
    """A loss of Tinker by its ``loss_fn``, under the keys and values of its ``loss_fn_config``.

    ``logprobs`` of Tinker's datums is `behavior_log_prob` here: there is no other policy. Tinker sums over tokens.

    =======================  ==========================================================  ===================================
    ``loss_fn``              keys                                                        what differs
    =======================  ==========================================================  ===================================
    ``importance_sampling``  none
    ``ppo``                  ``clip_low_threshold`` (0.8), ``clip_high_threshold``       bounds are ratios, not offsets
                             (1.2)
    ``cispo``                the same                                                    paper: no lower bound
    ``dro``                  ``beta``, which has no documented default
    =======================  ==========================================================  ===================================

    Parameters
    ----------
    loss_fn
        See the table. ``gspo`` and ``stable_reinforce`` are not documented; ``cross_entropy`` and ``custom`` are no modes.
    **keys
        See the table.

    Returns
    -------
    Mode
        Its loss and gradient are those of Tinker's documentation; the service itself can't be run here.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, or a key is given that the loss does not use.

    References
    ----------
    https://tinker-docs.thinkingmachines.ai/tinker/losses

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.tinker("importance_sampling")
    Mode(PolicyGradient(), reduction='token_sum')
    """
    return made("Tinker", "loss_fn", LOSSES, DEFAULTS, loss_fn, keys)


def _importance_sampling(_: Keys) -> Mode:
    return Mode(PolicyGradient(), reduction="token_sum")


def _ppo(keys: Keys) -> Mode:
    return Mode(clip(*_thresholds(keys)), reduction="token_sum")


def _cispo(keys: Keys) -> Mode:
    low, high = _thresholds(keys)
    return Mode(CISPO(min_ratio=low or None, max_ratio=high), reduction="token_sum")


def _dro(keys: Keys) -> Mode:
    penalty = Penalty(coefficient=keys.number("beta", above=0.0), estimator="k2", to="behavior")
    return Mode(Reinforce(), penalties=(penalty,), reduction="token_sum")


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
}


def _thresholds(keys: Keys) -> tuple[float, float]:
    return keys.number("clip_low_threshold", at_least=0.0), keys.number("clip_high_threshold", above=0.0)
