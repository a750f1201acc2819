"""Guesses the framework in which a loss is written."""

import inspect
import re
from collections.abc import Callable, Mapping
from types import CodeType, ModuleType
from typing import Any

__all__ = ["FRAMEWORKS", "guess"]

FRAMEWORKS = ("numpy", "torch", "jax")
PACKAGES = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "numpy": "numpy", "drpo_torch": "torch", "drpo_jax": "jax"}
WORDS = PACKAGES | {"Tensor": "torch", "jnp": "jax", "np": "numpy", "NDArray": "numpy"}
"""Words by which an annotation in quotes, which is never evaluated, names a framework."""


def guess(function: Callable[..., Any]) -> str | None:
    """Return the framework a function is written in: by its annotations, else what it uses, else what its module imports."""
    while hasattr(function, "func"):
        function = function.func
    plain = inspect.unwrap(function)
    plain = getattr(plain, "__func__", plain)
    scope: dict[str, object] = getattr(plain, "__globals__", {})
    annotated = {framework for a in getattr(plain, "__annotations__", {}).values() for framework in _frameworks_of(a, scope)}
    code = getattr(plain, "__code__", None)
    used = {_framework(scope[name]) for name in _names(code) if name in scope} if code is not None else set()
    imported = {_framework(value) for value in scope.values() if isinstance(value, ModuleType)}
    for found in (annotated, used, imported):
        frameworks = found & {"torch", "jax"}
        if len(frameworks) == 1:
            return frameworks.pop()
        if not frameworks and "numpy" in found:
            return "numpy"
    return None


def _frameworks_of(annotation: object, scope: Mapping[str, object]) -> set[str]:
    if not isinstance(annotation, str):
        return {_framework(annotation)} | {_framework(inner) for inner in getattr(annotation, "__args__", ())}
    words = re.findall(r"\w+", annotation)
    return {_framework(scope[word]) if word in scope else WORDS.get(word, "") for word in words}


def _framework(thing: object) -> str:
    origin = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", "") or ""
    return PACKAGES.get(str(origin).partition(".")[0], "")


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
