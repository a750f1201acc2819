"""The policy losses of slime (commit 624b824 of August 2026)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, NegativeSequenceMask
from drpo_core.modes._keys import ONE_RATIO, Keys, cispo, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import PPOClip
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.corrections import Correction
    from drpo_core.objectives import Objective

__all__ = ["slime"]

ICEPOP = "slime.backends.megatron_utils.loss.icepop_function"

DEFAULTS: Mapping[str, Any] = {
    "eps_clip": 0.2,
    "eps_clip_high": None,
    "eps_clip_c": None,
    "use_rollout_logprobs": False,
    "calculate_per_token_loss": False,
    "use_opsm": False,
    "opsm_delta": 1e-4,
    "use_tis": False,
    "tis_clip": 2.0,
    "tis_clip_low": 0.0,
    "custom_tis_function_path": None,
    "use_kl_loss": False,
    "kl_loss_coef": 0.0,
    "kl_loss_type": "k1",
    "use_unbiased_kl": False,
    "entropy_coef": 0.0,
}


def slime(advantage_estimator: str = "grpo", /, **keys: Any) -> Mode:
    """A policy loss of slime by its ``advantage_estimator``, under its command-line options with underscores.

    ``log_probs`` of slime is `proximal_log_prob` here, ``rollout_log_probs`` `behavior_log_prob`; with
    ``use_rollout_logprobs=True`` the loss has only the latter.

    =================================  ================================================  ===================================
    ``advantage_estimator``            keys, besides those of all                        what differs
    =================================  ================================================  ===================================
    ``grpo``, ``ppo``                  ``eps_clip`` (0.2), ``eps_clip_high``
                                       (``eps_clip``), ``eps_clip_c`` (None): the dual
                                       clip
    ``reinforce_plus_plus``            the same
    ``reinforce_plus_plus_baseline``   the same
    ``gspo``                           the same                                          paper: 3e-4, 4e-4
    ``cispo``                          ``eps_clip``, ``eps_clip_high``                   paper: no lower bound, ``eps_clip``
                                                                                         ≥ 1
    =================================  ================================================  ===================================

    Parameters
    ----------
    advantage_estimator
        See the table. It is also what makes the advantages, which a mode does not.
    **keys
        ``calculate_per_token_loss`` (False: mean of sequences' means); ``use_opsm`` with ``opsm_delta`` (1e-4); ``use_tis``
        with ``tis_clip`` (2.0), ``tis_clip_low`` (0) and ``custom_tis_function_path`` (None, or the path of slime's own
        ``icepop_function``); ``use_kl_loss`` with ``kl_loss_coef`` (0.0), ``kl_loss_type`` (``"k1"``) and
        ``use_unbiased_kl``.

    Returns
    -------
    Mode
        Its loss and gradient are slime's.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for
        what no mode does: ``entropy_coef``, which needs logits; ``use_unbiased_kl`` with ``"k2"``; ``use_tis`` with
        ``gspo``, whose ratio slime differentiates as one of the sequence, so that its tokens share their weights.

    Notes
    -----
    The default KL, k1, is no penalty: its gradient has expectation 0. ``"low_var_kl"`` drops the gradient of values above 10.

    References
    ----------
    https://github.com/THUDM/slime/blob/624b824/slime/backends/megatron_utils/loss.py and slime/utils/ppo_utils.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.slime("gspo", eps_clip=3e-4, eps_clip_high=4e-4)
    Mode(PPOClip(eps_low=0.0003, eps_high=0.0004), anchor=Sequence(Proximal()), reduction='sequence_mean_token_mean')
    """
    return made("slime", "advantage_estimator", LOSSES, DEFAULTS, advantage_estimator, keys)


def _clip(keys: Keys) -> Mode:
    return _mode(keys, _ppo(keys))


def _gspo(keys: Keys) -> Mode:
    return _mode(keys, _ppo(keys), at_sequences=True)


def _cispo(keys: Keys) -> Mode:
    return _mode(keys, cispo(*_bounds(keys)))


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "grpo": _clip,
    "gspo": _gspo,
    "cispo": _cispo,
    "ppo": _clip,
    "reinforce_plus_plus": _clip,
    "reinforce_plus_plus_baseline": _clip,
}


def _bounds(keys: Keys) -> tuple[float, float]:
    low = keys.number("eps_clip", above=0.0)
    return low, low if keys["eps_clip_high"] is None else keys.number("eps_clip_high", above=0.0)


def _ppo(keys: Keys) -> PPOClip:
    low, high = _bounds(keys)
    return PPOClip(eps_low=low, eps_high=high, dual_clip=keys.optional("eps_clip_c", above=1.0))


def _mode(keys: Keys, objective: Objective, *, at_sequences: bool = False) -> Mode:
    """The objective with slime's masks, weights, KL and reduction."""
    if keys["entropy_coef"] != 0.0:
        keys.refuse("entropy_coef", "it needs logits")
    on_rollout = keys.flag("use_rollout_logprobs")
    if on_rollout and keys.flag("use_tis"):
        keys.refuse("use_tis", "slime refuses it with use_rollout_logprobs")
    anchor = Behavior() if on_rollout else Proximal()
    corrections: list[Correction] = []
    if keys.flag("use_opsm"):
        edge: Any = f"policy/{anchor.policy}"
        corrections.append(NegativeSequenceMask(edge=edge, delta=keys.number("opsm_delta", above=0.0)))
    if keys.flag("use_tis"):
        if at_sequences:
            keys.refuse("use_tis", ONE_RATIO)
        outside: Any = keys.choice("custom_tis_function_path", {None: "clamp", ICEPOP: "zero"})
        low, high = keys.number("tis_clip_low", at_least=0.0), keys.number("tis_clip", above=0.0)
        corrections.append(ImportanceWeight(low=low or None, high=high, outside=outside))
    return Mode(
        objective,
        anchor=Sequence(anchor) if at_sequences else anchor,
        corrections=tuple(corrections),
        penalties=_kl(keys, anchor.policy),
        reduction="token_mean" if keys.flag("calculate_per_token_loss") else "sequence_mean_token_mean",
    )


def _kl(keys: Keys, ratio: Any) -> tuple[Penalty, ...]:
    if not keys.flag("use_kl_loss"):
        return ()
    coefficient = keys.number("kl_loss_coef", at_least=0.0)
    estimator: Any = keys.choice("kl_loss_type", {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"})
    unbiased = keys.flag("use_unbiased_kl")
    if unbiased and estimator == "k2":
        keys.refuse("use_unbiased_kl", "the ratio times k2 is no penalty of this library")
    if coefficient == 0.0:
        return ()
    if unbiased:
        return (Penalty(coefficient=coefficient, estimator=f"r·{estimator}", ratio=ratio),)  # type: ignore[arg-type]
    return (Penalty(coefficient=coefficient, estimator=estimator),)
