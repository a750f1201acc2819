"""The losses for language models of TorchRL 0.14."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.corrections import DivergenceMask
from drpo_core.modes._keys import Keys, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import IcePop, PPOClip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.objectives import Objective

__all__ = ["torchrl"]

DEFAULTS: Mapping[str, Any] = {
    "clip_epsilon": 0.2,
    "kl_mask_threshold": None,
    "aggregation": "token_mean",
    "kl_to_ref_coeff": None,
    "kl_to_inference_coeff": None,
}


def torchrl(loss: str = "GRPOLoss", /, **keys: Any) -> Mode:
    """A loss of TorchRL 0.14 by its class, under the arguments of its constructor: its ``loss_objective``.

    ``sample_log_prob`` of TorchRL is `behavior_log_prob` here. Its entropy bonus, on by default, is a term of its own.

    ======================  ==========================================================================================
    ``loss``                what differs
    ======================  ==========================================================================================
    ``GRPOLoss``, ``DAPO``  the two are the same
    ``CISPOLoss``           TorchRL differentiates the clipped ratio, so there is no gradient outside of the bounds:
                            it is IcePop's mask. CISPO is ``drpo_core.CISPO``
    ======================  ==========================================================================================

    Parameters
    ----------
    loss
        See the table.
    **keys
        ``clip_epsilon`` (0.2), a number or (low, high); ``kl_mask_threshold`` (None): the largest ℓ²/2 of a token;
        ``aggregation`` (``"token_mean"``, ``"prompt_mean"``: the mean of the sequences' means).

    Returns
    -------
    Mode
        Its gradient is TorchRL's. So is the loss, but outside of ``CISPOLoss``'s bounds, where TorchRL's is constant.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, or a value asks for what no mode does: ``kl_to_ref_coeff``
        and ``kl_to_inference_coeff``, whose KL TorchRL averages over padding too; ``kl_mask_threshold`` with
        ``"prompt_mean"``, which averages over the tokens that are left, and over all sequences.

    References
    ----------
    https://github.com/pytorch/rl/blob/v0.14.1/torchrl/objectives/llm/grpo.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.torchrl("DAPO", clip_epsilon=(0.2, 0.28))
    Mode(PPOClip(eps_low=0.2, eps_high=0.28))
    """
    return made("TorchRL", "loss", LOSSES, DEFAULTS, loss, keys)


def _clip(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    return _mode(keys, PPOClip(eps_low=low, eps_high=high))


def _cispo(keys: Keys) -> Mode:
    low, high = _bounds(keys)
    return _mode(keys, IcePop(min_ratio=1.0 - low, max_ratio=1.0 + high))


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {"GRPOLoss": _clip, "DAPO": _clip, "CISPOLoss": _cispo}


def _bounds(keys: Keys) -> tuple[float, float]:
    if isinstance(keys["clip_epsilon"], (tuple, list)):
        return keys.pair("clip_epsilon")
    low = keys.number("clip_epsilon", above=0.0)
    return low, low


def _mode(keys: Keys, objective: Objective) -> Mode:
    for key in ("kl_to_ref_coeff", "kl_to_inference_coeff"):
        if keys[key]:
            keys.refuse(key, "TorchRL averages its KL over padding too")
    threshold = keys.optional("kl_mask_threshold", at_least=0.0)
    reduction = keys.choice("aggregation", {"token_mean": "token_mean", "prompt_mean": "sequence_mean_token_mean"})
    if not threshold:
        return Mode(objective, reduction=reduction)
    if reduction != "token_mean":
        keys.refuse("kl_mask_threshold", "it averages over the tokens that are left, and over all sequences")
    mask = DivergenceMask(edge="policy/behavior", estimator="k2", high=threshold)
    # TorchRL's mask leaves the denominator too
    return Mode(objective, corrections=(mask,), count_masked=False)
