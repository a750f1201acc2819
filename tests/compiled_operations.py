"""Registers and spills, as JSON, of kernels with every operation of a recording at every place, and of those over rows.

``python tests/compiled_operations.py``, without TRITON_INTERPRET: Triton has to compile. Run by tests/test_launches.py.
"""

import json
import re
import sys
from pathlib import Path

import torch
from drpo_torch.engines import triton_loop

from drpo_core import DRPO
from drpo_core.engines import trace
from drpo_core.loss import PolicyLoss

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from device import Recording
from kernels import compiled
from launches import ROWS, kernels_of, tokens

DTYPES = ("float32", "float64")
NAMES = ("log_prob", "behavior_log_prob", "advantages", "mask", "coefficients")
TEMPLATES = trace._TEMPLATES  # noqa: SLF001 -- so that an operation that is added is in here


def every_operation(x, y, *, xp):
    """A number that each operation on two numbers, and on truth values made of them, has a part in."""
    total = xp.minimum(xp.maximum(x, 0.5), 2.0)
    for name, template in TEMPLATES.items():
        numbers, truths = [x, total], [x > y, total < y]
        operands = [truths[0], *numbers] if name == "where" else truths if name.startswith("logical") else numbers
        arity = len(set(re.findall(r"{\d}", template))) or template.count("{}")
        found = getattr(xp, name)(*operands[:arity])
        total = total + (xp.where(found, y, 1.0) if found.dtype == trace.BOOL else found)
    return total


def everywhere(objective, log_prob, behavior_log_prob, advantages, mask, coefficients, *, xp, **_):
    """Every operation on tokens, on sums and maxima of rows, and on those of all tokens; a threshold, and a truth of it."""
    of_token = every_operation(log_prob, behavior_log_prob, xp=xp)
    row = xp.sum(of_token, axis=-1, keepdims=True), xp.max(of_token, axis=-1, keepdims=True)
    threshold = xp.where(objective.delta > 0.1, advantages, objective.delta)
    result = xp.where(mask, coefficients * (of_token + every_operation(*row, xp=xp)) + threshold, 0.0)
    return PolicyLoss(every_operation(xp.sum(result), xp.max(result), xp=xp), result, None)


def launched(dtype):
    """The kernels of `everywhere` for tensors of a dtype, as they would be launched."""
    program = triton_loop.program(everywhere, DRPO(delta=0.15), NAMES, dtype, diagnostics=False)
    given = {"coefficients": torch.ones((), dtype=dtype)} | tokens(dtype)
    with torch.no_grad(), Recording(execute=False).entered() as recording:
        program.run({name: given[name] for name in NAMES}, (0.15,), dtype, dtype)
    return recording


def rows_of_logits(dtype):
    """The kernels over rows, with all that they may do; in float64 for one architecture, to save seconds."""
    options = {"architectures": (90,)} if dtype == "float64" else {}
    return list(kernels_of({name: ROWS[name] for name in list(ROWS)[2:]}, (dtype,), **options))


if __name__ == "__main__":
    of_rows = {name: rows_of_logits(name) for name in DTYPES}
    of_tokens = {name: [kernel._asdict() for kernel in compiled([launched(getattr(torch, name))])] for name in DTYPES}
    print(json.dumps({name: of_tokens[name] + of_rows[name] for name in DTYPES}))  # noqa: T201
