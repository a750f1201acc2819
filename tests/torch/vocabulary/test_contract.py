"""What the functions at vocabulary scale promise besides the contract matrix: recorded heads, overwriting, float16, ids."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from drpo_torch import (
    FullDivergence,
    LinearHead,
    TopKDivergence,
    full_divergences,
    linear_policy_loss,
    logits_policy_loss,
    token_log_prob,
    top_k_divergences,
)
from vocabulary_batches import small_steps
from vocabulary_functions import FUNCTIONS, H, V, every_tensor, scalar_of

import drpo_core.loss
from drpo_core import DPPO, DRPO, PolicyGradient

NAN = float("nan")

each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_loss = pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("logits_policy_loss", "linear_policy_loss") for engine in ("arrays", "compiled")],
)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    small_steps(monkeypatch)


def assert_close(actual, expected, tolerance, message=""):
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((actual.double() - expected).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-30), (message, error, scale)


# dtypes


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


# what a training loop does to a loss


def every(name, shape):
    return FUNCTIONS[name].tensors(shape)


# ambient states


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
    functions = {
        f.__name__: f for f in (logits_policy_loss, linear_policy_loss, token_log_prob, full_divergences, top_k_divergences)
    }
    positional = (DRPO(delta=0.3),) if name.endswith("policy_loss") else ()
    return functions[name](*positional, **tensors)


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
                assert torch.equal(
                    call_with(name, **changes).loss, call_with(name, **changes | {parameter: tensors[parameter]}).loss
                )
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
    monkeypatch.setattr(drpo_core.loss, "_has_numba", lambda: False)
    monkeypatch.setattr(drpo_core.loss, "_say_once_how_to_compile", lambda: None)
    function = FUNCTIONS[name]
    expected, actual = (function.gradients(function.tensors(), engine=engine) for engine in ("arrays", "auto"))
    assert torch.equal(actual[0], expected[0])
    with pytest.raises(ImportError, match=r"engine: 'compiled' needs numba: pip install 'drpo-core\[compiled\]'"):
        function.gradients(function.tensors(), engine="compiled")
