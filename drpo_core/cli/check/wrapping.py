"""The user's loss as an `Implementation`: whose arguments are the kit's, and whose mistakes name the user's code."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from drpo_core.cli.check.declaration import RETURNS, Declared
from drpo_core.cli.check.framework import FRAMEWORKS, guess
from drpo_core.cli.check.notes import note
from drpo_core.cli.check.target import Target, find
from drpo_core.cli.loading import user_line
from drpo_core.cli.usage import UsageError, literal, one_of, pairs
from drpo_core.testing.batch import TokenBatch
from drpo_core.testing.implementation import ARGUMENTS, REDUCTIONS, Implementation, from_function

__all__ = ["About", "implementation_of"]

REQUIRED = ("log_prob", "behavior_log_prob", "advantages")


@dataclass
class About:
    """The report's facts about a loss, besides the implementation.

    `last` and `error` are of the last call, for failures without a snippet: its arguments, and where it raised.
    """

    file: str | None
    framework: str | None = None
    last: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def implementation_of(text: str, declared: Declared) -> tuple[Implementation, About]:
    """Return the target as the kit calls it."""
    claims = declared.claims()
    target = find(text)
    about = About(target.file)
    if isinstance(target.thing, Implementation):
        if given := declared.given():
            msg = f"{text} is an Implementation and declares itself: leave out {', '.join(given)}"
            raise UsageError(msg)
        source = target.thing.source
        if source is not None:
            source = replace(source, function=target.search_path + source.function)
        return _recorded(replace(target.thing, source=source), about), about
    if inspect.isclass(target.thing) or not callable(target.thing):
        kind = "a class" if inspect.isclass(target.thing) else f"a {type(target.thing).__name__}"
        msg = f"{text} is {kind}, not a function or an Implementation"
        raise UsageError(msg)
    about.framework = declared.framework or guess(target.thing)
    if about.framework is None:
        msg = f"{text}: which framework is it written in? --framework numpy, torch or jax"
        raise UsageError(msg)
    one_of("--framework", about.framework, FRAMEWORKS)
    implementation = _recorded(_wrapped(target, about.framework, declared, claims), about)
    _probe(implementation, declared)
    if not implementation.takes_mask:
        note(
            "the loss takes no mask, so masks (P1, P5 and P6) can't be checked; --map mask=NAME if it has one by another name"
        )
    return implementation, about


def _wrapped(target: Target, framework: str, declared: Declared, claims: dict[str, Any]) -> Implementation:
    function: Callable[..., Any] = target.thing  # type: ignore[assignment]
    names, constants = _signature(function, target.label, declared, claims["objective"])

    def loss(**batch: object) -> object:
        returned = function(**{names[key]: value for key, value in batch.items()}, **constants)
        return _part(returned, declared.returns)

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    loss.__signature__ = inspect.Signature([inspect.Parameter(key, keyword_only) for key in names])  # type: ignore[attr-defined]
    try:
        return from_function(
            loss,
            framework,
            returns_gradient="gradient" in declared.returns,
            name=target.label,
            call_source=_call_source(target, names, constants, RETURNS[declared.returns]),
            **claims,
        )
    except ModuleNotFoundError as missing:
        if missing.name != framework:
            raise
        msg = f"{framework} is not installed: pip install 'drpo-core[{framework}]'"
        raise UsageError(msg) from missing


def _part(returned: Any, returns: str) -> Any:
    """Return the part of what a function returned that the kit wants."""
    several = isinstance(returned, (tuple, list))
    if returns == "loss":
        if several or isinstance(returned, dict):
            what = f"a {type(returned).__name__} of {len(returned)}"
            msg = f"the loss returned {what}: --returns tuple-first, loss+gradient or loss+gradient+weight?"
            raise UsageError(msg)
        return returned
    needed = 1 if returns == "tuple-first" else returns.count("+") + 1
    if not several or len(returned) < needed:
        what = f"a tuple of {len(returned)}" if several else f"a {type(returned).__name__}"
        msg = f"--returns {returns}: the loss returned {what}"
        raise UsageError(msg)
    return returned[0] if returns == "tuple-first" else tuple(returned[:needed])


def _signature(
    function: Callable[..., Any], label: str, declared: Declared, objective: object
) -> tuple[dict[str, str], dict[str, object]]:
    """Return the function's name for each of the kit's arguments that it takes, and its constants."""
    mapped = pairs("--map", declared.renamed)
    for key in mapped:
        one_of("--map", key, ARGUMENTS)
    constants = {name: literal("--set", text) for name, text in pairs("--set", declared.constants).items()}
    parameters = _parameters(function, label)
    called = f"{label}({', '.join(str(p) for p in map(_bare, parameters.values()))})"
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    asked = {key: mapped.get(key, key) for key in ARGUMENTS if key in REQUIRED or key in mapped}
    if absent := [theirs for theirs in asked.values() if theirs not in named and not anything]:
        msg = f"{called} takes no {', '.join(absent)}; name its arguments with --map, such as --map log_prob=THEIRS"
        raise UsageError(msg)
    if unknown := [name for name in constants if name not in named and not anything]:
        msg = f"--set: {called} takes no {', '.join(unknown)}"
        raise UsageError(msg)
    free = {key: key for key in ARGUMENTS if key in named and key not in {*asked, *asked.values(), *constants}}
    names = {key: {**asked, **free}[key] for key in ARGUMENTS if key in asked or key in free}
    if twice := [theirs for theirs, count in Counter([*names.values(), *constants]).items() if count > 1]:
        msg = f"--map, --set: {called} would be given {', '.join(twice)} twice"
        raise UsageError(msg)
    if empty := [name for name, p in named.items() if p.default is p.empty and name not in {*names.values(), *constants}]:
        msg = f"{called}: no value for {', '.join(empty)}; --set {empty[0]}=VALUE, or --map OURS={empty[0]}"
        raise UsageError(msg)
    always = getattr(objective, "arguments", ())
    if absent := [key for key in always if key not in names]:
        msg = f"{called} takes no {', '.join(absent)}, which {objective!r} needs; name it with --map {absent[0]}=THEIRS"
        raise UsageError(msg)
    optional = [names[key] for key in ARGUMENTS[4:] if key in names and names[key] in named and key not in always]
    if needed := [theirs for theirs in optional if named[theirs].default is inspect.Parameter.empty]:
        msg = f"{called}: {', '.join(needed)} needs a default, such as None: most calls come without it"
        raise UsageError(msg)
    return names, constants


def _parameters(function: Callable[..., Any], label: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function; all that it needs can be passed by name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        msg = f"{label}: its signature can't be read; wrap it in a Python function with named arguments"
        raise UsageError(msg) from None
    if hidden := [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
        msg = f"{label}: {', '.join(hidden)} can't be passed by name (positional-only); drop the '/', or wrap the function"
        raise UsageError(msg)
    return parameters


def _bare(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty)


def _call_source(target: Target, names: Mapping[str, str], constants: Mapping[str, object], part: str) -> str:
    """Return statements that define `function`, which takes the kit's arguments."""
    fixed = [f"{name}={value!r}" for name, value in constants.items()]
    if set(ARGUMENTS[4:]) & set(names):
        passed = ", ".join(["**{names[name]: value for name, value in batch.items()}", *fixed])
        body = f"    batch = {{'log_prob': log_prob, **batch}}\n    return {target.expression}({passed}){part}"
        return f"{target.imports}\n\nnames = {dict(names)!r}\n\ndef function(log_prob, **batch):\n{body}"
    passed = ", ".join([*(f"{theirs}={ours}" for ours, theirs in names.items()), *fixed])
    return f"{target.imports}\n\ndef function({', '.join(names)}):\n    return {target.expression}({passed}){part}"


def _recorded(implementation: Implementation, about: About) -> Implementation:
    """Return the same implementation, which also remembers its last call and where in the user's code it failed."""

    def call(arguments: dict[str, Any], dtype: str) -> Any:
        about.last = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
        about.error = ""
        try:
            return implementation.call(arguments, dtype)
        except Exception as error:
            about.error = f"raised {type(error).__name__}: {' '.join(str(error).split())} ({user_line(error, about.file)})"
            raise

    return replace(implementation, call=call)


def _probe(implementation: Implementation, declared: Declared) -> None:
    """Call it once and refuse declarations that its result contradicts."""
    rows, columns = implementation.shape or (2, 3)
    log_prob = -0.25 - 0.125 * np.arange(rows * columns, dtype=float).reshape(rows, columns)
    mask = np.ones((rows, columns), dtype=bool)
    if implementation.takes_mask:
        mask[-1, -1] = False
    advantages = np.where(mask, 1.0, 0.5)
    batch = TokenBatch(log_prob, log_prob.copy(), advantages, mask)
    batch = batch.replace(**dict.fromkeys(implementation.others, log_prob.copy()))
    try:
        result = implementation(batch)
    except UsageError:
        raise
    except Exception:  # noqa: BLE001 -- each check reports it, with the user's line
        return
    reduced, shape = implementation.reduction != "none", result.loss.shape
    if result.loss.size == 1 and not reduced:
        # at π = μ the gradient of each token is −A times what the reduction multiplies it with
        each: dict[str, Any] = {name: replace(implementation, reduction=cast("Any", name)) for name in REDUCTIONS[1:]}
        fits = [name for name, as_if in each.items() if np.allclose(-result.gradient, advantages * as_if.coefficients(batch))]
        told = f"--reduction {fits[0]}, by its gradient" if fits else f"one of {', '.join(REDUCTIONS[1:])}"
        msg = f"{implementation.name} returns one number: say how it reduces tokens ({told})"
        raise UsageError(msg)
    if reduced and result.loss.size != 1:
        msg = f"--reduction {declared.reduction}: {implementation.name} returns a loss of shape {shape}, not one number"
        raise UsageError(msg)
    if not reduced and shape != batch.shape:
        msg = f"{implementation.name} returns a loss of shape {shape} for tokens of shape {batch.shape}"
        raise UsageError(msg)
