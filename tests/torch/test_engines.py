"""The engines of `drpo_torch.policy_loss`: each is the plain expression, only faster; and the kit passes on each."""

import functools

import numpy as np
import pytest
import torch
from drpo_torch import fused, operations, policy_loss
from drpo_torch.namespace import COMPILED
from test_torch import OBJECTIVES, REDUCTIONS, batch, gradient_of

from drpo_core import CISPO, DPPO, DRPO, PPOClip, sequence_mean_token_mean, token_mean
from drpo_core.testing import from_function, parametrize_with_checks

SUBJECT = DRPO(delta_low=0.1, delta_high=0.2)

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}

each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS, ids=["token-mean", "seq-mean-token-mean", "token-sum"])
fast = pytest.mark.parametrize("engine", ["eager", "jit"])


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    """So few tokens at a time that small tensors take several pieces, and rows are cut."""
    monkeypatch.setattr(operations, "PIECE", 10)


@pytest.fixture(autouse=True)
def plain_engine(monkeypatch):
    """The plain expression as an engine of its own, to compare the others with."""
    monkeypatch.setitem(fused.ENGINES, "plain", fused.plain)


@pytest.fixture
def no_fallback(monkeypatch):
    """Fail where an engine hands over to the plain expression."""

    def refuse(*_args, **_kwargs):
        pytest.fail("fell back to the plain expression")

    monkeypatch.setattr(fused, "plain", refuse)


def awkward(shape=(4, 6), dtype=torch.float64):
    """A batch with zero advantages, extreme log-probs at valid tokens and garbage at masked ones."""
    data = batch(shape, dtype=dtype)
    values = {name: tensor.detach().reshape(-1) for name, tensor in data.items()}
    values["log_prob"][:3] = torch.tensor([-float("inf"), -0.0, -0.5])
    values["behavior_log_prob"][:3] = torch.tensor([-float("inf"), -25.0, -0.5])
    values["advantages"][3] = 0.0
    values["mask"][:4] = True
    for name, garbage in {"log_prob": float("nan"), "behavior_log_prob": float("inf"), "advantages": float("nan")}.items():
        values[name][~values["mask"]] = garbage
    return {name: tensor.reshape(shape) for name, tensor in values.items()}


def evaluated(objective, data, engine, **options):
    """Loss, gradient and diagnostics."""
    data = data | {"log_prob": data["log_prob"].detach().requires_grad_()}
    loss, statistics = policy_loss(objective, **data, engine=engine, **options)
    loss.backward()
    return loss.detach(), data["log_prob"].grad, {name: tuple(statistic) for name, statistic in statistics.items()}


def assert_same(got, expected, dtype=torch.float64):
    """Loss, gradients as a whole, and each figure to the rounding of the arithmetic."""
    tolerance = TOLERANCE[dtype]
    (loss, gradient, statistics), (expected_loss, expected_gradient, expected_statistics) = got, expected
    assert (loss.dtype, loss.shape, gradient.dtype) == (expected_loss.dtype, (), expected_gradient.dtype)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    # where w ≈ 0 a gradient is a difference that cancels: relative to −A r, of size 1 here, not to itself
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance * _size(expected_gradient))
    assert statistics.keys() == expected_statistics.keys()
    for name, figures in expected_statistics.items():
        torch.testing.assert_close(statistics[name], figures, rtol=2 * tolerance, atol=tolerance, equal_nan=True, msg=name)


def _size(gradient):
    return float(gradient.abs().max())


# every engine is the plain expression


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_reduction
@each_objective
def test_eager_equals_the_plain_expression(objective, reduction, dtype):
    data = awkward(dtype=dtype)
    expected = evaluated(objective, data, "plain", reduction=reduction)
    assert_same(evaluated(objective, data, "eager", reduction=reduction), expected, dtype)


def options_of(shape):
    """Of a padded batch with weights, and of packed sequences."""
    if len(shape) == 1:
        return {"segment_ids": torch.arange(shape[0]) // 6, "reduction": sequence_mean_token_mean}
    return {"token_weights": torch.linspace(0.5, 2.0, shape[0] * shape[1]).reshape(shape), "normalizer": 7.0}


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("shape", [(4, 6), (24,)])
@fast
def test_weighted_and_packed_tokens(shape, engine):
    data = awkward(shape, torch.float32)
    expected = evaluated(SUBJECT, data, "plain", **options_of(shape))
    assert_same(evaluated(SUBJECT, data, engine, **options_of(shape)), expected, torch.float32)


@pytest.mark.parametrize("engine", ["eager", "jit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, engine):
    data = batch(dtype=torch.float32)
    data["log_prob"] = data["log_prob"].detach().to(dtype)
    options = {"diagnostics": False, "token_weights": torch.rand(4, 6)}
    expected = evaluated(DRPO(delta=0.15), data, "plain", **options)
    loss, gradient, statistics = evaluated(DRPO(delta=0.15), data, engine, **options)
    assert (loss.dtype, gradient.dtype, statistics) == (torch.float32, dtype, {})
    torch.testing.assert_close((loss, gradient), expected[:2])


@pytest.mark.parametrize("engine", ["eager", "compile", "jit"])
def test_no_tokens(engine):
    for shape in [(0,), (3, 0), (0, 3)]:
        loss, gradient, statistics = evaluated(DRPO(delta=0.15), batch(shape), engine)
        assert (float(loss), gradient.shape) == (0.0, torch.Size(shape))
        assert float(statistics["ratio_mean"][1]) == 0.0


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("shape", [(), (1,), (35,), (1, 35), (35, 1), (2, 3, 4), (10, 10)])
def test_eager_takes_any_shape(shape):
    data = batch(shape)
    data["mask"] |= torch.tensor(data=True)
    assert_same(evaluated(SUBJECT, data, "eager"), evaluated(SUBJECT, data, "plain"))


@pytest.mark.usefixtures("no_fallback")
def test_eager_takes_strided_and_expanded_tensors():
    data = batch((6, 14))
    data["advantages"] = data["advantages"][:, :1].expand(6, 14)
    data["behavior_log_prob"] = data["behavior_log_prob"].t().contiguous().t()
    data["mask"] = data["mask"].t().contiguous().t()
    assert_same(evaluated(SUBJECT, data, "eager"), evaluated(SUBJECT, data, "plain"))


# objectives of users


class Damped:
    """Written with the Array API, mutable."""

    strength = 1.0

    def loss(self, tokens):
        """−A log(1 + s r)/s."""
        return -tokens.advantages * tokens.xp.log1p(self.strength * tokens.ratio) / self.strength

    def weight(self, tokens):
        """1/(1 + s r)."""
        return 1.0 / (1.0 + self.strength * tokens.ratio)

    def inside(self, tokens):
        """Everywhere."""
        return tokens.ratio == tokens.ratio


class WithTorch(Damped):
    """Written with torch's own functions, which don't take symbols."""

    def weight(self, tokens):
        """1/(1 + s r)."""
        return torch.reciprocal(1.0 + self.strength * tokens.ratio)


class AcrossTokens(Damped):
    """A weight that depends on all tokens: pieces would each have their own."""

    def weight(self, tokens):
        """1/(Σ r + r)."""
        return 1.0 / (tokens.xp.sum(tokens.ratio) + tokens.ratio)


class Branching(Damped):
    """Decides in Python."""

    def weight(self, tokens):
        """1, or 1/2 if any token has moved far."""
        return tokens.xp.ones_like(tokens.ratio) * (0.5 if bool((tokens.ratio > 1.5).any()) else 1.0)


@pytest.mark.usefixtures("no_fallback")
def test_an_objective_of_a_user_is_replayed_and_may_change():
    objective, data = Damped(), batch()
    first = evaluated(objective, data, "eager")
    assert_same(first, evaluated(objective, data, "plain"))
    objective.strength = 3.0
    second = evaluated(objective, data, "eager")
    assert_same(second, evaluated(objective, data, "plain"))
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "objective", [WithTorch(), AcrossTokens(), Branching()], ids=lambda objective: type(objective).__name__
)
def test_what_cannot_be_traced_falls_back(objective):
    data = batch()
    assert_same(evaluated(objective, data, "eager"), evaluated(objective, data, "plain"))


def test_a_missing_divergence_is_still_named():
    data = batch()
    del data["divergence"]
    with pytest.raises(TypeError, match="divergence: expected an array"):
        evaluated(DPPO(delta=0.1, divergence="per_token"), data, "eager")


@pytest.mark.parametrize("engine", ["eager", "compile", "jit"])
def test_a_foreign_reduction(engine):
    def half_the_mean(values, mask, **options):
        return 0.5 * token_mean(values, mask, **options)

    data = batch()
    loss, gradient, statistics = evaluated(SUBJECT, data, engine, reduction=half_the_mean)
    expected = evaluated(SUBJECT, data, "plain")
    assert_same((2.0 * loss, 2.0 * gradient, statistics), expected)
    assert evaluated(SUBJECT, data, engine, reduction=half_the_mean, diagnostics=False)[2] == {}


# contracts


@fast
def test_errors(engine):
    data = batch()
    with pytest.raises(ValueError, match=r"engine: expected one of 'eager', 'compile', 'jit'.*got 'fast'"):
        policy_loss(SUBJECT, **data, engine="fast")
    for change, error, message in [
        ({"mask": data["mask"].float()}, TypeError, "mask: expected a bool dtype"),
        ({"advantages": data["advantages"][0]}, ValueError, "advantages: expected the shape of log_prob"),
        ({"mask": None}, TypeError, "mask: expected"),
        ({"behavior_log_prob": [0.0]}, TypeError, "behavior_log_prob: expected a torch.Tensor"),
    ]:
        with pytest.raises(error, match=message):
            policy_loss(SUBJECT, **data | change, engine=engine)


def test_jit_is_for_the_cpu():
    data = {name: tensor.detach().to("meta") for name, tensor in batch().items()}
    with pytest.raises(ValueError, match="engine: 'jit' works on CPU tensors, got log_prob on meta"):
        policy_loss(SUBJECT, **data, engine="jit")


@fast
def test_transforms_see_the_plain_expression(engine):
    data = batch()
    expected = gradient_of(SUBJECT, data)

    def loss(log_prob):
        return policy_loss(SUBJECT, **data | {"log_prob": log_prob}, engine=engine, diagnostics=False)[0]

    torch.testing.assert_close(torch.func.grad(loss)(data["log_prob"].detach()), expected)
    torch._dynamo.reset()  # noqa: SLF001 -- the documented way
    log_prob = data["log_prob"].detach().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(log_prob).backward()
    torch.testing.assert_close(log_prob.grad, expected)
    (first,) = torch.autograd.grad(policy_loss(SUBJECT, **data, engine=engine)[0], data["log_prob"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@fast
def test_backward_twice_and_with_any_cotangent(engine):
    data = batch()
    expected = gradient_of(SUBJECT, data)
    loss, _ = policy_loss(SUBJECT, **data, engine=engine, diagnostics=False)
    for factor in (1.0, -2.0, 0.0):
        (gradient,) = torch.autograd.grad(factor * loss, data["log_prob"], retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected)


# torch.compile


@pytest.fixture
def without_recompiling():
    with torch._dynamo.config.patch(error_on_recompile=True):  # noqa: SLF001
        yield


@pytest.mark.usefixtures("without_recompiling")
def test_compiled_once_for_all_shapes_and_thresholds_and_equal_to_the_plain_expression():
    for objective in (DRPO(delta=0.15), DRPO(delta=0.3)):
        for shape in [(4, 6), (5, 7)]:
            data = awkward(shape, torch.float32)
            del data["divergence"]
            expected = evaluated(objective, data, "plain", diagnostics=False)
            assert_same(evaluated(objective, data, "compile", diagnostics=False), expected, torch.float32)


def test_expm1_is_accurate_where_inductor_compiles_it():
    t = torch.cat((-torch.logspace(-12, 2, 500, dtype=torch.float64), torch.tensor([-0.5, -0.0, -torch.inf, torch.nan])))
    compiled = torch.compile(COMPILED.expm1, fullgraph=True, dynamic=True)
    exact = torch.from_numpy(np.expm1(t.float().double().numpy())).float()
    torch.testing.assert_close(compiled(t.float()), exact, rtol=4e-7, atol=0.0, equal_nan=True)
    torch.testing.assert_close(COMPILED.expm1(t), torch.expm1(t), rtol=1e-15, atol=0.0, equal_nan=True)


# the verification kit on each engine


def with_engine(objective, engine, reduction, **claims):
    """`policy_loss` with one engine, for the kit."""

    @functools.cache
    def build(objective):
        def loss(log_prob, mask, segment_ids=None, normalizer=None, **tokens):
            options = {"segment_ids": segment_ids, "normalizer": normalizer, "reduction": reduction, "diagnostics": False}
            return policy_loss(objective, log_prob=log_prob, mask=mask, **tokens, **options, engine=engine)[0]

        declared = {
            "objective": objective,
            "form": "score" if isinstance(objective, CISPO) else "ratio",
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
        ("eager", SUBJECT, token_mean),
        ("eager", SUBJECT, sequence_mean_token_mean),
        ("eager", PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0), token_mean),
        ("eager", CISPO(max_ratio=5.0), token_mean),
        ("jit", SUBJECT, token_mean),
        ("jit", SUBJECT, sequence_mean_token_mean),
    ]
]


@parametrize_with_checks(ON_ENGINES, settings="dev")
def test_kit(check):
    check()


@fast
@pytest.mark.parametrize("cotangent", [1.0, 0.5])
def test_gradients_accumulate_over_backward_passes_of_one_graph(engine, cotangent):
    """Backward may give away the array it kept, or change it, in its last pass only."""
    data = batch()
    loss, _ = policy_loss(SUBJECT, **data, engine=engine)
    (once,) = torch.autograd.grad(cotangent * loss, data["log_prob"], retain_graph=True)
    expected = once.clone()
    for passes in (1, 2, 3):
        (cotangent * loss).backward(retain_graph=passes < 3)
        torch.testing.assert_close(data["log_prob"].grad, passes * expected)
    torch.testing.assert_close(once, expected, rtol=0.0, atol=0.0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@fast
def test_the_last_backward_pass_makes_no_array(engine):
    data = batch()
    loss, _ = policy_loss(SUBJECT, **data, engine=engine)
    kept = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert data["log_prob"].grad.data_ptr() == kept
