"""Every function that takes JAX arrays, on four devices: prints, for each way of sharding, what fails. See test_mesh.py.

Explicit axes are what `jax.make_mesh` gives since 0.7: every operation says how its result is sharded, or fails.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np
from contract import uses
from contract.arrays import exact, flatten, statistics
from contract.axes import DType, Given, Library, Masked
from contract.calls import call_of
from contract.places import base_cell
from contract.subjects import SUBJECTS, axes_of, parameters_of
from drpo_jax.distributed import all_reduce_diagnostics, global_normalizer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import drpo_core

DEVICES = 4


class _Rows:
    """A batch whose rows, or packed tokens, are divided among the devices."""

    leading = (DEVICES, 6)


class _Packed(_Rows):
    leading = (DEVICES * 6,)


def cells() -> Any:
    """Each function at its base, and with packed sequences."""
    for subject, row in SUBJECTS.items():
        if Library.JAX not in axes_of(subject)["library"] or row.call is not None or subject.endswith("validate"):
            continue
        parameters = parameters_of(subject)
        given = {n: axes_of(subject)[n][1] for n in ("mask", "token_weights") if parameters.get(n)}
        cell = base_cell(subject, library=Library.JAX, masked=Masked.SOME, **given)
        for n in ("tokens", "top_k_ids", "segment_ids", "group_ids"):
            if cell.get(n, Given.ABSENT) is not Given.ABSENT:
                cell[n] = DType.INT32
        yield subject, "rows", {**cell, "shape": _Rows}
        for name in ("segment_ids", "group_ids"):
            if name in parameters:
                yield subject, name, {**cell, "shape": _Packed, name: DType.INT32}


def spec(name: str, array: Any) -> P:
    """By rows; a head, and what is not of four rows, is on every device."""
    return P() if name in {"weight", "bias"} or array.shape[0] % DEVICES else P("x", *(None,) * (array.ndim - 1))


def values(result: uses.Result) -> dict[str, np.ndarray]:
    """Everything a function gives, by name."""
    found = {f"output {k}": exact(v) for k, v in (result.outputs | statistics(result.outputs)).items()}
    return found | {f"gradient {k}": exact(v) for k, v in result.gradients.items()}


def sharded(mesh: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays on the devices."""
    return {n: jax.device_put(a, NamedSharding(mesh, spec(n, a))) for n, a in arrays.items()}


def on_explicit_axes(subject: str, call: Any, differentiated: tuple[str, ...]) -> uses.Result:
    """Run a call with sharded arrays, compiled; tests/jax/explicit_axes.py runs operation by operation."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        arrays = sharded(mesh, call.arrays)
        return uses.jax_result(uses.Use.JIT, call.function, arrays, differentiated, SUBJECTS[subject].results)


def in_shard_map(subject: str, call: Any, differentiated: tuple[str, ...]) -> uses.Result:
    """Each device with its rows; reduced losses are summed, with the denominator of all devices."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    wanted = {n: call.arrays[n] for n in differentiated}
    constants = {n: a for n, a in call.arrays.items() if n not in wanted}
    names = SUBJECTS[subject].results
    reduced = "reduction" in parameters_of(subject)

    def device(wanted: dict[str, Any], constants: dict[str, Any]) -> Any:
        options = {"normalizer": global_normalizer(drpo_core.token_mean, constants["mask"], axis_name="x")} if reduced else {}
        result = call.function(**wanted, **constants, **options)
        outputs = dict(zip(names, result, strict=True)) if names else result if isinstance(result, dict) else None
        if reduced:
            fields = outputs or result._asdict()
            loss = jax.lax.psum(fields["loss"], "x")
            return loss, all_reduce_diagnostics(fields["diagnostics"], axis_name="x")
        return result

    def whole(wanted: dict[str, Any], constants: dict[str, Any]) -> Any:
        specs = tuple({n: spec(n, a) for n, a in some.items()} for some in (wanted, constants))
        out = (P(), P()) if reduced else P("x")
        result = jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=out)(wanted, constants)
        outputs = flatten(result, ("loss", "diagnostics") if reduced else names)
        return uses.jax_total(outputs), outputs

    if not differentiated:
        return uses.Result(jax.jit(whole)(wanted, constants)[1], {}, frozenset())
    gradients, outputs = jax.jit(jax.grad(whole, has_aux=True))(wanted, constants)
    return uses.Result(outputs, gradients, frozenset())


def main() -> None:
    """Compare every way with one device; print the failures as JSON."""
    assert jax.device_count() == DEVICES
    ways = {"explicit axes, jit": on_explicit_axes, "shard_map": in_shard_map}
    ran, failures = 0, []
    for subject, layout, cell in cells():
        row, call = SUBJECTS[subject], call_of(subject, cell)
        differentiated = tuple(n for n in row.differentiated if n in call.arrays)
        want = values(uses.jax_result(uses.Use.BACKWARD, call.function, call.arrays, differentiated, row.results))
        adapter = subject.startswith("drpo_jax.")
        for way, run in ways.items():
            if way != "explicit axes, jit" and not adapter:
                continue
            if way == "shard_map" and layout != "rows":
                continue
            ran += 1
            try:
                found = values(run(subject, call, differentiated))
                for name, array in found.items():
                    if name in want:
                        scale = np.abs(want[name][np.isfinite(want[name])]).max(initial=0.0)
                        np.testing.assert_allclose(array, want[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)
            except Exception as error:
                text = " ".join(str(error).split())[:240]
                failures.append(f"{subject} [{layout}, {way}] {type(error).__name__}: {text}")
    json.dump({"ran": ran, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
