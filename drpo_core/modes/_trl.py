"""The losses of TRL 1.16's GRPOTrainer, and of its experimental GMPOTrainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Proximal, Sequence
from drpo_core.corrections import (
    ClippedGeometricRatio,
    ImportanceWeight,
    NegativeSequenceMask,
    OutwardMask,
    VariationalWeight,
    Veto,
)
from drpo_core.modes._keys import ONE_RATIO, Keys, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import CISPO, SAPO, PPOClip, Reinforce
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.anchors import Anchor
    from drpo_core.corrections import Correction, Edge
    from drpo_core.objectives import Objective

__all__ = ["trl"]

DEFAULTS: Mapping[str, Any] = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "max_completion_length": 512,
    "off_policy_mask_threshold": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
}


def trl(loss_type: str = "dapo", /, **keys: Any) -> Mode:
    """A loss of TRL 1.16 by its ``loss_type``, under the keys and values of its ``GRPOConfig``.

    ``old_per_token_logps`` of TRL is `behavior_log_prob` here; with ``use_vllm=True`` it is `proximal_log_prob`, and
    ``sampling_per_token_logps`` is `behavior_log_prob`.

    =============================  ==============================================  =========================================
    ``loss_type``                  keys, besides those of all                      what differs
    =============================  ==============================================  =========================================
    ``grpo``, ``bnpo``, ``dapo``   ``epsilon`` (0.2), ``epsilon_high``             rows without valid tokens count in
                                   (``epsilon``), ``delta`` (None): the dual       ``grpo``
                                   clip's bound
    ``dr_grpo``                    the same, and ``max_completion_length`` (512)   rows without valid tokens count
    ``luspo``                      as ``grpo``                                     paper: with
                                                                                   ``importance_sampling_level="sequence"``
    ``cispo``                      ``epsilon_high``: the largest ratio itself      without it the cap is ``epsilon``, 0.2
    ``sapo``                       ``sapo_temperature_pos`` (1.0),
                                   ``sapo_temperature_neg`` (1.05)
    ``vespo``                      ``vespo_k_pos`` (2.0), ``vespo_lambda_pos``
                                   (3.0), ``vespo_k_neg`` (3.0),
                                   ``vespo_lambda_neg`` (2.0)
    ``gmpo``                       ``epsilon`` (0.4), ``epsilon_high``, nats       of ``trl.experimental.gmpo``
    =============================  ==============================================  =========================================

    Parameters
    ----------
    loss_type
        See the table.
    **keys
        ``importance_sampling_level`` (``"token"``, or ``"sequence"``: GSPO's ratio); ``beta`` (0.0) with
        ``use_bias_correction_kl`` (True: k3 times the ratio); ``off_policy_mask_threshold``;
        ``use_vllm`` with ``vllm_importance_sampling_correction`` (True), ``vllm_importance_sampling_mode``
        (``"sequence_mask"``), ``vllm_importance_sampling_clip_max`` (3.0) and ``vllm_importance_sampling_clip_min``.

    Returns
    -------
    Mode
        Its gradient is TRL's, and so is its loss, except that of ``gmpo`` (TRL: −A times the sequence's ratio).

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for
        what no mode does: ``top_entropy_quantile`` and ``entropy_coef``, which need logits; a bias-corrected KL with a ratio
        of sequences, which TRL broadcasts over the tokens; weights of tokens with
        ``importance_sampling_level="sequence"``, whose ratio TRL differentiates as one of the sequence; ``delta`` within the
        clip range; ``vespo`` with weights of vLLM that are not ``"token_mask"``, of which TRL refuses those of sequences.

    Notes
    -----
    With ``num_iterations=1`` and without vLLM TRL has no old log-probs and takes the current ones: the ratio is 1 and all
    losses look alike. Its ``mean()`` over rows is `sequence_mean_token_mean` if no row is empty. VESPO with a sampler's ratio
    masked as 0: TRL puts 1e-8 in its place, which leaves a weight of about 1e-15.

    References
    ----------
    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/grpo_trainer.py and grpo_config.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.trl("grpo", epsilon_high=0.28, beta=0.001)
    Mode(PPOClip(eps_low=0.2, eps_high=0.28), penalties=(Penalty(coefficient=0.001, estimator='r·k3'),), reduction='sequence_mean_token_mean')
    """  # noqa: E501 -- a repr is one line
    defaults = {**DEFAULTS, "epsilon": 0.4} if loss_type == "gmpo" else DEFAULTS
    return made("TRL", "loss_type", LOSSES, defaults, loss_type, keys)


def _clip(reduction: str, horizon: str | None = None) -> Callable[[Keys], Mode]:
    """A clipped loss: the names of its reduction and of the key of its horizon."""

    def make(keys: Keys) -> Mode:
        low, high = _bounds(keys)
        delta = keys.optional("delta", above=0.0)
        if delta is not None and delta <= 1.0 + high:
            keys.refuse("delta", "TRL cuts the gradient of A > 0 at it, below 1 + epsilon_high")
        objective = PPOClip(eps_low=low, eps_high=high, dual_clip=delta)
        return _mode(keys, objective, reduction, horizon=None if horizon is None else keys.number(horizon, above=0.0))

    return make


def _cispo(keys: Keys) -> Mode:
    cap = "epsilon" if keys["epsilon_high"] is None else "epsilon_high"
    return _mode(keys, CISPO(max_ratio=keys.number(cap, above=0.0)), "token_mean")


def _sapo(keys: Keys) -> Mode:
    positive, negative = (keys.number(f"sapo_temperature_{sign}", above=0.0) for sign in ("pos", "neg"))
    return _mode(keys, SAPO(tau_positive=positive, tau_negative=negative), "sequence_mean_token_mean")


def _vespo(keys: Keys) -> Mode:
    positive, negative = (
        (keys.number(f"vespo_k_{sign}", above=0.0), keys.number(f"vespo_lambda_{sign}", above=0.0)) for sign in ("pos", "neg")
    )
    edge, masks = _vespo_edge(keys)
    weight = VariationalWeight(edge=edge, positive=positive, negative=negative)
    # the level enters TRL's KL alone
    return _mode(keys, Reinforce(), "token_mean", weights=(*masks, weight))


def _vespo_edge(keys: Keys) -> tuple[Edge, tuple[Correction, ...]]:
    """The ratio whose product VESPO takes, and what it leaves out of the sampler's."""
    if not keys.flag("use_vllm"):
        return "policy/behavior", ()
    if not keys.flag("vllm_importance_sampling_correction"):
        return "policy/proximal", ()
    level, outside = keys.choice("vllm_importance_sampling_mode", _SAMPLING)
    if level == "sequence":
        keys.refuse("vllm_importance_sampling_mode", "TRL refuses it, because the product is of the tokens' ratios")
    if outside == "clamp":
        keys.refuse("vllm_importance_sampling_mode", "its truncated ratio is a factor within the sequence's product")
    low, high = _limits(keys)
    return "policy/behavior", () if low is None and high is None else (Veto(low=low, high=high),)


def _gmpo(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    edge: Edge = "policy/proximal" if keys.flag("use_vllm") else "policy/behavior"
    bounds: dict[str, Any] = {"edge": edge, "eps_low": low, "eps_high": high}
    return Mode(
        Reinforce(),
        anchor=_anchor(keys),
        corrections=(ClippedGeometricRatio(**bounds), OutwardMask(**bounds)),
        penalties=_kl(keys, corrected=False),
        reduction="sequence_mean_token_mean",
    )


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "grpo": _clip("sequence_mean_token_mean"),
    "bnpo": _clip("token_mean"),
    "dapo": _clip("token_mean"),
    "dr_grpo": _clip("sequence_mean_token_sum", "max_completion_length"),
    "luspo": _clip("sequence_mean_token_sum"),
    "cispo": _cispo,
    "sapo": _sapo,
    "vespo": _vespo,
    "gmpo": _gmpo,
}


def _bounds(keys: Keys) -> tuple[float, float]:
    low = keys.number("epsilon", above=0.0)
    return low, low if keys["epsilon_high"] is None else keys.number("epsilon_high", above=0.0)


def _mode(
    keys: Keys,
    objective: Objective,
    reduction: str,
    *,
    horizon: float | None = None,
    weights: tuple[Correction, ...] | None = None,
) -> Mode:
    """The objective with TRL's ratio, masks, weights and KL; `weights` are VESPO's own."""
    for key, nothing in (("top_entropy_quantile", 1.0), ("entropy_coef", 0.0)):
        if keys[key] != nothing:
            keys.refuse(key, "it needs logits")
    anchor = _anchor(keys)
    at_sequences = keys.choice("importance_sampling_level", {"token": False, "sequence": True})
    threshold = keys.optional("off_policy_mask_threshold", above=0.0)
    masks = () if threshold is None else (NegativeSequenceMask(delta=threshold),)
    penalties = _kl(keys, corrected=True)
    if at_sequences and penalties and keys.flag("use_bias_correction_kl"):
        keys.refuse("use_bias_correction_kl", "TRL broadcasts the ratio of the sequence over the KL of its tokens")
    return Mode(
        objective,
        anchor=Sequence(anchor) if at_sequences and weights is None else anchor,
        corrections=(*masks, *(_weights(keys, at_sequences=at_sequences) if weights is None else weights)),
        penalties=penalties,
        reduction=reduction,
        horizon=horizon,
    )


def _anchor(keys: Keys) -> Anchor:
    return Proximal() if keys.flag("use_vllm") else Behavior()


def _kl(keys: Keys, *, corrected: bool) -> tuple[Penalty, ...]:
    beta = keys.number("beta", at_least=0.0)
    if beta == 0.0:
        return ()
    if not (corrected and keys.flag("use_bias_correction_kl")):
        return (Penalty(coefficient=beta),)
    return (Penalty(coefficient=beta, estimator="r·k3", ratio="proximal" if keys.flag("use_vllm") else "behavior"),)


_SAMPLING: Mapping[str, tuple[Any, Any]] = {
    "token_truncate": ("token", "clamp"),
    "token_mask": ("token", "zero"),
    "sequence_truncate": ("sequence", "clamp"),
    "sequence_mask": ("sequence", "zero"),
}


def _weights(keys: Keys, *, at_sequences: bool) -> tuple[ImportanceWeight, ...]:
    """What corrects for the sampler."""
    if not keys.flag("use_vllm") or not keys.flag("vllm_importance_sampling_correction"):
        return ()
    level, outside = keys.choice("vllm_importance_sampling_mode", _SAMPLING)
    if at_sequences and level == "token":
        keys.refuse("vllm_importance_sampling_mode", ONE_RATIO)
    low, high = _limits(keys)
    if outside == "clamp" and low is None and high is None:
        keys.refuse("vllm_importance_sampling_mode", "TRL refuses a truncation without a bound")
    return (ImportanceWeight(level=level, low=low, high=high, outside=outside),)


def _limits(keys: Keys) -> tuple[float | None, float | None]:
    low = keys.optional("vllm_importance_sampling_clip_min", at_least=0.0)
    return low, keys.optional("vllm_importance_sampling_clip_max", above=0.0)
