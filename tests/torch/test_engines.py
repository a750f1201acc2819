"""The engines of `drpo_torch.policy_loss`: each gives the core's numbers, and the kit passes on each."""

import functools
import importlib.util

import numpy as np
import pytest
import torch
from drpo_torch import engines, linear_reduction, policy_loss
from torch_cases import (
    TOLERANCE,
    assert_same,
    awkward,
    batch,
    each_engine,
    each_reduction,
    evaluated,
    gradient_of,
    in_log_prob,
    of_the_core,
)
from variants import MEASURED, each_kind, each_objective

from drpo_core import (
    CISPO,
    DRPO,
    PPOClip,
    SlowEngineWarning,
    UntraceableError,
    sequence_mean_token_mean,
    token_mean,
)
from drpo_core import loss as core_loss
from drpo_core.engines import numba_loop
from drpo_core.testing import from_function, parametrize_with_checks
from drpo_core.testing.implementation import form_of

SUBJECT = DRPO(delta_low=0.1, delta_high=0.2)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """So few tokens at a time that small tensors take several chunks, and rows are cut."""
    monkeypatch.setitem(engines.run_pass.__globals__, "CHUNK", 5)


@pytest.fixture
def no_arrays(monkeypatch):
    """Fail where the compiled loop hands over to array operations."""

    def refuse(*_args, **_kwargs):
        pytest.fail("fell back to array operations")

    for name in ("chunked_pass", "policy_pass"):
        monkeypatch.setitem(engines.run_pass.__globals__, name, refuse)


# --- every engine gives the core's numbers ---


@each_engine
@each_objective
def test_the_core_in_float64(objective, engine):
    data = awkward()
    assert_same(evaluated(objective, data, engine), of_the_core(objective, data))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_engine
@each_reduction
@each_kind
def test_each_reduction_of_each_kind(objective, reduction, engine, dtype):
    data = awkward(dtype=dtype)
    assert_same(
        evaluated(objective, data, engine, reduction=reduction), of_the_core(objective, data, reduction=reduction), dtype
    )


@pytest.mark.usefixtures("no_arrays")
@pytest.mark.parametrize("engine", ["auto", "compiled"])
@each_objective
def test_every_objective_of_the_table_is_compiled(objective, engine):
    evaluated(objective, batch(), engine)


def test_auto_is_the_compiled_loop_bit_for_bit():
    data = awkward()
    for found, expected in zip(evaluated(SUBJECT, data, "auto"), evaluated(SUBJECT, data, "compiled"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def options_of(shape):
    """Of a padded batch with weights, and of packed sequences."""
    if len(shape) == 1:
        return {"segment_ids": torch.arange(shape[0]) // 6, "reduction": sequence_mean_token_mean}
    return {"token_weights": torch.linspace(0.5, 2.0, shape[0] * shape[1]).reshape(shape), "normalizer": 7.0}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (24,)], ids=["weighted", "packed"])
@each_engine
def test_weighted_and_packed_tokens(shape, engine, dtype):
    data, options = awkward(shape, dtype), options_of(shape)
    assert_same(evaluated(SUBJECT, data, engine, **options), of_the_core(SUBJECT, data, **options), dtype)


@each_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, engine):
    data = batch(dtype=torch.float32)
    data["log_prob"] = data["log_prob"].detach().to(dtype)
    options = {"token_weights": torch.linspace(0.5, 2.0, 24).reshape(4, 6)}
    loss, gradient, statistics = evaluated(DRPO(delta=0.15), data, engine, diagnostics=False, **options)
    assert (loss.dtype, gradient.dtype, statistics) == (torch.float32, dtype, None)
    expected_loss, expected_gradient, _ = of_the_core(DRPO(delta=0.15), data, **options)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=torch.finfo(dtype).eps, atol=1e-7)


@each_engine
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (0, 3), (35,), (1, 35), (35, 1), (2, 3, 4), (10, 10)], ids=str)
@each_reduction
def test_any_shape(shape, engine, reduction):
    if shape == () and reduction is not token_mean:
        pytest.skip("a number has no sequences")
    data = batch(shape)
    found = evaluated(SUBJECT, data, engine, reduction=reduction)
    assert found[1].shape == shape
    assert_same(found, of_the_core(SUBJECT, data, reduction=reduction))


@each_engine
def test_strided_and_expanded_tensors(engine):
    data = batch((6, 14))
    data["advantages"] = data["advantages"][:, :1].expand(6, 14)
    data["behavior_log_prob"] = data["behavior_log_prob"].t().contiguous().t()
    data["mask"] = data["mask"].t().contiguous().t()
    assert_same(evaluated(SUBJECT, data, engine), of_the_core(SUBJECT, data))


@each_engine
@each_kind
def test_diagnostics_that_were_not_asked_for(objective, engine):
    data = batch()
    loss, gradient, statistics = evaluated(objective, data, engine, diagnostics=False)
    assert statistics is None
    assert_same((loss, gradient, None), of_the_core(objective, data))


# --- objectives of users ---


class Damped:
    """Written with the Array API, mutable, and without a trust region."""

    def __init__(self, strength=1.0):
        self.strength = strength

    def __eq__(self, other):
        """Whatever the class: a cache that asks no more gives another's numbers."""
        return getattr(other, "strength", None) == self.strength

    def __hash__(self):
        """The number's."""
        return hash(self.strength)

    def loss(self, tokens):
        """−A log(1 + s r)/s."""
        return -tokens.advantages * tokens.xp.log1p(self.strength * tokens.ratio) / self.strength

    def weight(self, tokens):
        """1/(1 + s r)."""
        return 1.0 / (1.0 + self.strength * tokens.ratio)


class Doubled(Damped):
    """Equal to a `Damped` of its strength, and not the same."""

    def weight(self, tokens):
        """Twice the other's."""
        return 2.0 * super().weight(tokens)


class Region(Damped):
    """With a trust region."""

    def inside(self, tokens):
        """Where r < 2."""
        return tokens.ratio < 2.0


class WithTorch(Damped):
    """Written with torch's own functions, which don't take symbols."""

    def weight(self, tokens):
        """1/(1 + s r)."""
        if isinstance(tokens.ratio, np.ndarray):
            return super().weight(tokens)
        return torch.reciprocal(1.0 + self.strength * tokens.ratio)


class AcrossTokens(Damped):
    """A weight that depends on all tokens: chunks would each have their own."""

    def weight(self, tokens):
        """1/(Σ r + r)."""
        return 1.0 / (tokens.xp.sum(tokens.ratio) + tokens.ratio)


class Branching(Damped):
    """Decides in Python."""

    def weight(self, tokens):
        """1, or 1/2 if any token has moved far."""
        return tokens.xp.ones_like(tokens.ratio) * (0.5 if bool(tokens.xp.any(tokens.ratio > 1.5)) else 1.0)


each_engine_and_auto = pytest.mark.parametrize("engine", ["arrays", "compiled", "auto"])


@each_engine_and_auto
@pytest.mark.parametrize("objective", [Damped(), Region(), Doubled(3.0)], ids=lambda objective: type(objective).__name__)
def test_an_objective_of_a_user(objective, engine):
    data = awkward()
    assert_same(evaluated(objective, data, engine), of_the_core(objective, data))


@each_engine_and_auto
def test_an_objective_may_change_between_calls(engine, monkeypatch):
    data, gradients = batch(), []

    def check(objective):
        found = evaluated(objective, data, engine)
        assert_same(found, of_the_core(objective, data))
        gradients.append(found[1])

    objective = Damped()
    check(objective)
    objective.strength = 3.0
    check(objective)
    # equal and hashed alike, but of another class
    check(Doubled(3.0))
    monkeypatch.setattr(Damped, "weight", lambda self, tokens: self.strength / (2.0 + tokens.ratio))
    check(objective)
    objective.weight = lambda tokens: 0.25 * tokens.xp.ones_like(tokens.ratio)
    check(objective)
    for i, one in enumerate(gradients):
        assert not any(torch.equal(one, other) for other in gradients[:i])


@pytest.mark.parametrize(
    "objective", [WithTorch(), AcrossTokens(), Branching()], ids=lambda objective: type(objective).__name__
)
def test_what_cannot_be_traced_runs_as_arrays(objective):
    data = batch()
    for engine in ("arrays", "auto"):
        found = evaluated(objective, data, engine)
        assert found[1].abs().max() > 0.0
        # masked tokens are r = 1 for the objective, in the core as here
        assert_same(found, of_the_core(objective, data))
    with pytest.raises(UntraceableError, match="engine='arrays' runs any objective"):
        evaluated(objective, data, "compiled")


def test_a_schedule_of_thresholds_compiles_once():
    data = batch()
    evaluated(DRPO(delta=0.11), data, "compiled")
    before = numba_loop.compilations()
    for step in range(50):
        objective = DRPO(delta=0.1 + 0.001 * step)
        assert_same(evaluated(objective, data, "compiled"), of_the_core(objective, data))
    assert numba_loop.compilations() == before


@each_engine
def test_a_missing_divergence_is_named(engine):
    data = batch()
    del data["divergence"]
    with pytest.raises(TypeError, match="divergence: expected an array"):
        evaluated(MEASURED, data, engine)


# --- reductions of users ---


@each_engine_and_auto
@pytest.mark.parametrize("diagnostics", [False, True])
@each_kind
def test_a_linear_reduction(objective, engine, diagnostics):
    data = awkward()
    rows = data["mask"].sum(-1, keepdim=True).clamp(min=1)
    linear = linear_reduction(lambda values, mask: 0.5 * ((values * mask).sum(-1, keepdim=True) / rows).mean())
    expected = of_the_core(objective, data, reduction=functools.partial(sequence_mean_token_mean, normalizer=8.0))
    assert_same(evaluated(objective, data, engine, reduction=linear, diagnostics=diagnostics), expected)


@pytest.mark.usefixtures("no_arrays")
def test_a_linear_reduction_is_compiled():
    linear = linear_reduction(lambda values, mask: torch.where(mask, values, 0.0).sum() / 3.0)
    assert_same(
        evaluated(SUBJECT, awkward(), "auto", reduction=linear),
        of_the_core(SUBJECT, awkward(), reduction=functools.partial(token_mean, normalizer=3.0)),
    )


# --- contracts ---


@pytest.mark.parametrize("engine", ["arrays", "compiled", "auto"])
def test_errors(engine):
    data = batch()
    for change, error, message in [
        ({"mask": data["mask"].float()}, TypeError, "mask: expected a bool dtype"),
        ({"advantages": data["advantages"][0]}, ValueError, "advantages: expected the shape of log_prob"),
        ({"mask": None}, TypeError, "mask: expected"),
        ({"behavior_log_prob": [0.0]}, TypeError, "behavior_log_prob: expected a torch.Tensor"),
        ({"reduction": torch.mean}, TypeError, "reduction: expected token_mean"),
        ({"reduction": "token_mean"}, TypeError, "reduction: expected token_mean"),
        ({"token_weights": torch.ones(6)}, ValueError, "token_weights: expected the shape of mask"),
    ]:
        with pytest.raises(error, match=message):
            policy_loss(SUBJECT, **data | change, engine=engine)
    for wrong in (DRPO, 3, None, object()):
        with pytest.raises(TypeError, match=r"^objective: expected"):
            policy_loss(wrong, **data, engine=engine)


@pytest.mark.parametrize("engine", ["fast", "eager", "jit", "compile", "", None, 1, True, ["auto"], b"auto"], ids=repr)
def test_an_unknown_engine(engine):
    with pytest.raises(ValueError, match=r"engine: expected 'auto', 'arrays' or 'compiled', got"):
        policy_loss(SUBJECT, **batch(), engine=engine)


def test_the_compiled_loop_is_for_the_cpu():
    data = {name: tensor.detach().to("meta") for name, tensor in batch().items()}
    with pytest.raises(ValueError, match="engine: 'compiled' works on tensors of a CPU or a GPU of CUDA or ROCm, got meta"):
        policy_loss(SUBJECT, **data, engine="compiled")


def test_without_numba(monkeypatch):
    """Said once a process: how to get the compiled loop; asked for, it is an error."""
    scope = core_loss.may_compile.__globals__
    scope["_is_installed"].cache_clear()
    scope["_say_once_how_to_compile"].cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setitem(scope, "find_spec", lambda _: None)
    try:
        with pytest.warns(SlowEngineWarning, match=r"pip install 'drpo-core\[compiled\]'") as warned:
            found, *_ = [evaluated(SUBJECT, batch(), "auto") for _ in range(3)]
        assert len(warned) == 1
        assert warned[0].filename == evaluated.__code__.co_filename
        assert_same(found, of_the_core(SUBJECT, batch()))
        with pytest.raises(ImportError, match=r"engine: 'compiled' needs numba: pip install 'drpo-core\[compiled\]'"):
            evaluated(SUBJECT, batch(), "compiled")
    finally:
        scope["_is_installed"].cache_clear()
        scope["_say_once_how_to_compile"].cache_clear()


@each_engine_and_auto
def test_transforms_see_one_expression(engine):
    data = batch()
    loss = in_log_prob(SUBJECT, data, engine=engine, diagnostics=False)
    expected = gradient_of(SUBJECT, data, engine="arrays")
    torch.testing.assert_close(torch.func.grad(loss)(data["log_prob"].detach()), expected)
    torch._dynamo.reset()  # noqa: SLF001 -- the documented way
    log_prob = data["log_prob"].detach().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(log_prob).backward()
    torch.testing.assert_close(log_prob.grad, expected)


# --- the verification kit on each engine ---


def with_engine(objective, engine, reduction, **claims):
    """`policy_loss` with one engine, for the kit."""

    @functools.cache
    def build(objective):
        def loss(log_prob, mask, segment_ids=None, normalizer=None, **tokens):
            options = {"segment_ids": segment_ids, "normalizer": normalizer, "reduction": reduction, "diagnostics": False}
            return policy_loss(objective, log_prob=log_prob, mask=mask, **tokens, **options, engine=engine)[0]

        declared = {
            "objective": objective,
            "form": form_of(objective),
            "reduction": reduction.__name__,
            "gradient": "analytic",
            "takes_packed": True,
            "max_abs_log_ratio": np.inf,
            "family": build,
        }
        return from_function(loss, "torch", name=f"{engine}-{reduction.__name__}-{objective!r}", **declared | claims)

    return build(objective)


ON_ENGINES = [
    with_engine(objective, engine, reduction)
    for engine, objective, reduction in [
        ("arrays", SUBJECT, token_mean),
        ("arrays", SUBJECT, sequence_mean_token_mean),
        ("compiled", SUBJECT, token_mean),
        ("compiled", SUBJECT, sequence_mean_token_mean),
        ("compiled", PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0), token_mean),
        ("compiled", CISPO(max_ratio=5.0), token_mean),
    ]
]


@parametrize_with_checks(ON_ENGINES, settings="dev")
def test_kit(check):
    check()
