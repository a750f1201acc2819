"""The kit kills every seeded mutant, and what kills it is the property that should."""

import json
from collections import defaultdict
from pathlib import Path

import matrix
import mutants
import pytest
from mutants import CORRECT, FAILURES, MUTANTS, NOT_ABOUT_THE_LOSS

from drpo_core.testing import CHECKS, run_check

PROPERTIES = [f"P{n}" for n in range(1, 25)]
STORED = json.loads(matrix.PATH.read_text())
KILLERS = {
    name: list(dict.fromkeys(CHECKS[check].property for check in row["checks"])) for name, row in STORED["killers"].items()
}
"""Properties that kill each mutant, as `matrix.py` found with 50 cases a check."""

SOLE = defaultdict(list)
for mutant in MUTANTS:
    if len(KILLERS.get(mutant.name, [])) == 1:
        SOLE[KILLERS[mutant.name][0]].append(mutant)

KEPT = {
    "P10": "follows from the formula of w, which P3 and P20 compare; bounds in μ alone, which the formula does not enter",
    "P12": "follows from the formula of w, which P3 and P20 compare; a statement about every objective that needs no formula",
    "P14": "follows from the formula of w, which P3 and P20 compare; an identity of the implementation with itself",
    "P15": "follows from the formula of w, which P3 and P20 compare; owes nothing to that formula, but to its partner's",
    "P18": "follows from the formula of w, which P3 and P20 compare; bounds w by its own values at two π",
    "P19": "follows from the formula of w, which P3 and P20 compare; an indicator, whatever the region is",
}
"""Properties that are nowhere the only killer, and why they are kept."""

SURVIVORS: tuple[str, ...] = ()
"""Names of mutants that the kit does not kill, and why. Empty, or the kit has a hole."""

ids = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


def fails(info, mutant, max_examples):
    with mutant.world():
        return run_check(info, mutant.implementation(), matrix.settings(max_examples)).status == "failed"


@pytest.mark.parametrize("name", CORRECT)
def test_the_correct_losses_pass(name):
    implementation = CORRECT[name].implementation()
    results = [run_check(info, implementation, matrix.settings(6)) for info in CHECKS.values()]
    assert [(r.check, r.reason) for r in results if r.status == "failed"] == []


@ids
def test_the_kit_kills(mutant):
    checks = [info for info in CHECKS.values() if info.property == mutant.killed_by]
    assert any(fails(info, mutant, 50) for info in checks) != (mutant.name in SURVIVORS)


def test_there_are_no_survivors():
    assert SURVIVORS == ()


def test_every_reported_failure_has_a_mutant():
    seeded = {mutant.seeds for mutant in MUTANTS}
    assert set(FAILURES) <= seeded
    assert all(seed in FAILURES or ":" in seed or "≠" in seed for seed in seeded)
    assert not set(NOT_ABOUT_THE_LOSS) & set(FAILURES)
    for reason in NOT_ABOUT_THE_LOSS.values():
        file, test = reason.rpartition("tests/")[2].split("::")
        assert f"def {test}(" in (Path(mutants.__file__).parents[1] / file).read_text()


def test_there_are_enough_mutants():
    assert len(MUTANTS) == len({mutant.name for mutant in MUTANTS}) >= 45


def test_the_stored_matrix_is_of_these_mutants_and_checks():
    assert STORED["checks"] == list(CHECKS), "run python tests/mutants/matrix.py"
    stored = {name: row["change"] for name, row in STORED["killers"].items()}
    assert stored == {mutant.name: mutant.digest() for mutant in MUTANTS}, "run python tests/mutants/matrix.py changed"
    assert {m.name for m in MUTANTS if m.killed_by not in KILLERS[m.name]} == set(SURVIVORS)


def test_every_property_is_a_sole_killer_or_kept_for_a_reason():
    # those of modes kill in test_mode_kit.py
    assert {info.property for info in CHECKS.values()} == {*PROPERTIES, "P25", "P26", "P27"}
    assert sorted({*SOLE, *KEPT}) == sorted(PROPERTIES)
    assert not set(SOLE) & set(KEPT)
    assert set(PROPERTIES) == {killer for killers in KILLERS.values() for killer in killers}


@pytest.mark.parametrize("number", SOLE)
def test_sole_killers_are_alone(number):
    # that the property itself kills is tested above
    mutant = SOLE[number][0]
    others = [info for info in CHECKS.values() if info.property != number]
    assert matrix.killers(mutant, others, 6) == []


def test_a_change_is_made_exactly_once():
    wrong = mutants.Mutant("no such line", "misread: nothing", "numpy_drpo", "no such line", "", "P1")
    with pytest.raises(ValueError, match="no such line: 'no such line' occurs 0 times in numpy_drpo"):
        wrong.implementation()


def test_the_mistakes_shared_with_the_reference_end_with_their_world():
    before = mutants.oracle.reference
    for mutant in MUTANTS:
        with mutant.world():
            assert (mutants.oracle.reference is before) == (mutant.shared is None)
    assert mutants.oracle.reference is before
