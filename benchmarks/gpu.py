"""Check and time the library on a GPU: ``python benchmarks/gpu.py RESULTS.json [--seconds 480]``.

1. Numbers beside float64, and CUDA graphs (`gpu_checks.py`); a kernel that falls back to array operations is an error.
2. Seconds between events of the device, interleaved as `measure.py` says, and the peak of extra memory, of a table of cases
   (`gpu_cases.py`). The bandwidth of a copy and the speed of a matrix product are measured in the same run.

Each part that fails leaves its error in the results, and the exit status is 1. Nothing is downloaded. Needs torch 2.11 and
Triton 3.6, or later.

``--page docs/explanation/gpu.md`` measures nothing, and writes that page's section "Measured" from the results, or from there
being none. Results that the page shows are kept in benchmarks/gpu.json.

``--miniature`` runs all of it without a GPU, in small sizes, under Triton's interpreter. How long that takes says nothing,
and no page is written from it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpu_cases import GpuCase
    from gpu_device import Device

NOT_INSTALLED = "not installed"
SHARE_OF_CHECKS = 0.45
"""Of the time, at most; most of it goes to compiling."""
FIRST, LAST = "<!-- measured by benchmarks/gpu.py -->", "<!-- end of what was measured -->"


def main() -> int:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file")
    parser.add_argument("--seconds", type=float, default=480.0, help="that all of it may take")
    parser.add_argument("--miniature", action="store_true", help="small sizes, on the CPU, under Triton's interpreter")
    parser.add_argument("--page", type=Path, help="write its section from the results, and measure nothing")
    arguments = parser.parse_args()
    if arguments.page:
        write(arguments.page, arguments.results)
        return 0
    # Triton looks at this when it is imported
    os.environ.pop("TRITON_INTERPRET", None)
    if arguments.miniature:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = Results(arguments.results, arguments.seconds)
    results.measure(_device(miniature=arguments.miniature))
    return 1 if results.found["failures"] else 0


def _device(*, miniature: bool) -> Device:
    import torch  # noqa: PLC0415

    from gpu_device import Gpu, Miniature  # noqa: PLC0415 -- after Triton's variable

    if miniature:
        return Miniature()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no GPU here; --miniature runs without one")
    return Gpu()


class Results:
    """What was found by now, in a file from the first part on."""

    def __init__(self, path: Path, seconds: float) -> None:
        """The clock starts here."""
        self._path, self._seconds, self._started = path, seconds, time.monotonic()
        self.found: dict[str, Any] = {"failures": {}, "probes": {}, "checks": {}, "cases": []}

    def measure(self, device: Device) -> None:
        """Everything, each part in a try."""
        from drpo_core import SlowEngineWarning  # noqa: PLC0415

        from gpu_cases import cases, copy, product  # noqa: PLC0415
        from gpu_checks import checks  # noqa: PLC0415

        self.found = {"miniature": device.miniature, "machine": device.machine()} | self.found
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", SlowEngineWarning)
        for name, check in checks(device):
            self.part(name, partial(self.check, name, check))
        for name, make in {"bytes": copy, "flops": product}.items():
            self.part(f"probe of {name}", partial(self._probe, device, name, make))
        # modules are no garbage
        gc.freeze()
        every = cases(device)
        for done, (name, of_case) in enumerate(every.items()):
            self.part(name, partial(self._time, device, of_case, len(every) - done))
            # tensors of a case that are in a cycle
            gc.collect()

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._started)

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Run it, and keep what was found, or its error."""
        start = time.monotonic()
        try:
            run()
        except Exception as error:  # noqa: BLE001 -- a compiler or a peer may raise anything
            self._failure(name, error)
        print(f"{time.monotonic() - start:6.1f} s  {name}", file=sys.stderr, flush=True)
        self._path.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _failure(self, name: str, error: Exception) -> None:
        traceback.print_exception(error)
        self.found["failures"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"

    def check(self, name: str, check: Callable[[], Any]) -> None:
        """Keep a `gpu_checks.Check`; raise if it does not hold, or comes too late."""
        if self._left() < (1.0 - SHARE_OF_CHECKS) * self._seconds:
            msg = "no time is left for this check"
            raise TimeoutError(msg)
        found = check()
        self.found["checks"][name] = found._asdict()
        if not found.error <= found.limit:
            msg = f"differs from float64 by {found.error:.1e} of the largest number, more than {found.limit:.1e}"
            raise ArithmeticError(msg)

    def _probe(self, device: Device, name: str, make: Callable[[Device], tuple[int, Callable[[], object]]]) -> None:
        amount, function = make(device)
        function()
        self.found["probes"][name] = amount / median(device.seconds(function) for _ in range(9))

    def _time(self, device: Device, make: Callable[[], GpuCase], cases_left: int) -> None:
        from measure import Case, interleave  # noqa: PLC0415

        case = make()
        # compiling counts, too
        deadline = time.monotonic() + self._left() / cases_left
        rows: dict[str, dict[str, Any]] = {}
        for label, function in case.functions.items():
            rows[label] = {"status": NOT_INSTALLED}
            if function is None:
                continue
            try:
                function()
                rows[label] = {"status": "measured", "memory": device.memory(function)}
            except Exception as error:  # noqa: BLE001 -- as above
                rows[label] = {"status": "failed"}
                self._failure(f"{case.name}: {label}", error)
        running = {label: case.functions[label] for label, row in rows.items() if row["status"] == "measured"}
        rounds = Case(case.name, case.about, 1, running, seconds=max(0.0, deadline - time.monotonic()))  # type: ignore[arg-type]
        least, most = device.sizes.rounds
        for label, seconds in interleave(rounds, least=least, most=most, clock=device.seconds).items():
            rows[label] |= {"seconds": seconds, **self._derived(case, seconds)}
        first = rows[next(iter(case.functions))]
        for row in rows.values():
            if "seconds" in row and "seconds" in first:
                pairs = zip(first["seconds"], row["seconds"], strict=True)
                row["times_as_fast"] = median(one / other for one, other in pairs)
        shown = {"name": case.name, "about": case.about, "least_bytes": case.least_bytes, "flops": case.flops}
        self.found["cases"].append(shown | {"rows": rows})

    def _derived(self, case: GpuCase, seconds: list[float]) -> dict[str, float]:
        """The median, and the least traffic and arithmetic of the work as a share of what the probes could do meanwhile."""
        middle, probes = median(seconds), self.found["probes"]
        work = {"bytes": case.least_bytes, "flops": case.flops}
        shares = {f"share_of_{name}": n / middle / probes[name] for name, n in work.items() if n and name in probes}
        return {"median": middle, **shares}


# --- the page ---


def write(page: Path, results: Path) -> None:
    """Put the section between its markers."""
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
    if found and found["miniature"]:
        sys.exit(f"benchmarks/gpu.py: {results} is of a miniature, which measures nothing")
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(FIRST)
    _, after = rest.split(LAST)
    page.write_text(f"{before}{FIRST}\n\n{section(found)}\n\n{LAST}{after}", encoding="utf-8")


def section(found: dict[str, Any] | None) -> str:
    """What the page says of results, or of there being none."""
    if found is None:
        return (
            "Compiled and interpreted, **never timed on a GPU**. `python benchmarks/gpu.py RESULTS.json` checks the numbers\n"
            "and times every function on one, in at most 8 minutes; `--page docs/explanation/gpu.md` then writes them here."
        )
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    machine, probes, checks = found["machine"], found["probes"], found["checks"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    yield f"{machine['device']}, driver {machine['driver']}, {packages}."
    rates = {"bytes": "a copy moves {:.2f} TB/s", "flops": "a bfloat16 product makes {:.0f} TFLOP/s"}
    measured = [text.format(probes[name] / 1e12) for name, text in rates.items() if name in probes]
    yield f"In the same run {' and '.join(measured)}." if measured else "The probes failed."
    held = sum(check["error"] <= check["limit"] for check in checks.values())
    yield f"{held} of {len(checks)} checks beside float64 hold; {len(found['failures'])} parts failed."
    for name, error in found["failures"].items():
        yield f"\n- failed: {name}: `{error}`"
    yield "\nMedians of interleaved calls, between events on the device, which finds nothing of the call before in its cache."
    yield "Share: the least traffic, or arithmetic, of the work, beside what the copy, or the product, does in the same time."
    for case in found["cases"]:
        share = "share_of_flops" if case["flops"] else "share_of_bytes"
        yield f"\n**{case['about'][0].upper()}{case['about'][1:]}**\n"
        yield f"| | ms | {share.replace('_', ' ')} | extra MiB | times as fast |"
        yield "|---|--:|--:|--:|--:|"
        for label, row in case["rows"].items():
            yield f"| {label} | {' | '.join(_cells(row, share))} |"


def _cells(row: dict[str, Any], share: str) -> list[str]:
    if row["status"] != "measured":
        return [row["status"], *3 * ["–"]]
    part = f"{100 * row[share]:.0f} %" if share in row else "–"
    ratio = f"{row['times_as_fast']:.2f}" if "times_as_fast" in row else "–"
    return [f"{1e3 * row['median']:.3g}", part, f"{row['memory'] / 2**20:,.0f}", ratio]


if __name__ == "__main__":
    sys.exit(main())
