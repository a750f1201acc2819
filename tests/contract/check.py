"""The contract, as what one cell must fulfil."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from contract import axes, device, uses
from contract.arrays import bits, dtype_of, exact, flatten, memory, statistics
from contract.axes import Ambient, DType, Library, Masked, Regime, Shape, Use
from contract.calls import Call, call_of
from contract.oracle import SIZE, UNDECIDED
from contract.reasons import Refusal, refusals
from contract.subjects import ARRAYS, SUBJECTS, has_head, is_vocabulary

if TYPE_CHECKING:
    from contract.calls import Cell

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float64": 0.0, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
LARGEST = {"float16": 65504.0, "float32": float(np.finfo(np.float32).max)}
ROUNDINGS = 256.0
"""Of the arithmetic, that a result may be off by, relative to the largest of its array."""


def check(subject: str, cell: Cell) -> str:
    """Raise AssertionError where a cell breaks the contract; give "held" or "refused"."""
    may = refusals(subject, cell)
    call = call_of(subject, cell)
    before = {name: bits(array) for name, array in (call.arrays | call.hidden_arrays).items()}
    try:
        with warnings.catch_warnings():
            _only_ours()
            with device.around(cell):
                result = _run(subject, cell, call)
    except Exception as error:
        _check_refusal(error, may)
        return "refused"
    else:
        required = [refusal for refusal in may if refusal.always]
        assert not required, f"expected {_expected(required)}, got a result"
    if not cell.get("overwrite_logits"):
        changed = [name for name, array in (call.arrays | call.hidden_arrays).items() if bits(array) != before[name]]
        assert not changed, f"inputs changed: {changed}"
    _check_values(subject, cell, call, result)
    _check_masked(subject, cell, result)
    _check_memory(cell, call, result)
    return "held"


def _scale(cell: Cell) -> float:
    """Of a loss: a loss scaler's with a denominator to match, or one that 16-bit gradients of single tokens can take."""
    if cell["use"] is not Use.SCALED:
        return 1.0
    return uses.SCALE if cell.get("normalizer", axes.Number.ABSENT) is not axes.Number.ABSENT else 64.0


def _only_ours() -> None:
    """Every warning is an error, but for those that torch raises about itself."""
    warnings.simplefilter("error")
    for message in (".*should not be instantiated", ".*torch.jit.script.* is deprecated"):
        warnings.filterwarnings("ignore", message, DeprecationWarning)


def _run(subject: str, cell: Cell, call: Call) -> uses.Result:
    row, use, ambient = SUBJECTS[subject], cell["use"], cell["ambient"]
    differentiated = tuple(name for name in row.differentiated if name in call.arrays)
    if cell["library"] is Library.TORCH and (differentiated or use is Use.FORWARD):
        torch_cell = uses.TorchCell(call.function, call.arrays, differentiated, row.results, ambient, _scale(cell))
        return uses.torch_result(use, torch_cell, overwrites=bool(cell.get("overwrite_logits")))
    with ambient.around():
        if cell["library"] is Library.JAX:
            return uses.jax_result(use, call.function, call.arrays, differentiated, row.results)
        result = call.function(**call.arrays)
    outputs = flatten(result, row.results)
    return uses.Result(outputs, {}, frozenset(outputs))


# --- refusals --------------------------------------------------------------------------------------------------------------


def _check_refusal(error: Exception, may: list[Refusal]) -> None:
    if not may or isinstance(error, AssertionError):
        raise error
    if any(isinstance(error, refusal.error) and refusal.name in str(error) for refusal in may):
        return
    msg = f"expected {_expected(may)}, got {type(error).__name__}: {error}"
    raise AssertionError(msg) from error


def _expected(may: list[Refusal]) -> str:
    return " or ".join(
        f"{'/'.join(e.__name__ for e in r.error)} naming {r.name or 'what is refused'!r} ({r.reason})" for r in may
    )


# --- values ----------------------------------------------------------------------------------------------------------------


def _check_values(subject: str, cell: Cell, call: Call, result: uses.Result) -> None:
    wanted = {name: call.exact[name].requires_grad_() for name in SUBJECTS[subject].differentiated if name in call.exact}
    outputs = call.oracle(**call.exact)
    sizes = {path.removesuffix(SIZE): float(outputs.pop(path)) for path in [*outputs] if path.endswith(SIZE)}
    undecided = {path.removesuffix(UNDECIDED): outputs.pop(path).numpy() for path in [*outputs] if path.endswith(UNDECIDED)}
    gradients = _gradients(outputs, wanted, second=any(name.startswith("second") for name in result.gradients))
    precise = _precision(cell)
    figures = statistics(result.outputs)
    found = result.outputs | figures
    for path, want in outputs.items():
        if want is None:
            continue
        assert path in found, f"{path}: expected among {sorted(found)}"
        got = found[path]
        if path not in figures:
            _check_kind(path or "result", got, tuple(want.shape), _dtypes_of_result(subject, path, cell, want, call), cell)
        tolerance = _tolerance(subject, path, cell, dtype_of(got), precise)
        size = max(_absolute(subject, path, cell, tolerance), tolerance * sizes.get(path, 0.0))
        _compare(path or "result", got, want.detach().numpy(), tolerance, size, undecided.get(path))
        if cell["library"] is Library.TORCH and cell["use"] is not Use.FORWARD and want.is_floating_point():
            differs = (path in result.differentiable) != want.requires_grad
            assert not differs or not wanted, f"{path}: {'lost its' if want.requires_grad else 'has a'} gradient"
    for path in result.outputs:
        if path.rpartition("/")[0] in figures:
            kinds = _dtypes_of_result(subject, path, cell, torch.tensor(0.0), call)
            _check_kind(path, result.outputs[path], (), kinds, cell)
    extra = {path.split("/")[0] for path in result.outputs} - {path.split("/")[0] for path in outputs}
    assert not extra, f"results that were not asked for: {sorted(extra)}"
    for name, got in result.gradients.items():
        assert got is not None, f"gradient of {name}: none"
        array = call.arrays[name.removeprefix("second ")]
        _check_kind(f"gradient of {name}", got, tuple(array.shape), {dtype_of(array)}, cell)
        tolerance = _tolerance(subject, f"gradient {name}", cell, dtype_of(got), precise)
        want = _scale(cell) * gradients[name].numpy()
        # products of a narrow dtype are sums whose terms may cancel
        absolute = tolerance * float(np.abs(want).max(initial=0.0)) if has_head(subject) else 0.0
        absolute = max(absolute, _scale(cell) * tolerance * sizes.get("gradients", 0.0))
        _compare(f"gradient of {name}", got, want, tolerance, absolute)
        if name == "logits" and "objective" in cell:
            _check_rows_sum_to_zero(exact(got), tolerance)


def _gradients(outputs: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, second: bool) -> dict[str, torch.Tensor]:
    """Of Σ w·output, and of the sum of its squares, by autograd in float64."""
    if not wanted:
        return {}
    of = uses.total(outputs)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    if not isinstance(of, torch.Tensor) or not of.requires_grad:
        return zeros | {f"second {name}": zero for name, zero in zeros.items()}
    first = torch.autograd.grad(of, list(wanted.values()), create_graph=second, allow_unused=True)
    found = {n: zeros[n] if g is None else g for n, g in zip(wanted, first, strict=True)}
    if second:
        squares = sum((g**2).sum() for g in found.values())
        again = (
            torch.autograd.grad(squares, list(wanted.values()), allow_unused=True)
            if squares.requires_grad  # type: ignore[union-attr]
            else [None for _ in wanted]
        )
        found |= {f"second {n}": zeros[n] if g is None else g for n, g in zip(wanted, again, strict=True)}
    return {name: g.detach() for name, g in found.items()}


def _check_kind(path: str, got: Any, shape: tuple[int, ...], dtypes: set[str], cell: Cell) -> None:
    assert tuple(got.shape) == shape, f"{path}: shape {tuple(got.shape)}, expected {shape}"
    assert dtype_of(got) in dtypes, f"{path}: dtype {dtype_of(got)}, expected {' or '.join(sorted(dtypes))}"
    if cell["library"] is Library.TORCH:
        assert got.device.type == "cpu", f"{path}: on {got.device}, but every tensor given is on the CPU"


def _floats(cell: Cell) -> set[DType]:
    return {choice for name, choice in cell.items() if name in ARRAYS and choice in axes.FLOATS}


def _dtypes_of_result(subject: str, path: str, cell: Cell, want: torch.Tensor, call: Call) -> set[str]:
    """Of what precision a result may be: that of the arithmetic, float32 at least; where dtypes are mixed, of either."""
    if want.dtype == torch.bool:
        return {"bool"}
    name = subject.rpartition(".")[2]
    if path == "gradient":
        return {dtype_of(call.arrays["log_prob"])}
    if not want.is_floating_point():
        return {"int64", "int32"}
    if name.endswith("_advantages"):
        return {dtype_of(call.arrays["rewards" if "rewards" in call.arrays else "advantages"])}
    if name in {"global_normalizer", "summarize"}:
        return {"float64", "float32"}
    if name in {"reduction_coefficients", "reduction_count", "global_coefficients", "linear_reduction"}:
        return {"float64", "float32"} if cell["library"] is Library.JAX else {"float32"}
    kinds = _floats(cell)
    if kinds == {DType.FLOAT64}:
        return {"float64"}
    return {"float32", "float64"} if DType.FLOAT64 in kinds else {"float32"}


def _precision(cell: Cell) -> float:
    """Rounding of the arithmetic."""
    return EPSILON["float64"] * 16.0 if _floats(cell) == {DType.FLOAT64} else EPSILON["float32"]


def _tolerance(subject: str, path: str, cell: Cell, dtype: str, precise: float) -> float:
    """How far a result may be off, relative to the largest of its array."""
    precise = max(precise, EPSILON["float32"]) if dtype == "float32" else precise
    tolerance = ROUNDINGS * precise
    if path.startswith(("gradient", "second")) or subject.endswith("_advantages"):
        tolerance += 2.0 * EPSILON[dtype]
    if has_head(subject) or cell.get("centering") is axes.Recorded.HEAD:
        # logits are products of the dtype of the model, or of autocast's
        narrow = max((EPSILON[d] for n, d in cell.items() if n in {"hidden", "weight", "bias"} and d in EPSILON), default=0.0)
        narrow = max(narrow, *(EPSILON[d] for a, d in axes.AUTOCAST.items() if a is cell["ambient"]), 0.0)
        magnitude = 300.0 if cell["regime"] is Regime.DISTANT else 8.0
        tolerance += magnitude * (narrow if narrow > EPSILON["float32"] else precise)
        tolerance *= 4.0 if cell["shape"] is Shape.LARGE else 1.0  # a sum over all tokens
    if "second" in path:
        tolerance *= 4.0
    if path.startswith("gradient") and subject.endswith("top_k_divergences"):
        tolerance *= 128.0  # the rest of π, by whose mass it is divided, is known to a rounding of 1
    if cell["regime"] is Regime.DISTANT:
        tolerance *= 16.0 if is_vocabulary(subject) else 4.0  # logits of hundreds
    return tolerance


def _absolute(subject: str, path: str, cell: Cell, tolerance: float) -> float:
    """How far a result that is nearly 0 may be off."""
    if cell["regime"] is Regime.CERTAIN and "kl" in f"{subject} {path}":
        return 4e-6  # a probability of 1 may be less by a rounding of any dtype
    if cell["regime"] is Regime.CERTAIN and subject.endswith("top_k_divergences"):
        return 1.6e-5  # its logarithm is a difference of logits of 100
    if path.endswith("entropy"):
        return tolerance / 16.0  # of a distribution that is nearly certain
    if has_head(subject) and "diagnostics" in path:
        return tolerance  # a weight is a difference from 1
    between = "diagnostics" in path or subject.endswith("divergences")
    if cell["regime"] is Regime.ON_POLICY and between and is_vocabulary(subject):
        return tolerance  # the policies differ by the rounding of their log-probs
    return 0.0


def _compare(
    path: str,
    array: Any,
    want: np.ndarray,
    tolerance: float,
    absolute: float = 0.0,
    undecided: np.ndarray | None = None,
) -> None:
    got, want = exact(array).astype(np.float64), want.astype(np.float64)
    if undecided is not None:
        got, want = got[~undecided], want[~undecided]
    largest = LARGEST.get(dtype_of(array), np.inf)
    want = np.where(np.abs(want) > largest, np.copysign(np.inf, want), want)
    odd = ~np.isfinite(want)
    assert np.array_equal(got[odd], want[odd], equal_nan=True), f"{path}: {_shown(got[odd])}, expected {_shown(want[odd])}"
    got, want = got[~odd], want[~odd]
    assert np.isfinite(got).all(), f"{path}: {_shown(got)}, expected {_shown(want)}"
    if not want.size:
        return
    scale = np.abs(want).max()
    error = np.abs(got - want)
    bound = tolerance * (0.1 * scale + np.abs(want)) + 1e-6 * (scale < 1e-4) * tolerance
    bad = error > np.maximum(bound, max(absolute, 4.0 * SMALLEST["float16"] if tolerance > EPSILON["float16"] else 0.0))
    if bad.any():
        worst = np.argmax(error / np.maximum(bound, 1e-300))
        msg = f"{path}: {got.flat[worst]:.6g}, expected {want.flat[worst]:.6g} ({int(bad.sum())} of {bad.size} elements)"
        raise AssertionError(msg)


def _shown(values: np.ndarray) -> str:
    return str(values.reshape(-1)[:4].tolist())


def _check_rows_sum_to_zero(gradient: np.ndarray, tolerance: float) -> None:
    gradient = gradient[np.isfinite(gradient).all(-1)]
    sums, sizes = gradient.sum(-1), np.abs(gradient).sum(-1)
    assert (np.abs(sums) <= tolerance * sizes + 8 * SMALLEST["float16"]).all(), (
        f"gradient of logits: rows sum to {_shown(sums)}"
    )


# --- masks and memory ------------------------------------------------------------------------------------------------------


def _check_masked(subject: str, cell: Cell, result: uses.Result) -> None:
    """Whatever masked positions hold, the bits of every result and gradient are the same; gradients there are 0."""
    if "mask" not in cell or cell["mask"] is not DType.BOOL or cell["masked"] is Masked.NONE or not _is_masked(cell):
        return
    with warnings.catch_warnings():
        _only_ours()
        with device.around(cell):
            spoilt = _run(subject, cell, call_of(subject, cell, spoilt=True))
    for kind, ours, theirs in (("", result.outputs, spoilt.outputs), ("gradient of ", result.gradients, spoilt.gradients)):
        for name, array in ours.items():
            same = bits(array) == bits(theirs[name])
            assert same, f"{kind}{name or 'result'}: depends on masked positions: {_shown(exact(theirs[name]))}"


def _is_masked(cell: Cell) -> bool:
    return cell["shape"] not in {Shape.NO_TOKENS, Shape.NO_ROWS}


def _check_memory(cell: Cell, call: Call, result: uses.Result) -> None:
    """Outputs share memory with nothing, and each can be changed in place."""
    if cell["library"] is Library.JAX:
        return
    outputs = {path or "result": memory(array) for path, array in result.outputs.items()}
    inputs = {name: memory(array) for name, array in (call.arrays | call.hidden_arrays).items()}
    outputs, inputs = ({n: a for n, a in every.items() if a is not None} for every in (outputs, inputs))
    for (a, x), (b, y) in itertools.combinations(outputs.items(), 2):
        assert not np.may_share_memory(x, y), f"{a} and {b} share memory"
    for (a, x), (b, y) in itertools.product(outputs.items(), inputs.items()):
        assert not np.may_share_memory(x, y), f"{a} shares memory with the input {b}"
    for path, array in outputs.items():
        alone = all(stride or size == 1 for stride, size in zip(array.strides, array.shape, strict=True))
        assert alone and array.flags.writeable, f"{path}: can't be changed in place"


def is_slow(subject: str, cell: Cell) -> bool:
    """Whether a cell is compiled at run time."""
    return cell["use"] in {Use.COMPILE, Use.JIT} or (is_vocabulary(subject) and cell["library"] is Library.JAX)


__all__ = ["Ambient", "check", "is_slow"]
