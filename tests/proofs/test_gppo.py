"""Proofs for `docs/derivations/gppo.md`."""

from __future__ import annotations

import sympy
import z3
from provers import Term, c, delta_high, delta_low, prove, r, real_bounds, real_tokens, symbolic, sympy_tokens, to_z3
from test_ppo import larger, smaller

from drpo_core.objectives import GPPO
from drpo_core.objectives.thresholds import Bounds

TINY = z3.RealVal("2.061153622438558e-09")  # e⁻²⁰, where 1/r saturates


def test_value_is_that_of_clipping():
    """z3: the code's loss is max(−A r, −A clip(r)), and min(that, −A c) where A < 0 under dual clip."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    a, ratio, cap = tokens.advantages, tokens.ratio, z3.Real("c")
    published = larger(-a * ratio, -a * smaller(larger(ratio, 1 - eps.low), 1 + eps.high))
    prove(symbolic(GPPO, eps=eps).loss(tokens) == published, *facts, *positive)
    dual = z3.If(a < 0, smaller(published, -a * cap), published)
    prove(symbolic(GPPO, eps=eps, dual_clip=cap).loss(tokens) == dual, *facts, *positive, cap > 1)


def test_gradient():
    """SymPy + z3: the published surrogate −A b r/sg(r), differentiated with sg(r) fixed, gives the code's −A r w."""
    tokens, objective = sympy_tokens(), symbolic(GPPO, eps=Bounds(delta_low, delta_high), dual_clip=c)
    a, held = tokens.advantages.e, sympy.Symbol("held", positive=True)
    beyond = sympy.Or(sympy.And(a > 0, held > 1 + delta_high), sympy.And(a < 0, held < 1 - delta_low))
    bound = sympy.Piecewise((1 + delta_high, a > 0), (1 - delta_low, True))
    dropped = sympy.And(a < 0, held > c)
    surrogate = sympy.Piecewise((-a * c, dropped), (-a * bound * r / held, beyond), (-a * r, True))
    gradient = (r * sympy.diff(surrogate, r)).subs(held, r)
    _, facts = real_tokens()
    positive = [z3.Real(name) > 0 for name in ("r", "c", "delta_low", "delta_high")]
    product = Term(objective.ratio_weight(tokens)).e
    prove(to_z3(gradient) == to_z3(-a * product), *facts, *positive)
    weight = Term(objective.weight(tokens)).e
    prove(to_z3(r * weight) == to_z3(product), *facts, *positive, z3.Real("r") >= TINY)


def test_clipped_ratio():
    """z3: r w is min(r, 1 + ε_high) for A > 0 and max(r, 1 − ε_low) for A < 0; w > 0 if ε_low < 1."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    objective = symbolic(GPPO, eps=eps)
    product, a, ratio = objective.ratio_weight(tokens), tokens.advantages, tokens.ratio
    prove(z3.Implies(a > 0, product == smaller(ratio, 1 + eps.high)), *facts, *positive)
    prove(z3.Implies(a < 0, product == larger(ratio, 1 - eps.low)), *facts, *positive)
    prove(objective.weight(tokens) > 0, *facts, *positive, eps.low < 1)


def test_sides():
    """z3: w ≤ 1 for A > 0 and w ≥ 1 for A < 0, up to the saturation of 1/r."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    weight, a = symbolic(GPPO, eps=eps).weight(tokens), tokens.advantages
    prove(z3.Implies(a > 0, weight <= 1), *facts, *positive)
    prove(z3.Implies(a < 0, weight >= 1), *facts, *positive, tokens.ratio >= TINY)


def test_vast_threshold():
    """z3: w = 1 if r − 1 ≤ ε_high and ε_low ≥ 1."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    prove(symbolic(GPPO, eps=eps).weight(tokens) == 1, *facts, *positive, tokens.ratio - 1 <= eps.high, eps.low >= 1)
