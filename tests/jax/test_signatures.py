"""drpo_jax has the names and arguments of drpo_torch, but for a declared few."""

import inspect

import drpo_jax
import drpo_torch
import pytest

# XLA compiles everything, arrays are never written to, and a chunk's logits take all of the vocabulary
TORCH_ONLY = {"engine", "overwrite_logits", "chunk_vocabulary"}
# a process group there is a mesh axis here
RENAMED = {"vocabulary_group": "vocabulary_axis"}

FUNCTIONS = [name for name in drpo_jax.__all__ if inspect.isfunction(getattr(drpo_jax, name))]
CLASSES = [name for name in drpo_jax.__all__ if inspect.isclass(getattr(drpo_jax, name))]


def parameters(module, name):
    """Name → (kind, default), in order where it matters: of positional arguments."""
    signature = inspect.signature(getattr(module, name))
    positional = [p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    every = {RENAMED.get(p.name, p.name): (p.kind, p.default) for p in signature.parameters.values()}
    named = {name: argument for name, argument in every.items() if name not in TORCH_ONLY}
    return positional, named


def test_names():
    assert drpo_jax.__all__ == drpo_torch.__all__
    assert sorted(FUNCTIONS + CLASSES) == sorted(drpo_jax.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_same_arguments(name):
    assert parameters(drpo_jax, name) == parameters(drpo_torch, name)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_same_fields(name):
    ours, theirs = (getattr(module, name) for module in (drpo_jax, drpo_torch))
    assert parameters(drpo_jax, name) == parameters(drpo_torch, name)
    assert getattr(ours, "_fields", None) == getattr(theirs, "_fields", None)


def test_every_exception_is_one():
    """What is declared as torch's alone is no argument of drpo_jax, and is one of drpo_torch."""
    of_torch = {p for name in FUNCTIONS for p in inspect.signature(getattr(drpo_torch, name)).parameters}
    of_jax = {p for name in FUNCTIONS for p in inspect.signature(getattr(drpo_jax, name)).parameters}
    assert not (TORCH_ONLY | set(RENAMED)) & of_jax
    assert of_torch >= TORCH_ONLY | set(RENAMED)
    assert of_jax - of_torch == set(RENAMED.values())
