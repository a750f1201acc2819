# ruff: noqa: D105  # operators mean what they mean for arrays
"""What the proofs share: the objectives of `drpo_core` run on symbols, and provers that never pass in silence.

An objective reads `Tokens` and a namespace. Given symbols and a namespace of symbolic functions, it returns its own
formula, so that the theorems are about the code and not about a copy of it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from fractions import Fraction
from functools import reduce
from types import SimpleNamespace
from typing import Any

import sympy
import z3

from drpo_core.objectives.thresholds import Bounds
from drpo_core.tokens import Tokens

SECONDS = 30


def prove(claim: Any, *given: Any) -> None:
    """Z3 finds no counterexample to the claim under what is given; fail with the model if it does, and on unknown."""
    solver = z3.Solver()
    solver.set("timeout", SECONDS * 1000)
    solver.add(*given)
    assert solver.check() == z3.sat, f"hypotheses not known to be satisfiable, so the claim may be vacuous: {given}"
    solver.add(z3.Not(claim))
    result = solver.check()
    if result == z3.sat:
        msg = f"refuted by {solver.model()}"
        raise AssertionError(msg)
    assert result == z3.unsat, f"undecided: {solver.reason_unknown()}"


def refute(claim: Any, *given: Any) -> z3.ModelRef:
    """The counterexample that z3 finds to the claim, which must exist."""
    solver = z3.Solver()
    solver.set("timeout", SECONDS * 1000)
    solver.add(*given, z3.Not(claim))
    assert solver.check() == z3.sat, "expected a counterexample, found none"
    return solver.model()


def same(x: Any, y: Any) -> None:
    """Sympy reduces x − y to 0."""
    difference = sympy.nsimplify(x - y, rational=True).replace(sympy.log, lambda z: sympy.log(sympy.factor(z)))
    difference = sympy.simplify(sympy.expand_log(difference, force=True))
    assert difference == 0, f"{x} differs from {y} by {difference}"


def symbolic(kind: type, **fields: Any) -> Any:
    """An objective whose thresholds are symbols, without the checks that only numbers pass; `Bounds` are two of them."""
    objective = object.__new__(kind)
    values = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in fields.items():
        values |= {f"{name}_low": value.low, f"{name}_high": value.high} if isinstance(value, Bounds) else {name: value}
    unknown = values.keys() - {field.name for field in dataclasses.fields(kind)}
    assert not unknown, f"{kind.__name__} has no {unknown}"
    for name, value in values.items():
        assert value is not dataclasses.MISSING, f"{kind.__name__} needs {name}"
        object.__setattr__(objective, name, value)
    return objective


# --- real numbers, in z3 ---------------------------------------------------------------------------------------------

z3_xp = SimpleNamespace(
    inf=z3.Real("infinity"),
    where=z3.If,
    abs=lambda x: z3.If(x >= 0, x, -x),
    ones_like=lambda _: z3.RealVal(1),
    full_like=lambda _, value: value,
)


def real_tokens(name: str = "", **fields: Any) -> tuple[Tokens, list[Any]]:
    """One token over the reals, and what is true of any token: 0 < μ ≤ 1, 0 ≤ π ≤ 1, ℓ has the sign of r − 1.

    z3 knows no logarithm; of ℓ it is told the sign, which is all that a mask reads.
    """
    r, ell, divergence = z3.Real(f"r{name}"), z3.Real(f"ell{name}"), z3.Real(f"D{name}")
    r, mu = fields.pop("ratio", r), fields.pop("mu", z3.Real(f"mu{name}"))
    tokens = Tokens(
        log_prob=z3.Real(f"log_pi{name}"),
        behavior_log_prob=z3.Real(f"log_mu{name}"),
        advantages=z3.Real("A"),
        log_ratio=ell,
        ratio=r,
        ratio_minus_one=r - 1,
        shift=mu * (r - 1),
        divergence=divergence,
        xp=z3_xp,
    )._replace(**fields)
    facts = [mu > 0, mu <= 1, r >= 0, mu * r <= 1, (ell > 0) == (r > 1), (ell < 0) == (r < 1), divergence >= 0]
    return tokens, facts


def real_bounds(name: str = "delta") -> tuple[Bounds, list[Any]]:
    """A low and a high threshold over the reals, both positive."""
    low, high = z3.Reals(f"{name}_low {name}_high")
    return Bounds(low, high), [low > 0, high > 0]


# --- terms to differentiate, in sympy --------------------------------------------------------------------------------


class Term:
    """A sympy expression with an array's operators: `==` compares values where sympy's own compares structure."""

    __hash__ = None
    dtype = "float64"

    def __init__(self, expression: Any) -> None:
        self.e = expression.e if isinstance(expression, Term) else sympy.sympify(expression)

    def __neg__(self) -> Term:
        return Term(-self.e)

    def __eq__(self, other: object) -> Any:
        return sympy.Eq(self.e, Term(other).e)


def _lifted(function: Any) -> Any:
    return lambda *operands: Term(function(*(Term(operand).e for operand in operands)))


for _name in ("add", "sub", "mul", "truediv"):
    _function = _lifted(getattr(operator, _name))
    setattr(Term, f"__{_name}__", _function)
    setattr(Term, f"__r{_name}__", lambda self, other, f=_function: f(other, self))
for _name, _function in (("lt", operator.lt), ("le", operator.le), ("gt", operator.gt), ("ge", operator.ge)):
    setattr(Term, f"__{_name}__", lambda self, other, f=_function: f(self.e, Term(other).e))

sympy_xp = SimpleNamespace(
    inf=sympy.oo,
    finfo=lambda _: SimpleNamespace(eps=2.0**-52),
    astype=lambda x, _, copy: x,  # noqa: ARG005 -- the Array API's name
    where=lambda condition, x, y: Term(sympy.Piecewise((Term(x).e, condition), (Term(y).e, True))),
    maximum=lambda x, y: sympy_xp.where(x > y, x, y),
    minimum=lambda x, y: sympy_xp.where(x < y, x, y),
    abs=_lifted(lambda x: sympy.Piecewise((x, x >= 0), (-x, True))),
    ones_like=lambda _: Term(1),
    full_like=lambda _, value: Term(value),
    exp=_lifted(sympy.exp),
    log=_lifted(sympy.log),
    expm1=_lifted(lambda x: sympy.exp(x) - 1),
    log1p=_lifted(lambda x: sympy.log(1 + x)),
    sqrt=_lifted(sympy.sqrt),
)
r, mu, c, delta_low, delta_high = sympy.symbols("r mu c delta_low delta_high", positive=True)
A, ell = sympy.symbols("A ell", real=True)


def sympy_tokens(*, at: dict[sympy.Symbol, Any] | None = None, **fields: Any) -> Tokens:
    """One token as functions of r and μ; all branches, or those taken at a point."""
    tokens = Tokens(
        log_prob=sympy.log(r * mu),
        behavior_log_prob=sympy.log(mu),
        advantages=A,
        log_ratio=ell,
        ratio=r,
        ratio_minus_one=r - 1,
        shift=mu * (r - 1),
        divergence=sympy.Symbol("D", real=True),
        xp=None,
    )._replace(**fields)
    return Tokens(*map(Term, tokens[:-1]), sympy_xp if at is None else xp_at(at))


def xp_at(point: dict[sympy.Symbol, Any]) -> SimpleNamespace:
    """The namespace whose every `where` takes the side of this point: the formula of all points on the same branches."""

    def where(condition: Any, x: Any, y: Any) -> Term:
        return Term(x) if bool(sympy.sympify(condition).subs(point)) else Term(y)

    taken = {
        "where": where,
        "maximum": lambda x, y: where(x > y, x, y),
        "minimum": lambda x, y: where(x < y, x, y),
        "abs": lambda x: where(Term(x) >= 0, x, -x),
    }
    return SimpleNamespace(**{**vars(sympy_xp), **taken})


def gradient_is_minus_a_r_w(loss: Any, weight: Any, *given: Any, advantage: Any = A) -> None:
    """∂L/∂log π = r ∂L/∂r (μ is fixed) is −A r w: sympy differentiates the code's loss, z3 compares with its weight."""
    gradient, expected = r * sympy.diff(Term(loss).e, r), -advantage * r * Term(weight).e
    _, facts = real_tokens()
    positive = [z3.Real(name) > 0 for name in ("r", "c", "delta_low", "delta_high")]
    prove(to_z3(gradient) == to_z3(expected), *facts, *positive, *given)


def to_z3(expression: Any) -> Any:
    """The same term in z3: rational functions and piecewise ones, symbols by name. Anything else is a KeyError."""
    if expression in (True, False):
        return z3.BoolVal(bool(expression))
    if isinstance(expression, sympy.Number):
        return z3.RealVal(str(Fraction(float(expression)) if isinstance(expression, sympy.Float) else expression))
    if isinstance(expression, sympy.Symbol):
        return z3.Real(expression.name)
    if isinstance(expression, sympy.Piecewise):
        *pairs, (default, _) = [(to_z3(value), to_z3(condition)) for value, condition in expression.args]
        return reduce(lambda rest, pair: z3.If(pair[1], pair[0], rest), reversed(pairs), default)
    arguments = [to_z3(argument) for argument in expression.args]
    if isinstance(expression, sympy.Pow):
        power = reduce(operator.mul, [arguments[0]] * abs(int(expression.exp)))
        return power if expression.exp > 0 else 1 / power
    operations = {
        sympy.Add: lambda *terms: reduce(operator.add, terms),
        sympy.Mul: lambda *factors: reduce(operator.mul, factors),
        sympy.And: z3.And,
        sympy.Or: z3.Or,
        sympy.Not: z3.Not,
        sympy.logic.boolalg.ITE: z3.If,
        sympy.StrictGreaterThan: operator.gt,
        sympy.GreaterThan: operator.ge,
        sympy.StrictLessThan: operator.lt,
        sympy.LessThan: operator.le,
    }
    return operations[type(expression)](*arguments)


# --- floating-point numbers, in z3 -----------------------------------------------------------------------------------


class Float:
    """An IEEE 754 number in z3 with an array's operators, rounding to nearest; a NaN is not equal to itself."""

    __hash__ = None

    def __init__(self, term: z3.FPRef) -> None:
        self.term = term

    def lift(self, other: Any) -> z3.FPRef:
        """The other operand, in this format."""
        return other.term if isinstance(other, Float) else z3.FPVal(other, self.term.sort())

    def __neg__(self) -> Float:
        return Float(z3.fpNeg(self.term))

    def __sub__(self, other: Any) -> Float:
        return Float(z3.fpSub(z3.RNE(), self.term, self.lift(other)))

    def __rsub__(self, other: Any) -> Float:
        return Float(self.lift(other)) - self

    def __mul__(self, other: Any) -> Float:
        return Float(z3.fpMul(z3.RNE(), self.term, self.lift(other)))

    def __truediv__(self, other: Any) -> Float:
        return Float(z3.fpDiv(z3.RNE(), self.term, self.lift(other)))

    def __rtruediv__(self, other: Any) -> Float:
        return Float(self.lift(other)) / self

    def __eq__(self, other: object) -> Any:
        return z3.fpEQ(self.term, self.lift(other))

    def __lt__(self, other: Any) -> Any:
        return z3.fpLT(self.term, self.lift(other))

    def __le__(self, other: Any) -> Any:
        return z3.fpLEQ(self.term, self.lift(other))

    def __gt__(self, other: Any) -> Any:
        return z3.fpGT(self.term, self.lift(other))

    def __ge__(self, other: Any) -> Any:
        return z3.fpGEQ(self.term, self.lift(other))

    def is_nan(self) -> Any:
        """Whether it is a NaN."""
        return z3.fpIsNaN(self.term)


FORMATS = {"float16": z3.Float16(), "bfloat16": z3.FPSort(8, 8), "float32": z3.Float32()}


def float_tokens(name: str) -> tuple[Tokens, Bounds, list[Any]]:
    """One token of any floats of a format, finite positive thresholds, and what is true of computed ℓ, r − 1 and d.

    The two have the sign of ℓ, or underflow to 0; |d| ≤ 1. Both may be NaN only if ℓ is.
    """
    sort = FORMATS[name]

    def where(condition: Any, x: Any, y: Any) -> Float:
        like = Float(z3.FP("A", sort))
        return Float(z3.If(condition, like.lift(x), like.lift(y)))

    fields = {field: Float(z3.FP(field, sort)) for field in Tokens._fields[:-1]}
    tokens = Tokens(**fields, xp=SimpleNamespace(where=where, ones_like=lambda _: 1.0, full_like=lambda _, value: value))
    bounds = Bounds(*(Float(z3.FP(side, sort)) for side in ("low", "high")))
    given = [z3.And(bound > 0.0, bound < math.inf) for bound in bounds]
    for x in (tokens.shift, tokens.ratio_minus_one):
        log_ratio = tokens.log_ratio
        given += [
            z3.Implies(log_ratio > 0.0, x >= 0.0),
            z3.Implies(log_ratio < 0.0, x <= 0.0),
            z3.Implies(log_ratio == 0.0, x == 0.0),
        ]
    return tokens, bounds, [*given, z3.Or(tokens.shift.is_nan(), z3.And(tokens.shift <= 1.0, tokens.shift >= -1.0))]
