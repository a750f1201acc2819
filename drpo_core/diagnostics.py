"""Trust-region telemetry: what an objective does to a batch, and two figures that reveal plumbing bugs.

Every statistic is a small tuple of 0-d arrays that stays on the device, adds up over micro-batches and shards
(`merge_diagnostics`), and becomes a number once, at the end of a step (`summarize`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from array_api_compat import array_namespace, to_device

from drpo_core.divergence import k3_of
from drpo_core.objectives.protocol import check_objective, inside_of, weight_of
from drpo_core.reduction import count_true
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
    return separated(diagnostics_of(tokens, weight_of(objective, tokens), inside_of(objective, tokens), mask), xp=tokens.xp)


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
        if not isinstance(part, dict):
            msg = f"parts: expected dicts of diagnostics, got {type(part).__name__}"
            raise TypeError(msg + ("; pass merge_diagnostics(*parts)" if isinstance(part, (list, tuple)) else ""))
        if part.keys() != parts[0].keys():
            differing = sorted(part.keys() ^ parts[0].keys())
            msg = f"parts: expected the same names in every dict of diagnostics, got {differing} in some only"
            raise ValueError(msg)
    if not parts[0]:
        return {}
    xp = array_namespace(next(iter(parts[0].values())).count)

    def stacked(*fields: Array) -> Array:
        return xp.stack([xp.asarray(field) for field in fields])

    return combine_diagnostics(map_diagnostics(stacked, *parts), xp=xp)


def combine_diagnostics(stacked: Diagnostics, *, xp: Namespace) -> Diagnostics:
    """One batch's statistics from those whose fields are 1-D arrays with an element a part."""

    def combined(statistic: Statistic) -> Statistic:
        first, *others = statistic
        extreme = {Maximum: xp.max, Minimum: xp.min}.get(type(statistic), xp.sum)
        return type(statistic)(extreme(first), *(xp.sum(field) for field in others))

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
    return {name: statistic._make(map(function, statistic, *(o[name] for o in others))) for name, statistic in first.items()}


def summarize(statistics: Mapping[str, Statistic]) -> dict[str, float]:
    """Diagnostics as plain floats, with a single transfer from the device: call it once, at the end of a step.

    Parameters
    ----------
    statistics
        A result of `token_diagnostics` or `merge_diagnostics`, or of a policy loss.

    Returns
    -------
    dict
        Number by name, in the same order; NaN for a statistic that counted nothing.

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
    first = next(iter(statistics.values()))
    xp = array_namespace(first.count)
    values = [xp.where(statistic.count > 0.0, statistic.value, xp.nan) for statistic in statistics.values()]
    on_host = to_device(xp.stack(values), "cpu") if hasattr(first.count, "is_cuda") else xp.stack(values)
    return {name: float(on_host[i]) for i, name in enumerate(statistics)}


def diagnostics_of(tokens: Tokens, weight: Array, inside: Array, mask: Array | None) -> Diagnostics:
    """`token_diagnostics` of tokens whose weight and trust region are known."""
    xp, a, ell, r = tokens.xp, tokens.advantages, tokens.log_ratio, tokens.ratio

    def total(x: Array, over: _Subset) -> Array:
        return xp.sum(xp.where(over.where, x, 0.0))

    def subset(where: Array) -> _Subset:
        return _Subset(where, count_true(where, a.dtype, xp=xp))

    def mean(x: Array, over: _Subset) -> Mean:
        return Mean(total(x, over), over.count)

    def fraction(condition: Array, over: _Subset) -> Mean:
        return Mean(count_true(condition & over.where, a.dtype, xp=xp), over.count)

    def maximum(x: Array, over: _Subset) -> Maximum:
        candidates = xp.where(over.where, x, -xp.inf)
        return Maximum(xp.max(candidates) if 0 not in x.shape else xp.sum(candidates) - xp.inf, over.count)

    finite = xp.isfinite(a) & xp.isfinite(tokens.behavior_log_prob) & (tokens.log_prob < xp.inf)
    counted = subset(xp.ones_like(a) == 1.0 if mask is None else mask)
    valid = subset(counted.where & finite)
    active = subset(valid.where & (a != 0.0))
    outside, direction = ~inside, tokens.along_advantage(tokens.ratio_minus_one)
    diverging, converging, positive, negative = direction > 0.0, direction < 0.0, a > 0.0, a < 0.0
    # selected before multiplying, as inf·0 is a NaN
    magnitude = r * xp.where(active.where, xp.abs(a), 0.0)
    effective_weight = xp.where(active.where, xp.abs(weight), 0.0)
    effective = r * effective_weight
    binary_tv = xp.abs(tokens.shift)
    largest_negated_weight = maximum(-weight, active)
    return {
        "ratio_mean": mean(r, valid),
        "ratio_max": maximum(r, valid),
        "log_ratio_abs_mean": mean(xp.abs(ell), valid),
        "k1_mean": mean(-ell, valid),
        "k3_mean": mean(k3_of(tokens), valid),
        "binary_tv_mean": mean(binary_tv, valid),
        "binary_tv_max": maximum(binary_tv, valid),
        "invalid_fraction": fraction(~finite, counted),
        "outside_fraction": fraction(outside, active),
        "outside_positive_diverging_fraction": fraction(outside & positive & diverging, active),
        "outside_positive_converging_fraction": fraction(outside & positive & converging, active),
        "outside_negative_diverging_fraction": fraction(outside & negative & diverging, active),
        "outside_negative_converging_fraction": fraction(outside & negative & converging, active),
        "dropped_fraction": fraction(weight == 0.0, active),
        "attenuated_fraction": fraction((weight > 0.0) & (weight < 1.0), active),
        "amplified_fraction": fraction(weight > 1.0, active),
        "corrective_fraction": fraction(weight < 0.0, active),
        "weight_mean": mean(weight, active),
        "weight_min": Minimum(-largest_negated_weight.value, largest_negated_weight.count),
        "weight_max": maximum(weight, active),
        "gradient_mass_kept": Mean(total(magnitude * effective_weight, active), total(magnitude, active)),
        "effective_sample_size": EffectiveSampleSize(
            total(effective, active), total(effective * effective, active), active.count
        ),
    }


class _Subset(NamedTuple):
    """Some of the tokens, and how many."""

    where: Array
    count: Array


def _quotient(numerator: Array, denominator: Array) -> Array:
    xp = array_namespace(numerator)
    empty = denominator == 0.0
    return xp.where(empty, xp.nan, numerator / xp.where(empty, 1.0, denominator))
