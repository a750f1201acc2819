"""The flag --objective: an objective of the table as a Python call, or one of the user's own as module:NAME."""

import ast
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from drpo_core import anchors, corrections, modes, objectives, penalties
from drpo_core.cli.loading import load, user_line
from drpo_core.cli.usage import UsageError, literal, one_of
from drpo_core.objectives import OBJECTIVES, Objective
from drpo_core.objectives.protocol import check_objective, inside_of, loss_of, ratio_weight_of, weight_of
from drpo_core.tokens import Tokens

__all__ = ["FLAG", "Parsed", "parse_objective", "try_out"]

FLAG = "--objective"
_ROOMS = (objectives, anchors, corrections, penalties, modes)
EXAMPLE = 'such as "DRPO(delta=0.15)"'


@dataclass(frozen=True)
class Parsed:
    """An objective, what it warned about when it was made, and the user's file that it comes from."""

    objective: Objective
    warnings: tuple[str, ...]
    file: str | None = None


def parse_objective(text: str) -> Parsed:
    """Make the objective that a user typed.

    One of the table is a call with its hyper-parameters, such as ``DRPO(delta=0.15)``. One of the user's own is
    ``package.module:NAME`` or ``path/to/file.py:NAME``, where NAME is an objective, or makes one when it is called; a call
    may follow, such as ``mine.py:Mine(tau=0.3)``. Hyper-parameters are literals. A mode is ``modes.FRAMEWORK(…)`` with the
    framework's names and keys, or ``Mode(…)`` as it prints.
    """
    head, parenthesis, rest = text.strip().partition("(")
    if ":" not in head:
        return _mode(text) if head.strip() == "Mode" or head.strip().startswith("modes.") else _of_the_table(text)
    found = load(head, wanted="NAME")
    if parenthesis:
        if not callable(found.thing):
            msg = f"{FLAG}: {head} is a {type(found.thing).__name__} and takes no hyper-parameters"
            raise UsageError(msg)
        objective, caught = _made(text, found.thing, _hyper_parameters(text, _call(f"_({rest}")))
    elif inspect.isclass(found.thing) or (callable(found.thing) and not hasattr(found.thing, "weight")):
        objective, caught = _made(text, found.thing, {})
    else:
        objective, caught = found.thing, ()
    try:
        check_objective(objective)
    except TypeError as error:
        msg = f"{FLAG}: {text}: {error}"
        raise UsageError(msg) from error
    return Parsed(cast("Objective", objective), caught, found.file)


def try_out(parsed: Parsed, text: str) -> None:
    """Call each method with a few tokens, so that a mistake in it is one line that names the user's code."""
    tokens = Tokens.checked(np.log([0.3, 0.2, 0.5]), np.log([0.2, 0.3, 0.5]), np.array([1.0, -1.0, 1.0]))
    for name, checked in {"loss": loss_of, "weight": weight_of, "ratio_weight": ratio_weight_of, "inside": inside_of}.items():
        method = getattr(parsed.objective, name, None)
        if method is None:
            continue
        try:
            method(tokens)
        except Exception as error:
            where = f" ({user_line(error, parsed.file)})" if parsed.file else ""
            msg = f"{FLAG}: {text}: {name} raised {type(error).__name__}: {error}{where}"
            raise UsageError(msg) from error
        try:
            checked(parsed.objective, tokens)
        except TypeError as error:
            msg = f"{FLAG}: {text}: {error}"
            raise UsageError(msg) from error


def _of_the_table(text: str) -> Parsed:
    known: dict[str, Callable[..., object]] = {family.objective.__name__: family.objective for family in OBJECTIVES}
    call = _call(text)
    if call is None or not isinstance(call.func, ast.Name):
        names = ", ".join(sorted(known))
        msg = f"{FLAG}: expected one of {names} with its hyper-parameters, {EXAMPLE}, or module:NAME, got {text!r}"
        raise UsageError(msg)
    one_of(FLAG, call.func.id, sorted(known))
    objective, caught = _made(text, known[call.func.id], _hyper_parameters(text, call))
    return Parsed(cast("Objective", objective), caught)


def _mode(text: str) -> Parsed:
    """Make a mode from the call of a framework's function, or from the line that a mode prints."""
    call = _call(text)
    if call is None:
        msg = f"{FLAG}: expected a call such as \"modes.verl('gspo')\", got {text!r}"
        raise UsageError(msg)
    if isinstance(call.func, ast.Attribute):
        frameworks = [name for name in modes.__all__ if name.islower()]
        one_of(FLAG, call.func.attr, frameworks)
        keys = _hyper_parameters(text, ast.Call(call.func, [], call.keywords))
        objective, caught = _made(text, partial(getattr(modes, call.func.attr), *map(partial(literal, FLAG), call.args)), keys)
    else:
        objective, caught = _made(text, partial(_of_parts, call), {})
    if not isinstance(objective, modes.Mode):
        msg = f"{FLAG}: {text} is a {type(objective).__name__}, not a mode"
        raise UsageError(msg)
    return Parsed(cast("Objective", objective), caught)


def _of_parts(node: ast.expr) -> object:
    """The value of calls of the library's classes with literals, nested; nothing else is evaluated."""
    if isinstance(node, ast.Tuple):
        return tuple(map(_of_parts, node.elts))
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return literal(FLAG, node)
    made = next((getattr(room, node.func.id) for room in _ROOMS if node.func.id in room.__all__), None)
    if made is None:
        msg = f"{FLAG}: {node.func.id} is no class of drpo_core's objectives, anchors, corrections, penalties or modes"
        raise UsageError(msg)
    values = {str(keyword.arg): _of_parts(keyword.value) for keyword in node.keywords}
    return made(*map(_of_parts, node.args), **values)


def _call(text: str) -> ast.Call | None:
    """Parse a call; None if the text is something else."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return call if isinstance(call, ast.Call) else None


def _hyper_parameters(text: str, call: ast.Call | None) -> dict[str, object]:
    """Return the keyword arguments of a call, which are literals: nothing is evaluated."""
    if call is None or call.args or any(keyword.arg is None for keyword in call.keywords):
        msg = f"{FLAG}: hyper-parameters are given by name, {EXAMPLE}, got {text!r}"
        raise UsageError(msg)
    return {str(keyword.arg): literal(FLAG, keyword.value) for keyword in call.keywords}


def _made(text: str, make: Callable[..., object], values: dict[str, object]) -> tuple[object, tuple[str, ...]]:
    """Call what makes an objective; return it and the warnings."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            objective = make(**values)
    except (TypeError, ValueError) as error:
        reason = str(error).replace(f"{getattr(make, '__name__', '')}.__init__() ", "")
        msg = f"{FLAG}: {text}: {reason}"
        raise UsageError(msg) from error
    return objective, tuple(str(warning.message) for warning in caught)
