"""The GRPO losses of ms-swift 4.6.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import FutureRatio, ImportanceWeight, NegativeSequenceMask, RatioMask
from drpo_core.modes._keys import ONE_RATIO, Keys, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import CISPO, SAPO, PPOClip
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.corrections import Correction
    from drpo_core.objectives import Objective

__all__ = ["ms_swift"]

DEFAULTS: Mapping[str, Any] = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "beta": 0.04,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "max_completion_length": 512,
    "fipo_decay_rate": 32.0,
    "fipo_clip_range": 0.2,
    "fipo_clip_high_only": True,
    "fipo_safety_threshold": 4.0,
    "rollout_importance_sampling_mode": None,
    "rollout_importance_sampling_threshold": 2.0,
    "off_policy_sequence_mask_delta": None,
}


def ms_swift(loss_type: str = "grpo", /, **keys: Any) -> Mode:
    """A GRPO loss of ms-swift 4.6.0 by its ``loss_type``, under its command-line options.

    ``old_per_token_logps`` of ms-swift is `proximal_log_prob` here, ``rollout_per_token_logps`` `behavior_log_prob`.

    ============================  ===========================================  ===========================================
    ``loss_type``                 keys, besides those of all                   what differs
    ============================  ===========================================  ===========================================
    ``grpo``, ``bnpo``, ``dapo``  ``epsilon`` (0.2), ``epsilon_high``          a KL penalty is on by default
                                  (``epsilon``), ``delta`` (None): the dual
                                  clip's bound
    ``dr_grpo``                   the same, and ``max_completion_length``      the same
                                  (512)
    ``cispo``                     ``epsilon_high``: the largest ratio itself   without it the cap is ``epsilon``, 0.2
    ``sapo``                      ``tau_pos`` (1.0), ``tau_neg`` (1.05)        the same as ``grpo``
    ``fipo``                      as ``grpo``, and ``fipo_decay_rate``         needs ``delta``, or no
                                  (32.0), ``fipo_clip_range`` (0.2),           ``fipo_safety_threshold``
                                  ``fipo_clip_high_only`` (True),
                                  ``fipo_safety_threshold`` (4.0)
    ============================  ===========================================  ===========================================

    Parameters
    ----------
    loss_type
        See the table. ``real`` compares the sequences of a group, and is no mode.
    **keys
        ``importance_sampling_level`` (``"token"``, ``"sequence"``, ``"sequence_token"``); ``beta`` (0.04);
        ``rollout_importance_sampling_mode`` (None, ``"token_truncate"``, ``"token_mask"``, ``"sequence_truncate"``,
        ``"sequence_mask"``) with ``rollout_importance_sampling_threshold`` (2.0); ``off_policy_sequence_mask_delta``.

    Returns
    -------
    Mode
        Its gradient is ms-swift's. So is the loss, except that of ``fipo`` where ``delta`` leaves no gradient: there
        ``fipo_safety_threshold`` changes the constant.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for what no
        mode does: ``beta`` with rollout weights or the sequence mask, which ms-swift applies to the KL too; weights of
        tokens with ``importance_sampling_level="sequence"``, whose ratio it differentiates as one of the sequence;
        ``delta`` within the clip range; FIPO with the ratio of a sequence; FIPO's own treatment of ratios beyond
        ``fipo_safety_threshold`` where A < 0, unless ``delta`` leaves those without a gradient.

    Notes
    -----
    ms-swift's ratio of a sequence, in ``rollout_importance_sampling_mode``, is the geometric mean. It holds log-ratios of its
    KL within 20 and values within 10.

    References
    ----------
    https://github.com/modelscope/ms-swift/blob/v4.6.0/swift/rlhf_trainers/grpo_trainer.py and args_mixin.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.ms_swift("dapo", epsilon_high=0.28, beta=0.0)
    Mode(PPOClip(eps_low=0.2, eps_high=0.28), anchor=Proximal())
    """
    return made("ms-swift", "loss_type", LOSSES, DEFAULTS, loss_type, keys)


def _clip(reduction: str, horizon: str | None = None) -> Callable[[Keys], Mode]:
    def make(keys: Keys) -> Mode:
        number = None if horizon is None else keys.number(horizon, above=0.0)
        return _mode(keys, _ppo(keys), reduction, horizon=number)

    return make


def _cispo(keys: Keys) -> Mode:
    cap = "epsilon" if keys["epsilon_high"] is None else "epsilon_high"
    return _mode(keys, CISPO(max_ratio=keys.number(cap, above=0.0)), "token_mean")


def _sapo(keys: Keys) -> Mode:
    positive, negative = keys.number("tau_pos", above=0.0), keys.number("tau_neg", above=0.0)
    return _mode(keys, SAPO(tau_positive=positive, tau_negative=negative), "sequence_mean_token_mean")


def _fipo(keys: Keys) -> Mode:
    objective = _ppo(keys)
    safety = keys.optional("fipo_safety_threshold", above=0.0)
    if safety is not None and (objective.dual_clip is None or objective.dual_clip > safety):
        keys.refuse("fipo_safety_threshold", "it changes weights where A < 0 by the token's own ratio")
    width = keys.number("fipo_clip_range", above=0.0)
    low = 1.0 if keys.flag("fipo_clip_high_only") else 1.0 - width
    # without `delta` every token counts; e²⁰ is where ratios saturate
    delta = objective.dual_clip or 5e8
    half_life = keys.number("fipo_decay_rate", above=0.0)
    future = FutureRatio(edge="policy/proximal", delta=delta, half_life=half_life, low=low, high=1.0 + width)
    return _mode(keys, objective, "token_mean", weights=(future,))


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "grpo": _clip("sequence_mean_token_mean"),
    "bnpo": _clip("token_mean"),
    "dapo": _clip("token_mean"),
    "dr_grpo": _clip("sequence_mean_token_sum", "max_completion_length"),
    "cispo": _cispo,
    "sapo": _sapo,
    "fipo": _fipo,
}


def _ppo(keys: Keys) -> PPOClip:
    low = keys.number("epsilon", above=0.0)
    high = low if keys["epsilon_high"] is None else keys.number("epsilon_high", above=0.0)
    delta = keys.optional("delta", above=0.0)
    if delta is not None and delta <= 1.0 + high:
        keys.refuse("delta", "ms-swift cuts the gradient of A > 0 at it, below 1 + epsilon_high")
    return PPOClip(eps_low=low, eps_high=high, dual_clip=delta)


def _mode(
    keys: Keys,
    objective: Objective,
    reduction: str,
    *,
    horizon: float | None = None,
    weights: tuple[Correction, ...] = (),
) -> Mode:
    """The objective with ms-swift's ratio, masks, weights and KL."""
    at_sequences, one = keys.choice(
        "importance_sampling_level", {"token": (False, False), "sequence": (True, True), "sequence_token": (True, False)}
    )
    if at_sequences and weights:
        keys.refuse("importance_sampling_level", "FIPO's weights would see the ratio of the sequence")
    weights = (*weights, *_rollout_weights(keys, one=one))
    threshold = keys.optional("off_policy_sequence_mask_delta", above=0.0)
    masks = () if threshold is None else (NegativeSequenceMask(delta=threshold),)
    beta = keys.number("beta", at_least=0.0)
    if beta > 0.0 and (masks or keys["rollout_importance_sampling_mode"] is not None):
        keys.refuse("beta", "ms-swift's weights and masks apply to its KL too")
    return Mode(
        objective,
        anchor=Sequence(Proximal()) if at_sequences else Proximal(),
        corrections=(*masks, *weights),
        penalties=(Penalty(coefficient=beta),) if beta > 0.0 else (),
        reduction=reduction,
        horizon=horizon,
        # bnpo alone divides by the tokens that the mask leaves
        count_masked=not (masks and keys.name == "bnpo"),
    )


def _rollout_weights(keys: Keys, *, one: bool) -> tuple[Correction, ...]:
    names = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    kind = keys.choice("rollout_importance_sampling_mode", {name: name for name in (None, *names)})
    if kind is None:
        return ()
    if one and kind != "sequence_truncate":
        keys.refuse("rollout_importance_sampling_mode", ONE_RATIO)
    high = keys.number("rollout_importance_sampling_threshold", above=0.0)
    if kind == "sequence_mask":
        return RatioMask(level="geometric", high=high), ImportanceWeight()
    level: Any = "token" if kind.startswith("token") else "geometric"
    outside: Any = "clamp" if kind.endswith("truncate") else "zero"
    return (ImportanceWeight(level=level, high=high, outside=outside),)
