"""What XLA makes of the JAX adapter, read from the compiled programs: ``python benchmarks/hlo.py [--target cuda] [--json]``.

Function → kernels, temporary memory and how it grows with the tokens, and the bytes that its kernels read and write, beside
the least. Nothing is run, and no array is made: functions are compiled for shapes, at the vocabulary's true size. ``--page
PAGE`` puts the table into the page, in the place of that of the same target.

XLA compiles for an H100 where there is none, if JAX's plugin for CUDA is installed; no driver and no other package of NVIDIA
is needed: ``pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt``, of the version of JAX.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

TOKENS, ROWS = 1 << 21, 4096
"""Of log-probs, and of logits or hidden states; and twice as many."""
VOCABULARY, HIDDEN, TOP_K = 151_936, 4096, 20
TARGETS = {"cpu": "compiled for a CPU", "cuda": "compiled for an H100"}
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
"""What XLA's compiler is told of the GPU."""

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_NO_KERNEL = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id"}


class Case(NamedTuple):
    """A function of arrays of so many tokens, and the least bytes that it moves a token, or a logit: `unit` a token."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    tokens: int
    unit: int = 1
    least: float | None = None


class Instruction(NamedTuple):
    """A line of a program: the arrays that it makes, as (dtype, shape), and the names of its operands."""

    name: str
    operation: str
    arrays: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    calls: str | None
    index: int | None


class Program(NamedTuple):
    """A compiled program's computations by name, and which one is its entry."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def of(cls, text: str) -> Program:
        """From XLA's text."""
        computations: dict[str, list[Instruction]] = {}
        entry = name = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = head[2]
                computations[name], entry = [], name if head[1] else entry
            elif name and (found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)):
                # what a tuple holds may be tuples
                inside, _, options = found[4].partition("), ")
                calls, index = re.search(r"calls=%?([\w.-]+)", options), re.search(r"index=(\d+)", line)
                arrays = _arrays(line[: line.index(f" {found[3]}(")])
                operands = re.findall(r"%([\w.-]+)", inside)
                of = calls and calls[1], index and int(index[1]) if found[3] == "get-tuple-element" else None
                computations[name].append(Instruction(found[1], found[3], arrays, operands, *of))
        return cls(computations, entry)

    def kernels(self) -> list[Instruction]:
        """What the entry computation does, in order."""
        return [found for found in self.computations[self.entry] if found.operation not in _NO_KERNEL]

    def traffic(self) -> int | None:
        """Bytes that the kernels read and write; None where there is a loop, whose rounds are not known."""
        if any(found.operation == "while" for found in self.kernels()):
            return None
        made = {}
        for found in self.computations[self.entry]:
            made[found.name] = made[found.operands[0]] if found.operation == "bitcast" else found.arrays
            if found.index is not None and len(made[found.operands[0]]) > found.index:
                made[found.name] = [made[found.operands[0]][found.index]]
        total = 0
        for kernel in self.kernels():
            written = _bytes(kernel.arrays)
            gathers = any(part.operation == "gather" for part in self.computations.get(kernel.calls or "", []))
            # a gather reads as many elements as it writes
            read = [min(_bytes(made[of]), written) if gathers else _bytes(made[of]) for of in kernel.operands]
            total += written + sum(read)
        return total

    def written(self, shape: tuple[int, ...]) -> int:
        """How many arrays of this size kernels write, apart from the program's results."""
        size, entry = math.prod(shape), self.computations[self.entry]

        def of_size(found: Instruction) -> int:
            return sum(math.prod(each) >= size for _, each in found.arrays)

        inside = (part for name, parts in self.computations.items() if "region" in name or "body" in name for part in parts)
        loops = sum(of_size(part) for part in inside if part.operation == "fusion")
        return sum(map(of_size, self.kernels())) + loops - of_size(entry[-1])


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", text)
    return [(dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in found]


def _bytes(arrays: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    return sum(_SIZES[dtype] * math.prod(shape) for dtype, shape in arrays)


def main() -> None:
    """Compile every function and show what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="cpu")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--page", type=Path, help="put the table into this page")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = [row(case, device_of(arguments.target)) for case in cases()]
    shown = table(arguments.target, rows)
    if arguments.page:
        _replace_table(arguments.page, shown)
    print(json.dumps(rows, indent=1) if arguments.json else shown)


def device_of(target: str) -> Any:
    """The device to compile for, present or not."""
    import jax  # noqa: PLC0415 -- a second
    from jax.experimental import topologies  # noqa: PLC0415

    here = jax.devices("cpu")[0]
    if target == "cpu":
        return here
    return topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1").devices[0]


def row(case: Case, device: Any) -> dict[str, Any]:
    """What one function is compiled to, for N and 2 N tokens."""
    import jax  # noqa: PLC0415
    from jax.sharding import SingleDeviceSharding  # noqa: PLC0415

    def compiled(tokens: int) -> Any:
        here = SingleDeviceSharding(device)
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), case.arguments(tokens))
        return jax.jit(case.function).lower(*placed).compile()

    once, twice = compiled(case.tokens), compiled(2 * case.tokens)
    temporary = [found.memory_analysis().temp_size_in_bytes for found in (once, twice)]
    program = Program.of(twice.as_text())
    traffic, analysis = program.traffic(), once.cost_analysis() or {}
    return {
        "function": case.name,
        "tokens": 2 * case.tokens,
        "unit": case.unit,
        "kernels": dict(Counter(found.operation for found in program.kernels())),
        "temporary": temporary,
        "growth": (temporary[1] - temporary[0]) / (case.tokens * case.unit),
        "written": program.written((2 * case.tokens, case.unit)),
        "traffic": None if traffic is None else traffic / (2 * case.tokens * case.unit),
        "bytes accessed": analysis.get("bytes accessed"),
        "least": case.least,
    }


def cases() -> Iterator[Case]:  # noqa: C901 -- a function for each kind of arguments
    """Every public function of many tokens, and its gradient."""
    import drpo_jax  # noqa: PLC0415
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    from drpo_core import DRPO  # noqa: PLC0415

    objective = DRPO(delta=0.15)

    def of(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def per_token(n: int) -> dict[str, Any]:
        return {"behavior_log_prob": of(n), "advantages": of(n), "mask": of(n, dtype=jnp.bool_)}

    def with_ids(n: int) -> dict[str, Any]:
        return per_token(n) | {"tokens": of(n, dtype=jnp.int32)}

    def logits(n: int) -> Any:
        return of(n, VOCABULARY, dtype=jnp.bfloat16)

    def head(n: int) -> tuple[Any, Any]:
        return of(n, HIDDEN, dtype=jnp.bfloat16), of(VOCABULARY, HIDDEN, dtype=jnp.bfloat16)

    def top(n: int) -> dict[str, Any]:
        found = {"log_normalizer": of(n), "tokens": of(n, dtype=jnp.int32), "behavior_log_prob": of(n)}
        return found | {"top_k_ids": of(n, TOP_K, dtype=jnp.int32), "top_k_behavior_log_prob": of(n, TOP_K)}

    def both(
        name: str, function: Callable[..., Any], arguments: Any, *, scalar: bool = True, **options: Any
    ) -> Iterator[Case]:
        """The function, and its value with its gradient; of a function of tokens, with a cotangent for each."""
        least = options.pop("least", (None, None))
        options.setdefault("tokens", ROWS)
        yield Case(name, function, arguments, **options, least=least[0])

        def total(first: Any, others: Any, cotangent: Any) -> Any:
            found = function(first, others)
            return (found[0], found[1:]) if scalar else (sum(jnp.sum(x * cotangent) for x in found), ())

        gradient = jax.value_and_grad(total, has_aux=True)
        yield Case(f"{name}, ∂", gradient, lambda n: (*arguments(n), of(n)), **options, least=least[1])

    def policy(first: Any, others: Any, **options: Any) -> Any:
        return drpo_jax.policy_loss(objective, log_prob=first, **others, **options)

    def ids_and_mask(n: int) -> dict[str, Any]:
        return {name: array for name, array in with_ids(n).items() if name in ("tokens", "mask")}

    in_tokens: dict[str, Any] = {"tokens": TOKENS, "least": (13.0, 17.0)}
    of_logits: dict[str, Any] = {"unit": VOCABULARY, "least": (2.0, 6.0)}
    yield from both("policy_loss", policy, lambda n: (of(n), per_token(n)), **in_tokens)
    without = lambda x, others: policy(x, others, diagnostics=False)
    yield from both("policy_loss, diagnostics=False", without, lambda n: (of(n), per_token(n)), **in_tokens)
    yield from both(
        "token_log_prob",
        lambda x, others: (drpo_jax.token_log_prob(logits=x, **others).log_prob,),
        lambda n: (logits(n), ids_and_mask(n)),
        scalar=False,
        **of_logits,
    )
    yield from both(
        "logits_policy_loss",
        lambda x, others: drpo_jax.logits_policy_loss(objective, logits=x, **others),
        lambda n: (logits(n), with_ids(n)),
        **of_logits,
    )
    yield from both(
        "linear_log_prob",
        lambda x, others: (drpo_jax.linear_log_prob(hidden=x[0], weight=x[1], **others).log_prob,),
        lambda n: (head(n), ids_and_mask(n)),
        scalar=False,
        unit=VOCABULARY,
    )
    yield from both(
        "linear_policy_loss",
        lambda x, others: drpo_jax.linear_policy_loss(objective, hidden=x[0], weight=x[1], **others),
        lambda n: (head(n), with_ids(n)),
        unit=VOCABULARY,
    )
    yield from both(
        "full_divergences",
        lambda x, others: drpo_jax.full_divergences(logits=x, behavior_logits=others),
        lambda n: (logits(n), logits(n)),
        scalar=False,
        unit=VOCABULARY,
        least=(4.0, 10.0),
    )
    yield from both(
        "top_k_divergences",
        lambda x, others: drpo_jax.top_k_divergences(logits=x, **others),
        lambda n: (logits(n), top(n)),
        scalar=False,
        unit=VOCABULARY,
        least=(0.0, 2.0),
    )


def table(target: str, rows: Iterable[dict[str, Any]]) -> str:
    """A line a function, of the larger number of tokens."""
    head = (TARGETS[target], "fusions", "others", "temporary, MB", "growth", "N × V", "traffic", "least")

    def line(row: dict[str, Any]) -> tuple[Any, ...]:
        kernels = dict(row["kernels"])
        fusions, wide = kernels.pop("fusion", 0), row["unit"] > 1
        unit = "B a logit" if wide else "B a token"
        growth = f"{row['growth']:.2f} {unit}"
        traffic = "–" if row["traffic"] is None else f"{row['traffic']:.1f} {unit}"
        others = ", ".join(f"{count} {name}" for name, count in kernels.items()) or "–"
        written = row["written"] if wide else "–"
        least = "–" if row["least"] is None else f"{row['least']:.0f}"
        return row["function"], fusions, others, f"{row['temporary'][1] / 1e6:,.1f}", growth, written, traffic, least

    lines = [head, ("---", "--:", "---", *("--:" for _ in head[3:])), *map(line, rows)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _replace_table(page: Path, shown: str) -> None:
    """In the place of the table whose first cell is the same."""
    lines, mark = page.read_text(encoding="utf-8").splitlines(), shown[: shown.index("|", 1)]
    first = last = next(i for i, line in enumerate(lines) if line.startswith(mark))
    while lines[last].startswith("|"):
        last += 1
    page.write_text("\n".join([*lines[:first], *shown.splitlines(), *lines[last:]]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
