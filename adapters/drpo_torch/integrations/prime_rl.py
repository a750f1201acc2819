"""prime-rl: every objective as the RL component of the loss, named in `[trainer.loss]` by import path and keywords.

prime-rl calls it for one sequence at a time, with the log-probs of the inference engine that sampled it, sums over
sequences and divides by the global number of tokens itself.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

from prime_rl.trainer.rl.loss import LossOutputs

from drpo_core import token_mean
from drpo_core.modes.mode import refuse_mode
from drpo_core.objectives import OBJECTIVES
from drpo_torch.loss import policy_loss as loss_and_diagnostics

if TYPE_CHECKING:
    import torch
    from prime_rl.trainer.rl.loss import LossInputs

    from drpo_core import Objective
    from drpo_core.diagnostics import Mean

__all__ = ["policy_loss"]


def policy_loss(inputs: LossInputs, *, objective: str | Objective, **parameters: float | str) -> LossOutputs:
    """Summed loss of an objective over one sequence, for ``[trainer.loss] type = "custom"``.

    Tokens outside `loss_mask` may hold anything; `loss_weights` multiply the losses of tokens. `ref_logprobs` and
    `score_correction` are not read: they belong to other losses.

    Parameters
    ----------
    inputs
        prime-rl's: `trainer_logprobs` (log π), `inference_logprobs` (log μ), `advantages` and `loss_mask`, (tokens,) each.
    objective
        A name in `drpo_core.objectives.OBJECTIVES`: ``"DRPO"``, ``"PPO-clip"``, ``"DPPO-TV"``, …; or, from Python, any
        objective.
    **parameters
        What the class of that name takes: `delta`, `eps`, `max_ratio`, …

    Returns
    -------
    LossOutputs
        `loss`, 0-d, a sum; `metrics`, of which prime-rl takes means, medians and extremes over sequences:
        ``trust_region/<name>`` for the statistics of `drpo_core.token_diagnostics`, absent where nothing was counted, and
        `is_masked`, the share of the sequence's tokens that has no gradient.

    Raises
    ------
    ValueError
        If the objective is unknown, or a mode: prime-rl divides by the tokens of all sequences itself.
    TypeError
        If a parameter is missing, or is none of the objective's.

    Examples
    --------
    .. code-block:: toml

        [trainer.loss]
        type = "custom"
        import_path = "drpo_torch.integrations.prime_rl.policy_loss"
        kwargs = { objective = "DRPO", delta = 0.15 }
    """
    loss, diagnostics = loss_and_diagnostics(
        _objective(objective, **parameters) if isinstance(objective, str) else refuse_mode(objective, "prime-rl"),
        log_prob=inputs.trainer_logprobs,
        behavior_log_prob=inputs.inference_logprobs,
        advantages=inputs.advantages,
        mask=inputs.loss_mask,
        reduction=token_mean,
        normalizer=1.0,
        token_weights=inputs.loss_weights,
    )
    assert diagnostics is not None
    metrics = {f"trust_region/{name}": _counted(each.value, each.count) for name, each in diagnostics.items()}
    tokens, dropped = diagnostics["ratio_mean"].count, cast("Mean", diagnostics["dropped_fraction"])
    metrics["is_masked"] = _counted(dropped.total / tokens.clamp(min=1.0), tokens)
    return LossOutputs(loss=loss, metrics=metrics)


@cache
def _objective(name: str, **parameters: float | str) -> Objective:
    families = {family.name: family for family in OBJECTIVES}
    if name not in families:
        msg = f"objective: expected one of {', '.join(families)}, got {name!r}"
        raise ValueError(msg)
    family = families[name]
    objective: Objective = family.objective(**{**family.fixed, **parameters})
    return objective


def _counted(value: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(1,), or (0,) where nothing was counted: prime-rl concatenates what the sequences of a step return."""
    return value.reshape(1)[count.reshape(1) > 0]
