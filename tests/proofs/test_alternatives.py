"""Proofs for `docs/derivations/alternatives.md`."""

from __future__ import annotations

import pytest
import sympy
from provers import Term, delta_high, mu, prove, r, real_bounds, real_tokens, refute, same, symbolic, sympy_tokens

from drpo_core import DRPO, SPO, PolicyGradient
from drpo_core.divergence import k3_of

a, delta = sympy.symbols("a delta", positive=True)
SIGNS = (1, -1)
SMOOTH = {"DRPO": symbolic(DRPO, delta=delta_high), "chi squared": symbolic(SPO, eps=delta_high)}


def penalty_of(objective, advantage):
    """P(r, μ) of an objective's own loss L = −A r + |A| P/δ."""
    tokens = sympy_tokens(advantages=advantage)
    difference = (objective.loss(tokens) - PolicyGradient().loss(tokens)).e
    return sympy.simplify(difference * delta_high / sympy.Abs(advantage))


def k3_penalty():
    """The code's k3, away from its series, as a function of r."""
    far = {r: 3, mu: sympy.Rational(1, 4)}
    return sympy.nsimplify(k3_of(sympy_tokens(at=far, log_ratio=sympy.log(r), ratio_minus_one=r - 1)).e, rational=True)


PENALTIES = {
    "DRPO": penalty_of(SMOOTH["DRPO"], a),
    "chi squared": penalty_of(SMOOTH["chi squared"], a),
    "k1": -sympy.log(r),
    "k2": sympy.log(r) ** 2 / 2,
    "k3": k3_penalty(),
    "TV": sympy.Abs(r - 1) / 2,
    "Binary TV": mu * sympy.Abs(r - 1),
}
MARGINS = {
    "DRPO": mu * (r - 1),
    "chi squared": r - 1,
    "k1": -1 / r,
    "k2": sympy.log(r) / r,
    "k3": 1 - 1 / r,
    "TV": sympy.sign(r - 1) / 2,
    "Binary TV": mu * sympy.sign(r - 1),
}


def weight(name, sign):
    """The weight w = 1 − sign(A) P′/δ of a penalty."""
    return 1 - sign * MARGINS[name] / delta


def test_weight_of_a_penalty():
    """SymPy: L = −A r + |A| P(r, μ)/δ has ∂L/∂log π = −A r w with w = 1 − sign(A) P′/δ, P′ = ∂P/∂r, for any P."""
    penalty = sympy.Function("P")(r)
    for sign in SIGNS:
        loss = -sign * a * r + a * penalty / delta
        w = 1 - sign * sympy.diff(penalty, r) / delta
        assert sympy.simplify(r * sympy.diff(loss, r) + sign * a * r * w) == 0


@pytest.mark.parametrize("name", PENALTIES)
def test_margins(name):
    """SymPy: P′ of the table, for the code's own DRPO, χ² (SPO) and k3, and for k1, k2, TV and Binary TV."""
    for side in (1 + a, 1 / (1 + a)):  # r above and below 1
        difference = sympy.diff(PENALTIES[name], r) - MARGINS[name]
        assert sympy.simplify(difference.subs(r, side).doit()) == 0


def test_both_signs_have_one_penalty():
    """SymPy: the code's DRPO and SPO penalties are |A| P/δ with the same P for A > 0 and A < 0."""
    for objective in SMOOTH.values():
        same(penalty_of(objective, a), penalty_of(objective, -a))


def test_ratio_space():
    """SymPy: of these margins only DRPO's and Binary TV's hold μ; only DRPO's is a function of π − μ (TV's is its sign)."""
    holding = {name for name, margin in MARGINS.items() if mu in margin.free_symbols}
    assert holding == {"DRPO", "Binary TV"}
    d = sympy.Symbol("d")
    in_shift = {name: sympy.simplify(margin.subs(r, 1 + d / mu)) for name, margin in MARGINS.items()}
    assert in_shift["DRPO"] == d
    assert {name for name, margin in in_shift.items() if mu not in margin.free_symbols} == {"DRPO", "TV"}
    assert [in_shift["TV"].subs(d, side) for side in (a, -a)] == [sympy.Rational(1, 2), -sympy.Rational(1, 2)]


def test_k1_is_not_inert_on_policy():
    """SymPy: at π = μ k1 has w = 1 + sign(A)/δ, all other smooth penalties w = 1; k1's own gradient is −|A|/δ at every r."""
    for sign in SIGNS:
        assert sympy.simplify(weight("k1", sign).subs(r, 1) - (1 + sign / delta)) == 0
        for name in ("DRPO", "chi squared", "k2", "k3"):
            assert weight(name, sign).subs(r, 1) == 1
    assert sympy.simplify(r * sympy.diff(a * PENALTIES["k1"] / delta, r)) == -a / delta


def test_k2_lets_go():
    """SymPy: for A > 0 k2's margin ℓ/r is largest at r = e, 1/e, and tends to 0: beyond, the further the weaker the pull."""
    margin = MARGINS["k2"]
    (at,) = sympy.solve(sympy.diff(margin, r), r)
    assert at == sympy.E
    assert sympy.simplify(margin.subs(r, at) - 1 / sympy.E) == 0
    assert sympy.diff(margin, r, 2).subs(r, at).is_negative
    assert sympy.limit(margin, r, sympy.oo) == 0
    assert sympy.limit(weight("k2", 1), r, sympy.oo) == 1


def test_k3_boundary():
    """SymPy: k3's w = 0 at r = 1/(1 − sign(A) δ), so at a shift μδ/(1 ∓ δ) that fades with μ; and w > 1 − 1/δ for A > 0."""
    for sign in SIGNS:
        (boundary,) = sympy.solve(weight("k3", sign), r)
        assert sympy.simplify(boundary - 1 / (1 - sign * delta)) == 0
        assert sympy.simplify(mu * (boundary - 1) - sign * mu * delta / (1 - sign * delta)) == 0
    same(sympy.limit(weight("k3", 1), r, sympy.oo), 1 - 1 / delta)
    assert sympy.diff(weight("k3", 1), r).is_negative


def test_total_variation_has_two_weights():
    """SymPy: TV's w is 1 ∓ 1/(2δ), Binary TV's 1 ∓ μ/δ: π enters by the side it is on, and by nothing else."""
    for sign in SIGNS:
        for side, at in ((1, 1 + a), (-1, 1 / (1 + a))):
            assert sympy.simplify(weight("TV", sign).subs(r, at) - (1 - sign * side / (2 * delta))) == 0
            assert sympy.simplify(weight("Binary TV", sign).subs(r, at) - (1 - sign * side * mu / delta)) == 0


def test_without_the_advantage():
    """SymPy: without |A| the weight is 1 − d/(δA): its boundary is at |d| = δ|A|, and at A = 0 the gradient is r d/δ."""
    A = sympy.Symbol("A", real=True)  # noqa: N806 - the symbol
    loss = -A * r + PENALTIES["DRPO"] / delta
    gradient = r * sympy.diff(loss, r)
    w = 1 - mu * (r - 1) / (delta * A)
    assert sympy.simplify(gradient + A * r * w) == 0
    (boundary,) = sympy.solve(w, r)
    assert sympy.simplify(mu * (boundary - 1) - delta * A) == 0
    assert sympy.simplify(gradient.subs(A, 0) - r * mu * (r - 1) / delta) == 0


def test_the_library_weighs_by_the_advantage():
    """z3: DRPO's w does not change with |A|; the weight without |A| does (a counterexample exists)."""
    tokens, facts = real_tokens()
    bounds, positive = real_bounds()
    twice = tokens._replace(advantages=2 * tokens.advantages)
    objective = symbolic(DRPO, delta=bounds)
    prove(objective.weight(twice) == objective.weight(tokens), *facts, *positive)

    def without(t):
        return 1 - t.shift / (bounds.high * t.advantages)

    refute(without(twice) == without(tokens), *facts, *positive, tokens.advantages > 0)


def test_k1_and_k3_agree_in_expectation():
    """SymPy: over a softmax of three outcomes the gradients of Σ μ k1 and Σ μ k3 are the same, that of KL(μ‖π)."""
    logits = sympy.symbols("z1:4", real=True)
    behavior = sympy.symbols("m1:3", positive=True)
    behavior = (*behavior, 1 - sum(behavior))
    total = sum(map(sympy.exp, logits))
    policy = [sympy.exp(z) / total for z in logits]
    expected = {
        name: sum(m * PENALTIES[name].subs(r, p / m) for m, p in zip(behavior, policy, strict=True)) for name in ("k1", "k3")
    }
    for z in logits:
        assert sympy.simplify(sympy.diff(expected["k1"] - expected["k3"], z)) == 0


# --- second order ----------------------------------------------------------------------------------------------------


def second(expression):
    """The second derivative in log π."""
    return r * sympy.diff(r * sympy.diff(expression, r), r)


def test_curvature_of_a_weight():
    """SymPy: ∂²L/∂(log π)² = −A r (w + ∂w/∂log π) for any weight; with a mask, −A r w."""
    A = sympy.Symbol("A", real=True)  # noqa: N806 - the symbol
    w = sympy.Function("w")(r)
    gradient = -A * r * w
    assert sympy.simplify(r * sympy.diff(gradient, r) + A * r * (w + r * sympy.diff(w, r))) == 0


def test_curvatures():
    """SymPy: of the code's losses: PG-IS −A r, SPO −A r (1 − sign(A)(2r − 1)/ε), DRPO −A r (1 − sign(A)(2π − μ)/δ)."""
    for sign in SIGNS:
        tokens = sympy_tokens(advantages=sign * a)
        surrogate = -sign * a * r
        same(second(PolicyGradient().loss(tokens).e), surrogate)
        same(second(SMOOTH["chi squared"].loss(tokens).e), surrogate * (1 - sign * (2 * r - 1) / delta_high))
        same(second(SMOOTH["DRPO"].loss(tokens).e), surrogate * (1 - sign * (2 * mu * r - mu) / delta_high))


def test_curvature_on_policy():
    """SymPy: at π = μ SPO's penalty adds |A|/ε to every token, DRPO's adds |A| μ/δ: it holds common tokens, not rare ones."""
    for sign in SIGNS:
        tokens = sympy_tokens(advantages=sign * a)
        same(second(SMOOTH["chi squared"].loss(tokens).e).subs(r, 1), -sign * a + a / delta_high)
        same(second(SMOOTH["DRPO"].loss(tokens).e).subs(r, 1), -sign * a + a * mu / delta_high)


def test_convex_in_the_ratio():
    """SymPy: ∂²L/∂r² is |A|/ε (SPO) and |A| μ/δ (DRPO), both positive: each has one minimum in π."""
    for sign in SIGNS:
        tokens = sympy_tokens(advantages=sign * a)
        for name, expected in (("chi squared", a / delta_high), ("DRPO", a * mu / delta_high)):
            curvature = sympy.simplify(sympy.diff(Term(SMOOTH[name].loss(tokens)).e, r, 2))
            assert sympy.simplify(curvature - expected) == 0
            assert curvature.is_positive
