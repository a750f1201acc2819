"""The verification kit: whether a policy loss is what it claims to be, in value and gradient, mask and boundary.

Any loss will do: NumPy, torch or JAX, per token or reduced, with a gradient weight or with autodiff alone. Declare what it
claims, and every property P1 to P27 that follows is searched for a counterexample. Four lines in a test file:

>>> from drpo_core import DPPO
>>> from drpo_core.testing import from_function, parametrize_with_checks
>>> def my_loss(log_prob, behavior_log_prob, advantages, mask):  # in your project: from my_project import my_loss
...     keep = mask & (advantages * (np.exp(log_prob) - np.exp(behavior_log_prob)) <= 0.25 * np.abs(advantages))
...     ratio = np.exp(np.where(keep, log_prob - behavior_log_prob, 0.0))
...     return np.where(keep, -advantages * ratio, 0.0)
>>> import numpy as np

>>> @parametrize_with_checks([from_function(my_loss, "numpy", objective=DPPO(delta=0.25))])
... def test_my_loss(check):
...     check()

or, outside pytest:

>>> from drpo_core.testing import check_implementation
>>> report = check_implementation(from_function(my_loss, objective=DPPO(delta=0.25)), checks=["P1", "P5", "P9"])
>>> report.ok
True

A failure shows the smallest counterexample found, and a snippet that reproduces it with the function and NumPy alone.
What does not apply is reported with the reason. A mutant is an `Implementation` like any other.

What is checked: `drpo_core.testing.checks`. What it is compared with: `drpo_core.testing.oracle`, in 50 digits. What it
is given: `drpo_core.testing.strategies`. How hard it is tried: `drpo_core.testing.profiles`.
"""

from drpo_core.testing.batch import TokenBatch, Vocabulary
from drpo_core.testing.checks import CHECKS, CheckInfo, PropertyViolated
from drpo_core.testing.implementation import Evaluation, Implementation, Source, from_adapter, from_core, from_function
from drpo_core.testing.runner import CheckResult, Report, check_implementation, parametrize_with_checks, run_check
from drpo_core.testing.strategies import token_batches, vocabularies

__all__ = [
    "CHECKS",
    "CheckInfo",
    "CheckResult",
    "Evaluation",
    "Implementation",
    "PropertyViolated",
    "Report",
    "Source",
    "TokenBatch",
    "Vocabulary",
    "check_implementation",
    "from_adapter",
    "from_core",
    "from_function",
    "parametrize_with_checks",
    "run_check",
    "token_batches",
    "vocabularies",
]
