"""Proofs for `docs/derivations/reduction.md`: a reduction is linear, so its coefficients say everything; enumerate them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from drpo_core import sequence_mean_token_mean, sequence_mean_token_sum, token_mean
from drpo_core.reduction import prompt_mean

ROWS, WIDTH, HORIZON = 2, 3, 4.0
MASKS = [np.array(bits, dtype=bool).reshape(ROWS, WIDTH) for bits in product([False, True], repeat=ROWS * WIDTH)]
IDS = np.repeat(np.arange(ROWS), WIDTH)
REDUCTIONS = {
    "token mean": token_mean,
    "mean of means": sequence_mean_token_mean,
    "mean of sums": lambda *args, **options: sequence_mean_token_sum(*args, horizon=HORIZON, **options),
}


def coefficients(reduction, mask, **options):
    """∂(scalar)/∂(value), one basis vector at a time."""
    basis = np.eye(mask.size).reshape(-1, *mask.shape)
    return np.array([float(reduction(values, mask, **options)) for values in basis]).reshape(mask.shape)


def stated(name, mask):
    """The coefficients that the docs state."""
    lengths, sequences = mask.sum(axis=1, keepdims=True), max(mask.any(axis=1).sum(), 1)
    return {
        "token mean": mask / max(mask.sum(), 1),
        "mean of means": mask / np.maximum(lengths, 1) / sequences,
        "mean of sums": mask / HORIZON / sequences,
    }[name]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_coefficients(name):
    """enumeration: for all 64 masks of 2 × 3 tokens the coefficients are m/N, m/(n_s S), m/(H S); 0 if all is masked."""
    for mask in MASKS:
        np.testing.assert_allclose(coefficients(REDUCTIONS[name], mask), stated(name, mask), rtol=1e-15)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_packed_is_padded(name):
    """enumeration: packed with segment ids has the padded coefficients, for all 64 masks."""
    for mask in MASKS:
        packed = coefficients(REDUCTIONS[name], mask.ravel(), segment_ids=IDS)
        np.testing.assert_allclose(packed.reshape(mask.shape), stated(name, mask), rtol=1e-15)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_split(name):
    """enumeration: rows reduced apart with the whole batch's denominator add up to the whole, for all 64 masks."""
    for mask in MASKS:
        whole = float(mask.sum() if name == "token mean" else mask.any(axis=1).sum())
        parts = [coefficients(REDUCTIONS[name], row[None], normalizer=whole) for row in mask]
        np.testing.assert_allclose(np.concatenate(parts), stated(name, mask), rtol=1e-15)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_token_weights(name):
    """enumeration: token weights u multiply the coefficients and leave the denominators alone, for all 64 masks."""
    weights = np.arange(1.0, 1.0 + ROWS * WIDTH).reshape(ROWS, WIDTH)
    for mask in MASKS:
        weighted = coefficients(REDUCTIONS[name], mask, token_weights=weights)
        np.testing.assert_allclose(weighted, stated(name, mask) * weights, rtol=1e-15)


@pytest.mark.parametrize("prompts", [(4, 4), (4, 9)], ids=["one prompt", "two prompts"])
def test_prompts(prompts):
    """enumeration: all rows of one prompt have m/N, each of its own prompt m/(n_s S); packed too, for all 64 masks."""
    of_rows = np.array(prompts)
    for mask in MASKS:
        expected = stated("token mean" if prompts[0] == prompts[1] else "mean of means", mask)
        np.testing.assert_allclose(coefficients(prompt_mean, mask, group_ids=of_rows), expected, rtol=1e-15)
        packed = coefficients(prompt_mean, mask.ravel(), group_ids=np.repeat(of_rows, WIDTH))
        np.testing.assert_allclose(packed.reshape(mask.shape), expected, rtol=1e-15)
