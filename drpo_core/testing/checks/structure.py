"""Masks, padding, micro-batches, layout: properties of any policy loss, whatever its formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from drpo_core.anchors import Prefix
from drpo_core.corrections import FutureRatio, MinimumPrefixRatio, PrefixBudgetMask, SecondMomentMask
from drpo_core.modes import Mode
from drpo_core.modes.mode import parts_of
from drpo_core.objectives import ASPO, DPPO, IPO, UP, IcePop, PPOClip, Reinforce, TokenwiseClip
from drpo_core.penalties import CovariancePenalty
from drpo_core.testing.checks._base import (
    PropertyViolated,
    blur,
    check,
    expect,
    needs_local,
    needs_mask,
    tokens,
    tolerance,
)
from drpo_core.testing.snippet import unchanged_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drpo_core.testing.batch import BoolArray, FloatArray, TokenBatch
    from drpo_core.testing.implementation import Evaluation, Implementation

__all__ = [
    "check_duplicates_leave_means_unchanged",
    "check_extreme_token_stays_finite",
    "check_fully_masked_batch_is_finite",
    "check_inputs_are_not_changed",
    "check_masked_inputs_are_inert",
    "check_micro_batches_sum_to_the_batch",
    "check_nan_at_a_valid_token_is_not_hidden",
    "check_order_does_not_matter",
    "check_packed_equals_padded",
    "check_padding_does_not_matter",
    "check_tokens_do_not_interact",
    "check_transforms_agree",
    "close",
]

_IN_ORDER = (FutureRatio, MinimumPrefixRatio, Prefix, PrefixBudgetMask)
_OF_A_BATCH = (CovariancePenalty, SecondMomentMask)

POISONS = (np.nan, np.inf, -np.inf, 1e4, -1e4)

_MASKED = ("right_padded", "left_padded", "holes")


@check("P1", needs=[needs_mask], cases=tokens(layouts=_MASKED))
def check_masked_inputs_are_inert(implementation: Implementation, batch: TokenBatch) -> None:
    """Whatever masked inputs hold (NaN, ±inf, ±1e4), loss and gradient are the same, and masked gradients exactly 0.

    Engines leave NaN or garbage in padding. A mask that is multiplied in, or a `where` after the exp, lets it into the
    gradient even where the loss looks right (0·inf = NaN): SkyRL #1633, OpenRLHF #1240, NeMo-RL #4120, verl #2377.
    Each input is poisoned alone too: together they can hide each other, as 1e4 − 1e4 is 0.
    """
    if batch.mask.all():
        return
    batch = batch.poisoned(-1.0)
    clean = implementation(batch)
    expect(clean, "gradient", "equal", 0.0, where=~batch.mask, because="the gradient at masked tokens is exactly 0")
    for names in (batch.inputs, *((name,) for name in batch.inputs)):
        for poison in POISONS:
            _expect_inert(implementation, batch, poison, names, clean)
    empty = batch.replace(mask=np.zeros_like(batch.mask))
    clean = implementation(empty)
    if np.isfinite(clean.loss).all() and np.isfinite(clean.gradient).all():  # if not, P5 says so
        _expect_inert(implementation, empty, np.nan, empty.inputs, clean)


def _expect_inert(
    implementation: Implementation, batch: TokenBatch, poison: float, names: Sequence[str], clean: Evaluation
) -> None:
    dirty = implementation(batch.poisoned(poison, names))
    because = f"masked {'inputs' if len(names) > 1 else names[0]} of {poison} are inert"
    expect(dirty, "gradient", "equal", clean.gradient, because=because)
    expect(dirty, "loss", "equal", clean.loss, because=because)


@check("P1", cases=tokens(layouts=["full"]))
def check_nan_at_a_valid_token_is_not_hidden(implementation: Implementation, batch: TokenBatch) -> None:
    """A NaN at a valid token gives a NaN loss or gradient or an error or, where the weight is a mask, drops the token.

    Engines return NaN or missing log-probs (TRL #5001, #6266). A `nan_to_num` makes a plausible number of them: log π = 0
    is certainty. A mask fails closed, with a gradient of exactly 0; anything else must be loud.
    """
    objective = implementation.objective
    may_drop = objective is None or isinstance(objective, (Mode, PPOClip, DPPO, IcePop, IPO, UP, ASPO, TokenwiseClip))
    # REINFORCE, a mode, or a loss of no declared objective may ignore log μ
    ignores = objective is None or isinstance(objective, (Mode, Reinforce))
    names: tuple[str, ...] = ("log_prob", "advantages") if ignores else ("log_prob", "behavior_log_prob", "advantages")
    if isinstance(objective, Mode) and objective.penalties:
        # what a NaN advantage drops still has the gradient of the penalties
        names = ("log_prob",)
    first = np.zeros(batch.shape, dtype=bool)
    first[(0,) * first.ndim] = True
    for name in names:
        changed = batch.replace(**{name: np.where(first, np.nan, getattr(batch, name))})
        try:
            result = implementation(changed)
        except Exception:  # noqa: BLE001, S112 -- whatever it raises is loud
            continue
        if np.isnan(result.loss[first] if result.loss.shape == first.shape else result.loss).any():
            continue
        counts = first & (result.gradient != 0.0) if may_drop else first
        expect(result, "gradient", "NaN", where=counts, because=f"a NaN in {name} of a valid token is not hidden")


def _float32_or_first(implementation: Implementation) -> str:
    return "float32" if "float32" in implementation.dtypes else implementation.dtypes[0]


@check("P2", cases=tokens(dtype="float32", regimes=["on_policy", "head", "tail"]))
def check_extreme_token_stays_finite(implementation: Implementation, batch: TokenBatch) -> None:
    """In float32, a token with log μ → −100 that is dropped has gradient exactly 0; everything else stays finite.

    One such token has made whole batches NaN: e^100 overflows float32, and 0·inf is NaN (OpenRLHF #1314, prime-rl
    #2972, slime #2198).
    """
    dtype = _float32_or_first(implementation)
    objective = implementation.objective
    # (log π, log μ, A): far beyond the region upwards; downwards; and a converging token, which clipping keeps
    extremes = ((-0.01, -100.0, 1.0), (-100.0, -0.01, -1.0), (-0.01, -100.0, -1.0))
    first = (0,) * batch.mask.ndim
    for x, b, a in extremes:
        changed = batch.map(np.copy)
        changed.log_prob[first], changed.behavior_log_prob[first], changed.advantages[first] = x, b, a
        changed.mask[first] = True
        result = implementation(changed, dtype=dtype)
        because = f"a token with log π = {x}, log μ = {b}, A = {a} leaves everything finite"
        expect(result, "gradient", "finite", because=because)
        expect(result, "loss", "finite", because=because)
        diverging = a * (x - b) > 0.0
        if diverging and _drops_far_tokens(objective):
            at_first = np.zeros(batch.shape, dtype=bool)
            at_first[first] = True
            expect(result, "gradient", "equal", 0.0, where=at_first, because="a dropped token has a gradient of exactly 0")


def _drops_far_tokens(objective: object) -> bool:
    if isinstance(objective, PPOClip):
        return max(objective.region) < 0.9
    return isinstance(objective, DPPO) and (
        objective.divergence == "binary_kl" or (objective.divergence == "binary_tv" and max(objective.region) < 0.9)
    )


@check("P4", needs=[needs_local], cases=tokens(square=True))
def check_tokens_do_not_interact(implementation: Implementation, batch: TokenBatch) -> None:
    """Changing tokens, or masking them where no mean counts them, leaves others' gradients equal to the bit; also if B = T.

    A (B,) advantage or a (B, 1, T) mask broadcasts silently when B = T, and log-probs off by one token are valid
    numbers too (prime-rl 8d77a2cd9, OpenRLHF #1250, prime-rl #1525).
    """
    before = implementation(batch)
    maskable = implementation.takes_mask and implementation.reduction in ("none", "sum")
    rows, columns = np.indices(batch.shape)
    for disturbed in (rows == 0, columns == 0, (rows + columns) % 2 == 0):
        moved = batch.replace(
            log_prob=np.where(disturbed, -1.25, batch.log_prob),
            behavior_log_prob=np.where(disturbed, -1.5, batch.behavior_log_prob),
            advantages=np.where(disturbed, 0.75, batch.advantages),
        )
        for changed in (moved, moved.replace(mask=moved.mask & ~disturbed)) if maskable else (moved,):
            after = implementation(changed)
            because = f"{'changing' if changed is moved else 'masking'} other tokens leaves a token's gradient as it was"
            if implementation.exact_gradient or implementation.reduction == "none":
                expect(after, "gradient", "equal", before.gradient, where=~disturbed, because=because)
            else:
                close(after, "gradient", before.gradient, where=~disturbed, because=because, measured=before)


@check("P5", needs=[needs_mask])
def check_fully_masked_batch_is_finite(implementation: Implementation, batch: TokenBatch) -> None:
    """With every token of the batch, or of a sequence, masked, the loss is finite and their gradient exactly 0.

    A micro-batch of filtered prompts has no valid token; 0/0 then ends the run (verl #782, prime-rl #808, AReaL #463).
    What masked positions hold is finite here: whether it matters is P1's.
    """
    first_row = np.arange(batch.shape[0])[:, None] == 0
    for empty, what in ((np.ones(batch.shape, dtype=bool), "batch"), (np.broadcast_to(first_row, batch.shape), "sequence")):
        result = implementation(batch.replace(mask=batch.mask & ~empty).poisoned(-1.0))
        expect(result, "loss", "finite", because=f"the loss with a fully masked {what} is finite")
        expect(result, "gradient", "equal", 0.0, where=empty, because=f"the gradient of a fully masked {what} is 0")
        expect(result, "gradient", "finite", because=f"gradients beside a fully masked {what} are finite")


@check("P6", needs=[needs_mask])
def check_padding_does_not_matter(implementation: Implementation, batch: TokenBatch) -> None:
    """Appending masked columns and empty rows changes neither the loss nor the gradients.

    Losses that divide by the padded width, or average over masked tokens, depend on the longest sequence of the
    micro-batch (verl #5417, TRL #6439, UniRL #409).
    """
    before = implementation(batch)
    rows, columns = batch.shape
    for extra in ({"columns": 3}, {"rows": 1}):
        after = implementation(batch.padded(**extra))
        inner = np.zeros(after.batch.shape, dtype=bool)
        inner[:rows, :columns] = True
        because = f"{' '.join(extra)} of padding change nothing"
        close(after, "gradient", _embedded(before.gradient, after.batch.shape), where=inner, because=because)
        if implementation.reduction == "none":
            close(after, "loss", _embedded(before.loss, after.batch.shape), where=inner, because=because)
        else:
            close(after, "loss", before.loss, because=because)


def _looks_at(implementation: Implementation, parts: tuple[type, ...], why: str) -> str | None:
    """The reason, if a mode has one of these anchors, corrections and penalties."""
    objective = implementation.objective
    return why if objective is not None and any(isinstance(part, parts) for part in parts_of(objective)) else None


def _needs_no_order(implementation: Implementation) -> str | None:
    return _looks_at(implementation, _IN_ORDER, "its mode looks at the order of the tokens")


def _needs_no_batch(implementation: Implementation) -> str | None:
    mode = implementation.objective
    why = "its mode looks at all tokens of a call"
    if isinstance(mode, Mode) and any(getattr(part, "normalize", False) for part in mode.corrections):
        return why
    return _looks_at(implementation, _OF_A_BATCH, why)


def _needs_own_count(implementation: Implementation) -> str | None:
    mode = implementation.objective
    counts = not isinstance(mode, Mode) or mode.count_masked or not mode.corrections
    return None if counts else "its mode counts what its corrections keep: micro-batches can't know of the others'"


def _needs_global_denominator(implementation: Implementation) -> str | None:
    if implementation.reduction in ("none", "sum") or implementation.takes_normalizer:
        return None
    return f"its {implementation.reduction} takes no denominator of the whole batch: micro-batches can't add up"


@check("P7", needs=[_needs_global_denominator, _needs_no_batch, _needs_own_count], cases=tokens(empty_rows=True))
def check_micro_batches_sum_to_the_batch(implementation: Implementation, batch: TokenBatch) -> None:
    """With the denominator of the whole batch, losses and gradients of its micro-batches add up to those of the batch.

    With a local denominator the loss scales with the number of micro-batches or shards, and short sequences count more
    (TRL #2647, verl #906, SkyRL #1296, Liger #1082, prime-rl #2562).
    """
    normalizer = implementation.denominator(batch) if implementation.takes_normalizer else None
    whole = implementation(batch, normalizer=normalizer)
    if batch.shape[0] < 2:
        return
    middle = (batch.shape[0] + 1) // 2
    parts = [implementation(part, normalizer=normalizer) for part in (batch[:middle], batch[middle:])]
    for part, gradient in zip(parts, (whole.gradient[:middle], whole.gradient[middle:]), strict=True):
        because = "a micro-batch has the gradient of its tokens in the whole batch"
        close(part, "gradient", gradient, because=because, measured=whole)
    total = np.asarray(whole.loss.sum())
    size = np.abs(total) + sum(np.abs(part.loss).sum() for part in parts)
    expect(parts, "loss", "close", total, bound=tolerance(implementation) * (1.0 + size), because="micro-batch losses add up")
    if implementation.takes_normalizer and implementation.reduction != "none":
        # a normalizer that is accepted and ignored
        doubled = implementation(batch, normalizer=2.0 * implementation.denominator(batch))
        close(doubled, "gradient", whole.gradient / 2.0, because="twice the normalizer gives half the gradient")
        # a constant factor, such as a number of ranks that is never divided out again
        close(implementation(batch), "gradient", whole.gradient, because="its own denominator is that of the whole batch")


@check("P8", needs=[_needs_no_order])
def check_order_does_not_matter(implementation: Implementation, batch: TokenBatch) -> None:
    """Permuting sequences, and tokens within them, permutes the gradients and leaves a reduced loss as it is."""
    before = implementation(batch)
    for index in ((slice(None, None, -1), slice(None)), (slice(None), slice(None, None, -1))):
        after = implementation(batch[index])
        because = f"reversing the {'sequences' if index[0].step else 'tokens'} permutes the gradients"
        close(after, "gradient", before.gradient[index], because=because)
        loss = before.loss[index] if implementation.reduction == "none" else before.loss
        close(after, "loss", loss, because=because)


@check("P8", needs=[_needs_no_batch])
def check_duplicates_leave_means_unchanged(implementation: Implementation, batch: TokenBatch) -> None:
    """A batch beside a copy of itself has the same mean loss, and each token half the gradient."""
    before = implementation(batch)
    twice = implementation(batch.join(batch))
    mean = implementation.reduction not in ("none", "sum")
    because = "a duplicated batch leaves means unchanged"
    gradient = np.concatenate([before.gradient, before.gradient]) * (0.5 if mean else 1.0)
    close(twice, "gradient", gradient, because=because)
    if implementation.reduction == "none":
        close(twice, "loss", np.concatenate([before.loss, before.loss]), because=because)
    else:
        close(twice, "loss", before.loss * (1.0 if mean else 2.0), because=because)


def _needs_packed(implementation: Implementation) -> str | None:
    return None if implementation.takes_packed else "takes no packed tokens (segment_ids)"


@check("P24", needs=[_needs_packed], cases=tokens(empty_rows=True))
def check_packed_equals_padded(implementation: Implementation, batch: TokenBatch) -> None:
    """The same tokens packed into one row with segment ids have the same loss and gradients.

    Terms that cross from one sample into the next when packed were TRL #5854.
    """
    padded = implementation(batch)
    for drop in (False, True) if implementation.shape is None else (False,):
        layout = batch.packed(drop_padding=drop)
        if not layout.mask.size:
            continue
        keep = batch.mask if drop else np.ones(batch.shape, dtype=bool)
        packed = implementation(layout)
        because = f"packed tokens ({'without' if drop else 'with'} padding) equal padded ones"
        close(packed, "gradient", padded.gradient[keep], because=because)
        close(packed, "loss", padded.loss[keep] if implementation.reduction == "none" else padded.loss, because=because)


@check("P24")
def check_inputs_are_not_changed(implementation: Implementation, batch: TokenBatch) -> None:
    """The arrays passed in are as they were after the call.

    An in-place operation corrupts the buffer for whoever uses it next, or breaks backward (verl #2484, slime #2114).
    """
    result = implementation(batch)
    if result.changed:
        because = f"the call changed its inputs {', '.join(result.changed)} in place"
        raise PropertyViolated(because, (result,), unchanged_inputs(result))


def _needs_reference(implementation: Implementation) -> str | None:
    return None if implementation.reference is not None else "declares no reference to agree with (eager, or a loop)"


@check("P24", needs=[_needs_reference], cases=tokens(regimes=["on_policy", "head", "tail", "far", "extreme"]))
def check_transforms_agree(implementation: Implementation, batch: TokenBatch) -> None:
    """Compiled equals eager, and vmapped equals looped.

    Tracing loses what depends on values: a Python branch, an in-place write, a clamp folded away.
    """
    assert implementation.reference is not None
    expected = implementation.reference(batch, dtype=implementation.dtypes[0])
    result = implementation(batch)
    because = f"agrees with {implementation.reference.name}"
    close(result, "gradient", expected.gradient, because=because)
    close(result, "loss", expected.loss, because=because)


def close(
    result: Evaluation,
    quantity: str,
    expected: FloatArray,
    *,
    because: str,
    where: BoolArray | bool = True,
    measured: Evaluation | None = None,
) -> None:
    """`expect` within the relative tolerance of the implementation, and the blur of what `expected` was measured on."""
    limit = tolerance(result.implementation)
    # a gradient that nearly vanishes is the difference of two terms of size A r
    ratio = np.exp(np.minimum(result.batch.log_ratio, 20.0))
    size = np.abs(result.batch.advantages) * ratio * result.coefficients if quantity == "gradient" else 0.0
    with np.errstate(invalid="ignore"):
        bound = limit * (np.abs(expected) + size + result.coefficients.max(initial=0.0) * 1e-3)
    if measured is not None:
        bound = bound + blur(measured, quantity).max(initial=0.0)
    expect(result, quantity, "close", expected, bound=bound, where=where, because=because)


def _embedded(inner: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    outer = np.zeros(shape)
    outer[tuple(slice(n) for n in inner.shape)] = inner
    return outer
