"""Trust-region telemetry: what an objective does to a batch, and two figures that reveal plumbing bugs.

Every statistic is a small tuple of 0-d arrays that stays on the device, adds up over micro-batches and shards
(`merge_diagnostics`), and becomes a number once, at the end of a step (`summarize`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from array_api_compat import array_namespace, to_device

from drpo_core.divergence import k3_of
from drpo_core.objectives.protocol import check_objective, inside_of, ratio_weight_of, weight_of
from drpo_core.reduction import count_true
from drpo_core.tokens import Tokens, constant

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core._arrays import Array, Bool, Float, Namespace
    from drpo_core.objectives import Objective

__all__ = [
    "Diagnostics",
    "EffectiveSampleSize",
    "Maximum",
    "Mean",
    "Minimum",
    "diagnostics_of",
    "map_diagnostics",
    "merge_diagnostics",
    "summarize",
    "token_diagnostics",
]


class Mean(NamedTuple):
    """total / count, as (sum, count)."""

    total: Array
    count: Array

    @property
    def value(self) -> Array:
        """The mean; NaN if nothing was counted."""
        return _quotient(self.total, self.count)


class Maximum(NamedTuple):
    """The largest of `count` values; −inf if there is none."""

    value: Array
    count: Array


class Minimum(NamedTuple):
    """The smallest of `count` values; +inf if there is none."""

    value: Array
    count: Array


class EffectiveSampleSize(NamedTuple):
    """(Σ ρ)² / (n Σ ρ²) of n importance weights ρ: the share of the tokens that still counts, in (0, 1]."""

    total: Array
    total_of_squares: Array
    count: Array

    @property
    def value(self) -> Array:
        """The effective share; NaN if nothing was counted or every weight is 0."""
        return _quotient(self.total * self.total, self.total_of_squares * self.count)


Statistic = Mean | Maximum | Minimum | EffectiveSampleSize
Diagnostics = dict[str, Statistic]


def token_diagnostics(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    divergence: Float[Array, "*tokens"] | None = None,
    xp: Namespace | None = None,
) -> Diagnostics:
    """What an objective does to these tokens, as statistics that add up over micro-batches and shards.

    Over valid tokens:

    =============================  ==================================================================================
    `ratio_mean`, `ratio_max`      r. The mean estimates E_μ[r], which is 1 if μ is what was sampled from: far from 1,
                                   suspect truncated sampling (top-p, top-k) or a wrong behaviour policy
    `log_ratio_abs_mean`           abs(ℓ), nats: large before any update, suspect temperature or log-probs off by one
    `k1_mean`, `k3_mean`           estimates of KL(μ‖π), nats
    `binary_tv_mean`, `…_max`      abs(π − μ), a difference of probabilities
    `invalid_fraction`             tokens with a NaN, an infinite advantage, or a log-prob that is infinite (but π = 0
                                   is valid): anything but 0 is a bug; these tokens enter nothing else
    =============================  ==================================================================================

    Over active tokens, the valid ones with A ≠ 0:

    =============================  ==================================================================================
    `outside_fraction`             outside the objective's trust region; also split as
                                   `outside_{positive,negative}_{diverging,converging}_fraction` by the sign of A and
                                   by whether the update moves further from μ (A ℓ > 0) or back
    `dropped_fraction`             w = 0
    `attenuated_fraction`          0 < w < 1
    `amplified_fraction`           w > 1
    `corrective_fraction`          w < 0: the gradient points back to μ
    `weight_{mean,min,max}`        w
    `gradient_mass_kept`           Σ abs(A r w) / Σ abs(A r): gradient magnitude relative to PG-IS
    `effective_sample_size`        of the importance weights ρ = r abs(w) that the gradient has, in (0, 1]
    =============================  ==================================================================================

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
    mask
        True at tokens that count. Masked positions may hold anything. None: every token counts.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    dict
        Statistics by name: tuples of 0-d arrays on the tokens' device. See `summarize` and `merge_diagnostics`.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DPPO, summarize, token_diagnostics
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> figures = summarize(token_diagnostics(DPPO(delta=0.2), log_prob, behavior, np.array([1.0, 1.0, -1.0])))
    >>> round(figures["dropped_fraction"], 6), round(figures["gradient_mass_kept"], 6)
    (0.666667, 0.285714)
    """
    check_objective(objective)
    # a mode's own are those of its losses, which have what it looks at
    objective = getattr(objective, "alone", objective)
    log_prob, behavior_log_prob, advantages, divergence = map(constant, (log_prob, behavior_log_prob, advantages, divergence))
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
    weight = weight_of(objective, tokens)
    ratio_weight, inside = ratio_weight_of(objective, tokens), inside_of(objective, tokens)
    return separated(diagnostics_of(tokens, weight, ratio_weight, inside, mask), xp=tokens.xp)


def merge_diagnostics(*parts: Diagnostics) -> Diagnostics:
    """Statistics of several micro-batches or shards as if they had been one.

    Parameters
    ----------
    *parts
        Results of `token_diagnostics` or of a policy loss, at least one, all with the same names.

    Returns
    -------
    dict
        Statistics by name.

    Raises
    ------
    TypeError
        If a part is not a dict of diagnostics.
    ValueError
        If there is no part or the names differ.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DRPO, merge_diagnostics, summarize, token_diagnostics
    >>> x, b, a = np.log([0.5, 0.2]), np.log([0.25, 0.4]), np.array([1.0, 1.0])
    >>> parts = [token_diagnostics(DRPO(delta=0.5), x[i:], b[i:], a[i:]) for i in (0, 1)]
    >>> round(summarize(merge_diagnostics(*parts))["binary_tv_mean"], 6)
    0.216667
    """
    if not parts:
        msg = "parts: expected at least one dict of diagnostics, got none"
        raise ValueError(msg)
    for part in parts:
        _check_part(part, parts[0])
    if not parts[0]:
        return {}
    xp = array_namespace(next(iter(parts[0].values())).count)

    def stacked(*fields: Array) -> Array:
        return xp.stack([xp.asarray(field) for field in fields])

    return combine_diagnostics(map_diagnostics(stacked, *parts), xp=xp)


def _check_part(part: object, first: Diagnostics) -> None:
    if not isinstance(part, dict):
        msg = f"parts: expected dicts of diagnostics, got {type(part).__name__}"
        raise TypeError(msg + ("; pass merge_diagnostics(*parts)" if isinstance(part, (list, tuple)) else ""))
    if part.keys() != first.keys():
        differing = sorted(part.keys() ^ first.keys())
        msg = f"parts: expected the same names in every dict of diagnostics, got {differing} in some only"
        raise ValueError(msg)


def combine_diagnostics(stacked: Diagnostics, *, xp: Namespace) -> Diagnostics:
    """One batch's statistics from those whose fields are 1-D arrays with an element a part."""
    extremes: Mapping[type, Callable[[Array], Array]] = {Maximum: xp.max, Minimum: xp.min}

    def combined(statistic: Statistic) -> Statistic:
        first, *others = statistic
        first = extremes.get(type(statistic), xp.sum)(first)
        return type(statistic)(first, *map(xp.sum, others))

    return {name: combined(statistic) for name, statistic in stacked.items()}


def separated(diagnostics: Diagnostics, *, xp: Namespace) -> Diagnostics:
    """The same diagnostics with no memory in common, so that a field can be reduced over ranks in place."""
    fields = iter(xp.stack([field for statistic in diagnostics.values() for field in statistic]))
    return map_diagnostics(lambda _: next(fields), diagnostics)


def map_diagnostics(function: Callable[..., Any], *diagnostics: Diagnostics) -> Diagnostics:
    """The statistics whose fields are the function of the fields of these, by the first one's names.

    Parameters
    ----------
    function
        Called for each field, with that of each of the diagnostics.
    *diagnostics
        At least one; all have the same names.

    Returns
    -------
    dict
        Statistics of the same classes.

    Examples
    --------
    >>> from drpo_core.diagnostics import Mean, map_diagnostics
    >>> map_diagnostics(lambda field: 2 * field, {"ratio_mean": Mean(3.0, 2.0)})
    {'ratio_mean': Mean(total=6.0, count=4.0)}
    """
    first, *others = diagnostics
    return {
        name: type(statistic)(*map(function, statistic, *(other[name] for other in others)))
        for name, statistic in first.items()
    }


def summarize(statistics: Mapping[str, Statistic] | None) -> dict[str, float]:
    """Diagnostics as plain floats, with a single transfer from the device: call it once, at the end of a step.

    Parameters
    ----------
    statistics
        A result of `token_diagnostics` or `merge_diagnostics`, or of a policy loss; None, as a policy loss gives where they
        were not asked for, has no numbers.

    Returns
    -------
    dict
        Number by name, in the same order; NaN for a statistic that counted nothing.

    Raises
    ------
    TypeError
        If it is not a dict of diagnostics.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PolicyGradient, summarize, token_diagnostics
    >>> x = np.log([0.5, 0.2])
    >>> summarize(token_diagnostics(PolicyGradient(), x, x, np.array([1.0, -1.0])))["ratio_mean"]
    1.0
    """
    if not statistics:
        return {}
    given: object = statistics
    if not isinstance(given, Mapping):
        msg = f"statistics: expected a dict of diagnostics, got {type(given).__name__}"
        raise TypeError(msg)
    first = next(iter(statistics.values()))
    xp = array_namespace(first.count)
    values = [xp.where(statistic.count > 0.0, statistic.value, xp.nan) for statistic in statistics.values()]
    on_host = to_device(xp.stack(values), "cpu") if hasattr(first.count, "is_cuda") else xp.stack(values)
    return {name: float(on_host[i]) for i, name in enumerate(statistics)}


def diagnostics_of(
    tokens: Tokens, weight: Array, ratio_weight: Array | None, inside: Array, mask: Array | None
) -> Diagnostics:
    """`token_diagnostics` of tokens whose weight w, trust region and, if it is not the product, r w are known."""
    sets = token_sets(tokens, mask)
    return data_diagnostics(tokens, sets) | objective_diagnostics(tokens, weight, ratio_weight, inside, sets)


class Subset(NamedTuple):
    """Some of the tokens, and how many."""

    where: Array
    count: Array


class TokenSets(NamedTuple):
    """Which tokens the statistics are over, and what else does not depend on the objective."""

    finite: Array
    counted: Subset
    valid: Subset
    active: Subset
    diverging: Array
    converging: Array
    magnitude: Array
    """abs(A) r where active, else 0."""


def token_sets(tokens: Tokens, mask: Array | None) -> TokenSets:
    """The sets of tokens; computed once, they serve any number of objectives."""
    xp, a = tokens.xp, tokens.advantages

    def subset(where: Array) -> Subset:
        return Subset(where, count_true(where, a.dtype, xp=xp))

    finite = xp.isfinite(a) & xp.isfinite(tokens.behavior_log_prob) & (tokens.log_prob < xp.inf)
    counted = subset(xp.ones_like(a) == 1.0 if mask is None else mask)
    valid = subset(counted.where & finite)
    active = subset(valid.where & (a != 0.0))
    direction = tokens.along_advantage(tokens.ratio_minus_one)
    # selected before multiplying, as inf·0 is a NaN
    magnitude = tokens.ratio * xp.where(active.where, xp.abs(a), 0.0)
    return TokenSets(finite, counted, valid, active, direction > 0.0, direction < 0.0, magnitude)


def data_diagnostics(tokens: Tokens, sets: TokenSets) -> Diagnostics:
    """The statistics that are the same for every objective."""
    ell, r, valid, xp = tokens.log_ratio, tokens.ratio, sets.valid, tokens.xp
    binary_tv = xp.abs(tokens.shift)
    return {
        "ratio_mean": _mean(r, valid, xp=xp),
        "ratio_max": _maximum(r, valid, xp=xp),
        "log_ratio_abs_mean": _mean(xp.abs(ell), valid, xp=xp),
        "k1_mean": _mean(-ell, valid, xp=xp),
        "k3_mean": _mean(k3_of(tokens), valid, xp=xp),
        "binary_tv_mean": _mean(binary_tv, valid, xp=xp),
        "binary_tv_max": _maximum(binary_tv, valid, xp=xp),
        "invalid_fraction": _fraction(~sets.finite, sets.counted, tokens),
    }


def objective_diagnostics(
    tokens: Tokens, weight: Array, ratio_weight: Array | None, inside: Array, sets: TokenSets
) -> Diagnostics:
    """The statistics of one objective, from its weight w, its trust region and, if it is not the product, its r w."""
    a, active, xp = tokens.advantages, sets.active, tokens.xp
    outside, positive, negative = ~inside, a > 0.0, a < 0.0
    effective_weight = xp.where(active.where, xp.abs(weight), 0.0)
    effective = tokens.ratio * effective_weight if ratio_weight is None else xp.where(active.where, xp.abs(ratio_weight), 0.0)
    size = xp.where(active.where, xp.abs(a), 0.0) * effective
    largest_negated_weight = _maximum(-weight, active, xp=xp)

    def fraction(condition: Array) -> Mean:
        return _fraction(condition, active, tokens)

    return {
        "outside_fraction": fraction(outside),
        "outside_positive_diverging_fraction": fraction(outside & positive & sets.diverging),
        "outside_positive_converging_fraction": fraction(outside & positive & sets.converging),
        "outside_negative_diverging_fraction": fraction(outside & negative & sets.diverging),
        "outside_negative_converging_fraction": fraction(outside & negative & sets.converging),
        "dropped_fraction": fraction(weight == 0.0),
        "attenuated_fraction": fraction((weight > 0.0) & (weight < 1.0)),
        "amplified_fraction": fraction(weight > 1.0),
        "corrective_fraction": fraction(weight < 0.0),
        "weight_mean": _mean(weight, active, xp=xp),
        "weight_min": Minimum(-largest_negated_weight.value, largest_negated_weight.count),
        "weight_max": _maximum(weight, active, xp=xp),
        "gradient_mass_kept": Mean(_total(size, active, xp=xp), _total(sets.magnitude, active, xp=xp)),
        "effective_sample_size": EffectiveSampleSize(
            _total(effective, active, xp=xp), _total(effective * effective, active, xp=xp), active.count
        ),
    }


def _total(x: Array, over: Subset, *, xp: Namespace) -> Array:
    return xp.sum(xp.where(over.where, x, 0.0))


def _mean(x: Array, over: Subset, *, xp: Namespace) -> Mean:
    return Mean(_total(x, over, xp=xp), over.count)


def _fraction(condition: Array, over: Subset, tokens: Tokens) -> Mean:
    return Mean(count_true(condition & over.where, tokens.advantages.dtype, xp=tokens.xp), over.count)


def _maximum(x: Array, over: Subset, *, xp: Namespace) -> Maximum:
    candidates = xp.where(over.where, x, -xp.inf)
    return Maximum(xp.max(candidates) if 0 not in x.shape else xp.sum(candidates) - xp.inf, over.count)


def _quotient(numerator: Array, denominator: Array) -> Array:
    xp = array_namespace(numerator)
    empty = denominator == 0.0
    return xp.where(empty, xp.nan, numerator / xp.where(empty, 1.0, denominator))
