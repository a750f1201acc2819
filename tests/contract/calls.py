"""A cell's call: the function with everything but its arrays bound, its arrays, and what the oracle needs to know."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import drpo_jax
import drpo_torch
import numpy as np
import torch
from contract import names
from contract.arrays import exact, make
from contract.axes import BOUND_ARRAY, DType, Given, Library, Measured, Number, Reduction, Storage, Use
from contract.oracle import LINEAR_DIVISOR
from contract.subjects import ARRAYS, FLAGS, GOOD, NUMBERS, OF_MODES, SUBJECTS, function_of, parameters_of
from contract.world import SOFTCAP, TEMPERATURE, junk, world

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
    numbers = world(cell["shape"], cell["regime"], cell.get("masked"))
    numbers |= {"behavior_weight": numbers["weight"], "behavior_bias": numbers["bias"]}
    if spoilt:
        numbers = junk(numbers, numbers["mask"])
    storage = cell.get("storage", Storage.CONTIGUOUS)

    def array(name: str, dtype: DType = DType.FLOAT32) -> Any:
        # all words of an expanded head would be the same
        head = name.removeprefix("behavior_") in {"weight", "bias"} and storage is Storage.EXPANDED
        return make(numbers[row.world.get(name, name)], dtype, library, Storage.SLICED if head else storage)

    given = [name for name in parameters_of(subject) if cell[name] is not Given.ABSENT and cell[name] is not Number.ABSENT]
    arrays = {name: array(name, cell[name]) for name in given if name in ARRAYS and isinstance(cell[name], DType)}
    needed = getattr(names.of_label(cell.get("objective")), "arguments", ())
    arrays |= {
        name: array(name) for name in OF_MODES if name in needed and name in parameters_of(subject) and name not in arrays
    }
    if "log_normalizer" in arrays:
        temperature = 1.0 if cell["temperature"] is Number.ABSENT else GOOD["temperature"]
        numbers["log_normalizer"] = torch.tensor(exact(arrays["logits"]) / temperature).logsumexp(-1).numpy()
        arrays["log_normalizer"] = array("log_normalizer", cell["log_normalizer"])
    options: dict[str, Any] = {name: cell[name] for name in given if name in FLAGS}
    known = dict(options)
    inner: dict[str, Any] = {}
    for name in given:
        choice = cell[name]
        if name in NUMBERS:
            known[name] = MANY if name == "normalizer" and cell["use"] is Use.SCALED else GOOD[name]
            options[name] = _number(known[name], choice, library)
        elif name in _VALUES:
            options[name] = known[name] = _VALUES[name](choice)
        elif name == "reduction":
            if any(value == BOUND_ARRAY for _, value in choice.bound):
                inner["bound_token_weights"] = array("token_weights")
            options[name], known[name] = _reduction(choice, inner.get("bound_token_weights"), library), choice
        elif isinstance(choice, Measured):
            options[name], recorded = _measured(choice, cell, array, library)
            inner |= recorded
            known |= {"divergence": choice}
    if cell.get("xp") is Given.GIVEN:
        options["xp"] = names.namespace(next(iter(arrays.values())))
    values = {name: torch.tensor(exact(a)) for name, a in arrays.items()}
    recorded = {name: None if a is None else torch.tensor(exact(a)) for name, a in inner.items()}
    if "bound_token_weights" in recorded:
        known["bound_token_weights"] = recorded["bound_token_weights"]
    if recorded.keys() - {"bound_token_weights"}:
        known["recorded"] = recorded | {"behavior_temperature": TEMPERATURE, "behavior_softcap": SOFTCAP}
    function = function_of(subject) if row.call is None else functools.partial(row.call, function_of(subject))
    # what a signature requires by position or by name
    objective = (options.pop("objective"),) if "objective" in options else ()

    def oracle(**exact_arrays: torch.Tensor) -> dict[str, torch.Tensor]:
        own = {k: v for k, v in known.items() if k != "objective"}
        return row.oracle(*((known["objective"],) if objective else ()), **exact_arrays, **own)

    def called(**some: Any) -> Any:
        return function(*objective, **(options | some))

    return Call(called, arrays, oracle, values, {k: v for k, v in inner.items() if v is not None})


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


def _measured(choice: Measured, cell: Cell, array: Callable[..., Any], library: Library) -> tuple[Any, dict[str, Any]]:
    """A recorded policy, and its arrays by the names they have in the world."""
    module = drpo_torch if library is Library.TORCH else drpo_jax
    if choice.of == "top_k":
        recorded = {
            "top_k_ids": array("top_k_ids", cell["tokens"]),
            "top_k_behavior_log_prob": array("top_k_behavior_log_prob"),
        }
        ids, log_prob = recorded.values()
        return module.TopKDivergence(kind=choice.kind, ids=ids, behavior_log_prob=log_prob), recorded
    if choice.of == "full":
        logits = array("behavior_logits", cell.get("logits", DType.FLOAT32))
        recorded = {"behavior_logits": logits}
        return module.FullDivergence(kind=choice.kind, behavior=logits, temperature=TEMPERATURE), recorded
    dtype = cell.get("hidden", DType.FLOAT32)
    recorded = {name: array(name, dtype) for name in ("behavior_hidden", "behavior_weight", "behavior_bias")}
    head = module.LinearHead(*recorded.values(), logit_softcap=SOFTCAP)
    return module.FullDivergence(kind=choice.kind, behavior=head, temperature=TEMPERATURE), recorded


def signature_of(subject: str) -> inspect.Signature:
    """Of the public function."""
    return inspect.signature(function_of(subject))
