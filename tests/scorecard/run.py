"""Run the kit on one framework's rows: ``python tests/scorecard/run.py verl results/verl.json``.

Runs in the framework's own environment. The module `declare_<framework>` says what is run and what it claims to be.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from drpo_core.testing import CHECKS, TokenBatch, run_check

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from row import Row

    from drpo_core.testing import Implementation

PROFILE = "ci"


def main() -> None:
    """Write what the checks found to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", help="a module declare_<framework> beside this file")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    # deprecations inside the releases are not what is measured
    warnings.simplefilter("ignore")
    declared = import_module(f"declare_{arguments.framework}")
    result = {
        "framework": arguments.framework,
        "profile": PROFILE,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in declared.PACKAGES},
        "rows": [measure(row) for row in declared.rows()],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def measure(row: Row) -> dict[str, object]:
    """One row: its declaration and every check's result."""
    started = time.perf_counter()
    implementation = row.implementation
    results = [asdict(run_check(suited(info, row), implementation, PROFILE)) for info in CHECKS.values()]
    seconds = time.perf_counter() - started
    failed = {result["property"] for result in results if result["status"] == "failed"}
    ordered = " ".join(sorted(failed, key=lambda name: int(name[1:])))
    print(f"{implementation.name}: {seconds:.1f} s, failed: {ordered or 'none'}", flush=True)  # noqa: T201
    return {
        "name": implementation.name,
        "called": row.called,
        "boundary": row.boundary,
        "claims": {
            "objective": None if implementation.objective is None else row.objective,
            "form": implementation.form,
            "reduction": implementation.reduction,
            "dtype": ", ".join(implementation.dtypes),
            "normalizer": implementation.takes_normalizer,
            "local": implementation.local,
        },
        "counts_empty_rows": row.counts_empty_rows,
        "empty_is_finite": empty_is_finite(implementation),
        "seconds": round(seconds, 1),
        "results": results,
    }


def suited(info: Any, row: Row) -> Any:
    """The check on batches that are not the subject of another property, so that one defect is counted once.

    Fully masked batches belong to P5. Empty rows belong to P6, if the row is declared to count them.
    """
    if info.property == "P5":
        return info
    cases: Callable[[Implementation], Any] = info.cases
    axis = -1 if row.counts_empty_rows and info.property != "P6" else None

    def filtered(implementation: Implementation) -> Any:
        return cases(implementation).filter(lambda case: all(batch.mask.any(axis=axis).all() for batch in _batches(case)))

    return replace(info, cases=filtered)


def _batches(case: Any) -> list[TokenBatch]:
    return [part for part in (case if isinstance(case, tuple) else (case,)) if isinstance(part, TokenBatch)]


def empty_is_finite(implementation: Implementation) -> bool:
    """Whether a fully masked batch or sequence does no harm on its own, as P5 states."""
    shape = implementation.shape or (2, 3)
    values = np.full(shape, -1.0)
    all_but_first = np.broadcast_to(np.arange(shape[0])[:, None] > 0, shape)
    for mask in (np.zeros(shape, dtype=bool), all_but_first):
        result = implementation(TokenBatch(values, values, values, mask))
        if not (np.isfinite(result.loss).all() and np.isfinite(result.gradient).all()) or result.gradient[~mask].any():
            return False
    return True


if __name__ == "__main__":
    main()
