"""Every number a caller may pass, to every parameter that takes one: accepted as a Python float, or refused by name."""

import dataclasses
import inspect
import math
import re
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from backends import Backend

import drpo_core
from drpo_core import reduction, validation
from drpo_core._checks import check_number
from drpo_core.objectives import OBJECTIVES

pytestmark = pytest.mark.filterwarnings("ignore::drpo_core.VacuousTrustRegionWarning")

X, B, A = np.log([[0.5, 0.2]]), np.log([[0.25, 0.4]]), np.array([[1.0, -1.0]])
MASK = np.array([[True, True]])
TOKENS = {"log_prob": X, "behavior_log_prob": B, "advantages": A, "mask": MASK}
DRPO = drpo_core.DRPO(delta=0.5)


class Parameter(NamedTuple):
    """A numeric parameter: what takes it, its bound, and whether 0-d arrays of any library are numbers to it."""

    call: object
    name: str
    above: float | None = None
    at_least: float | None = None
    below: float = math.inf
    whole: bool = False
    optional: bool = False
    arrays: bool = False


def label(parameter):
    function = getattr(parameter.call, "func", parameter.call)
    return f"{function.__name__}.{parameter.name}"


def give(parameter, value):
    """What the function or class makes of a value of the parameter."""
    return parameter.call(**{parameter.name: value})


def of_objectives():
    """Every field of an objective that is a number, with what else its class needs."""
    for family in {family.objective: family for family in OBJECTIVES}.values():
        needed = family.threshold
        for field in dataclasses.fields(family.objective):
            if "float" not in str(field.type):
                continue
            required = {f.name for f in dataclasses.fields(family.objective) if f.default is dataclasses.MISSING}
            # a lower bound may not exceed the upper one
            others = {name: 1e-300 if name.startswith("min_") else 1e300 for name in required - {field.name}}
            others |= {} if needed is None or needed in {field.name, *required} else {needed: 0.5}
            if field.name in {f"{needed}_low", f"{needed}_high"}:
                others = {f"{needed}_low": 0.5, f"{needed}_high": 0.5}
                del others[field.name]
            optional = field.default is None and not field.name.startswith(str(needed))
            cap = field.name == "dual_clip" or (field.name, family.name) == ("max_ratio", "ASPO")
            below = 1.0 if field.name == "alpha" else math.inf
            yield Parameter(
                partial(family.objective, **others), field.name, above=1.0 if cap else 0.0, below=below, optional=optional
            )


REDUCTIONS = (drpo_core.token_mean, drpo_core.sequence_mean_token_mean, drpo_core.sequence_mean_token_sum)
NORMALIZER = {"at_least": 0.0, "optional": True, "arrays": True}
of_sum = drpo_core.sequence_mean_token_sum


def bound(reduce, name):
    """A policy loss of a reduction with an argument bound by `functools.partial`."""

    def policy_loss(**given):
        return drpo_core.policy_loss_and_gradient(DRPO, **TOKENS, reduction=partial(reduce, **given))

    policy_loss.__name__ = f"partial-{reduce.__name__}-{name}"
    return policy_loss


PARAMETERS = [
    *of_objectives(),
    *(Parameter(partial(reduce, X, MASK), "normalizer", **NORMALIZER) for reduce in REDUCTIONS),
    Parameter(partial(of_sum, X, MASK), "horizon", above=0.0, arrays=True),
    Parameter(partial(reduction.prompt_mean, X, MASK, group_ids=np.zeros(1, int)), "normalizer", **NORMALIZER),
    Parameter(
        partial(reduction.reduction_coefficients, drpo_core.token_mean, MASK, dtype=np.float64), "normalizer", **NORMALIZER
    ),
    Parameter(partial(drpo_core.policy_loss_and_gradient, DRPO, **TOKENS), "normalizer", **NORMALIZER),
    Parameter(partial(drpo_core.policy_loss_and_gradient, DRPO, **TOKENS), "threads", at_least=1, whole=True, optional=True),
    Parameter(partial(drpo_core.group_advantages, A, divide_by_std=True), "std_offset", at_least=0.0),
    Parameter(partial(drpo_core.validate, X, B, A), "tolerance", at_least=0.0, optional=True),
    Parameter(partial(validation.find_problems, X, B, A), "tolerance", at_least=0.0, optional=True),
]
BOUND = [
    *(Parameter(bound(reduce, "normalizer"), "normalizer", **NORMALIZER) for reduce in REDUCTIONS),
    Parameter(bound(of_sum, "horizon"), "horizon", above=0.0, arrays=True),
]

NOT_NUMBERS = {
    "text": "0.5",
    "None": None,
    "True": True,
    "np.bool": np.bool_(1),
    "0-d bool": np.array(1, dtype=bool),
    "complex": 1j,
    "decimal": Decimal("0.5"),
    "list": [0.5],
    "array of 1": np.ones(1),
    "array of 2": np.ones(2),
    "object array": np.array(None),
    "tensor of 1": torch.ones(1),
}
OUT_OF_RANGE = {
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "-0.5": -0.5,
    "huge": 10**400,
    "not printable": 10**5000,
    "-huge": -(10**400),
    "float32 inf": np.float32(np.inf),
    "0-d NaN": np.array(np.nan),
    "0": 0,
    "-0.0": -0.0,
    "1": 1,
    "np.float64 0": np.float64(0.0),
}

each_parameter = pytest.mark.parametrize("parameter", [*PARAMETERS, *BOUND], ids=label)


def test_every_numeric_parameter_of_every_public_function_and_class_is_here():
    functions = {name: getattr(drpo_core, name) for name in drpo_core.__all__ if name[0].islower()}
    functions |= {name: getattr(module, name) for module in (reduction, validation) for name in module.__all__}
    numeric = {
        f"{function.__name__}.{name}"
        for function in functions.values()
        if inspect.isfunction(function)
        for name, parameter in inspect.signature(function).parameters.items()
        if re.search(r"\b(float|int)\b", str(parameter.annotation))
    }
    classes = {family.objective for family in OBJECTIVES}
    numeric |= {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c) if "float" in str(f.type)}
    assert numeric == {label(parameter) for parameter in PARAMETERS}


@each_parameter
@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_what_is_no_number_is_refused_by_name(parameter, kind):
    value = NOT_NUMBERS[kind]
    if value is None and parameter.optional:
        give(parameter, None)
        return
    # None is a threshold that is missing, which has a message of its own; an array of another shape is a wrong value
    with pytest.raises((TypeError, ValueError), match=rf"(^{parameter.name}: expected )|(^expected either )") as caught:
        give(parameter, value)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    if not message.startswith("expected either"):
        assert ", got " in message


@each_parameter
@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_a_number_out_of_its_range_is_refused_by_name(parameter, kind):
    value = OUT_OF_RANGE[kind]
    low = parameter.above if parameter.at_least is None else parameter.at_least
    finite = not isinstance(value, int) or abs(value) < 10**300
    inside = finite and math.isfinite(value) and (value > low if parameter.at_least is None else value >= low)
    inside = inside and value < parameter.below
    if parameter.whole and not isinstance(value, int):
        with pytest.raises(TypeError, match=rf"^{parameter.name}: expected a whole number, got "):
            give(parameter, value)
    elif inside:
        give(parameter, value)
    else:
        with pytest.raises(ValueError, match=rf"^{parameter.name}: expected a finite number.*, got ") as caught:
            give(parameter, value)
        assert len(str(caught.value)) < 200


@each_parameter
@pytest.mark.parametrize(
    "kind",
    [int, float, Fraction, np.float32, np.float64, np.float16, np.int64, np.uint8, np.array],
    ids=lambda kind: kind.__name__,
)
def test_any_real_number_of_any_type_is_one(parameter, kind):
    if parameter.below <= 2:  # a share: no whole number is in its range
        for half in (Fraction(1, 2), np.float32(0.5), np.array(0.5)):
            assert str(give(parameter, half)) == str(give(parameter, 0.5))
        return
    value = kind(2)
    if parameter.whole and not isinstance(value, int | np.integer):
        value = 2
    expected, found = give(parameter, 2.0 if not parameter.whole else 2), give(parameter, value)
    assert str(found) == str(expected)
    if dataclasses.is_dataclass(found):
        assert {type(v) for v in dataclasses.astuple(found) if v is not None and not isinstance(v, str)} == {float}


ARRAYS = [parameter for parameter in PARAMETERS if parameter.arrays and isinstance(parameter.call, partial)]


@pytest.mark.parametrize("backend", [Backend.STRICT, Backend.TORCH, Backend.JAX_JIT], ids=lambda b: b.value, indirect=True)
@pytest.mark.parametrize("parameter", ARRAYS, ids=label)
def test_a_0_d_array_is_a_number_and_nan_where_it_is_none(backend, parameter):
    """Its value may be on a device, or unknown while a compiler traces, so that no error can be raised."""

    def call(value):
        function, arguments, options = parameter.call.func, parameter.call.args, parameter.call.keywords
        options = {key: option for key, option in options.items() if key != "dtype"}
        if function is reduction.reduction_coefficients:
            function, arguments = arguments[0], (X, arguments[1])
        result = backend.run(function, *arguments, **options, **{parameter.name: value})
        return result if parameter.call.func is not drpo_core.policy_loss_and_gradient else result.loss

    for right in (np.array(2.0), np.array(2), np.array(2.0, dtype=np.float32)):
        np.testing.assert_allclose(call(right), call(2.0), rtol=1e-15)
    for wrong in (-1.0, math.nan, math.inf, -math.inf):
        assert np.isnan(call(np.array(wrong)))
    assert np.isnan(call(np.array(0.0))) == (parameter.at_least is None)


@pytest.mark.parametrize("parameter", ARRAYS, ids=label)
def test_an_array_that_is_no_number_is_refused_in_torch_too(parameter):
    for wrong in (torch.ones(1), torch.ones(2, 2), torch.tensor(1, dtype=torch.bool)):
        with pytest.raises((TypeError, ValueError), match=rf"^{parameter.name}: expected a"):
            give(parameter, wrong)


def test_what_is_returned_is_a_python_number():
    assert type(check_number("n", np.float32(0.5), above=0.0)) is float
    assert type(check_number("n", np.array(0.5), above=0.0)) is float
    assert type(check_number("n", 3)) is float
    assert type(check_number("n", np.int64(3), whole=True)) is int
    assert check_number("n", 2**60 + 1, whole=True) == 2**60 + 1


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (-1.0, {"above": 0.0}, "n: expected a finite number greater than 0, got -1.0"),
        (-1.0, {"at_least": 0.0}, "n: expected a finite number, 0 or more, got -1.0"),
        (math.nan, {}, "n: expected a finite number, got nan"),
        ("1", {}, "n: expected a real number, got str"),
        (True, {}, "n: expected a real number, got bool True"),
        (1.5, {"whole": True}, "n: expected a whole number, got float 1.5"),
        (np.ones((2, 1)), {}, "n: expected a real number, got numpy.ndarray of shape (2, 1)"),
        (torch.ones(1), {}, "n: expected a real number, got torch.Tensor of shape (1,)"),
        (10**5000, {}, "n: expected a finite number, got a number too large to print"),
        (10**400, {}, f"n: expected a finite number, got 1{'0' * 36}…"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_say_what_was_expected_and_what_was_given(value, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        check_number("n", value, **options)
