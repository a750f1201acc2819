"""The policy loss of NeMo-RL (commit 7ea279a of August 2026)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, RatioMask
from drpo_core.modes._keys import Keys, cispo, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import PPOClip, Reinforce
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drpo_core.anchors import Anchor
    from drpo_core.corrections import Correction
    from drpo_core.objectives import Objective

__all__ = ["nemo_rl"]

DEFAULTS: Mapping[str, Any] = {
    "disable_ppo_ratio": False,
    "token_level_loss": True,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}


def nemo_rl(loss_fn: str = "ClippedPGLossFn", /, **keys: Any) -> Mode:
    """NeMo-RL's ``ClippedPGLossFn``, under the keys and values of its ``loss_fn`` section.

    ``prev_logprobs`` of NeMo-RL is `proximal_log_prob` here, ``generation_logprobs`` `behavior_log_prob`. Which loss it
    is, keys say:

    =====================================  ============================================  ===================================
    key                                    loss                                          what differs
    =====================================  ============================================  ===================================
    none                                   the clip: ``ratio_clip_min``,                 a KL penalty is on by default
                                           ``ratio_clip_max`` (0.2), ``ratio_clip_c``
                                           (None)
    ``sequence_level_importance_ratios``   GSPO; needs ``token_level_loss=False``        paper: 3e-4, 4e-4
    ``use_cispo``                          CISPO                                         paper: no lower bound
    ``disable_ppo_ratio``                  REINFORCE
    ``force_on_policy_ratio``              REINFORCE                                     by its gradient; NeMo-RL's value is
                                                                                         −A
    =====================================  ============================================  ===================================

    Parameters
    ----------
    loss_fn
        ``"ClippedPGLossFn"``, the only one.
    **keys
        The table's; ``token_level_loss`` (True; False: mean of sequences' means); ``reference_policy_kl_penalty`` (0.01) with
        ``reference_policy_kl_type`` (``"k3"``), ``use_on_policy_kl_approximation`` and ``use_kl_in_reward``;
        ``use_importance_sampling_correction`` with ``truncated_importance_sampling_type`` (``"tis"``, ``"icepop"``,
        ``"seq-mask-tis"``), ``truncated_importance_sampling_ratio`` and ``truncated_importance_sampling_ratio_min``.
        ``kl_input_clamp_value`` and ``kl_output_clamp_value`` are accepted and have no effect here.

    Returns
    -------
    Mode
        Its gradient is NeMo-RL's, and its loss too, except with ``force_on_policy_ratio``.

    Raises
    ------
    TypeError, ValueError
        If a key or a value is unknown, a key is given that these settings do not use, keys contradict each other, or a value
        asks for what no mode does: the k1 or k2 KL without, and k2 with, the on-policy approximation, whose
        score-function term has no penalty of this library; ``positive_example_nll_weight``.

    Notes
    -----
    The default KL has the value of k3 and, through the score-function term, the gradient of k2: the penalty ``"k3+"``. NeMo-RL
    drops the gradient where the log-ratio exceeds 20 or the KL 10, and adds 1e-8 to its denominators.

    References
    ----------
    https://github.com/NVIDIA-NeMo/RL/blob/7ea279a/nemo_rl/algorithms/loss/loss_functions.py and
    nemo_rl/algorithms/utils.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.nemo_rl(ratio_clip_max=0.28, reference_policy_kl_penalty=0)
    Mode(PPOClip(eps_low=0.2, eps_high=0.28), anchor=Proximal())
    """
    return made("NeMo-RL", "loss_fn", {"ClippedPGLossFn": _clipped}, DEFAULTS, loss_fn, keys)


def _clipped(keys: Keys) -> Mode:
    objective, anchor = _objective(keys)
    if keys["positive_example_nll_weight"] != 0.0:
        keys.refuse("positive_example_nll_weight", "it needs rewards")
    return Mode(
        objective,
        anchor=anchor,
        corrections=_corrections(keys, isinstance(anchor, Sequence)),
        penalties=_kl(keys),
        reduction="token_mean" if keys.flag("token_level_loss") else "sequence_mean_token_mean",
    )


def _objective(keys: Keys) -> tuple[Objective, Anchor]:
    names = ("force_on_policy_ratio", "disable_ppo_ratio", "use_cispo", "sequence_level_importance_ratios")
    chosen = [name for name in names if keys.flag(name)]
    if "use_cispo" in chosen and (len(chosen) > 1 or not keys.flag("token_level_loss")):
        keys.refuse("use_cispo", "NeMo-RL refuses it with another ratio, and without token_level_loss")
    if "sequence_level_importance_ratios" in chosen and keys.flag("token_level_loss"):
        keys.refuse("sequence_level_importance_ratios", "NeMo-RL refuses it with token_level_loss")
    if chosen and chosen[0] in ("force_on_policy_ratio", "disable_ppo_ratio"):
        return Reinforce(), Proximal()
    low, high = (keys.number(f"ratio_clip_{side}", above=0.0) for side in ("min", "max"))
    if "use_cispo" in chosen:
        return cispo(low, high), Proximal()
    objective = PPOClip(eps_low=low, eps_high=high, dual_clip=keys.optional("ratio_clip_c", above=1.0))
    return objective, Sequence(Proximal()) if chosen else Proximal()


def _kl(keys: Keys) -> tuple[Penalty, ...]:
    keys.ignore("kl_input_clamp_value", "kl_output_clamp_value")
    coefficient = keys.number("reference_policy_kl_penalty", at_least=0.0)
    if keys.flag("use_kl_in_reward") or coefficient == 0.0:
        return ()
    known = {"k1": "r·k1", "k3": "r·k3"} if keys.flag("use_on_policy_kl_approximation") else {"k3": "k3+"}
    estimator: Any = keys.choice("reference_policy_kl_type", known)
    return (Penalty(coefficient=coefficient, estimator=estimator),)


def _corrections(keys: Keys, at_sequences: bool) -> tuple[Correction, ...]:  # noqa: FBT001 -- private
    if not keys.flag("use_importance_sampling_correction"):
        return ()
    level: Any = "sequence" if keys.flag("sequence_level_importance_ratios") else "token"
    kind = keys.choice("truncated_importance_sampling_type", {name: name for name in (None, "tis", "icepop", "seq-mask-tis")})
    if kind is None:
        return (ImportanceWeight(level=level),)
    low = keys.optional("truncated_importance_sampling_ratio_min", at_least=0.0)
    high = keys.number("truncated_importance_sampling_ratio", above=0.0)
    if kind == "tis":
        return (ImportanceWeight(level=level, low=low, high=high),)
    if low is None:
        keys.refuse("truncated_importance_sampling_ratio_min", f"NeMo-RL needs it with {kind!r}")
    if kind == "icepop":
        return (ImportanceWeight(level=level, low=low, high=high, outside="zero"),)
    if at_sequences:
        keys.refuse("truncated_importance_sampling_type", "NeMo-RL refuses it with sequence_level_importance_ratios")
    return RatioMask(level="geometric", low=low, high=high), ImportanceWeight()
