"""Proofs for `docs/derivations/penalties.md`: the code's estimators on symbols, and their expectations over a vocabulary."""

from __future__ import annotations

import operator
from functools import reduce
from itertools import product
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import sympy
from provers import Term, xp_at

from drpo_core import PolicyGradient, token_loss_and_gradient
from drpo_core._sequences import Sequences
from drpo_core.anchors import Policies, Proximal
from drpo_core.corrections import Evidence
from drpo_core.modes import Mode
from drpo_core.penalties import CovariancePenalty, Penalty

MP = mpmath.mp.clone()
MP.dps = 40
beta = 1.0
p, q, m = (sympy.symbols(f"{name}0:3", positive=True) for name in "pqm")
x, reference, behavior = sympy.symbols("x y b", real=True)
TRUE = ["k1", "k2", "k3", "r·k1", "r·k3", "square"]
NEAR, FAR = {x: -1, reference: -2, behavior: -1}, {x: -30, reference: -1, behavior: -30}


def estimates(estimator, log_prob, other, behavior_log_prob, at):
    """The code's value and gradient of one token, on symbols, on the branches taken at a point."""
    # 20 nats are a number of the code, exact in its powers too
    exact = {
        "exp": lambda term: Term(sympy.exp(sympy.nsimplify(Term(term).e))),
        "expm1": lambda term: Term(sympy.exp(sympy.nsimplify(Term(term).e)) - 1),
    }
    policies = SimpleNamespace(
        log_prob=Term(log_prob),
        reference_log_prob=Term(other),
        behavior_log_prob=Term(behavior_log_prob),
        xp=SimpleNamespace(**vars(xp_at(at)) | exact),
    )
    value, gradient = Penalty(coefficient=beta, estimator=estimator).value_and_gradient(Evidence(policies, None))
    return tuple(sympy.nsimplify(Term(part).e, rational=True) for part in (value, gradient))


def expected_gradient(estimator, samples):
    """E[g ∇log π] over a vocabulary of three, in π's logits, where Σ π = 1: one component a logit."""
    at = {symbol: sympy.Rational(1, 3) for symbol in (*p, *q, *m)}
    g = [estimates(estimator, *map(sympy.log, (p[y], q[y], m[y])), at)[1] for y in range(3)]
    return [sum(samples[y] * g[y] * (int(y == k) - p[k]) for y in range(3)) for k in range(3)]


def gradient_of(divergence):
    """∇ in π's logits of a divergence written in p: ∂/∂logit_k = Σ_y ∂/∂p_y p_y (δ_yk − p_k)."""
    slopes = [sympy.diff(divergence, p[y]) for y in range(3)]
    return [sum(slopes[y] * p[y] * (int(y == k) - p[k]) for y in range(3)) for k in range(3)]


def agree(one, other):
    """Both are equal where Σ p = Σ q = Σ m = 1."""
    whole = {symbols[2]: 1 - symbols[0] - symbols[1] for symbols in (p, q, m)}
    for left, right in zip(one, other, strict=True):
        difference = sympy.expand(sympy.expand_log(sympy.expand(left - right), force=True))
        logs = {atom: sympy.Dummy() for atom in difference.atoms(sympy.log)}
        difference = sympy.together(difference.xreplace(logs).subs(whole))
        assert sympy.expand(sympy.numer(difference)) == 0, sympy.factor(difference)


REVERSE = sum(p[y] * sympy.log(p[y] / q[y]) for y in range(3))
FORWARD = sum(q[y] * sympy.log(q[y] / p[y]) for y in range(3))
FROM_SAMPLER = sum(m[y] * sympy.log(m[y] / p[y]) for y in range(3))


def test_k1_is_no_penalty():
    """SymPy: over a vocabulary, E_π[∇k1] = 0 for every π and π_ref."""
    agree(expected_gradient("k1", p), [sympy.Integer(0)] * 3)


def test_k1_on_samples_of_the_sampler():
    """SymPy: E_μ[∇k1] = −∇KL(μ‖π), whatever π_ref is: minimising it drives π away from μ."""
    agree(expected_gradient("k1", m), [-part for part in gradient_of(FROM_SAMPLER)])


@pytest.mark.parametrize("estimator", ["k2", "k1+", "k3+"])
def test_k2_and_straight_through(estimator):
    """SymPy: over a vocabulary, the expected gradient of k2, k1+ and k3+ on samples of π is ∇KL(π‖π_ref)."""
    agree(expected_gradient(estimator, p), gradient_of(REVERSE))


def test_square():
    """SymPy: the expected gradient of ℓ² on samples of π is 2∇KL(π‖π_ref)."""
    agree(expected_gradient("square", p), [2 * part for part in gradient_of(REVERSE)])


def test_k3():
    """SymPy: the expected gradient of k3 on samples of π is ∇KL(π_ref‖π), the other direction than its value's KL(π‖π_ref)."""
    agree(expected_gradient("k3", p), gradient_of(FORWARD))


@pytest.mark.parametrize("estimator", ["r·k1", "r·k3"])
def test_off_policy(estimator):
    """SymPy: the expected gradient of r·k1 and r·k3 on samples of any μ is ∇KL(π‖π_ref), and so is that of their value."""
    agree(expected_gradient(estimator, m), gradient_of(REVERSE))
    at = {symbol: sympy.Rational(1, 3) for symbol in (*p, *q, *m)}
    value = sum(m[y] * estimates(estimator, *map(sympy.log, (p[y], q[y], m[y])), at)[0] for y in range(3))
    agree([value], [REVERSE])


@pytest.mark.parametrize("estimator", ["k1", "k3", "k1+", "k3+"])
def test_values(estimator):
    """SymPy: the expected value of k1, k3, k1+ and k3+ on samples of π is KL(π‖π_ref)."""
    at = {symbol: sympy.Rational(1, 3) for symbol in (*p, *q, *m)}
    value = sum(p[y] * estimates(estimator, *map(sympy.log, (p[y], q[y], m[y])), at)[0] for y in range(3))
    agree([value], [REVERSE])


@pytest.mark.parametrize("estimator", TRUE)
def test_gradient(estimator):
    """SymPy: the gradient of k1, k2, k3, ℓ², r·k1 and r·k3 is the derivative of their value in log π, within 20 nats."""
    value, gradient = estimates(estimator, x, reference, behavior, NEAR)
    assert sympy.simplify(sympy.diff(value, x) - gradient) == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "square"])
def test_gradient_beyond_20_nats(estimator):
    """SymPy: below ℓ = −20 too, where k3 goes on along its tangent; value and slope are continuous there."""
    value, gradient = estimates(estimator, x, reference, behavior, FAR)
    assert sympy.simplify(sympy.diff(value, x) - gradient) == 0
    inside, slope = estimates(estimator, x, reference, behavior, NEAR)
    at_edge = {reference: x + 20}
    assert sympy.simplify((value - inside).subs(at_edge)) == 0
    assert sympy.simplify((gradient - slope).subs(at_edge)) == 0


@pytest.mark.parametrize("estimator", ["k1+", "k3+"])
def test_straight_through(estimator):
    """SymPy: k1+ and k3+ have the value of k1 and k3 and the gradient of k2."""
    value, gradient = estimates(estimator, x, reference, behavior, NEAR)
    assert sympy.simplify(value - estimates(estimator[:2], x, reference, behavior, NEAR)[0]) == 0
    assert sympy.simplify(gradient - estimates("k2", x, reference, behavior, NEAR)[1]) == 0


# --- enumeration: numbers, where a statement is that two things differ or spans two tokens -----------------------------


def number(estimator, log_prob, other, behavior_log_prob):
    """The code's gradient of one token, in 40 digits."""
    xp = SimpleNamespace(
        exp=MP.exp,
        expm1=MP.expm1,
        where=lambda condition, one, two: one if condition else two,
        ones_like=lambda _: MP.mpf(1),
    )
    policies = SimpleNamespace(log_prob=log_prob, reference_log_prob=other, behavior_log_prob=behavior_log_prob, xp=xp)
    return Penalty(coefficient=1.0, estimator=estimator).value_and_gradient(Evidence(policies, None))[1]


def policy(*logits):
    weights = [MP.exp(MP.mpf(z)) for z in logits]
    return [w / sum(weights) for w in weights]


PI, REF, MU = policy(0.3, -0.2, 1.1, 0.0), policy(-0.5, 0.4, 0.2, 0.9), policy(0.8, 0.1, 0.5, -0.6)


def mean_gradient(estimator, samples):
    """E[g ∇log π] in the logits, over a vocabulary of four."""
    g = [number(estimator, *map(MP.log, each)) for each in zip(PI, REF, MU, strict=True)]
    return [sum(s * each * ((y == k) - PI[k]) for y, (s, each) in enumerate(zip(samples, g, strict=True))) for k in range(4)]


@pytest.mark.parametrize("estimator", ["k2", "k3", "k1+", "k3+", "square"])
def test_biased_on_samples_of_another_policy(estimator):
    """enumeration: on samples of μ ≠ π none of k2, k3, k1+, k3+, ℓ² has the expected gradient that it has on those of π."""
    gap = [abs(one - other) for one, other in zip(mean_gradient(estimator, MU), mean_gradient(estimator, PI), strict=True)]
    assert max(gap) > 0.02


def test_a_ratio_of_the_sequence_is_another_gradient():
    """enumeration: over two tokens, r·k3 with the sequence's geometric-mean ratio is not ∇KL of the tokens: it broadcasts."""
    first, second = ([PI[:2], MU[:2], REF[:2]], [PI[2:], MU[2:], REF[2:]])
    norm = [[[v / sum(d) for v in d] for d in step] for step in (first, second)]
    token, sequence = MP.mpf(0), MP.mpf(0)
    for y, z in product(range(2), repeat=2):
        chance = norm[0][1][y] * norm[1][1][z]
        ratios = norm[0][0][y] / norm[0][1][y], norm[1][0][z] / norm[1][1][z]
        ell = MP.log(norm[0][0][y] / norm[0][2][y])
        score = (y == 0) - norm[0][0][0]  # ∇ in the first token's first logit
        token += chance * ratios[0] * ell * score
        sequence += chance * MP.sqrt(ratios[0] * ratios[1]) * ell * score
    exact = sum(norm[0][0][y] * MP.log(norm[0][0][y] / norm[0][2][y]) * ((y == 0) - norm[0][0][0]) for y in range(2))
    assert abs(token - exact) < MP.mpf(10) ** -30
    assert abs(sequence - exact) > 1e-3


def test_per_token_gradients_leave_out_later_tokens():
    """enumeration: over two tokens, Σ E[ℓ_t ∇log π_t] is ∇KL of the two sequences' policies minus E[∇log π_1 KL_2]."""
    logit = MP.mpf("0.3")  # one shared parameter: first token's logit, and the second's after token 0
    others = {0: MP.mpf("-0.4"), 1: MP.mpf("0.7")}
    ref = {None: policy(0.2, 0.0), 0: policy(-0.3, 0.1), 1: policy(0.5, 0.2)}

    def policies(z):
        return {None: policy(z, 0.0), 0: policy(z + others[0], 0.0), 1: policy(others[1], 0.0)}

    def divergence(z):
        pi = policies(z)
        chances = [(pi[None][y] * pi[y][k], ref[None][y] * ref[y][k]) for y, k in product(range(2), repeat=2)]
        return sum(a * MP.log(a / b) for a, b in chances)

    pi = policies(logit)

    def score(state, y):
        return 0 if state == 1 else (y == 0) - pi[state][0]

    per_token, later = MP.mpf(0), MP.mpf(0)
    for y in range(2):
        per_token += pi[None][y] * number("k2", MP.log(pi[None][y]), MP.log(ref[None][y]), MP.mpf(0)) * score(None, y)
        later += pi[None][y] * score(None, y) * sum(a * MP.log(a / b) for a, b in zip(pi[y], ref[y], strict=True))
        for k in range(2):
            chance = pi[None][y] * pi[y][k]
            per_token += chance * number("k2", MP.log(pi[y][k]), MP.log(ref[y][k]), MP.mpf(0)) * score(y, k)
    assert abs(per_token + later - MP.diff(divergence, logit)) < MP.mpf(10) ** -15
    assert abs(later) > 1e-3


def test_the_optimum():
    """enumeration: REINFORCE with β·k2 is stationary on samples of π at π ∝ π_ref e^(A/β): DRO's and Kimi's policy."""
    strength = MP.mpf("0.7")
    advantages = [MP.mpf(a) for a in ("1.0", "-0.5", "0.2", "0.0")]
    weights = [b * MP.exp(a / strength) for a, b in zip(advantages, REF, strict=True)]
    best = [w / sum(weights) for w in weights]
    g = [
        -a + strength * number("k2", MP.log(one), MP.log(other), MP.mpf(0))
        for a, one, other in zip(advantages, best, REF, strict=True)
    ]
    slopes = [reduce(operator.add, (best[y] * g[y] * ((y == k) - best[k]) for y in range(4))) for k in range(4)]
    assert max(map(abs, slopes)) < MP.mpf(10) ** -30


# --- at the tokens of largest covariance: KL-Cov ------------------------------------------------------------------------

LOGITS = [MP.mpf(z) for z in ("0.3", "-0.2", "1.1", "0.0")]
ADVANTAGES = [2.0, -1.0, 0.5, -0.3]


def covariance_gradient(share):
    """The code's gradient at each outcome of PI, held near REF with β = 1; and which outcomes it chooses."""
    log_prob, other, a = (np.array([*values], dtype=float) for values in (map(MP.log, PI), map(MP.log, REF), ADVANTAGES))
    sequences = Sequences(np.ones(4, dtype=bool), None, xp=np)
    policies = Policies(log_prob, other, other, other, sequences, xp=np)
    found = CovariancePenalty(coefficient=1.0, share=share, to="reference").value_and_gradient(Evidence(policies, a))[1]
    return [MP.mpf(g) for g in found], [y for y in range(4) if found[y]]


@pytest.mark.parametrize(("share", "count"), [(1.0, 4), (0.5, 2), (0.25, 1)])
def test_covariance_penalty(share, count):
    """enumeration: on samples of π it is ∇Σ abs(π − q) over the chosen outcomes, on samples of q ∇Σ q abs(log π − log q)."""
    g, chosen = covariance_gradient(share)
    assert len(chosen) == count

    def at(*logits):
        pi = policy(*logits)
        return (
            sum(abs(pi[y] - REF[y]) for y in chosen),
            sum(REF[y] * abs(MP.log(pi[y]) - MP.log(REF[y])) for y in chosen),
        )

    for i, samples in enumerate((PI, REF)):
        for k in range(4):
            order = tuple(int(j == k) for j in range(4))
            exact = MP.diff(lambda *z, i=i: at(*z)[i], tuple(LOGITS), order)
            mean = sum(samples[y] * g[y] * ((y == k) - PI[k]) for y in range(4))
            assert abs(mean - exact) < MP.mpf(10) ** -12


def test_covariance_is_the_entropy_that_is_lost():
    """enumeration: logits moved along A change the entropy of π at the rate −Cov(log π, A), the mean of the tokens' shares."""

    def entropy(step):
        pi = policy(*(z + step * a for z, a in zip(LOGITS, ADVANTAGES, strict=True)))
        return -sum(p * MP.log(p) for p in pi)

    mean_a = sum(p * a for p, a in zip(PI, ADVANTAGES, strict=True))
    mean_x = sum(p * MP.log(p) for p in PI)
    shares = [(a - mean_a) * (MP.log(p) - mean_x) for p, a in zip(PI, ADVANTAGES, strict=True)]
    rate = sum(p * share for p, share in zip(PI, shares, strict=True))
    assert abs(MP.diff(entropy, 0) + rate) < MP.mpf(10) ** -12
    assert abs(rate) > 0.01


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("a", [1.0, -1.0])
def test_where_a_chosen_token_stops(a, beta):
    """enumeration: a chosen token has −A R + β sign(ℓ), and −A at ℓ = 0: it is held at q where β > abs(A), else not at q."""
    mode = Mode(PolicyGradient(), anchor=Proximal(), penalties=(CovariancePenalty(coefficient=beta),))

    def gradient(ell):
        old = np.array([-4.0])
        return float(token_loss_and_gradient(mode, old + ell, old, np.array([a]), proximal_log_prob=old).gradient[0])

    assert gradient(0.0) == -a
    for ell in np.linspace(-3.0, 3.0, 25):
        assert gradient(ell) == pytest.approx(-a * np.exp(ell) + beta * np.sign(ell), rel=1e-12)
    held = gradient(1e-6) > 0.0 > gradient(-1e-6)
    assert held == (beta > abs(a))
    at_bound = np.log(beta / abs(a))
    if a * at_bound > 0.0:
        # A > 0 and β > A: pulled back below R = β/A only. A < 0 and β < abs(A): pushed down to R = β/abs(A) only
        assert gradient(at_bound - 0.1) * gradient(at_bound + 0.1) < 0.0
        assert gradient(at_bound + 0.1) * a < 0.0
    elif a > 0.0:
        assert all(gradient(ell) < 0.0 for ell in (0.1, 1.0, 3.0))
    else:
        assert all(gradient(ell) < 0.0 for ell in (-0.1, -1.0, -3.0))
