"""Source code that reproduces a failure with the function under test and NumPy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.testing.batch import literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drpo_core.testing.batch import BoolArray, FloatArray
    from drpo_core.testing.implementation import Evaluation

__all__ = ["snippet", "unchanged_inputs"]

_RELATIONS = {
    "equal": "observed == expected",
    "close": "(np.abs(observed - expected) <= bound) | (observed == expected)",
    "at most": "observed <= expected + bound",
    "at least": "observed >= expected - bound",
    "finite": "np.isfinite(observed)",
    "NaN": "np.isnan(observed)",
}


def snippet(
    evaluations: Sequence[Evaluation],
    quantity: str,
    relation: str,
    expected: FloatArray,
    bound: FloatArray,
    where: BoolArray,
    message: str,
) -> str:
    """Python source that evaluates the same batches and asserts the same relation; empty without a source."""
    e = evaluations[0]
    if e.implementation.source is None:
        return ""
    lines = _preamble(evaluations)
    lines += ["results = [evaluate(function, **batch) for batch in batches]"]
    if len(evaluations) > 1:
        lines += ["observed = sum(np.sum(loss) for loss, gradient, weight in results)"]
    else:
        lines += ["loss, gradient, weight = results[0]"]
        if quantity == "weight" and e.returned_weight is None:
            lines += [
                "# w from ∂L/∂log π = −A r w times what the reduction multiplies with",
                'ell = batches[0]["log_prob"] - batches[0]["behavior_log_prob"]',
                f'unweighted = batches[0]["advantages"] * np.exp(np.minimum(ell, 20.0)) * {literal(e.coefficients)}',
                "weight = -gradient / np.where(unweighted == 0, np.nan, unweighted)",
            ]
        lines += [f"observed = np.asarray({quantity}, dtype=np.float64)"]
    if "expected" in _RELATIONS[relation]:
        lines += [f"expected = {_compact(expected)}"]
        if "bound" in _RELATIONS[relation]:
            lines += [f"bound = {_compact(bound)}"]
    condition = f"({_RELATIONS[relation]})"
    if not where.all():
        lines += [f"counts = {literal(where)}"]
        condition += " | ~counts"
    lines += [f"assert np.all({condition}), {message!r}"]
    return "\n".join(lines) + "\n"


def unchanged_inputs(evaluation: Evaluation) -> str:
    """Python source that asserts that a call leaves its inputs as they are; empty without a source."""
    if evaluation.implementation.source is None:
        return ""
    lines = [
        *_preamble([evaluation]),
        "before = {name: np.copy(value) for name, value in batches[0].items()}",
        "# shared memory: torch.from_numpy(array) in place of torch.tensor(array)",
        "evaluate(function, **batches[0])",
        "for name, value in before.items():",
        "    np.testing.assert_array_equal(batches[0][name], value, err_msg=name)",
    ]
    return "\n".join(lines).replace("torch.tensor(v)", "torch.from_numpy(v)") + "\n"


def _preamble(evaluations: Sequence[Evaluation]) -> list[str]:
    """Definitions of `function`, `evaluate` and `batches`."""
    implementation = evaluations[0].implementation
    assert implementation.source is not None
    source = implementation.source
    lines = ["import numpy as np", "", source.function, "", source.evaluate, ""]
    if evaluations[0].dtype == "bfloat16":
        lines += [source.bfloat16, ""]
    lines += ["batches = ["]
    for e in evaluations:
        arguments = implementation.arguments(e.batch, e.normalizer, e.dtype)
        lines += ["    {", *(f'        "{name}": {_value(value)},' for name, value in arguments.items()), "    },"]
    lines += ["]"]
    return lines


def _value(value: Any) -> str:
    return literal(value) if isinstance(value, np.ndarray) else repr(value)


def _compact(array: FloatArray) -> str:
    """One number for an array of equal ones."""
    if array.size and (array == array.flat[0]).all():
        return repr(float(array.flat[0]))
    return literal(array)
