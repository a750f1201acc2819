"""The matrix as a report: ``python -m contract [-v] [subject …]`` with ``tests`` on the path.

A line a subject (cells, pairs of choices, what held, was refused and failed, seconds of CPU), then the failures, each kind
in its smallest cell, then what no cell has, by reason.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import jax
import torch.distributed as dist
from contract import failures, matrix, open_cells
from contract.check import check
from contract.subjects import SUBJECTS


def main(names: list[str]) -> int:
    """Run the subjects whose names contain one of these; how many cells failed."""
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003 -- JAX's signature
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    left_out, totals, every = Counter[str](), Counter[str](), []
    for subject in SUBJECTS:
        if names and not any(name in subject for name in names):
            continue
        start = time.process_time()
        of = matrix.matrix_of(subject)
        outcomes, kinds = Counter[str](), {}
        for cell in of.cells:
            try:
                outcomes[check(subject, cell)] += 1
            except Exception as error:  # noqa: BLE001 -- listed below
                if (known := open_cells.reason(subject, error)) is not None:
                    outcomes[f"open ({known})"] += 1
                    continue
                outcomes["failed"] += 1
                kinds.setdefault(failures.kind(error), []).append(cell)
        seconds = time.process_time() - start
        counts = "  ".join(f"{outcomes[word]:4} {word}" for word in ("held", "refused", "failed"))
        print(f"{subject:45} {len(of.cells):4} cells  {of.pairs:5} pairs  {counts}  {seconds:6.1f} s", flush=True)  # noqa: T201
        for line in failures.lines(subject, kinds, shrunk=50):
            print("   ", line, flush=True)  # noqa: T201
        left_out.update(of.left_out)
        totals.update(outcomes)
        totals["cells"] += len(of.cells)
        totals["pairs"] += of.pairs
        every.append(seconds)
    print(", ".join(f"{n} {word}" for word, n in totals.items()), f"{sum(every):.0f} s")  # noqa: T201
    for reason, n in left_out.most_common():
        print(f"{n:6} pairs of choices that no cell has: {reason}")  # noqa: T201
    return totals["failed"]


if __name__ == "__main__":
    raise SystemExit(1 if main(sys.argv[1:]) else 0)
