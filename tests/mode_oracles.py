"""Scalar oracles of anchors, corrections and penalties: Python loops over the tokens of each sequence, from the formulas.

They share no code with the core. `examples_of` makes every public class with each of its choices, so that a class without
an oracle, or a choice that an oracle doesn't know, fails.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import mpmath
import numpy as np

from drpo_core import anchors, corrections, penalties
from drpo_core.modes import Mode
from drpo_core.testing import oracle

MP = mpmath.mp.clone()
MP.dps = 40

ARGUMENTS = {
    "policy": "log_prob",
    "behavior": "behavior_log_prob",
    "proximal": "proximal_log_prob",
    "reference": "reference_log_prob",
}


class Token(NamedTuple):
    """A valid token: its place in the sequence, masked places included, log-probs in nats, and A."""

    place: int
    policy: float
    behavior: float
    proximal: float
    reference: float
    advantage: float


# --- batches -----------------------------------------------------------------------------------------------------------


def batch(shape=(5, 7), *, seed=0, spread=0.6, valid=0.75):
    """Random rows with masked tokens anywhere, which hold junk; the second row is empty, the third has one token."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < valid
    if shape[0] > 2:
        mask[1] = False
        mask[2] = False
        mask[2, shape[1] // 2] = True
    behavior = -rng.exponential(1.0, shape) - 0.01
    arrays = {"behavior_log_prob": behavior}
    for name in ("proximal_log_prob", "log_prob", "reference_log_prob"):
        # of each row too, so that sequences differ in what their tokens have in common
        noise = rng.normal(0.0, spread, shape) + rng.normal(0.0, spread, (shape[0], 1))
        arrays[name] = np.minimum(behavior + noise, -1e-3)
    advantages = rng.normal(size=shape)
    advantages[rng.random(shape) < 0.1] = 0.0
    return spoilt(arrays | {"advantages": advantages, "mask": mask})


def spoilt(arrays):
    """Masked tokens hold what must not matter."""
    mask = arrays["mask"]
    junk = np.resize([np.nan, np.inf, -np.inf, 1e30, 0.0], mask.shape)
    return {name: a if name == "mask" else np.where(mask, a, junk.astype(a.dtype)) for name, a in arrays.items()}


def packed(arrays, *, seed=0):
    """The same tokens in one dimension, sequences interleaved, each in its order; and where each came from."""
    rng = np.random.default_rng(seed)
    rows, width = arrays["mask"].shape
    row = rng.permutation(np.repeat(np.arange(rows), width))
    place = np.empty_like(row)
    for i in range(rows):
        place[row == i] = np.arange(width)
    found = {name: array[row, place] for name, array in arrays.items()}
    # ids may be any integers
    return found | {"segment_ids": (rng.permutation(rows) * 7 - 9)[row]}, (row, place)


def sequences(arrays):
    """The valid tokens of each row."""
    names = ("log_prob", "behavior_log_prob", "proximal_log_prob", "reference_log_prob", "advantages")
    return [
        [Token(place, *(float(arrays[name][i, place]) for name in names)) for place in np.flatnonzero(row)]
        for i, row in enumerate(arrays["mask"])
    ]


def spread_out(values, mask):
    """One number a valid token, row by row, as an array with 0 at masked tokens."""
    result = np.zeros(mask.shape)
    result[mask] = [value for row in values for value in row]
    return result


# --- what the formulas are made of --------------------------------------------------------------------------------------


def ell(token, edge):
    over, under = edge.split("/")
    return getattr(token, over) - getattr(token, under)


def saturated(x):
    return max(-20.0, min(20.0, x))


def mean(values):
    return math.fsum(values) / len(values)


def log_ratios(row, edge, level):
    """Log of the ratio at a level, for each token of a sequence."""
    each = [ell(token, edge) for token in row]
    if level == "token" or not row:
        return [saturated(x) for x in each]
    return [saturated(math.fsum(each) if level == "sequence" else mean(each))] * len(row)


def within(ratio, low, high):
    return (low is None or ratio >= low) and (high is None or ratio <= high)


# --- corrections --------------------------------------------------------------------------------------------------------


def importance_weight(c, rows):
    def bounded(ratio):
        if c.outside == "zero":
            return ratio if within(ratio, c.low, c.high) else 0.0
        return min(max(ratio, c.low or 0.0), math.inf if c.high is None else c.high)

    found = [[bounded(math.exp(x)) for x in log_ratios(row, c.edge, c.level)] for row in rows]
    if not c.normalize:
        return found
    counted = [k for row in found for k in (row if c.level == "token" else row[:1])]
    return [[k / mean(counted) for k in row] for row in found] if any(counted) else found


def ratio_mask(c, rows):
    return [[float(within(math.exp(x), c.low, c.high)) for x in log_ratios(row, c.edge, c.level)] for row in rows]


def divergence(estimator, over, under):
    """D of a token, given log-probs of the two policies of an edge over/under."""
    x = over - under
    if estimator == "k2":
        return x * x / 2
    if estimator == "k3":
        return float(MP.exp(x) - 1 - x)
    if estimator == "binary_tv":
        return abs(float(MP.exp(over) - MP.exp(under)))
    forward = float(oracle.binary_kl(over, under))
    return forward if estimator == "binary_kl" else max(forward, float(oracle.binary_kl(under, over)))


def divergence_mask(c, rows):
    over, under = c.edge.split("/")
    found = []
    for row in rows:
        each = [divergence(c.estimator, getattr(token, over), getattr(token, under)) for token in row]
        if row and c.over != "token":
            each = [{"sum": math.fsum, "mean": mean, "max": max}[c.over](each)] * len(row)
        found.append([float(d <= c.high) for d in each])
    return found


def veto(c, rows):
    return [[float(all(within(math.exp(ell(t, c.edge)), c.low, c.high) for t in row))] * len(row) for row in rows]


def negative_sequence_mask(c, rows):
    return [[float(not (t.advantage < 0 and mean([-ell(u, c.edge) for u in row]) > c.delta)) for t in row] for row in rows]


def sequence_trust_mask(c, rows):
    def far(row):
        return mean([abs(math.expm1(ell(u, c.edge))) for u in row]) > c.delta

    return [[float(not (t.advantage * ell(t, c.edge) > 0 and far(row))) for t in row] for row in rows]


def outward_mask(c, rows):
    def outward(t):
        x = ell(t, c.edge)
        return (t.advantage > 0 and x > c.eps_high) or (t.advantage < 0 and x < -c.eps_low)

    return [[float(not outward(t)) for t in row] for row in rows]


def clipped_geometric_ratio(c, rows):
    def clipped(t):
        x = ell(t, c.edge)
        if t.advantage == 0:
            return 0.0
        return min(x, c.eps_high) if t.advantage > 0 else max(x, -c.eps_low)

    return [[math.exp(saturated(mean([clipped(t) for t in row])))] * len(row) if row else [] for row in rows]


def length_scale(_, rows):
    return [[float(len(row))] * len(row) for row in rows]


def variational_weight(c, rows):
    found = []
    for row in rows:
        product = [math.exp(x) for x in log_ratios(row, c.edge, "sequence")]
        pairs = [c.negative if t.advantage < 0 else c.positive for t in row]
        found.append([math.exp(rate) * w**k * math.exp(-rate * w) for w, (k, rate) in zip(product, pairs, strict=True)])
    return found


def minimum_prefix_ratio(c, rows):
    def weight(row, i):
        return math.exp(saturated(min([ell(u, c.edge) for u in row[:i]], default=0.0)))

    return [[weight(row, i) for i in range(len(row))] for row in rows]


def future_ratio(c, rows):
    gamma = 0.5 ** (1 / c.half_life)

    def weight(row, i):
        ahead = [(u.place - row[i].place, saturated(ell(u, c.edge))) for u in row[i:]]
        total = math.fsum(gamma**distance * x for distance, x in ahead if math.exp(x) <= c.delta)
        return min(max(math.exp(saturated(total)), c.low), c.high)

    return [[weight(row, i) for i in range(len(row))] for row in rows]


def prefix_budget_mask(c, rows):
    def kept(row):
        over, under = c.edge.split("/")
        each = [float(MP.exp(getattr(t, over)) - MP.exp(getattr(t, under))) for t in row]
        ordered, place = sorted(map(abs, each)), 0.9 * (len(row) - 1)
        budget = c.budget
        if c.calibrate:
            i, after = int(place), ordered[min(int(place) + 1, len(row) - 1)]
            budget = min(max(ordered[i] + (place - i) * (after - ordered[i]), budget), 2 * budget)
        spent = weights = 0.0
        for i, (t, shift) in enumerate(zip(row, each, strict=True)):
            weight = 1 - (1 - c.min_weight) * i / max(len(row) - 1, 1)
            limit = min(c.delta, c.delta + budget * weights - spent)
            yield float(t.advantage * shift <= 0 or weight * abs(shift) <= limit)
            spent, weights = spent + weight * abs(shift), weights + weight

    return [list(kept(row)) if row else [] for row in rows]


def second_moment_mask(c, rows):
    squares = sorted((ell(t, c.edge) ** 2 for row in rows for t in row), reverse=True)
    while squares and mean(squares) >= c.tau:
        largest = squares[0]
        squares = [s for s in squares if s < largest]
    limit = squares[0] if squares else -1.0
    return [[float(ell(t, c.edge) ** 2 <= limit) for t in row] for row in rows]


CORRECTIONS = {
    corrections.ClippedGeometricRatio: clipped_geometric_ratio,
    corrections.DivergenceMask: divergence_mask,
    corrections.FutureRatio: future_ratio,
    corrections.ImportanceWeight: importance_weight,
    corrections.LengthScale: length_scale,
    corrections.MinimumPrefixRatio: minimum_prefix_ratio,
    corrections.NegativeSequenceMask: negative_sequence_mask,
    corrections.OutwardMask: outward_mask,
    corrections.PrefixBudgetMask: prefix_budget_mask,
    corrections.RatioMask: ratio_mask,
    corrections.SecondMomentMask: second_moment_mask,
    corrections.SequenceTrustMask: sequence_trust_mask,
    corrections.VariationalWeight: variational_weight,
    corrections.Veto: veto,
}
"""K per valid token, of a correction and the sequences."""


# --- anchors ------------------------------------------------------------------------------------------------------------


def anchor_log_prob(anchor, row):
    """Log a of each token of a sequence."""
    match anchor:
        case anchors.Behavior():
            return [t.behavior for t in row]
        case anchors.Proximal():
            return [t.proximal for t in row]
        case anchors.Sequence(of=inner):
            gaps = [t.policy - a for t, a in zip(row, anchor_log_prob(inner, row), strict=True)]
            return [t.policy - saturated(mean(gaps)) for t in row]
        case anchors.Prefix(of=inner):
            gaps = [t.policy - a for t, a in zip(row, anchor_log_prob(inner, row), strict=True)]
            return [t.policy - saturated(mean(gaps[: i + 1])) for i, t in enumerate(row)]
        case _:
            msg = f"the oracle has no formula for {anchor!r}"
            raise TypeError(msg)


# --- penalties ----------------------------------------------------------------------------------------------------------


def penalty(p, t):
    """Value and gradient of a penalty at a token, without saturation."""
    x = t.policy - {"reference": t.reference, "behavior": t.behavior, "proximal": t.proximal}[p.to]
    ratio = MP.exp(t.policy - {"behavior": t.behavior, "proximal": t.proximal}[p.ratio])
    k1, k2, k3 = x, x * x / 2, MP.exp(-x) - 1 + x
    value, gradient = {
        "k1": (k1, 1),
        "k2": (k2, x),
        "k3": (k3, 1 - MP.exp(-x)),
        "k1+": (k1, x),
        "k3+": (k3, x),
        "r·k1": (ratio * k1, ratio * (x + 1)),
        "r·k3": (ratio * k3, ratio * x),
        "square": (x * x, 2 * x),
    }[p.estimator]
    return float(p.coefficient * value), float(p.coefficient * gradient)


def covariance_penalty(p, rows):
    """Value and gradient of a penalty on the tokens of largest covariance, for each token of all sequences."""
    tokens = [t for row in rows for t in row]
    mean_a, mean_x = mean([t.advantage for t in tokens]), mean([t.policy for t in tokens])

    def covariance(t):
        return (t.advantage - mean_a) * (t.policy - mean_x)

    most = max(1, int(p.share * len(tokens)))

    def at(t):
        x = t.policy - getattr(t, p.to)
        # as many as are at least as large, itself among them
        if sum(covariance(u) >= covariance(t) for u in tokens) > most:
            return 0.0, 0.0
        return p.coefficient * abs(x), p.coefficient * ((x > 0) - (x < 0))

    return [[at(t) for t in row] for row in rows]


def penalties_of(p, rows):
    """Value and gradient of any penalty, for each token of all sequences."""
    if isinstance(p, penalties.CovariancePenalty):
        return covariance_penalty(p, rows)
    return [[penalty(p, t) for t in row] for row in rows]


# --- every public class, with each of its choices -----------------------------------------------------------------------

EXAMPLES = (
    corrections.ClippedGeometricRatio(eps_low=0.3, eps_high=0.5),
    corrections.DivergenceMask(high=0.15),
    corrections.FutureRatio(delta=1.3, half_life=3.0, low=0.8, high=1.6),
    corrections.ImportanceWeight(low=0.6, high=1.5),
    corrections.ImportanceWeight(high=1.5),
    corrections.ImportanceWeight(low=0.7),
    corrections.ImportanceWeight(),
    corrections.LengthScale(),
    corrections.MinimumPrefixRatio(),
    corrections.NegativeSequenceMask(delta=0.1),
    corrections.OutwardMask(eps_low=0.3, eps_high=0.4),
    corrections.PrefixBudgetMask(delta=0.15, min_weight=0.5, budget=0.04),
    corrections.RatioMask(low=0.7, high=1.4),
    corrections.RatioMask(high=1.1),
    corrections.RatioMask(low=0.9),
    corrections.SecondMomentMask(tau=0.2),
    corrections.SequenceTrustMask(delta=0.5),
    corrections.VariationalWeight(),
    corrections.VariationalWeight(positive=(1.0, 0.5), negative=(0.5, 2.0)),
    corrections.Veto(low=0.3, high=3.0),
    penalties.Penalty(coefficient=0.3),
    penalties.CovariancePenalty(coefficient=0.3, share=0.3),
    anchors.Behavior(),
    anchors.Proximal(),
    anchors.Sequence(anchors.Behavior()),
    anchors.Sequence(anchors.Proximal()),
    anchors.Prefix(anchors.Behavior()),
    anchors.Prefix(anchors.Proximal()),
    anchors.Sequence(anchors.Prefix(anchors.Proximal())),
    anchors.Prefix(anchors.Sequence(anchors.Behavior())),
)
"""Parameters on both sides of which the tokens of `batch` lie."""


def choices(value):
    """Every replacement of one field of a dataclass by another of its choices: a Literal's, or a bool's."""
    for name, hint in get_type_hints(type(value)).items():
        options = get_args(hint) if get_origin(hint) is Literal else (False, True) if hint is bool else ()
        yield from (dataclasses.replace(value, **{name: option}) for option in options)


def with_choices(value):
    """The value with each pair of its choices."""
    return dict.fromkeys([value, *(second for first in choices(value) for second in choices(first))])


def examples_of(module):
    """Every example of a module's public classes, with each pair of its choices."""
    public = {getattr(module, name) for name in module.__all__}
    return list(dict.fromkeys(made for e in EXAMPLES if type(e) in public for made in with_choices(e)))


def made_by(module, method):
    """The public classes of a module that can be part of a mode."""
    classes = (getattr(module, name) for name in module.__all__)
    return {kind for kind in classes if dataclasses.is_dataclass(kind) and hasattr(kind, method)}


# --- through the public functions ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Constant:
    """w = 1, and an r w of 1, whatever the ratio: a token's weight is then K, its gradient −A K."""

    counts_ratio = False

    def loss(self, tokens):
        """−A."""
        return -tokens.advantages

    def weight(self, tokens):
        """1."""
        return tokens.xp.ones_like(tokens.advantages)

    def ratio_weight(self, tokens):
        """1."""
        return tokens.xp.ones_like(tokens.advantages)


@dataclasses.dataclass(frozen=True)
class LogRatio:
    """w = log R, to see an anchor by."""

    counts_ratio = False

    def loss(self, tokens):
        """Log R."""
        return tokens.log_ratio

    def weight(self, tokens):
        """Log R."""
        return tokens.log_ratio


def quiet(*parts, objective=None, **fields):
    """A mode of corrections and penalties around a constant weight."""
    kept = [part for part in parts if hasattr(part, "factor")]
    others = [part for part in parts if hasattr(part, "value_and_gradient")]
    return Mode(objective or Constant(), corrections=tuple(kept), penalties=tuple(others), **fields)


def arguments_for(mode, arrays):
    """What a mode takes of the arrays of a batch: no log-probs that it doesn't need."""
    unused = {"proximal_log_prob", "reference_log_prob"} - set(mode.arguments)
    return {name: array for name, array in arrays.items() if name not in unused}


def reduced_over(of):
    """What each of two ranks returns of ``of(rank, across)``: its k-th all-reduce is answered with both ranks' k-th arrays."""
    known = []
    while True:
        asked = []

        def across(array, operation, asked=asked):
            calls = len(asked[-1])
            asked[-1].append((array, operation))
            return known[calls] if calls < len(known) else array

        results = []
        for rank in range(2):
            asked.append([])
            results.append(of(rank, across))
        counts = [len(calls) for calls in asked]
        assert counts[0] == counts[1], "ranks would wait for each other"
        if len(known) == counts[0]:
            return results
        pair = [calls[len(known)] for calls in asked]
        assert pair[0][1] == pair[1][1]
        known.append(np.add(pair[0][0], pair[1][0]) if pair[0][1] == "sum" else np.maximum(pair[0][0], pair[1][0]))
