"""Run every check on every mutant and write `killers.json`: ``python tests/mutants/matrix.py``, ten minutes.

With words as arguments: only the mutants that have one of them in their name, or have changed since.
`test_mutants.py` verifies what it wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hypothesis
import jax
from mutants import MUTANTS, Mutant

from drpo_core.testing import CHECKS, run_check
from drpo_core.testing.profiles import PROFILES

PATH = Path(__file__).with_name("killers.json")

GENERATE_ONLY = [hypothesis.Phase.generate]
"""Not shrinking: that a counterexample exists is enough."""


def settings(max_examples: int) -> hypothesis.settings:
    """The `ci` profile, the same cases in every run, with another number of them."""
    return hypothesis.settings(PROFILES["ci"], max_examples=max_examples, phases=GENERATE_ONLY, print_blob=False)


def killers(mutant: Mutant, checks: list[Any], max_examples: int) -> list[str]:
    """Names of the checks that fail on a mutant."""
    implementation = mutant.implementation()
    with mutant.world():
        return [info.name for info in checks if run_check(info, implementation, settings(max_examples)).status == "failed"]


def main(*words: str) -> None:
    """Compute the matrix, or the rows of some mutants, and keep the others."""
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003 -- JAX's signature
    stored = json.loads(PATH.read_text())["killers"] if words else {}
    rows = {}
    for mutant in MUTANTS:
        known = stored.get(mutant.name)
        if known is not None and known["change"] == mutant.digest() and not any(word in mutant.name for word in words):
            rows[mutant.name] = known
            continue
        found = killers(mutant, list(CHECKS.values()), 50)
        rows[mutant.name] = {"change": mutant.digest(), "checks": found}
        properties = list(dict.fromkeys(CHECKS[name].property for name in found))
        flag = "" if mutant.killed_by in properties else f"   NOT BY {mutant.killed_by}"
        print(f"{mutant.name}: {' '.join(properties)}{flag}", flush=True)  # noqa: T201 -- a command
    text = json.dumps({"checks": list(CHECKS), "killers": rows}, indent=1, ensure_ascii=False)
    PATH.write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
