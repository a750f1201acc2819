"""The machinery of `drpo_core.replay`, operation by operation; whole passes are tested with the engines that use it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import array_api_compat.numpy
import numpy as np
import pytest
import torch
from drpo_torch import operations, policy_loss

from drpo_core import DRPO, numpy_operations, policy_loss_and_gradient
from drpo_core.ratio import Tokens
from drpo_core.replay import _pieces, _program

LIBRARIES = {"numpy": numpy_operations.LIBRARY, "torch": operations.LIBRARY}
SPECIAL = (0.0, -0.0, 1.0, -2.5, 1e-45, -1e-45, np.inf, -np.inf, np.nan)

each_library = pytest.mark.parametrize("name", LIBRARIES)


def test_pieces_cover_a_matrix_once():
    for rows, columns in [(1, 1), (1, 35), (35, 1), (7, 3), (3, 10), (2, 25)]:
        seen = np.zeros((rows, columns), dtype=int)
        for piece in _pieces(rows, columns, 10):
            assert 0 < seen[piece].size <= 10
            seen[piece] += 1
        assert (seen == 1).all()


@each_library
def test_registers_are_shared(name):
    library = LIBRARIES[name]
    program = _program(DRPO(delta=0.2), library.xp.float32, diagnostics=True, measured=False, library=library)
    assert program.registers < len(program.steps) / 4


def along(_, x, tokens):
    """sign(A)·x of a finite x."""
    return tokens.along_advantage(tokens.xp.where(tokens.xp.isfinite(x), x, 3.0))


EXPRESSIONS: dict[str, Callable] = {
    "select": lambda xp, x, tokens: xp.where(x > tokens.advantages, x, tokens.advantages),
    "select, or 0": lambda xp, x, tokens: xp.where(x == tokens.advantages, x, 0.0),
    "0, or select": lambda xp, x, tokens: xp.where(x == tokens.advantages, 0.0, x),
    "0, or select, not equal": lambda xp, x, tokens: xp.where(x != tokens.advantages, 0.0, x),
    "0, or select, less": lambda xp, x, tokens: xp.where(x < tokens.advantages, 0.0, x),
    "constant, or select": lambda xp, x, tokens: xp.where(x <= tokens.advantages, 0.25, x),
    "flip": lambda xp, x, tokens: xp.where(tokens.advantages >= 0.0, -x, x),
    "difference of cleared": lambda xp, x, tokens: (
        xp.where(tokens.advantages > 0.0, 0.0, x) - xp.where(tokens.advantages > 0.0, 0.0, tokens.advantages)
    ),
    "difference of what is cleared elsewhere": lambda xp, x, tokens: (
        xp.where(tokens.advantages > 0.0, 0.0, x) - xp.where(x > 0.0, 0.0, tokens.advantages)
    ),
    "used by two steps in a row": lambda _, x, tokens: (x + 1.0) * tokens.advantages - (x + 1.0),
    "at most": lambda xp, x, _: xp.where(x > 0.5, 0.5, x),
    "at least": lambda xp, x, _: xp.where(x < 0.5, 0.5, x),
    "minimum": lambda xp, x, tokens: xp.minimum(x, tokens.advantages),
    "maximum": lambda xp, x, tokens: xp.maximum(x, tokens.advantages),
    "minimum of a constant": lambda xp, x, _: xp.minimum(x, xp.full_like(x, -1.0)),
    "maximum of a constant": lambda xp, x, _: xp.maximum(x, xp.full_like(x, -1.0)),
    "and": lambda xp, x, tokens: xp.where((x > 0.0) & (tokens.advantages > 0.0), 1.0, xp.full_like(x, 2.0)),
    "or, not": lambda xp, x, tokens: xp.where((x > 0.0) | ~(tokens.advantages > 0.0), 1.0, xp.full_like(x, 2.0)),
    "classes": lambda xp, x, tokens: xp.where(
        xp.isnan(x), 1.0, xp.where(xp.isfinite(x), 2.0, xp.where(xp.isinf(tokens.advantages), 4.0, xp.full_like(x, 3.0)))
    ),
    "along": along,
}


@dataclass(frozen=True)
class Expression:
    """An objective whose loss is any function of log π, A and what is made of them."""

    function: Callable

    def loss(self, tokens):  # noqa: D102
        return self.function(tokens.xp, tokens.log_prob, tokens)

    def weight(self, tokens):  # noqa: D102
        return tokens.xp.ones_like(tokens.ratio)

    def inside(self, tokens):  # noqa: D102
        return tokens.ratio == tokens.ratio


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
@each_library
def test_every_pair_of_special_values(name, expression, dtype):
    """Each pair as a batch of one token, whose loss it is: as NumPy computes the expression, NaN for NaN."""
    objective = Expression(EXPRESSIONS[expression])
    for x, a in itertools.product(np.array(SPECIAL, dtype), repeat=2):
        log_prob, behavior, advantages = (np.array([value], dtype) for value in (x, -1.0, a))
        with np.errstate(all="ignore"):
            expected = objective.loss(Tokens.of(log_prob, behavior, advantages, xp=array_api_compat.numpy))
        batch = {"log_prob": log_prob, "behavior_log_prob": behavior, "advantages": advantages, "mask": np.ones(1, bool)}
        if name == "numpy":
            found = policy_loss_and_gradient(objective, **batch, diagnostics=False).loss
        else:
            tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
            found = policy_loss(objective, **tensors, engine="eager", diagnostics=False)[0].numpy()
        np.testing.assert_array_equal(found, np.asarray(expected, dtype)[0], err_msg=f"x = {x}, A = {a}")


@each_library
def test_none_of_these_falls_back(name):
    for expression in EXPRESSIONS.values():
        library = LIBRARIES[name]
        program = _program(Expression(expression), library.xp.float32, diagnostics=False, measured=False, library=library)
        assert program.steps
