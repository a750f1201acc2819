"""The faster `where` of NumPy against NumPy's own."""

import itertools

import numpy as np
import pytest

from drpo_core.selection import SelectingNamespace

XP = SelectingNamespace(np)
SPECIAL = (0.0, -0.0, 1.0, -1e-45, np.inf, -np.inf, np.nan)


def same_bits(result, expected):
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert result.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_pair_of_special_values(dtype):
    x, y = np.array(list(itertools.product(SPECIAL, SPECIAL)), dtype).T
    for condition in (np.arange(len(x)) % 2 == 0, np.ones(len(x), dtype=bool), np.zeros(len(x), dtype=bool)):
        x.flags.writeable = y.flags.writeable = condition.flags.writeable = False
        same_bits(XP.where(condition, x, y), np.where(condition, x, y))
        for scalar in SPECIAL:
            same_bits(XP.where(condition, x, scalar), np.where(condition, x, dtype(scalar)))
            same_bits(XP.where(condition, scalar, y), np.where(condition, dtype(scalar), y))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_bits(dtype):
    integer = np.dtype(f"i{np.dtype(dtype).itemsize}")
    limits = np.iinfo(integer)
    x, y = np.random.default_rng(0).integers(limits.min, limits.max, (2, 8, 512), integer, endpoint=True).view(dtype)
    condition = np.random.default_rng(1).random((8, 512)) < 0.5
    same_bits(XP.where(condition, x, y), np.where(condition, x, y))
    same_bits(XP.where(condition[:, ::2], x[:, ::2], y[:, 1::2]), np.where(condition[:, ::2], x[:, ::2], y[:, 1::2]))


def test_what_else_is_numpys():
    condition = np.array([True, False])
    for x, y in ((np.array([1, 2]), 0), (1.0, 2.0), (np.ones((3, 2)), np.zeros(2)), (np.ones(2, np.float32), np.zeros(2))):
        same_bits(XP.where(condition, x, y), np.where(condition, x, y))
    assert XP.exp is np.exp
