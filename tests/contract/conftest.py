"""Report of the matrix after a run: cells, what was left out and why, seconds."""

from __future__ import annotations

import time
from collections import Counter

import interpreted_loops
import pytest
import torch.distributed as dist

from drpo_core.engines import numba_loop, recording

_RAN: Counter[str] = Counter()
_LEFT_OUT: Counter[str] = Counter()
_SECONDS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """A process group of one, in which the distributed functions do what they do among several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def interpreted_over_few():
    """Loops over few tokens are interpreted: a cell of twelve takes a second to compile. Large batches run compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba_loop, "_compile", interpreted_loops.interpreted_over_few(numba_loop._compile))  # noqa: SLF001
        patch.setattr(recording, "_programs", {})
        yield


@pytest.fixture
def ledger(request):
    """Where a test writes down how many cells it ran, and which pairs no cell can have."""
    start = time.perf_counter()

    def write(ran: Counter[str], left_out: Counter[str] | None = None) -> None:
        request.node.user_properties.append(("contract", (dict(ran), dict(left_out or {}))))

    yield write
    request.node.user_properties.append(("contract seconds", time.perf_counter() - start))


def pytest_runtest_logreport(report):
    if report.when != "teardown":
        return
    for name, value in report.user_properties:
        if name == "contract":
            _RAN.update(value[0])
            _LEFT_OUT.update(value[1])
        elif name == "contract seconds":
            _SECONDS[report.nodeid.partition("[")[0].rpartition("::")[2]] += value


def pytest_terminal_summary(terminalreporter):
    if not _RAN:
        return
    terminalreporter.section("contract matrix")
    cells = ", ".join(f"{n} {kind}" for kind, n in _RAN.most_common())
    seconds = ", ".join(f"{name} {n:.0f} s" for name, n in _SECONDS.most_common())
    terminalreporter.write_line(f"{_RAN.total()} cells: {cells}; {seconds}")
    for reason, n in _LEFT_OUT.most_common():
        terminalreporter.write_line(f"{n:6} pairs of choices that no cell has: {reason}")
