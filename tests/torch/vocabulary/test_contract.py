"""One contract for all functions at vocabulary scale: dtypes, engines, layouts, transforms and ambient states, by product."""

import contextlib
import inspect
import itertools
from functools import partial

import drpo_torch
import numpy as np
import pytest
import torch
from drpo_torch import (
    FullDivergence,
    LinearHead,
    TopKDivergence,
    linear_policy_loss,
    logits_policy_loss,
    token_log_prob,
    top_k_divergences,
)
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from vocabulary_batches import small_steps
from vocabulary_functions import FLOATS, FUNCTIONS, H, K, V, every_tensor, scalar_of

import drpo_core.loss
from drpo_core import DPPO, DRPO, PolicyGradient

EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NAN = float("nan")

HEADS = [name for name, function in FUNCTIONS.items() if function.has_head]

each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_case = pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name, function in FUNCTIONS.items() for engine in function.engines]
)
each_loss = pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("logits_policy_loss", "linear_policy_loss") for engine in ("arrays", "compiled")],
)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    small_steps(monkeypatch)


def options_of(engine, function):
    return {} if function.engines == ("arrays",) else {"engine": engine}


def cast(tensors, dtypes):
    """The tensors in other dtypes; and what these hold, exactly, in float64."""
    given = tensors | {name: tensors[name].to(dtype) for name, dtype in dtypes.items()}
    return given, {name: t.double() if t.is_floating_point() else t for name, t in given.items()}


def assert_close(actual, expected, tolerance, message=""):
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((actual.double() - expected).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-30), (message, error, scale)


# dtypes


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name, function in FUNCTIONS.items() for engine in function.engines if engine != "auto"],
)
@pytest.mark.parametrize("first", FLOATS, ids=str)
def test_each_array_has_a_dtype_of_its_own(name, engine, first):
    function = FUNCTIONS[name]
    tensors = function.tensors()
    # the products of a head are in one dtype
    tied = {"hidden": first, "weight": first} if function.has_head else {function.differentiated[0]: first}
    free = [n for n in (*function.differentiated, *function.constant) if n not in tied]
    # the engines share the combinations
    combinations = list(itertools.product(FLOATS, repeat=len(free)))
    for others in combinations if function.engines == ("arrays",) else combinations[engine == "compiled" :: 2]:
        dtypes = tied | dict(zip(free, others, strict=True))
        given, exact = cast(tensors, dtypes)
        if engine == "compiled" and torch.float16 in [dtypes[n] for n in dtypes if "logits" in n or n == "hidden"]:
            with pytest.raises(ValueError, match="engine: 'compiled' takes float32, float64 and bfloat16"):
                function.gradients(given, **options_of(engine, function))
            continue
        actual, gradients = function.gradients(given, **options_of(engine, function))
        expected, exactly = function.gradients(exact, plain=True)
        # a head's logits are rounded to the dtype of the products, and the arithmetic is in float32 unless an array is wider
        rounding = EPSILON[first] * 8 if function.has_head else 0.0
        working = EPSILON[torch.float64 if set(dtypes.values()) == {torch.float64} else torch.float32]
        assert_close(actual, expected, 20 * working + rounding, dtypes)
        for n, ours, theirs in zip(function.differentiated, gradients, exactly, strict=True):
            assert ours.dtype == dtypes[n], (n, dtypes)
            assert_close(ours, theirs, 20 * working + 2 * EPSILON[dtypes[n]] + rounding, (n, dtypes))


@each_case
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", FLOATS, ids=str)
def test_under_autocast(name, engine, low, first):
    function = FUNCTIONS[name]
    free = [function.differentiated[0], *(n for n in ("weight", "behavior_logits") if n in function.tensors())]
    for others in itertools.product(FLOATS, repeat=len(free) - 1):
        dtypes = dict(zip(free, (first, *others), strict=True))
        given, exact = cast(function.tensors(), dtypes)
        call = partial(function.gradients, given, **options_of(engine, function))
        products = low if function.has_head and torch.float64 not in dtypes.values() else None
        with torch.autocast("cpu", low):
            if function.has_head and products is None and len(set(dtypes.values())) > 1:
                with pytest.raises(TypeError, match="weight: expected the dtype of hidden"):
                    call()
                continue
            if engine == "compiled" and torch.float16 in ([products] if products else dtypes.values()):
                with pytest.raises(ValueError, match="engine: 'compiled' takes"):
                    call()
                continue
            actual, gradients = call()
        expected, exactly = function.gradients(exact, plain=True)
        tolerance = 20 * EPSILON[products or torch.float32]
        assert_close(actual, expected, tolerance, dtypes)
        for n, ours, theirs in zip(function.differentiated, gradients, exactly, strict=True):
            assert ours.dtype == given[n].dtype
            assert_close(ours, theirs, tolerance + 2 * EPSILON[given[n].dtype], dtypes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ["arrays", "auto"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_recorded_head_is_multiplied_in_the_dtype_that_the_policy_would_be(dtype, engine, autocast):
    tensors = FUNCTIONS["linear_policy_loss"].tensors()
    head = [tensors[name].to(dtype) for name in ("hidden", "weight")]
    context = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    low = {name: t.to(dtype) if name in ("hidden", "weight") else t for name, t in tensors.items()}
    divergence = FullDivergence(kind="tv", behavior=LinearHead(*head, tensors["bias"]))
    with context:
        result = linear_policy_loss(DPPO(delta=1e-6, divergence="per_token"), **low, divergence=divergence, engine=engine)
    # the same head: nothing is outside, whatever is rounded
    assert result.diagnostics["outside_fraction"].value == 0.0


def test_a_recorded_heads_weight_has_the_dtype_of_its_hidden_states():
    tensors = FUNCTIONS["linear_policy_loss"].tensors()
    head = LinearHead(tensors["hidden"].float(), tensors["weight"])
    with pytest.raises(TypeError, match=r"divergence\.behavior\.weight: expected the dtype of divergence\.behavior\.hidden"):
        linear_policy_loss(
            DPPO(delta=0.1, divergence="per_token"), **tensors, divergence=FullDivergence(kind="tv", behavior=head)
        )


@each_case
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_any_integral_dtype(name, engine, dtype):
    function = FUNCTIONS[name]
    tensors = function.tensors()
    expected = function.gradients(tensors, **options_of(engine, function))
    given = {n: t.to(dtype) if n in ("tokens", "top_k_ids") else t for n, t in tensors.items()}
    assert torch.equal(function.gradients(given, **options_of(engine, function))[0], expected[0])


# what a training loop does to a loss


@each_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.0 / 3.0, 65536.0])
def test_the_gradient_is_the_same_whether_the_graph_is_kept(name, engine, dtype, factor):
    function = FUNCTIONS[name]
    if engine == "compiled" and dtype == torch.float16:
        pytest.skip("not compiled for float16")
    given, _ = cast(function.tensors(), {n: dtype for n in ("logits", "hidden", "weight") if n in function.tensors()})
    leaves = {n: given[n].clone().requires_grad_() for n in function.differentiated}
    found = []
    for retain in (False, True):
        scalar = scalar_of(function.outputs(given | leaves, **options_of(engine, function))) * factor * 1e-3
        found.append(torch.autograd.grad(scalar, list(leaves.values()), retain_graph=retain))
        if retain:
            found.append(torch.autograd.grad(scalar, list(leaves.values())))
    for handed_over, retained, again in zip(*found, strict=True):
        assert torch.equal(handed_over, retained)
        assert torch.equal(handed_over, again)
        assert handed_over.isfinite().all()


@each_case
def test_outputs_may_be_changed_in_place(name, engine):
    function = FUNCTIONS[name]
    tensors = function.tensors()
    _, expected = function.gradients(tensors, **options_of(engine, function))
    leaves = {n: tensors[n].clone().requires_grad_() for n in function.differentiated}
    outputs = function.outputs(tensors | leaves, **options_of(engine, function))
    for output in outputs:
        output.div_(4.0)
    for ours, theirs in zip(torch.autograd.grad(scalar_of(outputs), list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(4.0 * ours, theirs)


def results(name, engine, **changes):
    """All that a function returns, detached figures included."""
    function = FUNCTIONS[name]
    tensors = function.tensors() | changes
    options = options_of(engine, function)
    if name.endswith("policy_loss"):
        call = {"logits_policy_loss": logits_policy_loss, "linear_policy_loss": linear_policy_loss}[name]
        objective = DPPO(delta=0.4, divergence="per_token") if "divergence" in tensors else DRPO(delta=0.9)
        return call(objective, **tensors, entropy=True, **options)
    return function.outputs(tensors, **options)


@each_case
@pytest.mark.parametrize("shape", [(), (1,), (5,)], ids=str)
def test_no_two_outputs_share_memory(name, engine, shape):
    tensors = {n: t.requires_grad_() for n, t in FUNCTIONS[name].tensors(shape).items() if n in FUNCTIONS[name].differentiated}
    outputs = [t for t in tree_leaves(tuple(results(name, engine, **every(name, shape) | tensors))) if torch.is_tensor(t)]
    before = [t.detach().clone() for t in outputs]
    with torch.no_grad():
        for i, output in enumerate(outputs):
            output.add_(1.0)
            for other, value in zip(outputs[i + 1 :], before[i + 1 :], strict=True):
                assert torch.equal(other, value)
    assert not any(t.requires_grad for t in inputs_among(outputs, tensors))


def every(name, shape):
    return FUNCTIONS[name].tensors(shape)


def inputs_among(outputs, tensors):
    """Outputs that are an input, or in the memory of one."""
    given = {t.untyped_storage().data_ptr() for t in tensors.values()}
    return [t for t in outputs if t.untyped_storage().data_ptr() in given]


@each_case
def test_inputs_are_not_changed(name, engine):
    function = FUNCTIONS[name]
    tensors = function.tensors()
    before = {n: t.clone() for n, t in tensors.items()}
    function.gradients(tensors, **options_of(engine, function))
    assert all(torch.equal(tensors[n], t) for n, t in before.items())


@each_case
def test_gradients_accumulate_and_checkpoints_compute_again(name, engine):
    function = FUNCTIONS[name]
    tensors, options = function.tensors(), options_of(engine, function)
    _, expected = function.gradients(tensors, **options)
    leaves = {n: tensors[n].clone().requires_grad_() for n in function.differentiated}

    def scalar(*values):
        return scalar_of(function.outputs(tensors | dict(zip(leaves, values, strict=True)), **options))

    checkpoint(scalar, *leaves.values(), use_reentrant=False).backward()
    scalar(*leaves.values()).backward()
    for leaf, gradient in zip(leaves.values(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2.0 * gradient)


@each_function
def test_a_second_derivative_is_refused(name):
    if name == "top_k_divergences":
        pytest.skip("made of torch's operations, which have one")
    function = FUNCTIONS[name]
    leaves = {n: t.requires_grad_() for n, t in function.tensors().items() if n in function.differentiated}
    scalar = scalar_of(function.outputs(function.tensors() | leaves))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(scalar, list(leaves.values()), create_graph=True)


# transforms


@each_case
def test_cotangents_in_a_batch_work_or_are_refused(name, engine):
    function = FUNCTIONS[name]
    tensors, options = function.tensors(), options_of(engine, function)
    leaves = {n: tensors[n].clone().requires_grad_() for n in function.differentiated}
    scalar = scalar_of(function.outputs(tensors | leaves, **options))
    batched = partial(torch.autograd.grad, scalar, list(leaves.values()), torch.tensor([1.0, 2.0]).double())
    if name in ("token_log_prob", "linear_log_prob", "full_divergences"):
        with pytest.raises(RuntimeError, match="vectorised cotangents"):
            batched(is_grads_batched=True)
        return
    _, expected = function.gradients(tensors, **options)
    for ours, theirs in zip(batched(is_grads_batched=True), expected, strict=True):
        torch.testing.assert_close(ours, torch.stack((theirs, 2.0 * theirs)))


@each_function
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "forward mode"])
def test_transforms_of_functions_work_or_are_refused(name, transform):
    function = FUNCTIONS[name]
    tensors, first = function.tensors(), function.differentiated[0]

    def scalar(x):
        return scalar_of(function.outputs(tensors | {first: x}))

    def run():
        x = tensors[first]
        if transform == "forward mode":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(scalar(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        if transform == "jvp":
            return torch.func.jvp(scalar, (x,), (torch.ones_like(x),))[1]
        if transform == "vmap":
            return torch.func.vmap(scalar)(torch.stack((x, x)))
        return (torch.func.grad if transform == "grad" else torch.func.jacrev)(scalar)(x)

    if name == "top_k_divergences":
        assert run().isfinite().all()
        return
    with pytest.raises(RuntimeError, match=f"{first}: expected a (plain tensor|tensor without a tangent)"):
        run()


# ambient states


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


AMBIENT = {
    "default device": lambda: torch.device("meta"),
    "default float64": partial(default_dtype, torch.float64),
    "default float16": partial(default_dtype, torch.float16),
    "deterministic": deterministic,
    "anomaly": torch.autograd.detect_anomaly,
}


@each_case
@pytest.mark.parametrize("state", AMBIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_ambient_states_change_nothing(name, engine, state, dtype):
    function = FUNCTIONS[name]
    tensors, options = function.tensors(), options_of(engine, function)
    given, _ = cast(tensors, dict.fromkeys((*function.differentiated, *function.constant), dtype))
    leaves = {n: given[n].requires_grad_() for n in function.differentiated}
    found = []
    for context in (contextlib.nullcontext, AMBIENT[state]):
        with context():
            outputs = function.outputs(given | leaves, **options)
            gradients = torch.autograd.grad(outputs, list(leaves.values()), [torch.full_like(o, 0.7) for o in outputs])
        found.append((*(o.detach() for o in outputs), *gradients))
    for ours, theirs in zip(*reversed(found), strict=True):
        assert ours.device == theirs.device
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@each_case
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_a_graph(name, engine, context):
    function = FUNCTIONS[name]
    tensors, options = function.tensors(), options_of(engine, function)
    leaves = {n: tensors[n].clone().requires_grad_() for n in function.differentiated}
    expected = function.outputs(tensors | leaves, **options)
    with context():
        actual = function.outputs(tensors | leaves, **options)
        made_inside = function.outputs({n: t.clone() for n, t in tensors.items()}, **options)
    for ours, inside, theirs in zip(actual, made_inside, expected, strict=True):
        assert not ours.requires_grad
        assert torch.equal(ours, theirs)
        assert torch.equal(inside, theirs)


def test_a_head_is_trained_on_hidden_states_made_in_inference_mode():
    function = FUNCTIONS["linear_policy_loss"]
    tensors = function.tensors()
    _, expected = function.gradients(tensors)
    with torch.inference_mode():
        hidden = tensors["hidden"].clone()
    weight = tensors["weight"].clone().requires_grad_()
    for engine in ("arrays", "compiled"):
        (loss,) = function.outputs(tensors | {"hidden": hidden, "weight": weight}, engine=engine)
        (gradient,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(gradient, expected[1])


# layouts


def transposed(t):
    return t.mT.contiguous().mT if t.ndim > 1 else t


def spread_out(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), NAN if t.is_floating_point() else 0, dtype=t.dtype) if t.ndim else t
    if t.ndim == 0:
        return t
    wide[..., ::2] = t
    return wide[..., ::2]


def in_wider_rows(t):
    if t.ndim == 0:
        return t
    wide = torch.zeros((*t.shape[:-1], t.shape[-1] + 3), dtype=t.dtype)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


@each_case
@pytest.mark.parametrize("layout", [transposed, spread_out, in_wider_rows], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_layout_and_shape(name, engine, layout, shape):
    function = FUNCTIONS[name]
    tensors, options = function.tensors(shape), options_of(engine, function)
    given = {n: layout(t) for n, t in tensors.items()}
    leaves = {n: given[n].requires_grad_() for n in function.differentiated}

    def run():
        outputs = function.outputs(given | leaves, **options)
        return outputs, torch.autograd.grad(scalar_of(outputs), list(leaves.values()))

    if engine == "compiled" and layout is not in_wider_rows and rows_are_strided(given):
        with pytest.raises(ValueError, match="engine: 'compiled' takes rows that are contiguous"):
            run()
        return
    outputs, gradients = run()
    _, expected = function.gradients(tensors, plain=True)
    for output in outputs:
        assert tuple(output.shape) in ((), shape, (*shape, K))
    for n, ours, theirs in zip(function.differentiated, gradients, expected, strict=True):
        assert ours.shape == tensors[n].shape
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def rows_are_strided(given):
    return any(
        given[n].numel() > 0 and given[n].shape[-1] > 1 and given[n].reshape(-1, given[n].shape[-1]).stride(-1) != 1
        for n in ("logits", "behavior_logits")
        if n in given
    )


@each_case
def test_expanded_inputs(name, engine):
    function = FUNCTIONS[name]
    tensors, options = function.tensors((1,)), options_of(engine, function)
    leaves = {n: tensors[n].clone().requires_grad_() for n in function.differentiated}
    heads = ("weight", "bias")

    def scalar(plain):
        every = {n: t if n in heads else t.expand(3, *t.shape[1:]) for n, t in (tensors | leaves).items()}
        return scalar_of(function.plain(every) if plain else function.outputs(every, **options))

    expected = torch.autograd.grad(scalar(plain=True), list(leaves.values()))
    for ours, theirs in zip(torch.autograd.grad(scalar(plain=False), list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# storage that may be overwritten

OVERWRITING = [
    (name, engine) for name in ("token_log_prob", "logits_policy_loss") for engine in ("arrays", "compiled", "auto")
]
each_overwriting = pytest.mark.parametrize(("name", "engine"), OVERWRITING)


@each_overwriting
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["whole", "rows of wider ones", "expanded", "windows", "leaf"])
def test_overwriting_gives_the_same_gradient(name, engine, dtype, how):
    function = FUNCTIONS[name]
    tensors = function.tensors((5,))
    base = torch.randn(5, V + 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)

    def logits_of(x):
        if how == "whole":
            return x[:, :V] * 1.0
        if how == "rows of wider ones":
            return (x * 1.0)[:, 2 : V + 2]
        if how == "expanded":
            return (x[0, :V] * 1.0).expand(5, V)
        return (x[0] * 1.0).unfold(0, V, 1)

    found = []
    for overwrite in (False, True):
        leaf = (base[:, :V] if how == "leaf" else base).clone().requires_grad_()
        logits = leaf if how == "leaf" else logits_of(leaf)
        outputs = function.outputs(tensors | {"logits": logits}, engine=engine, overwrite_logits=overwrite)
        found.append(torch.autograd.grad(scalar_of(outputs), leaf)[0])
    assert torch.equal(*found)


@each_overwriting
@pytest.mark.parametrize("needed", ["to make them", "before", "twice"])
def test_overwriting_logits_that_something_else_needs_is_refused(name, engine, needed):
    function = FUNCTIONS[name]
    tensors = function.tensors((5,))
    leaf = tensors["logits"].clone().requires_grad_()
    # what needs them: the backward pass of what made them, or of another function of them
    logits = leaf.tanh() if needed == "to make them" else leaf * 1.0

    def other():
        return token_log_prob(logits=logits, tokens=tensors["tokens"], temperature=0.5, engine=engine).log_prob.sum()

    total = other() if needed == "before" else 0.0
    total = total + scalar_of(function.outputs(tensors | {"logits": logits}, engine=engine, overwrite_logits=True))
    if needed == "twice":
        total = total + scalar_of(function.outputs(tensors | {"logits": logits}, engine=engine, overwrite_logits=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# float16 and loss scales


@pytest.mark.parametrize("tokens", [1e4, 1e7, 1e9])
@pytest.mark.parametrize("name", ["logits_policy_loss", "linear_policy_loss", "linear under autocast"])
def test_no_part_of_a_float16_gradient_is_lost_in_a_large_batch(name, tokens):
    generator = torch.Generator().manual_seed(0)
    n, v, h, scale = 64, 1000, 16, 2.0 ** round(np.log2(tokens))
    hidden, weight = 0.3 * torch.randn(n, h, generator=generator), 0.3 * torch.randn(v, h, generator=generator)
    ids = torch.randint(0, v, (n,), generator=generator)
    half = {"hidden": hidden.half(), "weight": weight.half()}
    wide = {k: t.double() for k, t in half.items()}
    logits = wide["hidden"] @ wide["weight"].T
    if name == "logits_policy_loss":
        logits = logits.half().double()
    rest = {"tokens": ids, "advantages": torch.randn(n, generator=generator), "mask": torch.ones(n, dtype=torch.bool)}
    rest["behavior_log_prob"] = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    options = {"normalizer": tokens}
    exact = logits.clone().requires_grad_()
    double = {k: t.double() if t.is_floating_point() else t for k, t in rest.items()}
    (logits_policy_loss(PolicyGradient(), logits=exact, **double, **options).loss * scale).backward()
    if name == "logits_policy_loss":
        leaf = logits.half().requires_grad_()
        (logits_policy_loss(PolicyGradient(), logits=leaf, **rest, **options).loss * scale).backward()
        pairs = [(leaf.grad, exact.grad)]
    else:
        leaves = {k: (t.float() if "autocast" in name else t.clone()).requires_grad_() for k, t in half.items()}
        with torch.autocast("cpu", torch.float16, enabled="autocast" in name):
            loss = linear_policy_loss(PolicyGradient(), **leaves, **rest, **options, chunk_tokens=24).loss
        (loss * scale).backward()
        pairs = [(leaves["hidden"].grad, exact.grad @ wide["weight"])]
        pairs.append((leaves["weight"].grad, exact.grad.T @ wide["hidden"]))
    for ours, theirs in pairs:
        error = float((ours.double() - theirs).norm() / theirs.norm())
        assert error <= 1.5e-3, error
        # nothing is lost one-sidedly: the sum of all that is not the sampled token is as it should be
        assert float((ours.double().abs().sum() - theirs.abs().sum()) / theirs.abs().sum()) >= -1e-3


# rows add up to 0


@pytest.mark.parametrize("engine", ["arrays", "compiled"])
@pytest.mark.parametrize("spread", [1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "chunks", [None, {}, {"chunk_tokens": 1}, {"chunk_tokens": 3}, {"chunk_tokens": 3, "chunk_vocabulary": 4}], ids=str
)
def test_each_row_of_the_gradient_adds_up_to_0(engine, spread, dtype, chunks):
    tensors = every_tensor((7,), seed=3)
    logits = (spread * (2.0 * torch.rand(7, V, generator=torch.Generator().manual_seed(0)).double() - 1.0)).to(dtype)
    log_mu = logits.double().log_softmax(-1).gather(-1, tensors["tokens"][:, None])[:, 0]
    rest = {name: tensors[name] for name in ("tokens", "advantages", "mask")} | {"behavior_log_prob": log_mu}
    leaf = logits.requires_grad_()
    if chunks is None:
        logits_policy_loss(PolicyGradient(), logits=leaf, **rest, engine=engine).loss.backward()
    else:
        weight = torch.eye(V, dtype=dtype)
        linear_policy_loss(PolicyGradient(), hidden=leaf, weight=weight, **rest, **chunks, engine=engine).loss.backward()
    assert leaf.grad.abs().max() > 0.0
    assert leaf.grad.sum(-1).abs().max() <= 8 * torch.finfo(dtype).eps * leaf.grad.abs().sum(-1).max()


# objectives that look across tokens


class Centred:
    """Advantages less their mean: every token's gradient depends on all others."""

    def _centred(self, tokens):
        return tokens.advantages - tokens.xp.mean(tokens.advantages)

    def loss(self, tokens):
        """Per-token loss."""
        return -self._centred(tokens) * tokens.ratio

    def weight(self, tokens):
        """Gradient weight."""
        return self._centred(tokens) / tokens.advantages


@pytest.mark.parametrize("engine", ["arrays", "auto"])
@pytest.mark.parametrize("chunks", [None, {}, {"chunk_tokens": 2}, {"chunk_tokens": 2, "chunk_vocabulary": 4}], ids=str)
def test_an_objective_sees_all_tokens_at_once(engine, chunks):
    name = "logits_policy_loss" if chunks is None else "linear_policy_loss"
    function = FUNCTIONS[name]
    tensors = {n: t for n, t in function.tensors((9,)).items() if n not in ("divergence", "token_weights")}
    leaves = {n: tensors[n].clone().requires_grad_() for n in function.differentiated}
    valid = tensors["mask"]
    if chunks is None:
        call, logits = logits_policy_loss, leaves["logits"]
    else:
        call, logits = linear_policy_loss, leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    log_prob = logits.log_softmax(-1).gather(-1, tensors["tokens"][:, None])[:, 0][valid]
    centred = tensors["advantages"][valid] - tensors["advantages"][valid].mean()
    expected = -(centred * (log_prob - tensors["behavior_log_prob"][valid]).exp()).mean()
    result = call(Centred(), **tensors | leaves, engine=engine, **(chunks or {}))
    torch.testing.assert_close(result.loss, expected)
    both = (torch.autograd.grad(loss, list(leaves.values())) for loss in (result.loss, expected))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_loss
def test_diagnostics_that_are_not_asked_for_are_none(name, engine):
    function = FUNCTIONS[name]
    call = {"logits_policy_loss": logits_policy_loss, "linear_policy_loss": linear_policy_loss}[name]
    tensors = {n: t for n, t in function.tensors().items() if n != "divergence"}
    bare = call(DRPO(delta=0.3), **tensors, engine=engine, diagnostics=False)
    assert bare.diagnostics is None
    assert bare.entropy is None
    assert torch.equal(bare.loss, call(DRPO(delta=0.3), **tensors, engine=engine).loss)


# values

NUMBERS = {
    "zero": 0,
    "negative": -1,
    "NaN": NAN,
    "infinity": float("inf"),
    "shape (1,)": np.ones(1),
    "tensor of shape (1,)": torch.ones(1),
    "string": "1",
    "bool": True,
    "huge": 10**400,
    "tensor": torch.tensor(1.0),
}


def call_with(name, **changes):
    function = FUNCTIONS[name]
    tensors = {n: t for n, t in function.tensors().items() if n != "divergence"} | changes
    positional = (DRPO(delta=0.3),) if name.endswith("policy_loss") else ()
    return getattr(drpo_torch, name)(*positional, **tensors)


NUMERIC = [
    *((name, "temperature", set()) for name in FUNCTIONS),
    ("full_divergences", "behavior_temperature", set()),
    *((name, n, set()) for name in HEADS for n in ("logit_softcap", "chunk_tokens", "chunk_vocabulary")),
    # a normalizer may be a 0-d tensor, and 0 where there is no token
    ("logits_policy_loss", "normalizer", {"zero", "tensor"}),
    ("linear_policy_loss", "normalizer", {"zero", "tensor"}),
]


@pytest.mark.parametrize(("name", "parameter", "allowed"), NUMERIC, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("value", NUMBERS)
def test_a_wrong_number_is_refused_by_name(name, parameter, allowed, value):
    if value in allowed:
        call_with(name, **{parameter: NUMBERS[value]})
        return
    with pytest.raises((TypeError, ValueError), match=f"^{parameter}: expected"):
        call_with(name, **{parameter: NUMBERS[value]})


@pytest.mark.parametrize(("name", "parameter", "allowed"), NUMERIC, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("make", [np.float64, np.float32, np.int64, np.array], ids=["f8", "f4", "i8", "0-d"])
def test_numpy_scalars_are_numbers(name, parameter, allowed, make):  # noqa: ARG001
    value = make(2)
    if parameter.startswith("chunk") and not isinstance(value, np.integer) and getattr(value, "dtype", None) != np.int64:
        pytest.skip("a whole number is an integer")
    expected, actual = (call_with(name, **{parameter: v}) for v in (2, value))
    for ours, theirs in zip(tree_leaves(tuple(actual)), tree_leaves(tuple(expected)), strict=True):
        assert ours is theirs or (ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(), theirs.nan_to_num()))


TENSORS = [(name, n) for name, function in FUNCTIONS.items() for n in function.tensors() if n != "divergence"]


@pytest.mark.parametrize(("name", "parameter"), TENSORS)
@pytest.mark.parametrize("kind", ["numpy", "list", "None", "number", "complex", "kind", "rank", "size", "device", "sparse"])
def test_a_wrong_tensor_is_refused_by_name(name, parameter, kind):
    tensor = FUNCTIONS[name].tensors()[parameter]
    signature = inspect.signature(getattr(drpo_torch, name)).parameters
    if kind == "None" and signature[parameter].default is None:
        pytest.skip("None is what it is by default")
    if kind == "sparse" and not tensor.is_floating_point():
        pytest.skip("sparse tensors are of floating-point numbers")
    wrong = {
        "numpy": tensor.numpy,
        "list": tensor.tolist,
        "None": lambda: None,
        "number": lambda: 1.0,
        "complex": lambda: tensor.to(torch.complex64),
        "kind": lambda: tensor.long() if tensor.is_floating_point() else tensor.double(),
        "rank": lambda: tensor[None],
        "size": lambda: torch.cat((tensor, tensor)),
        "device": lambda: tensor.to("meta"),
        "sparse": tensor.to_sparse,
    }[kind]()
    # the shape of some is that which the others are compared with
    named = r"\w+" if kind in ("rank", "size", "device") and parameter in ("logits", "hidden", "weight") else parameter
    with pytest.raises((TypeError, ValueError), match=f"^{named}: expected"):
        call_with(name, **{parameter: wrong})


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "tokens" in FUNCTIONS[n].integers])
@pytest.mark.parametrize("wrong", [-1, V, -100])
@pytest.mark.parametrize("valid", [True, False], ids=["valid", "masked"])
def test_ids_outside_the_vocabulary(name, wrong, valid):
    function = FUNCTIONS[name]
    for parameter in ("tokens", "top_k_ids"):
        if parameter not in function.integers:
            continue
        tensors = {n: t for n, t in function.tensors().items() if n != "divergence"}
        mask = torch.ones(5, dtype=torch.bool)
        mask[3] = valid
        ids = tensors[parameter].clone()
        ids[3] = wrong
        changes = {parameter: ids} | ({"mask": mask} if "mask" in function.integers else {})
        if not valid:
            if "mask" in function.integers:
                known = call_with(name, **changes | {parameter: tensors[parameter]})
                assert torch.equal(call_with(name, **changes)[0], known[0])
            continue
        where = "(3,)" if parameter == "tokens" else "(3, 0)"
        with pytest.raises(
            ValueError, match=rf"^{parameter}: expected ids in \[0, {V}\).*got {wrong} at index \{where[:-1]}\)"
        ):
            call_with(name, **changes)


@pytest.mark.parametrize("wrong", [-1, V, -100])
def test_recorded_ids_outside_the_vocabulary(wrong):
    every_one = every_tensor((5,), 0)
    mask = torch.ones(5, dtype=torch.bool)
    for valid in (True, False):
        ids = every_one["top_k_ids"].clone()
        ids[3, 1] = wrong
        mask[3] = valid
        divergence = TopKDivergence(kind="tv", ids=ids, behavior_log_prob=every_one["top_k_behavior_log_prob"])
        call = partial(call_with, "logits_policy_loss", mask=mask, divergence=divergence)
        if valid:
            with pytest.raises(ValueError, match=rf"^divergence\.ids: expected ids .* got {wrong} at index \(3, 1\)"):
                call()
        else:
            assert call().loss.isfinite()


RECORDED = {
    "temperature": lambda value: FullDivergence(kind="tv", behavior=torch.zeros(5, V), temperature=value),
    "logit_softcap": lambda value: LinearHead(torch.zeros(5, H), torch.zeros(V, H), None, value),
}


@pytest.mark.parametrize("parameter", RECORDED)
@pytest.mark.parametrize("value", NUMBERS)
def test_a_recorded_policys_numbers_are_checked(parameter, value):
    with pytest.raises((TypeError, ValueError), match=f"^{parameter}: expected"):
        RECORDED[parameter](NUMBERS[value])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullDivergence(kind="js", behavior=torch.zeros(1)), "kind: expected 'tv' or 'kl', got 'js'"),
        (lambda: FullDivergence(kind=None, behavior=torch.zeros(1)), "kind: expected 'tv' or 'kl', got None"),
        (lambda: FullDivergence(kind="tv", behavior=[1.0]), r"behavior: expected a torch\.Tensor"),
        (lambda: LinearHead(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(1)), r"bias: expected the shape of"),
        (lambda: LinearHead(torch.zeros(2, 3), torch.zeros(5, 4)), r"weight: expected the shape of"),
        (lambda: LinearHead(torch.zeros(2, 0), torch.zeros(5, 0)), r"hidden: expected shape \(…, H\)"),
        (lambda: LinearHead(np.zeros((2, 3)), torch.zeros(5, 3)), r"hidden: expected a torch\.Tensor"),
        (
            lambda: TopKDivergence(kind="tv", ids=torch.zeros(2, 3), behavior_log_prob=torch.zeros(2, 3)),
            "ids: expected an integral dtype",
        ),
        (
            lambda: TopKDivergence(kind="tv", ids=torch.zeros(2, 3, dtype=torch.long), behavior_log_prob=torch.zeros(2, 2)),
            "behavior_log_prob: expected the shape of ids",
        ),
    ],
)
def test_a_recorded_policys_arrays_are_checked(make, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()


@each_function
def test_an_unknown_engine_is_refused(name):
    if FUNCTIONS[name].engines == ("arrays",):
        pytest.skip("it has none")
    for engine in ("eager", "jit", None, 1):
        with pytest.raises(ValueError, match=r"^engine: expected 'auto', 'arrays' or 'compiled'"):
            call_with(name, engine=engine)


@pytest.mark.parametrize("objective", [DRPO, None, object()], ids=["a class", "None", "an object"])
@pytest.mark.parametrize("function", [logits_policy_loss, linear_policy_loss], ids=lambda f: f.__name__)
def test_an_objective_that_is_none_is_refused(function, objective):
    tensors = FUNCTIONS[function.__name__].tensors()
    tensors.pop("divergence", None)
    with pytest.raises(TypeError, match=r"^objective: expected"):
        function(objective, **tensors)


def test_an_id_that_is_recorded_twice_counts_once():
    tensors = FUNCTIONS["top_k_divergences"].tensors()
    once = top_k_divergences(**tensors)
    twice = {
        "top_k_ids": torch.cat((tensors["top_k_ids"], tensors["top_k_ids"][:, :2]), -1),
        "top_k_behavior_log_prob": torch.cat(
            (tensors["top_k_behavior_log_prob"], tensors["top_k_behavior_log_prob"][:, :2]), -1
        ),
    }
    for ours, theirs in zip(top_k_divergences(**tensors | twice), once, strict=True):
        torch.testing.assert_close(ours, theirs)


class Sharded(torch.Tensor):
    """As a DTensor looks."""

    def full_tensor(self):
        """The whole tensor, gathered."""
        return torch.Tensor(self)


def test_a_sharded_head_is_told_how_to_gather():
    weight = FUNCTIONS["linear_policy_loss"].tensors()["weight"].as_subclass(Sharded)
    with pytest.raises(
        TypeError, match=r"^weight: expected a plain tensor, got a Sharded; gather it with weight\.full_tensor\(\)"
    ):
        call_with("linear_policy_loss", weight=weight)


@each_function
def test_without_numba(name, monkeypatch):
    if FUNCTIONS[name].engines == ("arrays",):
        pytest.skip("it has one engine")
    monkeypatch.setattr(drpo_core.loss, "_is_installed", lambda _: False)
    monkeypatch.setattr(drpo_core.loss, "_say_once_how_to_compile", lambda: None)
    function = FUNCTIONS[name]
    expected, actual = (function.gradients(function.tensors(), engine=engine) for engine in ("arrays", "auto"))
    assert torch.equal(actual[0], expected[0])
    with pytest.raises(ImportError, match=r"engine: 'compiled' needs numba: pip install 'drpo-core\[compiled\]'"):
        function.gradients(function.tensors(), engine="compiled")
