"""Every public function: every pair of choices on two of its axes, a sample of the full product, every refusal."""

from __future__ import annotations

import math

import pytest
from contract import failures, matrix
from contract.cells import product
from contract.reasons import left_out, refusals
from contract.subjects import ARRAYS, SUBJECTS, axes_of, is_vocabulary

PARTS = 3
"""Tests a subject, so that workers share it."""

WHOLE, DRAWN = 300, 40
"""Combinations of dtypes that are run as a whole, and how many of more, or of slow ones."""


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("subject", SUBJECTS)
def test_pairs_of_choices(subject, part, ledger):
    every = matrix.matrix_of(subject)
    ran = failures.run(subject, every.cells[part::PARTS])
    ledger(ran, every.left_out if part == 0 else None)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_dtypes_of_all_arrays(subject, ledger):
    """The dtype of each array that is always given, independently of the others', in each engine."""
    every = axes_of(subject)
    names = [
        name
        for name in every
        if (name in ARRAYS and name not in {"mask", "sampled_in_top_k"} and every[name][0] in ARRAYS[name])
    ]
    names += ["engine"] if "engine" in every else []
    libraries = every["library"]
    cells = [{**cell, "library": library} for library in libraries for cell in product(every, names)]
    cells = [cell for cell in cells if left_out(subject, cell) is None and not refusals(subject, cell)]
    compiled = "jax" in libraries and (is_vocabulary(subject) or len(names) > 3)
    most = DRAWN if compiled else WHOLE
    if len(cells) > most:
        cells = cells[:: math.ceil(len(cells) / most)]
    ledger(failures.run(subject, cells))
