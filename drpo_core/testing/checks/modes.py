"""Modes: the gradient with its anchor, corrections and penalties, what masks leave out, and what penalties follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core._sequences import Sequences
from drpo_core.loss import policy_loss_and_gradient, token_loss_and_gradient
from drpo_core.modes.mode import evaluated, is_whole_mode
from drpo_core.penalties import Penalty
from drpo_core.testing.checks._base import blur, check, expect, tokens, tolerance
from drpo_core.testing.strategies import vocabularies

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from drpo_core.modes import Mode
    from drpo_core.testing.batch import BoolArray, FloatArray, TokenBatch, Vocabulary
    from drpo_core.testing.implementation import Implementation

__all__ = [
    "check_masked_tokens_of_a_mode_have_no_gradient",
    "check_mode_gradient_matches_the_formula",
    "check_penalty_follows_its_divergence",
]

_NUDGES = 1e-7, -1e-7
"""Relative changes of a log-prob within which a token that jumps is not judged."""


def _mode_of(implementation: Implementation) -> Mode:
    mode = implementation.objective
    assert is_whole_mode(mode)
    return mode


def _needs_mode(implementation: Implementation) -> str | None:
    objective = implementation.objective
    if objective is None or not is_whole_mode(objective):
        return "claims no mode with an anchor, corrections or penalties"
    return "its mean over prompts needs their ids" if objective.reduction == "prompt_mean" else None


def _formula(mode: Mode, batch: TokenBatch, *, reduced: bool) -> FloatArray:
    """The core's gradient in float64."""
    arrays = (batch.log_prob, batch.behavior_log_prob, batch.advantages)
    options: dict[str, Any] = {"mask": batch.mask} | {name: getattr(batch, name) for name in mode.arguments}
    with np.errstate(all="ignore"):
        if reduced:
            return np.asarray(policy_loss_and_gradient(mode, *arrays, **options, diagnostics=False, engine="arrays").gradient)
        return np.asarray(token_loss_and_gradient(mode, *arrays, **options).gradient)


@check("P25", needs=[_needs_mode])
def check_mode_gradient_matches_the_formula(implementation: Implementation, batch: TokenBatch) -> None:
    """The gradient is −c K A R w plus that of the penalties: anchor and corrections held constant, each ratio counted once.

    A ratio of a sequence or a weight that is not detached, a weight of another level or edge, a sum for a mean, a weight
    that multiplies the ratio it is part of: each leaves a value that looks right, and another gradient (TRL #4159,
    open-instruct #1269, SkyRL's dppo with TIS, NeMo-RL #2506).
    """
    mode, reduced = _mode_of(implementation), implementation.reduction != "none"
    result = implementation(batch)
    expected = _formula(mode, batch, reduced=reduced)
    # how far the gradient moves with a rounding of what it is made of: beyond that, a mask has changed its mind
    names = ("log_prob", "behavior_log_prob", *mode.arguments)
    nudged = [
        _formula(mode, batch.replace(**{name: getattr(batch, name) * (1.0 + nudge)}), reduced=reduced)
        for name in names
        for nudge in _NUDGES
    ]
    moved = np.max([np.abs(other - expected) for other in nudged], axis=0)
    size = np.abs(expected).max(initial=0.0) + result.coefficients.max(initial=0.0)
    bound = tolerance(implementation) * (np.abs(expected) + size) + blur(result, "gradient")
    expect(
        result,
        "gradient",
        "close",
        expected,
        bound=bound + moved,
        where=moved <= 1e-3 * size,
        because="the gradient is −c K A R w plus that of the penalties",
    )


def _needs_masks(implementation: Implementation) -> str | None:
    reason = _needs_mode(implementation)
    if reason is not None:
        return reason
    mode = _mode_of(implementation)
    if mode.penalties:
        return "its penalties act on what its corrections leave out"
    return None if mode.corrections else "it has no corrections"


@check("P26", needs=[_needs_masks], cases=tokens(regimes=["on_policy", "head", "far", "extreme"]))
def check_masked_tokens_of_a_mode_have_no_gradient(implementation: Implementation, batch: TokenBatch) -> None:
    """What a correction leaves out (a band, a veto, a rejected sequence) has a gradient of exactly 0, whatever its ratio.

    A mask that is multiplied onto an infinite weight is a NaN; one that is applied to the loss after a mean over the
    sequence leaves the other tokens' share (verl #4231, slime #2198).
    """
    mode, sequences = _mode_of(implementation), Sequences(batch.mask, None, xp=np)
    log_probs = (batch.log_prob, batch.behavior_log_prob, batch.proximal_log_prob, batch.reference_log_prob)

    def left_out(which: int | None = None, nudge: float = 0.0) -> BoolArray:
        x, b, old, ref = (array if i != which or array is None else array * (1.0 + nudge) for i, array in enumerate(log_probs))
        found = evaluated(mode, x, b, old, ref, batch.advantages, sequences, diagnostics=False, dtype=np.dtype(np.float64))
        return np.broadcast_to(found.factor == 0.0, batch.shape)

    with np.errstate(all="ignore"):
        surely = left_out()
        if not surely.any():
            return
        # a token that a rounding would bring back is not judged
        for which in range(3):
            for nudge in _NUDGES:
                surely = surely & left_out(which, nudge)
    because = "what a correction leaves out has a gradient of exactly 0"
    expect(implementation(batch), "gradient", "equal", 0.0, where=surely, because=because)


_FOLLOWS = {
    "k2": "reverse",
    "k1+": "reverse",
    "k3+": "reverse",
    "r·k1": "reverse",
    "r·k3": "reverse",
    "k3": "forward",
}
"""Of which divergence an estimator's gradient is unbiased: KL(π‖q), or KL(q‖π)."""


def _needs_penalties(implementation: Implementation) -> str | None:
    reason = _needs_mode(implementation)
    if reason is not None:
        return reason
    mode = _mode_of(implementation)
    if not mode.penalties:
        return "it has no penalties"
    penalties = [penalty for penalty in mode.penalties if isinstance(penalty, Penalty)]
    if len(penalties) < len(mode.penalties) or not all(penalty.estimator in _FOLLOWS for penalty in penalties):
        return f"only about penalties by {', '.join(_FOLLOWS)}"
    if len({(p.estimator.startswith("r·"), p.ratio if p.estimator.startswith("r·") else "") for p in penalties}) > 1:
        return "its penalties are of samples of different policies"
    return None if mode.count_masked else "its corrections change what its penalties are a mean over"


def _on_small_vocabularies(implementation: Implementation) -> SearchStrategy[Vocabulary]:
    states, size = implementation.shape or (None, None)
    return vocabularies(states=states, size=size, max_logit=2.0)


@check("P27", needs=[_needs_penalties], cases=_on_small_vocabularies)
def check_penalty_follows_its_divergence(implementation: Implementation, case: Vocabulary) -> None:
    """Over an enumerated vocabulary, the expected gradient of the penalties is that of the divergence they follow.

    k1 in the loss has a value whose mean is the KL divergence and a gradient whose mean is 0; a k3 whose ratio is clamped has
    none where it is needed most (open-instruct #1269, NeMo-RL #2506, TRL #6586, OpenRLHF #1335).
    """
    mode = _mode_of(implementation)
    penalties = [penalty for penalty in mode.penalties if isinstance(penalty, Penalty)]
    batch = case.batch()
    q, moving = batch.behavior_log_prob, batch.log_prob
    third = np.roll(q, 1, axis=-1)
    policies = {"reference": third, "behavior": q, "proximal": np.roll(q, -1, axis=-1)}
    others = {name: policies[name.removesuffix("_log_prob")] for name in mode.arguments}
    batch = batch.replace(advantages=np.zeros(batch.shape), **others)
    result = implementation(batch)
    pi = np.exp(moving)
    limit = 1e3 * tolerance(implementation)
    sampled = policies[penalties[0].ratio] if penalties[0].estimator.startswith("r·") else moving
    per_token = result.gradient / np.where(result.coefficients > 0.0, result.coefficients, 1.0)
    weighted = np.exp(sampled) * per_token
    in_logits = weighted - weighted.sum(axis=-1, keepdims=True) * pi
    expected = np.zeros(batch.shape)
    for penalty in penalties:
        other = policies[penalty.to]
        ell = moving - other
        reverse = pi * (ell - (pi * ell).sum(axis=-1, keepdims=True))
        reversed_kl = _FOLLOWS[penalty.estimator] == "reverse"
        expected += penalty.coefficient * (reverse if reversed_kl else pi - np.exp(other))
    wrong = np.abs(in_logits - expected) > limit * (1.0 + np.abs(expected).max())
    if wrong.any() or not np.isfinite(in_logits).all():
        because = "the penalties' gradient, expected over the vocabulary, is that of the divergence they follow"
        wanted = _formula(mode, batch, reduced=implementation.reduction != "none")
        expect(result, "gradient", "close", wanted, bound=limit * result.coefficients, because=because)
        expect(result, "gradient", "equal", np.nan, because=f"{because}: {in_logits.tolist()}, not {expected.tolist()}")
