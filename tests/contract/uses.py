"""What is done with a function of torch or JAX: each use gives its outputs, and the gradient of one sum of all of them.

The sum is Σ w·output with the same weights everywhere, so that outputs can't stand for each other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
import torch.utils.checkpoint
from contract.arrays import bits, flatten
from contract.axes import Ambient, Use

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[..., Any]

SCALE = 65536.0
"""What torch.amp.GradScaler begins with; used with a denominator of a batch of 10⁶ tokens."""


class Result(NamedTuple):
    """Outputs by path and gradients by argument; `differentiable` names the outputs that had one."""

    outputs: dict[str, Any]
    gradients: dict[str, Any]
    differentiable: frozenset[str]


def cotangents(shape: tuple[int, ...]) -> list[float]:
    """The weights w of an output: different for each of its elements."""
    return [math.cos(1.0 + i) + 1.5 for i in range(math.prod(shape))]


def total(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ w·output over the outputs that require a gradient."""
    with torch.device("cpu"):
        wanted = {path: o for path, o in sorted(outputs.items()) if o is not None and o.requires_grad}
        weights = {p: torch.tensor(cotangents(o.shape), dtype=torch.float64).reshape(o.shape) for p, o in wanted.items()}
        return sum((weights[p].to(o.dtype) * o).sum() for p, o in wanted.items())  # type: ignore[return-value]


# --- torch -----------------------------------------------------------------------------------------------------------------


class TorchCell(NamedTuple):
    """A function of tensors, which of them are differentiated, and the state around the call."""

    function: Function
    tensors: dict[str, torch.Tensor]
    differentiated: tuple[str, ...]
    names: tuple[str, ...]
    ambient: Ambient
    scale: float = 1.0

    def leaves(self, *, leaf: bool = True) -> dict[str, torch.Tensor]:
        """The tensors anew, those differentiated as leaves or as results of an operation, in the same storage layout."""
        made = dict(self.tensors)
        for name in self.differentiated:
            tensor = self.tensors[name].detach()
            if leaf and not any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
                made[name] = tensor.clone(memory_format=torch.preserve_format).requires_grad_()
            else:
                made[name] = _copied(tensor)
                made[name].retain_grad()
        return made

    def forward(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The arrays of the result by path; in the state."""
        with self.ambient.around():
            return flatten(self.function(**tensors), self.names)

    def gradients(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What has arrived at the differentiated tensors."""
        return {name: tensors[name].grad for name in self.differentiated}  # type: ignore[misc]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the same layout, as the result of operations on a leaf."""
    dense = tensor[
        tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    ]
    base = dense.clone(memory_format=torch.preserve_format).requires_grad_()
    return (base * 1).expand(tensor.shape)


def torch_result(use: Use, cell: TorchCell, *, overwrites: bool = False) -> Result:
    """Run a use of torch."""
    return _TORCH.get(use, _backward)(cell, not overwrites)


def _finished(outputs: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> Result:
    return Result(outputs, gradients, frozenset(path for path, o in outputs.items() if o.requires_grad))


def _forward(cell: TorchCell, leaf: bool) -> Result:
    outputs = cell.forward(cell.tensors)
    assert not any(o.requires_grad for o in outputs.values()), "an output requires a gradient that no input has"
    return _finished(outputs, {})


def _backward(cell: TorchCell, leaf: bool) -> Result:
    tensors = cell.leaves(leaf=leaf)
    outputs = cell.forward(tensors)
    if cell.differentiated:
        with _anomaly(cell):
            total(outputs).backward()
    return _finished(outputs, cell.gradients(tensors))


def _anomaly(cell: TorchCell) -> Any:
    return (cell.ambient if cell.ambient is Ambient.ANOMALY else Ambient.PLAIN).around()


def _retained(cell: TorchCell, leaf: bool) -> Result:
    """With retain_graph, and again without: the same bits as a single backward pass."""
    tensors = cell.leaves(leaf=leaf)
    outputs = cell.forward(tensors)
    inputs = [tensors[name] for name in cell.differentiated]
    of = total(outputs)
    first = [g.clone() for g in torch.autograd.grad(of, inputs, retain_graph=True)]
    again = torch.autograd.grad(of, inputs)
    once = _backward(cell, leaf)
    for name, a, b in zip(cell.differentiated, first, again, strict=True):
        assert bits(a) == bits(b), f"{name}: the second backward pass of a retained graph gives another gradient"
        assert bits(a) == bits(once.gradients[name]), f"{name}: retain_graph changes the gradient"
    return _finished(outputs, dict(zip(cell.differentiated, first, strict=True)))


def _accumulated(cell: TorchCell, leaf: bool) -> Result:
    """Two micro-batches: every output divided in place, gradients added up where they are."""
    tensors = cell.leaves(leaf=leaf)
    added = {name: torch.zeros_like(tensors[name]) for name in cell.differentiated}
    for _ in range(2):
        outputs = cell.forward(tensors)
        for output in outputs.values():
            if output.requires_grad:
                output /= 2
        total(outputs).backward()
        for name in cell.differentiated:
            if not tensors[name].is_leaf:
                added[name] += tensors[name].grad
                tensors[name] = cell.leaves(leaf=leaf)[name]
    for output in outputs.values():
        if output.requires_grad:
            output.detach().mul_(2)
    gradients = {name: tensors[name].grad if tensors[name].is_leaf else added[name] for name in cell.differentiated}
    return _finished(outputs, gradients)


def _scaled(cell: TorchCell, leaf: bool) -> Result:
    """As torch.amp.GradScaler does it; the gradients arrive scaled."""
    tensors = cell.leaves(leaf=leaf)
    outputs = cell.forward(tensors)
    (total(outputs) * cell.scale).backward()
    return _finished(outputs, cell.gradients(tensors))


def _constants(cell: TorchCell, leaf: bool) -> Result:
    """Every floating tensor requires a gradient; those that are constants get none."""
    tensors = cell.leaves(leaf=leaf)
    others = [n for n, t in tensors.items() if t.is_floating_point() and n not in cell.differentiated]
    for name in others:
        tensors[name] = tensors[name].detach().requires_grad_()
    outputs = cell.forward(tensors)
    total(outputs).backward()
    received = [name for name in others if tensors[name].grad is not None and bool(tensors[name].grad.any())]
    assert not received, f"constants that receive a gradient: {received}"
    return _finished(outputs, cell.gradients(tensors))


def _checkpoint(cell: TorchCell, leaf: bool) -> Result:
    tensors = cell.leaves(leaf=leaf)
    with cell.ambient.around():
        outputs = torch.utils.checkpoint.checkpoint(
            lambda **some: flatten(cell.function(**some), cell.names), use_reentrant=False, **tensors
        )
    total(outputs).backward()
    return _finished(outputs, cell.gradients(tensors))


def _batched(cell: TorchCell, leaf: bool) -> Result:
    """Vectorised rows of a Jacobian."""
    tensors = cell.leaves(leaf=leaf)
    outputs = cell.forward(tensors)
    inputs = [tensors[name] for name in cell.differentiated]
    of = total(outputs)
    rows = torch.autograd.grad(of, inputs, torch.tensor([1.0, 3.0], dtype=of.dtype), is_grads_batched=True)
    for name, row in zip(cell.differentiated, rows, strict=True):
        # below its smallest normal number, float16 rounds to multiples of 2⁻²⁴
        smallest = 2.0**-22 if row.dtype == torch.float16 else 1e-8
        same = torch.allclose(row[1].double(), 3.0 * row[0].double(), rtol=0.02, atol=smallest)
        assert same, f"{name}: rows of one Jacobian differ"
    return _finished(outputs, {n: row[0] for n, row in zip(cell.differentiated, rows, strict=True)})


def _twice(cell: TorchCell, leaf: bool) -> Result:
    """The result of an operation, given to two calls: neither may take it for its own."""
    tensors = cell.leaves(leaf=False)
    first, outputs = cell.forward(tensors), cell.forward(tensors)
    ((total(first) + total(outputs)) / 2).backward()
    return _finished(outputs, cell.gradients(tensors))


def _create_graph(cell: TorchCell, leaf: bool) -> Result:
    """A second derivative is refused by name, or it is right: it stands among the gradients as "second …"."""
    tensors = cell.leaves(leaf=leaf)
    outputs = cell.forward(tensors)
    inputs = [tensors[name] for name in cell.differentiated]
    try:
        first = torch.autograd.grad(total(outputs), inputs, create_graph=True)
        of = sum((g**2).sum() for g in first)
        second = torch.autograd.grad(of, inputs, allow_unused=True) if of.requires_grad else [None for _ in inputs]  # type: ignore[union-attr, arg-type]
    except RuntimeError as error:
        assert "second derivative" in str(error), f"a second derivative: expected an error that names it, got {error}"
        return _backward(cell, leaf)
    gradients = dict(zip(cell.differentiated, first, strict=True))
    for name, tensor, found in zip(cell.differentiated, inputs, second, strict=True):
        gradients[f"second {name}"] = torch.zeros_like(tensor) if found is None else found
    return _finished(outputs, gradients)


def _func_grad(cell: TorchCell, leaf: bool) -> Result:
    constants = {n: t for n, t in cell.tensors.items() if n not in cell.differentiated}
    aside: list[frozenset[str]] = []

    def scalar(wanted: dict[str, torch.Tensor]) -> Any:
        outputs = cell.forward(wanted | constants)
        aside.append(frozenset(path for path, o in outputs.items() if o.requires_grad))
        return total(outputs), outputs

    wanted = {n: cell.tensors[n].detach() for n in cell.differentiated}
    gradients, outputs = torch.func.grad(scalar, has_aux=True)(wanted)
    return Result(outputs, gradients, aside[0])


def _vmap(cell: TorchCell, leaf: bool) -> Result:
    return _vmapped(cell, tuple(cell.tensors))


def _vmap_one(cell: TorchCell, leaf: bool) -> Result:
    """Over one constant, such as the advantages of several reward models; else over what is differentiated."""
    constants = [n for n, t in cell.tensors.items() if t.is_floating_point() and n not in cell.differentiated]
    return _vmapped(cell, (constants[-1:] or cell.differentiated)[:1])


def _vmapped(cell: TorchCell, over: tuple[str, ...]) -> Result:
    """Two copies at once: the gradient of the first by func.grad, the second the same."""
    stacked = {n: torch.stack((t, t)) if n in over else t for n, t in cell.tensors.items()}
    dims = {n: 0 if n in over else None for n in stacked}
    aside: list[Any] = []

    def gradient_and_outputs(tensors: dict[str, torch.Tensor]) -> Any:
        def scalar(wanted: dict[str, torch.Tensor]) -> Any:
            outputs = cell.forward(tensors | wanted)
            aside.append(frozenset(path for path, o in outputs.items() if o.requires_grad))
            return total(outputs), outputs

        return torch.func.grad(scalar, has_aux=True)({n: tensors[n] for n in cell.differentiated})

    gradients, outputs = torch.func.vmap(gradient_and_outputs, in_dims=(dims,))(stacked)
    for name, array in {**gradients, **outputs}.items():
        assert bits(array[0]) == bits(array[1]), f"{name}: vmap over two copies gives two results"
    outputs, gradients = ({name: array[0].clone() for name, array in every.items()} for every in (outputs, gradients))
    return Result(outputs, gradients, aside[0])


def _compile(cell: TorchCell, leaf: bool) -> Result:
    """Traced as a whole; compiling the trace is inductor's, and takes ten times as long."""
    torch._dynamo.reset()  # noqa: SLF001 -- the documented name
    tensors = cell.leaves(leaf=leaf)
    compiled = torch.compile(cell.function, fullgraph=True, backend="aot_eager")
    outputs = cell._replace(function=compiled).forward(tensors)
    total(outputs).backward()
    return _finished(outputs, cell.gradients(tensors))


_TORCH = {
    Use.FORWARD: _forward,
    Use.BACKWARD: _backward,
    Use.RETAINED: _retained,
    Use.ACCUMULATED: _accumulated,
    Use.SCALED: _scaled,
    Use.CONSTANTS: _constants,
    Use.CHECKPOINT: _checkpoint,
    Use.BATCHED: _batched,
    Use.TWICE: _twice,
    Use.CREATE_GRAPH: _create_graph,
    Use.FUNC_GRAD: _func_grad,
    Use.VMAP: _vmap,
    Use.VMAP_ONE: _vmap_one,
    Use.COMPILE: _compile,
}


# --- JAX -------------------------------------------------------------------------------------------------------------------


def jax_result(
    use: Use, function: Function, arrays: dict[str, Any], differentiated: tuple[str, ...], names: tuple[str, ...]
) -> Result:
    """Run a use of JAX."""
    wanted = {n: arrays[n] for n in differentiated}
    constants = {n: a for n, a in arrays.items() if n not in wanted}
    if use is Use.FORWARD or not differentiated:

        def called(arrays: dict[str, Any]) -> dict[str, Any]:
            return flatten(function(**arrays), names)

        outputs = (jax.jit(called) if use is Use.JIT else called)(arrays)
        return Result(outputs, {}, frozenset(outputs))

    def of(wanted: dict[str, Any], constants: dict[str, Any]) -> Any:
        outputs = flatten(function(**wanted, **constants), names)
        return jax_total(outputs), outputs

    if use is Use.CHECKPOINT:
        of = jax.checkpoint(of)
    if use is Use.JVP:
        return _jvp(of, wanted, constants)
    gradient = jax.grad(of, has_aux=True)
    if use is Use.JIT:
        gradient = jax.jit(gradient)
    if use in {Use.VMAP, Use.VMAP_ONE}:
        floats = [n for n, a in constants.items() if jnp.issubdtype(a.dtype, jnp.floating)]
        over = set(arrays) if use is Use.VMAP else set((floats[-1:] or [*wanted])[:1])

        def stacked(some: dict[str, Any]) -> dict[str, Any]:
            return {n: jnp.stack((a, a)) if n in over else a for n, a in some.items()}

        dims = tuple({n: 0 if n in over else None for n in some} for some in (wanted, constants))
        both = jax.vmap(gradient, in_axes=dims)(stacked(wanted), stacked(constants))
        gradients, outputs = jax.tree.map(lambda a: a[0], both)
    else:
        gradients, outputs = gradient(wanted, constants)
    return Result(outputs, gradients, frozenset(outputs))


def jax_total(outputs: dict[str, Any]) -> Any:
    """Σ w·output over the floating outputs; what is constant adds nothing to a derivative."""
    terms = [
        jnp.sum(jnp.asarray(cotangents(o.shape), dtype=o.dtype).reshape(o.shape) * o)
        for path, o in sorted(outputs.items())
        # a statistic may be infinite, and a sum with another's NaN
        if jnp.issubdtype(o.dtype, jnp.floating) and not (jax.config.jax_debug_nans and "diagnostics" in path)
    ]
    largest = max((t.dtype for t in terms), key=lambda d: d.itemsize)
    return sum(t.astype(largest) for t in terms)


def _jvp(of: Function, wanted: dict[str, Any], constants: dict[str, Any]) -> Result:
    """Forward mode along one-hot tangents is too many: along a random one, with the gradient's own product beside it."""
    tangents = {n: jnp.asarray(cotangents(a.shape)).reshape(a.shape).astype(a.dtype) for n, a in wanted.items()}
    _, forward, outputs = jax.jvp(lambda w: of(w, constants), (wanted,), (tangents,), has_aux=True)
    gradients, _ = jax.grad(of, has_aux=True)(wanted, constants)
    backward = sum(jnp.sum(gradients[n].astype("float32") * tangents[n].astype("float32")) for n in wanted)
    size = sum(jnp.sum(jnp.abs(gradients[n].astype("float32") * tangents[n].astype("float32"))) for n in wanted)
    assert bool(jnp.abs(forward - backward) <= 0.01 * size), f"jvp gives {forward}, grad {backward}"
    return Result(outputs, gradients, frozenset(outputs))
