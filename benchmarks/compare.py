"""The benchmarks of two checkouts, interleaved: ``python benchmarks/compare.py OTHER --only tokens vocabulary``.

Each checkout has a process of its own, which imports its own library and its own cases. They take turns, function by
function, so that a ratio compares two calls a moment apart. Functions are matched by case and label; ``--rename jit=compiled``
replaces a word in the other's labels. Prints, for each, the median of (other's seconds / this one's seconds) and its
quartiles: above 1 this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Start the two workers, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--only", nargs="+", required=True, help="groups of benchmarks/run.py that both have")
    parser.add_argument("--rename", nargs="*", default=[], help="old=new, in the other checkout's labels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file for the ratios")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.other, arguments.only[0])
        return
    found = {}
    renamed = [pair.partition("=")[::2] for pair in arguments.rename]
    for group in arguments.only:
        found[group] = _compare(arguments.other.resolve(), group, renamed, arguments.rounds)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _compare(other: Path, group: str, renamed: list[tuple[str, str]], rounds: int) -> dict[str, list[float]]:
    workers = [_Worker(root, group) for root in (HERE, other)]
    mine, theirs = ({key: key for key in worker.functions} for worker in workers)
    for old, new in renamed:
        theirs = {(case.replace(old, new), label.replace(old, new)): key for (case, label), key in theirs.items()}
    ratios = {}
    for key in mine:
        if key not in theirs:
            continue
        names = (mine[key], theirs[key])
        seconds: list[list[float]] = [[], []]
        for done in range(rounds + 1):
            order = [0, 1] if random.getrandbits(1) else [1, 0]
            for i in order:
                taken = workers[i].call(*names[i])
                if done:
                    seconds[i].append(taken)
        each = [theirs_ / mine_ for mine_, theirs_ in zip(*seconds, strict=True)]
        low, _, high = quantiles(each, n=4, method="inclusive")
        ratios[" | ".join(key)] = [median(each), low, high]
        print(f"{group:15} {median(each):6.2f} ({low:.2f}–{high:.2f})  {key[0]}: {key[1]}", flush=True)
    for key in theirs.keys() - mine.keys():
        print(f"{group:15} only in the other: {key[0]}: {key[1]}", flush=True)
    return ratios


class _Worker:
    """A process of one checkout that calls a function of its benchmarks when told to."""

    def __init__(self, root: Path, group: str) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "adapters", root / "benchmarks")))}
        command = [sys.executable, __file__, str(root), "--only", group, "--worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment | _threads(root, group)
        )
        self.functions: list[tuple[str, str]] = [(case, label) for case, label in self._read()]

    def call(self, case: str, label: str) -> float:
        """Seconds of one call."""
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        pipe.write(json.dumps([case, label]) + "\n")
        pipe.flush()
        return float(self._read())

    def _read(self) -> Any:
        return json.loads(self._process.stdout.readline())  # type: ignore[union-attr]


def _threads(root: Path, group: str) -> dict[str, str]:
    script = "import sys; from run import GROUPS; print(GROUPS[sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", script, group], check=True, capture_output=True, text=True, cwd=root / "benchmarks"
    )
    count = done.stdout.strip()
    return {"OMP_NUM_THREADS": count, "NUMBA_NUM_THREADS": count, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}


def _work(root: Path, group: str) -> None:
    sys.path.insert(0, str(root / "benchmarks"))
    warnings.simplefilter("ignore")
    from run import _cases  # noqa: PLC0415 -- of this root

    print(json.dumps([[case.name, label] for case in _cases(group) for label in case.functions]), flush=True)
    case = None
    for line in sys.stdin:
        name, label = json.loads(line)
        if case is None or case.name != name:
            # a case's functions share variables with the next one's, so that it runs before the next is made
            case = next(case for case in _cases(group) if case.name == name)
        started = time.perf_counter()
        case.functions[label]()
        print(json.dumps(time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
