"""A mode: what a policy loss takes its ratio against, how it weighs it, what is multiplied onto it, and how it is reduced."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from drpo_core import anchors, corrections, objectives, penalties
from drpo_core import reduction as reductions
from drpo_core._checks import check_arrays, check_flag, check_number, check_part, check_segment_ids, check_shape
from drpo_core._sequences import Sequences
from drpo_core.diagnostics import EffectiveSampleSize, Maximum, Mean, separated
from drpo_core.objectives.protocol import check_objective, inside_of, ratio_weight_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drpo_core._arrays import Array, Bool, Float, Int, Namespace
    from drpo_core._sequences import Across
    from drpo_core.anchors import Anchor
    from drpo_core.corrections import Correction
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Objective
    from drpo_core.penalties import PenaltyTerm
    from drpo_core.reduction import Reduction
    from drpo_core.tokens import Tokens

__all__ = ["DoubleRatioWarning", "Mode", "Resolved", "resolve"]

_OTHERS = ("proximal_log_prob", "reference_log_prob")
_FARTHEST = 1e6
"""Nats: log-probs are bounded by it, so that sums and differences over a sequence stay finite."""


class DoubleRatioWarning(UserWarning):
    """A mode multiplies the gradient with the same ratio twice."""


@dataclass(frozen=True, slots=True, repr=False)
class Mode:
    """A policy loss: gradient −c K A R w in log π, plus that of the penalties.

    R = e^(log π − a) is the ratio against the `anchor`'s a, w the `objective`'s weight at R, K the product of the
    `corrections`, c the coefficient of the `reduction`. Anchors and corrections are constants. The losses of
    the core and of the adapters take a mode in the place of an objective. It is hashable, and its repr is the line that
    makes it.

    Parameters
    ----------
    objective
        w and the loss at R, such as ``drpo_core.PPOClip(eps=0.2)``.
    anchor
        See `drpo_core.anchors`.
    corrections
        See `drpo_core.corrections`.
    penalties
        See `drpo_core.penalties`.
    reduction
        Name of a reduction of `drpo_core.reduction`: ``"token_mean"``, ``"sequence_mean_token_mean"``,
        ``"sequence_mean_token_sum"`` or ``"prompt_mean"``; or ``"token_sum"``, the sum over valid tokens. Which prompt a
        sequence answers is no part of a mode: with ``"prompt_mean"`` a loss is also given
        ``reduction=functools.partial(drpo_core.reduction.prompt_mean, group_ids=ids)``.
    horizon
        H of ``"sequence_mean_token_sum"``; None: 1.
    count_masked
        Whether tokens that a correction's mask leaves out still count in the reduction: in its denominator, and as tokens
        of their sequence. verl, where rejection changes the response mask, does not count them.

    Raises
    ------
    TypeError
        If a part is not of its kind.
    ValueError
        If the reduction is unknown, or a horizon is given to one that has none.

    Warns
    -----
    DoubleRatioWarning
        If a ratio multiplies the gradient twice: by the anchor and by a weight, or by two weights.

    Examples
    --------
    GSPO, with weights truncated at 2 for what trainer and sampler disagree on:

    >>> from drpo_core import PPOClip
    >>> from drpo_core.anchors import Proximal, Sequence
    >>> from drpo_core.corrections import ImportanceWeight
    >>> from drpo_core.modes import Mode
    >>> mode = Mode(
    ...     PPOClip(eps_low=3e-4, eps_high=4e-4),
    ...     anchor=Sequence(Proximal()),
    ...     corrections=(ImportanceWeight(high=2.0),),
    ...     reduction="sequence_mean_token_mean",
    ... )
    >>> mode.arguments
    ('proximal_log_prob',)
    >>> Mode.from_dict(mode.to_dict()) == mode
    True
    """

    objective: Objective
    anchor: Anchor = field(default_factory=anchors.Behavior)
    corrections: tuple[Correction, ...] = ()
    penalties: tuple[PenaltyTerm, ...] = ()
    reduction: str = "token_mean"
    horizon: float | None = None
    count_masked: bool = True

    def __post_init__(self) -> None:
        """Check the parts, and that no ratio is counted twice."""
        check_objective(self.objective)
        if isinstance(self.objective, Mode):
            msg = f"objective: expected an objective, got the mode {self.objective!r}"
            raise TypeError(msg)
        check_part("anchor", self.anchor, "log_prob", "an anchor such as Proximal()")
        for name, method in (("corrections", "factor"), ("penalties", "value_and_gradient")):
            parts = getattr(self, name)
            if not isinstance(parts, (tuple, list)):
                msg = f"{name}: expected a tuple, got {type(parts).__name__}"
                raise TypeError(msg)
            object.__setattr__(self, name, tuple(parts))
            for part in parts:
                check_part(name, part, method, f"a tuple of {name}")
        if self.reduction not in tuple(REDUCTIONS):
            msg = f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {self.reduction!r}"
            raise ValueError(msg)
        if self.horizon is not None:
            if self.reduction != "sequence_mean_token_sum":
                msg = f"horizon: expected None with reduction {self.reduction!r}, got {self.horizon!r}"
                raise ValueError(msg)
            object.__setattr__(self, "horizon", check_number("horizon", self.horizon, above=0.0))
        check_flag("count_masked", self.count_masked)
        _warn_of_double_ratios(self)

    def __repr__(self) -> str:
        """The line that makes it; what has its default is left out."""
        return _line(self)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The log-probs that it needs besides π's and μ's, by the names of the arguments."""
        parts: tuple[Any, ...] = (self.anchor, *self.corrections, *self.penalties)
        needed = {name for part in parts for name in part.arguments}
        return tuple(name for name in _OTHERS if name in needed)

    @property
    def reduce(self) -> Reduction:
        """The reduction as a function of values and mask; a `ValueError` where the mode's masks change what it counts."""
        if not self.count_masked and any(part.counts is None for part in self.corrections):
            msg = (
                f"count_masked: {self!r} counts the tokens that its corrections keep, which no mask says; expected "
                "count_masked=True, or a normalizer that you count yourself"
            )
            raise ValueError(msg)
        return reduction_of_counted(self)

    @property
    def is_plain(self) -> bool:
        """Whether it is no more than an objective and a reduction."""
        # in terms that Dynamo knows: it can't negate a tuple
        return type(self.anchor) is anchors.Behavior and len(self.corrections) == len(self.penalties) == 0

    @property
    def alone(self) -> Objective:
        """The objective of a plain mode; of any other raises `ValueError`."""
        if not self.is_plain:
            msg = f"objective: expected a mode without anchor, corrections and penalties, got {self!r}"
            raise ValueError(msg)
        return self.objective

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The objective's loss."""
        return self.objective.loss(tokens)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The objective's weight."""
        return self.objective.weight(tokens)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """The objective's trust region."""
        return inside_of(self.objective, tokens)

    def ratio_weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The objective's r w."""
        own = ratio_weight_of(self.objective, tokens)
        return tokens.ratio * self.objective.weight(tokens) if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """The mode as a dict of strings, numbers, lists and dicts, for YAML or TOML; what has its default is left out.

        None, which TOML can't say, is ``"none"``.
        """
        values: dict[str, Any] = _as_dict(self)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mode:
        """The mode of a `to_dict`.

        Raises
        ------
        ValueError
            If it names no class of `drpo_core.objectives`, `.anchors`, `.corrections` or `.penalties`, or an unknown key.
        """
        made = _of_dict(values)
        if not isinstance(made, cls):
            msg = f"values: expected the dict of a Mode, got that of a {type(made).__name__}"
            raise ValueError(msg)  # noqa: TRY004 -- the type is what the values say
        return made


def refuse_mode(objective: Any, framework: str) -> Any:
    """The objective, for a framework that reduces by itself; of a mode a `ValueError` that names what would be left out."""
    if not isinstance(objective, Mode):
        return objective
    named = [name for name, _ in _given(objective) if name != "objective"]
    missing = ", ".join(dict.fromkeys((*named, "reduction")))
    msg = (
        f"objective: {framework}'s integration takes no mode, whose {missing} it would leave out; expected an objective such "
        f"as {objective.objective!r}, got {objective!r}"
    )
    raise ValueError(msg)


REDUCTIONS: Mapping[str, Any] = {
    "token_mean": reductions.token_mean,
    "sequence_mean_token_mean": reductions.sequence_mean_token_mean,
    "sequence_mean_token_sum": reductions.sequence_mean_token_sum,
    "prompt_mean": reductions.prompt_mean,
    "token_sum": partial(reductions.token_mean, normalizer=1.0),
}


def reduction_of_counted(mode: Mode) -> Reduction:
    """The reduction of a mode over the tokens that it counts."""
    function = REDUCTIONS[mode.reduction]
    return function if mode.horizon is None else partial(function, horizon=mode.horizon)


# --- double ratios ---------------------------------------------------------------------------------------------------

_STEPS = {
    "proximal/behavior": {"proximal/behavior"},
    "policy/proximal": {"policy/proximal"},
    "policy/behavior": {"policy/proximal", "proximal/behavior"},
}


def _warn_of_double_ratios(mode: Mode) -> None:
    """π/μ is π/π_old times π_old/μ: no part of it may multiply the gradient twice."""
    counted: dict[str, str] = {}
    # an objective whose gradient does not have the ratio, as that of REINFORCE, counts nothing
    if getattr(mode.objective, "counts_ratio", True):
        counted = dict.fromkeys(_STEPS[f"policy/{mode.anchor.policy}"], f"the anchor {mode.anchor!r}")
    for correction in mode.corrections:
        for step in _STEPS.get(correction.counts or "", ()):
            if step in counted:
                msg = f"the ratio {step} multiplies the gradient twice: by {counted[step]} and by {correction!r}"
                warnings.warn(msg, DoubleRatioWarning, stacklevel=4)
            counted[step] = repr(correction)


# --- to and from text and dicts --------------------------------------------------------------------------------------

_ROOMS = (objectives, anchors, corrections, penalties)


def _line(value: Any) -> str:
    """A call of a dataclass, with what differs from its defaults; a mode's objective comes first, without its name."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_line, value))}{',' * (len(value) == 1)})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    named = [(name, _line(given)) for name, given in _given(value)]
    by_position = {"objective", "of"}
    return f"{type(value).__name__}({', '.join(text if name in by_position else f'{name}={text}' for name, text in named)})"


def _given(value: Any) -> list[tuple[str, Any]]:
    """The fields of a dataclass whose values are not their defaults."""
    pairs = [(each, getattr(value, each.name)) for each in dataclasses.fields(value)]
    defaults = [e.default if e.default_factory is dataclasses.MISSING else e.default_factory() for e, _ in pairs]
    return [(each.name, given) for (each, given), default in zip(pairs, defaults, strict=True) if given != default]


_NONE = "none"
"""None in a dict: TOML has no word for it, and YAML's would be lost on the way to TOML. No choice of a part is called so."""


def _as_dict(value: Any) -> Any:
    if value is None:
        return _NONE
    if isinstance(value, (tuple, list)):
        return [_as_dict(item) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    kind = type(value)
    if kind is not Mode and not any(getattr(room, kind.__name__, None) is kind for room in _ROOMS):
        msg = f"{kind.__name__}: expected a class of drpo_core, because a dict can't name one of another module"
        raise ValueError(msg)
    return {"kind": kind.__name__, **{name: _as_dict(given) for name, given in _given(value)}}


def _of_dict(values: Any) -> Any:
    if isinstance(values, (tuple, list)):
        return tuple(_of_dict(item) for item in values)
    if not isinstance(values, dict):
        return None if values == _NONE else values
    fields = {name: _of_dict(value) for name, value in values.items() if name != "kind"}
    name = str(values.get("kind"))
    kind = Mode if name == "Mode" else next((getattr(room, name) for room in _ROOMS if name in room.__all__), None)
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        msg = f"kind: expected the name of a class of drpo_core's modes, got {name!r}"
        raise ValueError(msg)
    known = {each.name: each for each in dataclasses.fields(kind)}
    if unknown := fields.keys() - known.keys():
        msg = f"{name}: expected keys among {', '.join(known)}, got {', '.join(sorted(unknown))}"
        raise ValueError(msg)
    needed = [key for key, each in known.items() if each.default is each.default_factory is dataclasses.MISSING]
    if missing := [key for key in needed if key not in fields]:
        msg = f"{name}: expected a value for {', '.join(missing)}, got none"
        raise ValueError(msg)
    return kind(**fields)


def parts_of(objective: Objective) -> list[Any]:
    """A mode with its objective, anchors, corrections and penalties; or an objective alone."""
    if not isinstance(objective, Mode):
        return [objective]
    parts: list[Any] = [objective, objective.objective, objective.anchor]
    while (inner := getattr(parts[-1], "of", None)) is not None:
        parts.append(inner)
    return [*parts, *objective.corrections, *objective.penalties]


def is_known(objective: Objective) -> bool:
    """Whether all of it is the library's: what it does depends on nothing but its fields."""
    if not isinstance(objective, Mode):
        return objectives.is_known(objective)
    _, own, *others = parts_of(objective)
    return objectives.is_known(own) and all(
        any(type(part) is getattr(room, name) for room in _ROOMS[1:] for name in room.__all__) for part in others
    )


# --- with arrays -----------------------------------------------------------------------------------------------------


class Resolved(NamedTuple):
    """What a mode is for a batch: an objective and the log-probs that its ratio is against, factors and penalties.

    `factor` is K, or None for 1; `counted` says which tokens the reduction counts; `penalty` is the value and the gradient of
    the penalties per token, or None for 0.
    """

    objective: Objective
    anchor_log_prob: Array
    factor: Array | None
    counted: Array
    penalty: tuple[Array, Array] | None
    diagnostics: Diagnostics

    def scaled(self, coefficients: Float[Array, "..."]) -> Float[Array, "..."]:
        """C K."""
        return coefficients if self.factor is None else coefficients * self.factor

    def added(self, result: Any, coefficients: Float[Array, "..."], *, xp: Namespace) -> Any:
        """A `PolicyLoss` with Σ m c (value, gradient) of the penalties, and with the statistics of the corrections."""
        if self.penalty is not None:
            value, gradient = (xp.where(self.counted, coefficients * each, 0.0) for each in self.penalty)
            gradient = xp.astype(result.gradient + gradient, result.gradient.dtype, copy=False)
            result = result._replace(loss=result.loss + xp.sum(value), gradient=gradient)
        return result if result.diagnostics is None else result._replace(diagnostics=result.diagnostics | self.diagnostics)


def resolve(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None,
    proximal_log_prob: Float[Array, "*tokens"] | None,
    reference_log_prob: Float[Array, "*tokens"] | None,
    segment_ids: Int[Array, " tokens"] | None,
    across: Across | None = None,
    diagnostics: bool,
    dtype: Any,
    xp: Namespace,
) -> Resolved:
    """The objective or mode for these tokens; checked arrays, without a graph."""
    others = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    check_others(objective, others, log_prob, xp=xp)
    of_ranks: object = across
    if of_ranks is not None and not callable(of_ranks):
        msg = f"across: expected a function, such as the adapters' distributed.across makes, got {across!r}"
        raise TypeError(msg)
    if segment_ids is not None:
        check_segment_ids(segment_ids, log_prob if mask is None else mask, xp=xp)
    if not is_whole_mode(objective):
        return Resolved(getattr(objective, "objective", objective), behavior_log_prob, None, mask, None, {})
    if mask is None:
        mask = xp.astype(xp.ones_like(log_prob), xp.bool)
    sequences = Sequences(mask, segment_ids, across=across, xp=xp)
    log_probs = (log_prob, behavior_log_prob, proximal_log_prob, reference_log_prob)
    found = evaluated(objective, *log_probs, advantages, sequences, diagnostics=diagnostics, dtype=dtype)
    return found._replace(diagnostics=separated(found.diagnostics, xp=xp)) if found.diagnostics else found


def is_whole_mode(objective: object) -> TypeGuard[Mode]:
    """Whether it is a mode with more to it than an objective and a reduction."""
    return isinstance(objective, Mode) and not objective.is_plain


def evaluated(
    mode: Mode,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    proximal_log_prob: Float[Array, "*tokens"] | None,
    reference_log_prob: Float[Array, "*tokens"] | None,
    advantages: Float[Array, "*tokens"],
    sequences: Sequences,
    *,
    diagnostics: bool,
    dtype: Any,
) -> Resolved:
    """`resolve` of checked arrays."""
    mask, xp = sequences.mask, sequences.xp
    log_probs = (log_prob, behavior_log_prob, proximal_log_prob, reference_log_prob)
    evidence = evidence_of(*log_probs, advantages=advantages, sequences=sequences, dtype=dtype)
    factor, counted = None, mask
    statistics: Diagnostics = {}
    for name, correction in zip(_names(mode.corrections), mode.corrections, strict=True):
        one = correction.factor(evidence)
        # a token that one correction leaves out stays out, whatever the others make of it
        factor = one if factor is None else xp.where(one == 0.0, 0.0, factor) * xp.where(factor == 0.0, 0.0, one)
        if correction.counts is None and not mode.count_masked:
            counted = counted & (one != 0.0)
        if diagnostics:
            statistics |= _statistics(name, xp.broadcast_to(one, mask.shape), mask, xp=xp)
    penalty = _total(mode.penalties, evidence) if mode.penalties else None
    anchor = anchored(mode, evidence.policies, behavior_log_prob, proximal_log_prob)
    return Resolved(mode.objective, anchor, factor, counted, penalty, statistics)


def anchored(
    mode: Mode,
    policies: anchors.Policies,
    behavior_log_prob: Float[Array, "*tokens"],
    proximal_log_prob: Float[Array, "*tokens"] | None,
) -> Array:
    """The log-probs that the ratio is against, from the policies and from the log-probs that they were made of."""
    if isinstance(mode.anchor, (anchors.Behavior, anchors.Proximal)):
        # nothing is added up, so its log-probs stay as they are: where π and the anchor are both 0, R is 1
        return behavior_log_prob if mode.anchor.policy == "behavior" else proximal_log_prob
    return mode.anchor.log_prob(policies)


def penalty_gradient(
    mode: Mode, *log_probs: Array | None, advantages: Array, sequences: Sequences, dtype: Any
) -> Float[Array, "*tokens"]:
    """Gradient of the penalties per token, from the log-probs under π, μ, π_old and π_ref; to be differentiated."""
    return _total(mode.penalties, evidence_of(*log_probs, advantages=advantages, sequences=sequences, dtype=dtype))[1]


def evidence_of(*log_probs: Array | None, advantages: Array, sequences: Sequences, dtype: Any) -> corrections.Evidence:
    """The policies by their log-probs and the advantages, in one dtype and 0 at masked tokens; log-probs are bounded."""
    mask, xp = sequences.mask, sequences.xp

    def prepared(array: Array | None) -> Array | None:
        if array is None:
            return None
        x = xp.astype(xp.where(mask, array, 0.0), dtype, copy=False)
        return xp.where(x < -_FARTHEST, -_FARTHEST, x)

    policies = anchors.Policies(*map(prepared, log_probs), sequences=sequences, xp=xp)  # type: ignore[misc, arg-type]
    return corrections.Evidence(policies, xp.astype(xp.where(mask, advantages, 0.0), dtype, copy=False))


def _total(terms: tuple[PenaltyTerm, ...], evidence: corrections.Evidence) -> tuple[Array, Array]:
    """Value and gradient of all penalties, per token."""
    values, gradients = zip(*(term.value_and_gradient(evidence) for term in terms), strict=True)
    return sum(values[1:], values[0]), sum(gradients[1:], gradients[0])


def check_others(objective: Objective, others: Mapping[str, Array | None], log_prob: Array, *, xp: Namespace) -> None:
    """Raise unless the log-probs that a mode needs are given, and an objective has none."""
    needed = objective.arguments if isinstance(objective, Mode) else ()
    for name, array in others.items():
        if array is None and name in needed:
            msg = f"{name}: expected log-probs of the sampled tokens, which {objective!r} needs, got None"
            raise ValueError(msg)
        if array is not None:
            if not isinstance(objective, Mode):
                msg = f"{name}: expected None, because {objective!r} is no Mode that uses it, got an array"
                raise ValueError(msg)
            if name not in needed:
                # a mode without the anchor that was meant would train all the same, on another policy
                used = ", ".join(needed) or "none"
                msg = f"{name}: expected None, because {objective!r} does not use it (its `arguments`: {used}), got an array"
                raise ValueError(msg)
            check_arrays(xp=xp, **{name: array})
            check_shape(name, array, "log_prob", log_prob)


def _names(parts: tuple[Correction, ...]) -> list[str]:
    """A name of each: its class in words, with a number where there are several."""
    words = [re.sub(r"(?<!^)(?=[A-Z])", "_", type(part).__name__).lower() for part in parts]
    return [word if words.count(word) == 1 else f"{word}_{words[:i].count(word) + 1}" for i, word in enumerate(words)]


def _statistics(name: str, factor: Array, mask: Array, *, xp: Namespace) -> Diagnostics:
    """Of a correction's factor over valid tokens: the share that it leaves out, mean, largest and effective sample size."""
    count = reductions.count_true(mask, factor.dtype, xp=xp)
    valid = xp.where(mask, factor, 0.0)
    total, largest = xp.sum(valid), xp.where(mask, factor, -xp.inf)
    return {
        f"{name}_masked_fraction": Mean(reductions.count_true(mask & (factor == 0.0), factor.dtype, xp=xp), count),
        f"{name}_mean": Mean(total, count),
        f"{name}_max": Maximum(xp.max(largest) if 0 not in valid.shape else xp.sum(valid) - xp.inf, count),
        f"{name}_effective_sample_size": EffectiveSampleSize(total, xp.sum(valid * valid), count),
    }
