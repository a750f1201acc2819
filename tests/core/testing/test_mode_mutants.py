"""The tests of modes kill every seeded mutant of their code, and each of these tests passes on the code as it is."""

import dataclasses

import pytest
from array_api_strict import ArrayAPIStrictFlags
from backends import STRICTEST
from mode_mutants import MUTANTS, ModeMutant

from drpo_core import _sequences, loss

ids = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)


@ids
def test_a_test_kills(mutant, monkeypatch):
    # a mode that was compiled as a whole would not see what changes in the library itself
    monkeypatch.setattr(loss, "compiled_mode", lambda *_, **__: None)
    killer = mutant.killer()
    with ArrayAPIStrictFlags(**STRICTEST):
        # recompiled without a change the code passes, so that what kills a mutant is its change
        with dataclasses.replace(mutant, now=mutant.was).world():
            killer()
        with mutant.world(), pytest.raises((Exception, pytest.fail.Exception)):
            killer()
        # what the mutant did is undone
        killer()


def test_there_are_enough_and_no_two_alike():
    assert len({mutant.mistake for mutant in MUTANTS}) == len(MUTANTS) >= 30


def test_a_change_is_made_exactly_once():
    wrong = ModeMutant("none", _sequences.Sequences.mean, "no such line", "", "core/test_sequences.py", "test_errors")
    with pytest.raises(ValueError, match=r"Sequences\.mean: 'no such line' occurs 0 times"), wrong.world():
        pass
