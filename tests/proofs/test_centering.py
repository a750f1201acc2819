"""Proofs for `docs/derivations/centering.md`: expectations over small vocabularies, outcome by outcome."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
from variants import ALL, MEASURED

from drpo_core import CISPO, DRPO, SPO, PolicyGradient, token_loss_and_gradient
from drpo_core.anchors import Proximal
from drpo_core.centering import score_centering
from drpo_core.corrections import DivergenceMask, ImportanceWeight, OutwardMask, RatioMask
from drpo_core.modes import DoubleRatioWarning, Mode
from drpo_core.objectives import OBJECTIVES, SAPO, Reinforce, label
from drpo_core.penalties import Penalty

V, K, STATES = 12, 5, 40
ORDINARY = slice(4, None)
"""States without a probability of 0 and without a saturated ratio."""
EPS = np.finfo(float).eps
assert {type(objective) for objective in ALL} >= {family.objective for family in OBJECTIVES}


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def policies(seed=0):
    """π, μ and π_old near and far from each other, two of them with a probability of 0, one with a ratio beyond e²⁰."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(0.05, 4.0, STATES)[:, None]
    mu = 2.0 * rng.normal(size=(STATES, V))
    pi, old = (mu + spread * rng.normal(size=mu.shape) for _ in range(2))
    pi[1, 3], mu[2, 4], mu[3, 5] = -np.inf, -np.inf, mu[3].max() - 30.0
    pi[3, 5] = pi[3].max() + 2.0
    advantages = np.where(np.arange(STATES) % 2 == 0, 1.0, -1.0) * rng.uniform(0.2, 2.0, STATES)
    return log_softmax(pi), log_softmax(mu), log_softmax(old), advantages


def made(*arguments, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubleRatioWarning)
        return Mode(*arguments, **fields)


MODES = [
    Mode(DRPO(delta=0.3), anchor=Proximal(), corrections=(ImportanceWeight(high=2.0),)),
    Mode(Reinforce(), corrections=(OutwardMask(edge="policy/behavior", eps_low=0.4, eps_high=0.4),)),
    made(PolicyGradient(), corrections=(ImportanceWeight(edge="policy/behavior", low=0.5, high=3.0, outside="zero"),)),
    Mode(
        DRPO(delta=0.3),
        corrections=(
            RatioMask(edge="policy/behavior", low=0.3, high=3.0),
            DivergenceMask(edge="policy/behavior", estimator="binary_tv", high=0.2),
        ),
        penalties=(Penalty(coefficient=0.1, estimator="k2", to="behavior"),),
    ),
]
each_objective = pytest.mark.parametrize(
    "objective", [*ALL, *MODES], ids=lambda o: repr(o) if isinstance(o, Mode) else label(o)
)


def options_of(objective, old, *, at=None):
    """What else an objective needs: for outcomes one by one, or with `at` for the recorded ones of a token."""
    if objective == MEASURED:
        divergence = np.linspace(0.0, 0.2, STATES)
        return {"divergence": divergence if at is not None else np.repeat(divergence[:, None], old.shape[-1], 1)}
    if isinstance(objective, Mode) and "proximal_log_prob" in objective.arguments:
        return {"proximal_log_prob": old if at is None else np.take_along_axis(old, at, -1)}
    return {}


def without_penalties(objective):
    if not isinstance(objective, Mode):
        return objective
    return made(objective.objective, anchor=objective.anchor, corrections=objective.corrections)


def gradient_at_outcomes(objective, x, b, old, a):
    """g_v = ∂L/∂log π_v, each outcome as a sequence of its own."""
    flat = [np.reshape(array, (-1, 1)) for array in (x, b, np.repeat(a[:, None], x.shape[-1], 1))]
    options = {name: np.reshape(array, (-1, 1)) for name, array in options_of(objective, old).items()}
    return token_loss_and_gradient(without_penalties(objective), *flat, **options).gradient.reshape(x.shape)


def in_logits(coefficients, x):
    """Σ_v c_v ∇log π_v, outcome by outcome, ∇log π_v = e_v − π."""
    total = np.zeros(x.shape)
    for v in range(x.shape[-1]):
        total += coefficients[:, v, None] * (np.eye(x.shape[-1])[v] - np.exp(x))
    return total


def sampled(objective, x, b, old, a, term):
    """E_μ of the gradient in the logits, sample by sample, each with the term; and the size of what is added up."""
    g, mean, size = gradient_at_outcomes(objective, x, b, old, a), np.zeros(x.shape), np.zeros(len(x))
    for y in range(V):
        one = np.exp(b[:, y])[:, None] * (in_logits(np.eye(V)[y] * g[:, y, None], x) + in_logits(term, x))
        mean, size = mean + one, size + np.abs(one).sum(-1)
    return mean, size


@each_objective
def test_the_expected_gradient_is_zero(objective):
    """enumeration: E_μ[g_y ∇log π_y] + Σ C_v ∇log π_v = 0 to rounding; π_v = 0, μ_v = 0, r > e²⁰ and both signs of A."""
    x, b, old, a = policies()
    options = options_of(objective, old, at=np.tile(np.arange(V), (STATES, 1)))
    term = score_centering(objective, x, b, a, tail=False, **options).gradient
    mean, size = sampled(objective, x, b, old, a, term)
    assert (np.abs(mean).sum(-1) <= 8 * V * EPS * size).all()


def test_it_is_not_zero_without():
    """enumeration: of the objectives only PG-IS, and PSPO that scales it, have E_μ[g_y ∇log π_y] = 0 by themselves."""
    x, b, _, a = (part[ORDINARY] for part in policies())
    biased = {}
    for family in OBJECTIVES:
        g = token_loss_and_gradient(family.make(*family.typical[:1]), x, b, np.repeat(a[:, None], V, 1)).gradient
        biased[family.name] = np.abs(in_logits(np.exp(b) * g, x)).max() > 1e-3
        term = score_centering(family.make(*family.typical[:1]), x, b, a, tail=False).gradient
        assert biased[family.name] == (np.abs(in_logits(term, x)).max() > 1e-12)
    assert {name for name, found in biased.items() if not found} == {"PG-IS", "PSPO"}


def test_special_cases():
    """enumeration: C_v for TIS is A min(π_v, c μ_v); for DRPO −|A|(π_v − μ_v)π_v/δ; REINFORCE's term is −A ∇KL(μ‖π)."""
    x, b, _, a = (part[ORDINARY] for part in policies())
    pi, mu = np.exp(x), np.exp(b)
    expected = {
        PolicyGradient(max_ratio=2.0): a[:, None] * np.minimum(pi, 2.0 * mu),
        DRPO(delta=0.15): -np.abs(a)[:, None] * (pi - mu) * pi / 0.15,
        # −A ∂KL(μ‖π)/∂x = −A (π − μ)
        Reinforce(): a[:, None] * (mu - pi),
    }
    for objective, coefficients in expected.items():
        term = score_centering(objective, x, b, a, tail=False).gradient
        difference = in_logits(term, x) - in_logits(coefficients, x)
        assert np.abs(difference).max() <= 1e-12 * np.abs(coefficients).max(), objective


def test_what_penalties_would_lose():
    """mpmath: at a constant A, DRPO's mean gradient is ∇ |A| Σ (π_v − μ_v)²/(2δ), SPO's ∇ |A| Σ (π_v − μ_v)²/(2ε μ_v)."""
    bound, a = 0.15, -0.7
    x, b, _, _ = (part[10] for part in policies())
    pi, mu = np.exp(x), np.exp(b)
    for objective, per in ((DRPO(delta=bound), np.ones(V)), (SPO(eps=bound), mu)):
        g = token_loss_and_gradient(objective, x, b, np.full(V, a)).gradient

        def penalty(*logits, per=per):
            powers = [mpmath.e**logit for logit in logits]
            shifts = [power / mpmath.fsum(powers) - mpmath.mpf(float(m)) for power, m in zip(powers, mu, strict=True)]
            return abs(a) * mpmath.fsum(d * d / mpmath.mpf(float(q)) for d, q in zip(shifts, per, strict=True)) / (2 * bound)

        at = [mpmath.mpf(float(logit)) for logit in x]
        for k in range(V):
            slope = sum(mu[v] * g[v] * ((v == k) - pi[k]) for v in range(V))
            order = tuple(int(v == k) for v in range(V))
            assert abs(mpmath.diff(penalty, tuple(at), order) - slope) < 1e-9 * max(1.0, np.abs(g).max()), objective


def test_advantages_of_mean_zero():
    """enumeration: where w does not look at A and E_μ[A] = 0, the term changes no expected gradient; else it may."""
    x, b, _, _ = (part[ORDINARY] for part in policies(seed=5))
    rewards = np.random.default_rng(6).normal(size=x.shape)
    a = rewards - (np.exp(b) * rewards).sum(-1, keepdims=True)
    changes = {}
    for objective in (
        PolicyGradient(max_ratio=2.0),
        CISPO(max_ratio=1.5),
        Reinforce(),
        SAPO(tau_positive=1.0, tau_negative=1.05),
    ):
        # the term that comes with each outcome y has its A
        each = [np.repeat(log_probs[:, None], V, 1) for log_probs in (x, b)]
        term = score_centering(objective, *each, a, tail=False).gradient
        mean = in_logits((np.exp(b)[..., None] * term).sum(1), x)
        changes[type(objective).__name__] = np.abs(mean).max() > 1e-12
    assert changes == {"PolicyGradient": False, "CISPO": False, "Reinforce": False, "SAPO": True}


def with_a_tail(objective, x, b, old, a):
    """The term over μ's K likeliest outcomes and a tail, spread over the vocabulary, and which outcomes are the tail's."""
    ids = np.argsort(-b, -1)[:, :K]
    options = options_of(objective, old, at=ids)
    recorded = (np.take_along_axis(log_probs, ids, -1) for log_probs in (x, b))
    spread, tail = np.zeros(x.shape), np.ones(x.shape, dtype=bool)
    np.put_along_axis(spread, ids, score_centering(objective, *recorded, a, **options).gradient, -1)
    np.put_along_axis(tail, ids, values=False, axis=-1)
    return spread, tail


@each_objective
def test_the_error_of_a_tail(objective):
    """enumeration: with a head and a tail, what is left is Σ_T (μ_v g_v − μ_T g_T π_v/π_T) ∇log π_v, below its bounds."""
    everything = policies(seed=1)
    x, b, old, a = everything
    term, tail = with_a_tail(objective, *everything)
    g = gradient_at_outcomes(objective, *everything)
    masses = [np.where(tail, np.exp(log_probs), 0.0).sum(-1, keepdims=True) for log_probs in (x, b, old)]
    # g_T: at an outcome of probability e⁻²⁰⁰ that has the ratios of the tail's masses
    of_tail = gradient_at_outcomes(objective, *(np.repeat(np.log(mass) - 200.0, V, -1) for mass in masses), a)[:, :1]
    errors = np.where(tail, np.exp(b) * g - masses[1] / masses[0] * of_tail * np.exp(x), 0.0)
    left, scale = in_logits(np.exp(b) * g + term, x), (np.abs(np.exp(b) * g).sum(-1) + np.abs(of_tail * masses[1])[:, 0])
    assert (np.abs(left - in_logits(errors, x)).max(-1) <= 1e-11 * scale)[ORDINARY].all()
    # ‖∇log π_v‖² = (1 − π_v)² + Σ_{u≠v} π_u² ≤ 2
    p = np.exp(x)
    steepness = np.sqrt((1.0 - p) ** 2 + (p * p).sum(-1, keepdims=True) - p * p)
    steepest = np.where(tail, steepness, 0.0).max(-1)
    norm = np.linalg.norm(left, axis=-1)
    assert (steepest <= np.sqrt(2.0)).all()
    assert (norm <= np.abs(errors).sum(-1) * steepest + 1e-11 * scale)[ORDINARY].all()
    if not isinstance(objective, Mode):
        # w = −g μ/(A π), and w_T = −g_T μ_T/(A π_T)
        w, of_rest = np.exp(b - x)[ORDINARY] * g[ORDINARY], (masses[1] / masses[0] * of_tail)[ORDINARY]
        furthest = np.where(tail[ORDINARY], np.abs(w - of_rest), 0.0).max(-1)
        bound = masses[0][ORDINARY, 0] * furthest * steepest[ORDINARY]
        assert (norm[ORDINARY] <= bound + 1e-11 * scale[ORDINARY]).all()
        assert bound.max() < 1e-12 or (norm[ORDINARY] > 0.01 * bound).any()


def test_no_tail_where_there_is_no_mass():
    """enumeration: of a sampler that is truncated to the head, the tail counts nothing; nor where π has none left."""
    x, b = np.log([0.3, 0.2, 0.2, 0.1]), np.log([0.35, 0.25, 0.2, 0.1])
    truncated, certain = np.log([0.4, 0.3, 0.2, 0.1]), np.log([0.25, 0.25, 0.25, 0.25])
    for objective in (DRPO(delta=0.15), Reinforce(), PolicyGradient()):
        for pi, mu, same in ((x, truncated, True), (certain, b, True), (x, b, False)):
            found = [score_centering(objective, pi, mu, np.array(1.0), tail=tail).gradient for tail in (True, False)]
            assert np.array_equal(*found) == same, objective


@each_objective
def test_a_sampling_support(objective):
    """enumeration: with both policies renormalised over what truncated sampling keeps, the sum over it is exact."""
    everything = policies(seed=3)
    kept = np.argsort(-everything[1], -1)[:, :K]
    x, b, old = (log_softmax(np.take_along_axis(log_probs, kept, -1)) for log_probs in everything[:3])
    a = everything[3]
    options = options_of(objective, old, at=np.tile(np.arange(K), (STATES, 1)))
    term = score_centering(objective, x, b, a, tail=False, **options).gradient
    g = gradient_at_outcomes(objective, x, b, old, a)
    assert (np.abs(np.exp(b) * g + term) <= 4 * EPS * np.abs(term))[ORDINARY].all()


@each_objective
def test_what_it_does_to_the_second_moment(objective):
    """enumeration: at a constant A the covariance stays and E‖·‖² falls by ‖E‖²; over A, Var_A E_y goes."""
    x, b, old, _ = policies(seed=4)
    options = options_of(objective, old, at=np.tile(np.arange(V), (STATES, 1)))
    moments = []
    for a in (np.full(STATES, 1.0), np.full(STATES, -1.0)):
        g = gradient_at_outcomes(objective, x, b, old, a)
        term = score_centering(objective, x, b, a, tail=False, **options).gradient
        scores = [in_logits(np.eye(V)[y] * g[:, y, None], x) for y in range(V)]
        shifted = [score + in_logits(term, x) for score in scores]
        moments.append([moments_of(samples, b) for samples in (scores, shifted)])
    (plus, plus_centred), (minus, minus_centred) = moments
    for (mean, square), (centred_mean, centred_square) in ((plus, plus_centred), (minus, minus_centred)):
        variance, remaining = square - (mean**2).sum(-1), centred_square - (centred_mean**2).sum(-1)
        close = 1e-9 * square
        assert (np.abs(variance - remaining) <= close)[ORDINARY].all()
        assert (np.abs(square - centred_square - (mean**2).sum(-1)) <= close)[ORDINARY].all()
    # A = ±1 by a coin: Var = E_A Var_y + Var_A E_y, of which the second is gone
    total, centred = (
        0.5 * (p[1] + m[1]) - ((0.5 * (p[0] + m[0])) ** 2).sum(-1) for p, m in ((plus, minus), (plus_centred, minus_centred))
    )
    between = (0.25 * (plus[0] - minus[0]) ** 2).sum(-1)
    assert (np.abs(total - centred - between) <= 1e-9 * total)[ORDINARY].all()


def moments_of(samples, b):
    """E_μ of the samples and of their squared norm."""
    mean = sum(np.exp(b[:, y, None]) * sample for y, sample in enumerate(samples))
    return mean, sum(np.exp(b[:, y]) * (sample**2).sum(-1) for y, sample in enumerate(samples))
