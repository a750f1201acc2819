"""Every place where a caller can put a number, an array or a choice, whatever the function: found in the signatures.

A place is a call of a function at the base of its axes, with one thing left open.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import drpo_jax
import drpo_torch
from contract import axes, names
from contract.arrays import make
from contract.axes import DType, Given, Library, Measured
from contract.calls import Call, call_of
from contract.cells import base
from contract.subjects import (
    ARRAYS,
    CHOICES,
    GOOD,
    NUMBERS,
    OF_MODES,
    SUBJECTS,
    axes_of,
    function_of,
    is_vocabulary,
    parameters_of,
)

import drpo_core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contract.cells import Cell


PER_TOKEN = next(filter(names.is_per_token, names.objectives()))


class Place(NamedTuple):
    """`call(value)` puts a value there; errors must contain `name`. `default` is what it is when nothing is put."""

    id: str
    name: str
    call: Callable[[Any], Any]
    default: Any = dataclasses.MISSING


def base_cell(subject: str, **choices: Any) -> Cell:
    """The base of a subject's axes, its optional arrays left out, with some choices of one's own."""
    return {**base(axes_of(subject)), **choices}


def _defaults(subject: str) -> dict[str, Any]:
    missing = inspect.Parameter.empty
    signature = inspect.signature(function_of(subject)).parameters
    return {n: dataclasses.MISSING if p.default is missing else p.default for n, p in signature.items()}


def numbers() -> Iterator[Place]:
    """Every number: of functions, bound to reductions, of recorded policies, of objectives."""
    for subject in SUBJECTS:
        defaults, parameters = _defaults(subject), parameters_of(subject)
        for name in parameters.keys() & NUMBERS.keys():
            call = call_of(subject, base_cell(subject))
            yield Place(f"{subject} {name}", name, _put(call, name), defaults[name])
        if "reduction" in parameters:
            call = call_of(subject, base_cell(subject))
            for name, reduction in (("normalizer", drpo_core.token_mean), ("horizon", drpo_core.sequence_mean_token_sum)):
                if name == "normalizer" and defaults.get(name, dataclasses.MISSING) is dataclasses.MISSING:
                    continue  # nothing is divided there, or its own is required
                yield Place(
                    f"{subject} bound {name}", name, _bind(call, reduction, name), None if name == "normalizer" else 1.0
                )
        if "divergence" in parameters and is_vocabulary(subject):
            module = drpo_torch if subject.startswith("drpo_torch.") else drpo_jax
            yield from _recorded_numbers(subject, module)
    by_class = {type(objective): objective for objective in reversed(names.objectives().values())}
    for objective in by_class.values():
        yield from _thresholds(objective)


def _put(call: Call, name: str) -> Callable[[Any], Any]:
    return lambda value: call.function(**call.arrays, **{name: value})


def _bind(call: Call, reduction: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    return lambda value: call.function(**call.arrays, reduction=functools.partial(reduction, **{name: value}))


def _recorded_numbers(subject: str, module: Any) -> Iterator[Place]:
    call = call_of(subject, base_cell(subject, divergence=Measured("head", "tv"), objective=PER_TOKEN))
    hidden = [call.hidden_arrays[name] for name in ("behavior_hidden", "behavior_weight", "behavior_bias")]

    def temperature(value: Any) -> Any:
        head = module.LinearHead(*hidden)
        return call.function(**call.arrays, divergence=module.FullDivergence(kind="tv", behavior=head, temperature=value))

    def softcap(value: Any) -> Any:
        head = module.LinearHead(*hidden, logit_softcap=value)
        return call.function(**call.arrays, divergence=module.FullDivergence(kind="tv", behavior=head))

    yield Place(f"{subject} divergence.temperature", "temperature", temperature, 1.0)
    yield Place(f"{subject} divergence.behavior.logit_softcap", "logit_softcap", softcap, None)


def _thresholds(objective: Any) -> Iterator[Place]:
    own = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    given = {name: value for name, value in own.items() if value is not None}
    for field in dataclasses.fields(objective):
        name = field.name
        if name not in NUMBERS:
            continue
        stem, _, side = name.partition("_")
        if {stem, f"{stem}_low"} <= own.keys():  # one threshold, or two
            others = {n: v for n, v in given.items() if not n.startswith(stem)}
            others |= {f"{stem}_{'high' if side == 'low' else 'low'}": 0.3} if side else {}
        else:
            others = {n: v for n, v in given.items() if n != name}
        default = None if field.default is None and not own.keys() & {"delta", "eps"} & {stem} else dataclasses.MISSING
        yield Place(
            f"{type(objective).__name__} {name}",
            name,
            lambda value, name=name, others=others: _of_tokens(type(objective)(**others, **{name: value})),
            default,
        )


def _of_tokens(objective: Any) -> Any:
    numpy = Library.NUMPY
    arrays = (make(values, DType.FLOAT32, numpy) for values in ([-1.0, -0.5, -2.0], [-1.5, -0.2, -1.0], [1.0, -1.0, 0.5]))
    divergence = make([0.1, 0.2, 0.3], DType.FLOAT32, numpy)
    return drpo_core.token_loss_and_gradient(objective, *arrays, divergence=divergence)


class ArrayPlace(NamedTuple):
    """An array argument of a call: `arrays` are all of them, and `call` takes them."""

    id: str
    name: str
    library: Library
    arrays: dict[str, Any]
    call: Callable[..., Any]
    required: bool
    dtypes: tuple[DType, ...]


def array_places() -> Iterator[ArrayPlace]:
    """Every array: the arguments of functions, optional ones included, and what recorded policies are made of."""
    for subject in SUBJECTS:
        if SUBJECTS[subject].call is not None:
            continue  # what calls it here would be refused its arrays, not the function
        parameters = parameters_of(subject)
        packed = any(name in parameters for name in ("segment_ids", "group_ids"))
        for name in parameters.keys() & ARRAYS.keys():
            choices: dict[str, Any] = {name: ARRAYS[name][0]}
            if name in {"segment_ids", "group_ids"} and packed:
                choices["shape"] = axes.Shape.PACKED
            if name == "divergence":
                choices["objective"] = PER_TOKEN
            if name in OF_MODES:
                choices["objective"] = "mode of sequences"
            call = call_of(subject, base_cell(subject, **choices))
            library = base_cell(subject)["library"]
            required = not parameters[name]
            yield ArrayPlace(f"{subject} {name}", name, library, call.arrays, call.function, required, ARRAYS[name])
        if "divergence" in parameters and is_vocabulary(subject):
            yield from _recorded_arrays(subject)


def _recorded_arrays(subject: str) -> Iterator[ArrayPlace]:
    library = base_cell(subject)["library"]
    module = drpo_torch if library is Library.TORCH else drpo_jax

    def top_k(ids: Any, behavior_log_prob: Any) -> Any:
        return module.TopKDivergence(kind="kl", ids=ids, behavior_log_prob=behavior_log_prob)

    def full(behavior: Any) -> Any:
        return module.FullDivergence(kind="kl", behavior=behavior)

    def head(hidden: Any, weight: Any, bias: Any) -> Any:
        return module.FullDivergence(kind="tv", behavior=module.LinearHead(hidden, weight, bias))

    of = {
        "top_k": (top_k, {"ids": "top_k_ids", "behavior_log_prob": "top_k_behavior_log_prob"}),
        "full": (full, {"behavior": "behavior_logits"}),
        "head": (head, {"hidden": "behavior_hidden", "weight": "behavior_weight", "bias": "behavior_bias"}),
    }
    for kind, (build, names_of) in of.items():
        measured = Measured(kind, "kl")
        call = call_of(subject, base_cell(subject, divergence=measured, objective=PER_TOKEN))
        recorded = {name: call.hidden_arrays[world] for name, world in names_of.items()}

        def called(build: Any = build, call: Call = call, **arrays: Any) -> Any:
            return call.function(**call.arrays, divergence=build(**arrays))

        for name in recorded:
            dtypes = ARRAYS["tokens"] if name == "ids" else ARRAYS["logits"]
            yield ArrayPlace(f"{subject} divergence {kind}.{name}", name, library, recorded, called, name != "bias", dtypes)


class ChoicePlace(NamedTuple):
    """An argument that is one of a few things."""

    id: str
    name: str
    call: Callable[[Any], Any]


def choice_places() -> Iterator[ChoicePlace]:
    """Every objective, reduction, engine and structured divergence."""
    for subject in SUBJECTS:
        parameters = parameters_of(subject)
        for name in parameters.keys() & (CHOICES.keys() - {"xp"}):
            call = call_of(subject, base_cell(subject))
            function = _positional(subject, call) if name == "objective" else _put(call, name)
            yield ChoicePlace(f"{subject} {name}", name, function)
        if "divergence" in parameters and is_vocabulary(subject):
            call = call_of(subject, base_cell(subject, objective=PER_TOKEN, divergence=DType.FLOAT32))
            arrays = {name: a for name, a in call.arrays.items() if name != "divergence"}
            yield ChoicePlace(f"{subject} divergence", "divergence", lambda v, c=call, a=arrays: c.function(**a, divergence=v))


def _positional(subject: str, call: Call) -> Callable[[Any], Any]:
    row = SUBJECTS[subject]
    function = function_of(subject) if row.call is None else functools.partial(row.call, function_of(subject))
    options = {"reduction": drpo_core.token_mean} if "reduction" in parameters_of(subject) else {}
    return lambda value: function(value, **call.arrays, **options)


__all__ = ["GOOD", "ArrayPlace", "ChoicePlace", "Given", "Place", "array_places", "choice_places", "numbers"]
