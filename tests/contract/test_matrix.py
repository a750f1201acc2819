"""Every public function: every pair of choices on two of its axes, a sample of the full product, every refusal.

All of it takes minutes and is in the report, `python -m contract`. Here is every refusal and, of what is not compiled for
each cell, every eighth; numba's loops over the few tokens of a cell are interpreted.
"""

from __future__ import annotations

import math

import pytest
from contract import failures, matrix
from contract.cells import product
from contract.reasons import REFUSED, left_out, refusals
from contract.subjects import ARRAYS, SUBJECTS, axes_of

pytestmark = pytest.mark.usefixtures("interpreted_over_few")

PARTS = 3
"""Tests a subject, so that workers share it."""

DRAWN = 30
"""Combinations of dtypes that are run as a whole, and how many of more."""


def some(subject):
    """The cells of the report that are run here."""
    cells = [cell for cell in matrix.matrix_of(subject).cells if not matrix.is_slow(cell)]
    refused = [cell for cell in cells if refusals(subject, cell)]
    return refused + [cell for cell in cells if not refusals(subject, cell)][::8]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("subject", SUBJECTS)
def test_pairs_of_choices(subject, part, ledger):
    ran = failures.run(subject, some(subject)[part::PARTS])
    ledger(ran, matrix.matrix_of(subject).left_out if part == 0 else None)


def test_every_refusal_that_must_come_has_a_cell():
    refused = {refusal.reason for subject in SUBJECTS for cell in some(subject) for refusal in refusals(subject, cell)}
    assert {refusal.reason for _, refusal in REFUSED if refusal.always} <= refused


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
    cells = [cell for cell in cells if not matrix.is_slow(cell)]
    if len(cells) > DRAWN:
        cells = cells[:: math.ceil(len(cells) / DRAWN)]
    ledger(failures.run(subject, cells))
