"""Tinker: a service, whose documented formulas are written down in tests/modes."""

from tensors import by_formula
from test_tinker import theirs as formula

FUNCTION = "the formulas of its documentation"
RELEASE = "0.38"
PACKAGES = ("torch",)
FORMULAS = ("importance_sampling", "ppo", "cispo", "dro")
SETTINGS = [
    ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("cispo", {"clip_low_threshold": 0, "clip_high_threshold": 1.1}),
    ("dro", {"beta": 0.05}),
]


def theirs(name, keys):
    """Loss and gradient of the documentation."""
    return by_formula(formula(name, **keys))
