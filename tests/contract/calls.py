"""A cell's call: the function with everything but its arrays bound, its arrays, and what the oracle needs to know."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import drpo_jax
import drpo_torch
import numpy as np
import torch
import torch.distributed as dist
from contract import names
from contract.arrays import exact, make
from contract.axes import BOUND_ARRAY, Divided, DType, Given, Library, Measured, Number, Recorded, Reduction, Storage, Use
from contract.oracle import LINEAR_DIVISOR, tempered
from contract.records import Records
from contract.subjects import ARRAYS, FLAGS, GOOD, NUMBERS, OF_MODES, PER_TOKEN, SUBJECTS, Subject, function_of, parameters_of
from contract.world import SOFTCAP, TEMPERATURE, junk, padded, renormalised, world
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import drpo_core

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHTS = (1.0, -0.5)
"""Of the two rewards of a sequence."""

MANY = 1e6
"""Tokens of a batch whose micro-batch is the world."""

Cell = dict[str, Any]
"""Choice by axis."""


class Call(NamedTuple):
    """`function(**arrays)` is what is tested; `oracle()` what it should give, as float64 by path."""

    function: Callable[..., Any]
    arrays: dict[str, Any]
    oracle: Callable[..., dict[str, torch.Tensor]]
    exact: dict[str, torch.Tensor]
    """The arrays' own values, as float64, int64 or bool."""
    hidden_arrays: dict[str, Any]
    """Arrays that are arguments of arguments: bound to a reduction, or of a recorded policy."""


def call_of(subject: str, cell: Cell, *, spoilt: bool = False) -> Call:
    """The call of a cell; `spoilt` with anything at masked positions."""
    row, library = SUBJECTS[subject], cell["library"]
    numbers = _numbers(row, cell, spoilt=spoilt)
    storage = cell.get("storage", Storage.CONTIGUOUS)

    def array(name: str, dtype: DType = DType.FLOAT32) -> Any:
        # all words of an expanded head would be the same
        head = name.removeprefix("behavior_") in {"weight", "bias"} and storage is Storage.EXPANDED
        return make(numbers[row.world.get(name, name)], dtype, library, Storage.SLICED if head else storage)

    given = [name for name in parameters_of(subject) if cell[name] is not Given.ABSENT and cell[name] is not Number.ABSENT]
    arrays = {
        name: array(name, cell[name]) for name in given if name in {*ARRAYS, *PER_TOKEN} and isinstance(cell[name], DType)
    }
    needed = getattr(names.of_label(cell.get("objective")), "arguments", ())
    arrays |= {
        name: array(name) for name in OF_MODES if name in needed and name in parameters_of(subject) and name not in arrays
    }
    records = Records(cell, array, arrays.get("mask"), needed)
    options, known = {}, {}
    for name in given:
        if (pair := _option(name, cell, records)) is not None:
            options[name], known[name] = pair
    if "log_normalizer" in arrays:
        mapped = {name: known[name] for name in ("temperature", "support", "vocabulary_size") if name in known}
        mapped |= {"temperature": torch.tensor(exact(arrays["temperature"]))} if "temperature" in arrays else {}
        numbers["log_normalizer"] = tempered(torch.tensor(exact(arrays["logits"])), **mapped).logsumexp(-1).numpy()
        arrays["log_normalizer"] = array("log_normalizer", cell["log_normalizer"])
    if cell.get("xp") is Given.GIVEN:
        options["xp"] = names.namespace(next(iter(arrays.values())))
    values = {name: torch.tensor(exact(a)) for name, a in arrays.items()}
    recorded = {name: torch.tensor(exact(a)) for name, a in records.arrays.items()}
    if "bound_token_weights" in recorded:
        known["bound_token_weights"] = recorded["bound_token_weights"]
    if any(isinstance(choice, (Measured, Recorded)) for choice in known.values()):
        known["recorded"] = {"behavior_temperature": TEMPERATURE, "behavior_softcap": SOFTCAP} | recorded
    function = function_of(subject) if row.call is None else functools.partial(row.call, function_of(subject))
    # what a signature requires by position or by name
    objective = (options.pop("objective"),) if "objective" in options else ()

    def oracle(**exact_arrays: torch.Tensor) -> dict[str, torch.Tensor]:
        own = {k: v for k, v in known.items() if k != "objective"}
        return row.oracle(*((known["objective"],) if objective else ()), **exact_arrays, **own)

    def called(**some: Any) -> Any:
        if cell.get("vocabulary_group") is Divided.DTENSOR:
            some = some | {name: _dtensor(some[name], dim) for name, dim in _DIVIDED.items() if name in some}
        return function(*objective, **(options | some))

    return Call(called, arrays, oracle, values, records.arrays)


def _numbers(row: Subject, cell: Cell, *, spoilt: bool) -> dict[str, Any]:
    """The world of a cell, over its support and with its padding."""
    numbers = world(cell["shape"], cell["regime"], cell.get("masked"))
    numbers |= {"behavior_weight": numbers["weight"], "behavior_bias": numbers["bias"]}
    if cell.get("support", Given.ABSENT) is not Given.ABSENT:
        support = numbers[row.world.get("support", "support")]
        numbers = renormalised(numbers | {"support": support}, cell["regime"])
    if cell.get("vocabulary_size", Number.ABSENT) is not Number.ABSENT:
        numbers = padded(numbers)
    return junk(numbers, numbers["mask"]) if spoilt else numbers


def _option(name: str, cell: Cell, records: Records) -> tuple[Any, Any] | None:
    """What an argument that is no array is given, and what the oracle needs to know of it."""
    choice, library = cell[name], cell["library"]
    if isinstance(choice, (Measured, Recorded)):
        return records.of(choice), choice
    if name in FLAGS:
        return choice, choice
    if name in NUMBERS and isinstance(choice, Number):
        value = MANY if name == "normalizer" and cell["use"] is Use.SCALED else GOOD[name]
        return _number(value, choice, library), value
    if name in _VALUES:
        return _VALUES[name](choice), _VALUES[name](choice)
    if name == "support":
        return records.support(choice)
    if name == "reduction":
        bound = any(value == BOUND_ARRAY for _, value in choice.bound)
        return _reduction(
            choice, records.kept("token_weights", word="bound_token_weights") if bound else None, library
        ), choice
    return (dist.group.WORLD, None) if choice is Divided.GROUP else None


_DIVIDED = {"logits": -1, "weight": 0, "bias": 0}
"""The axis of the vocabulary in what ranks divide."""


def _dtensor(local: torch.Tensor, dim: int) -> DTensor:
    """The only part of a tensor as a DTensor, whose gradient arrives at the part."""
    return DTensor.from_local(local, init_device_mesh("cpu", (1,)), [Shard(dim)])


_VALUES: dict[str, Callable[[Any], Any]] = {
    "objective": names.of_label,
    "weights": lambda _: WEIGHTS,
    "engine": lambda choice: choice.value,
}
"""What a choice of these stands for."""


def _number(value: float, choice: Number, library: Library) -> Any:
    if choice is Number.PLAIN:
        return value
    if choice is Number.SCALAR:
        return np.int64(value) if isinstance(value, int) else np.float64(value)
    return make(np.asarray(value), DType.FLOAT32, library)


def linear(values: Any, mask: Any) -> Any:
    """A linear function of one's own."""
    return (values * mask).sum() / LINEAR_DIVISOR


def _reduction(choice: Reduction, weights: Any, library: Library) -> Any:
    if choice.name == "linear":
        return (drpo_torch if library is Library.TORCH else drpo_jax).linear_reduction(linear)
    function = getattr(drpo_core, choice.name)
    bound = {name: weights if value == BOUND_ARRAY else value for name, value in choice.bound}
    return functools.partial(function, **bound) if bound else function


def signature_of(subject: str) -> inspect.Signature:
    """Of the public function."""
    return inspect.signature(function_of(subject))
