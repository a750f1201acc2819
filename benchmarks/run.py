"""Run the benchmarks: ``python benchmarks/run.py RESULTS [--only tokens vocabulary …] [--share 0.2]``.

Each group has a process of its own, with its threads and its malloc setting, and leaves a JSON file of raw seconds;
`write.py` makes docs/benchmarks.md of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from measure import Case

# threads of each group
GROUPS = {
    "tokens": 2,
    "tokens-small": 1,
    "jax": 2,
    "jax-one": 1,
    "vocabulary": 2,
    "linear-float32": 2,
    "linear-bfloat16": 2,
    "linear-peers": 2,
    "log-prob": 2,
    "growth": 2,
    "memory": 2,
    "smoke": 1,
}
VOCABULARY = 151_936
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Start the groups, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="directory of the JSON files")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[name for name in GROUPS if name != "smoke"])
    parser.add_argument("--share", type=float, default=1.0, help="of the time that each case may take")
    parser.add_argument("--huge-pages", action="store_true", help="let malloc ask for huge pages")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        (name,) = arguments.only
        _measure(name, arguments.results, arguments.share)
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        threads = str(GROUPS[name])
        # page faults on fresh memory cost more than many of these losses, so which pages is part of the result
        settings = {
            "OMP_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
            "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(arguments.huge_pages)}",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, str(arguments.results), "--inside", "--only", name]
        subprocess.run([*command, "--share", str(arguments.share)], check=True, env=os.environ | settings)


def _measure(name: str, results: Path, share: float) -> None:
    if name == "jax-one":
        # XLA takes its threads from the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    warnings.simplefilter("ignore")
    from measure import interleave, machine, others  # noqa: PLC0415 -- after the affinity

    measured = []
    for case in _cases(name):
        with others() as load:
            seconds = interleave(case, share=share)
        shown = {"name": case.name, "about": case.about, "units": case.units}
        measured.append(shown | {"others": round(load[0], 2), "seconds": seconds})
        print(f"{name}: {case.about}", flush=True)
    memory = _memory("linear") if name == "memory" else _memory("log_prob") if name == "log-prob" else {}
    errors = _errors() if name == "log-prob" else {}
    result = {"group": name, "machine": machine(), "cases": measured, "memory": memory, "errors": errors}
    (results / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _cases(name: str) -> Iterator[Case]:  # noqa: C901 -- a case a group
    import torch  # noqa: PLC0415

    import linear  # noqa: PLC0415
    import log_prob  # noqa: PLC0415
    import tokens  # noqa: PLC0415
    import vocabulary  # noqa: PLC0415

    torch.set_num_threads(GROUPS[name])
    match name:
        case "tokens":
            yield from tokens.cases((512, 8192), 2)
        case "tokens-small":
            yield from tokens.cases((64, 4096), 1)
        case "jax":
            yield from tokens.jax_cases((512, 8192))
        case "jax-one":
            yield from tokens.jax_cases((64, 4096))
        case "vocabulary":
            yield from vocabulary.cases(64, VOCABULARY)
        case "linear-float32":
            yield from linear.cases(1024, VOCABULARY, torch.float32, 30, with_peers=False)
        case "linear-bfloat16":
            yield from linear.cases(1024, VOCABULARY, torch.bfloat16, 20, with_peers=False)
        case "linear-peers":
            yield from linear.cases(512, 32_768, torch.float32, 25, with_peers=True)
        case "log-prob":
            yield from log_prob.cases(512, 32_768, torch.float32, 40)
            yield from log_prob.cases(512, 32_768, torch.bfloat16, 40)
        case "growth":
            yield from tokens.growth()
            yield from vocabulary.growth()
        case "smoke":
            yield from tokens.smoke()


def _errors() -> dict[str, Any]:
    """Of log π, ∂hidden and ∂weight, by primitive and dtype."""
    import torch  # noqa: PLC0415

    from log_prob import errors  # noqa: PLC0415

    shape = 4096, 4096
    return {f"{label}, {name}": e for name in DTYPES for label, e in errors(*shape, getattr(torch, name)).items()}


def _memory(module: str) -> dict[str, Any]:
    """Extra bytes of one call, each in a process of its own."""
    script = f"import sys, json; from {module} import peak; print(json.dumps(peak(sys.argv[1], sys.argv[2])))"
    labels: Iterable[str] = ("unfused", "ours, arrays", "ours, compiled", "ours, compiled, low memory")
    if module == "log_prob":
        from log_prob import primitives  # noqa: PLC0415

        labels = primitives()
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for label in labels:
            command = [sys.executable, "-c", script, label, dtype]
            # 4 KiB pages: a huge page counts as resident before it is used
            environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
            )
            found[f"{label}, {dtype}"] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
