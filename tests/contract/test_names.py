"""The table of subjects is the public interface: nothing is missing from it, and nothing in it is gone."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from contract import names
from contract.subjects import ARRAYS, CHOICES, CLASSES, ELSEWHERE, FLAGS, NO_SUBJECTS, NUMBERS, SUBJECTS, parameters_of

from drpo_core.modes import Mode
from drpo_core.objectives import OBJECTIVES

FUNCTIONS = {name: value for name, value in names.public().items() if inspect.isfunction(value)}
TYPES = {name: value for name, value in names.public().items() if inspect.isclass(value)}


def is_objective(value):
    return dataclasses.is_dataclass(value) and hasattr(value, "loss") and hasattr(value, "weight") and value is not Mode


def test_every_public_function_is_a_subject():
    assert FUNCTIONS.keys() == SUBJECTS.keys() | NO_SUBJECTS.keys()


def test_every_public_class_is_an_objective_or_has_a_reason_not_to_be_one():
    assert {name.rpartition(".")[2] for name, value in TYPES.items() if not is_objective(value)} == CLASSES.keys()


def test_every_objective_is_on_its_axis():
    every = {family.objective for family in OBJECTIVES}
    assert {value for value in TYPES.values() if is_objective(value)} <= every
    assert {type(objective) for objective in names.objectives().values()} == every


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_parameter_is_in_a_table(subject):
    known = ARRAYS.keys() | NUMBERS.keys() | FLAGS | CHOICES.keys()
    own = set() if SUBJECTS[subject].parameters else set(inspect.signature(FUNCTIONS[subject]).parameters) - ELSEWHERE.keys()
    assert own | parameters_of(subject).keys() <= known


@pytest.mark.parametrize("kind", dict.fromkeys(family.objective for family in OBJECTIVES), ids=lambda kind: kind.__name__)
def test_every_threshold_has_a_domain(kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    # bounds of a token's own are a value; tests/core/objectives/test_tokenwise.py has their numbers
    assert fields <= NUMBERS.keys() | {"divergence", "bounds"}


def test_a_missing_subject_would_be_seen():
    assert FUNCTIONS.keys() != SUBJECTS.keys() - {"drpo_core.k3"}
