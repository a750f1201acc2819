"""prime-rl: every objective as the RL component of the loss, named in `[trainer.loss]` by import path and keywords.

prime-rl calls it for one sequence at a time, with the log-probs of the inference engine that sampled it, sums over
sequences and divides by the global number of tokens itself.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from prime_rl.trainer.rl.loss import LossOutputs

from drpo_core import CISPO, DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip
from drpo_core import token_mean as mean
from drpo_torch.loss import policy_loss as loss_and_diagnostics

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from prime_rl.trainer.rl.loss import LossInputs

    from drpo_core import Objective

__all__ = ["OBJECTIVES", "policy_loss"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    kind.__name__: kind for kind in (PolicyGradient, PPOClip, CISPO, SPO, DPPO, DRPO, MaskDRPO)
}


def policy_loss(inputs: LossInputs, *, objective: str | Objective, **thresholds: float | str) -> LossOutputs:
    """Summed loss of an objective over one sequence, for ``[trainer.loss] type = "custom"``.

    Tokens outside `loss_mask` may hold anything; `loss_weights` multiply the losses of tokens. `ref_logprobs` and
    `score_correction` are not read: they belong to other losses.

    Parameters
    ----------
    inputs
        prime-rl's: `trainer_logprobs` (log π), `inference_logprobs` (log μ), `advantages` and `loss_mask`, (tokens,) each.
    objective
        The name of a class in `drpo_core`, one of `OBJECTIVES`; or, from Python, an objective.
    **thresholds
        What the class takes: `delta`, `eps`, `max_ratio`, …

    Returns
    -------
    LossOutputs
        `loss`, 0-d, a sum; `metrics`, of which prime-rl takes means, medians and extremes over sequences:
        ``trust_region/<name>`` for the statistics of `drpo_core.diagnostics`, absent where nothing was counted, and
        `is_masked`, the share of the sequence's tokens that has no gradient.

    Raises
    ------
    ValueError
        If the objective is unknown.
    TypeError
        If a threshold is missing, or is none of the objective's.

    Examples
    --------
    .. code-block:: toml

        [trainer.loss]
        type = "custom"
        import_path = "drpo_torch.integrations.prime_rl.policy_loss"
        kwargs = { objective = "DRPO", delta = 0.15 }
    """
    loss, diagnostics = loss_and_diagnostics(
        _objective(objective, **thresholds) if isinstance(objective, str) else objective,
        log_prob=inputs.trainer_logprobs,
        behavior_log_prob=inputs.inference_logprobs,
        advantages=inputs.advantages,
        mask=inputs.loss_mask,
        reduction=mean,
        normalizer=1.0,
        token_weights=inputs.loss_weights,
    )
    metrics = {f"trust_region/{name}": _counted(each.value, each.count) for name, each in diagnostics.items()}
    tokens = diagnostics["ratio_mean"].count
    metrics["is_masked"] = _counted(diagnostics["dropped_fraction"][0] / tokens.clamp(min=1.0), tokens)
    return LossOutputs(loss=loss, metrics=metrics)


@cache
def _objective(name: str, **thresholds: float | str) -> Objective:
    if name not in OBJECTIVES:
        msg = f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}"
        raise ValueError(msg)
    return OBJECTIVES[name](**thresholds)


def _counted(value: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(1,), or (0,) where nothing was counted: prime-rl concatenates what the sequences of a step return."""
    return value.reshape(1)[count.reshape(1) > 0]
