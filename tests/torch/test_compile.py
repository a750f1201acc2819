"""Under `torch.compile`, without a graph break: the numbers of the eager call, and no recompiling without need."""

import functools
import itertools

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from drpo_torch import linear_reduction, policy_loss, token_loss
from drpo_torch.engines._namespace import COMPILED
from torch_cases import batch, each_reduction
from variants import FULL, KINDS

from drpo_core import DPPO, DRPO, PolicyGradient, sequence_mean_token_mean, token_diagnostics
from drpo_core.advantages import pass_at_k_advantages
from drpo_core.corrections import PrefixBudgetMask, SecondMomentMask
from drpo_core.modes import Mode
from drpo_core.reduction import prompt_mean, reduction_coefficients


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()  # noqa: SLF001 -- the documented way


@pytest.fixture
def without_recompiling():
    with torch._dynamo.config.patch(error_on_recompile=True):  # noqa: SLF001
        yield


def assert_compiled_equals_eager(function, objectives, *, shapes=((4, 6),), rtol=1e-12, dtype=torch.float64, **options):
    compiled = torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)
    for i, objective in enumerate(objectives):
        for shape in shapes if i == 0 else shapes[:1]:
            data, same = batch(shape, seed=i, dtype=dtype), batch(shape, seed=i, dtype=dtype)
            loss, statistics = compiled(objective, **data)
            expected, expected_statistics = function(objective, **same)
            loss.backward()
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=rtol, atol=rtol)
            torch.testing.assert_close(data["log_prob"].grad, same["log_prob"].grad, rtol=rtol, atol=rtol)
            assert (statistics is None) is (expected_statistics is None)
            for name, statistic in (expected_statistics or {}).items():
                torch.testing.assert_close(tuple(statistics[name]), tuple(statistic), rtol=rtol, atol=rtol, equal_nan=True)


def loss_alone(objective, **data):
    return policy_loss(objective, **data, diagnostics=False)


def token_losses(objective, **data):
    return token_loss(objective, **data).sum(), None


@pytest.mark.parametrize("engine", ["auto", "arrays", "compiled"])
def test_with_diagnostics_on_each_engine(engine):
    assert_compiled_equals_eager(functools.partial(policy_loss, engine=engine), [DPPO(delta=0.15)])


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_changing_thresholds_and_shapes(dynamic):
    objectives = [DRPO(delta=0.1), DRPO(delta=0.2)]
    assert_compiled_equals_eager(token_losses, objectives, shapes=((4, 6), (5, 7)), dynamic=dynamic)
    assert_compiled_equals_eager(loss_alone, objectives, dynamic=dynamic)


@pytest.mark.usefixtures("without_recompiling")
@pytest.mark.parametrize("function", [token_losses, loss_alone])
def test_once_for_all_shapes_and_thresholds(function):
    objectives = [DRPO(delta=0.1), DRPO(delta=0.2), DRPO(delta=0.3)]
    options = {"shapes": ((4, 6), (5, 7)), "dynamic": True, "rtol": 1e-10}
    # aot_eager would compile a threshold in as a constant
    assert_compiled_equals_eager(function, objectives, backend="inductor", **options)


@pytest.mark.parametrize("function", [token_losses, policy_loss])
def test_each_kind_through_one_function(function):
    assert_compiled_equals_eager(function, KINDS)


def test_every_objective():
    for objective in FULL:
        torch._dynamo.reset()  # noqa: SLF001
        assert_compiled_equals_eager(loss_alone, [objective])


@pytest.mark.parametrize("dynamic", [True, None])
def test_code_that_uses_the_objective_before_and_after_the_loss(dynamic):
    # Dynamo can't hand a float attribute that it lifted into an autograd.Function back to the code around it
    # ("Argument 'item' of Node does not belong to this Graph"), so no objective may be an argument of one
    def step(objective, **data):
        loss = token_loss(objective, **data).sum()
        after = token_diagnostics(objective, **data | {"log_prob": data["log_prob"].detach()}, xp=xp)
        return loss, {"weight_mean": after["weight_mean"]}

    assert_compiled_equals_eager(step, [DRPO(delta=0.1), DRPO(delta=0.2)], dynamic=dynamic)


@each_reduction
def test_reductions(reduction):
    def step(objective, **data):
        weights = torch.ones_like(data["advantages"])
        return policy_loss(objective, **data, reduction=reduction, token_weights=weights, normalizer=3.0)

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)])


def test_a_normalizer_that_is_a_tensor():
    def step(objective, **data):
        return policy_loss(objective, **data, normalizer=data["mask"].sum() * 2)

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)])


def row_means(values, mask):
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


OUTSIDE = linear_reduction(row_means)


@pytest.mark.parametrize("made", [lambda: OUTSIDE, lambda: linear_reduction(row_means)], ids=["outside", "inside"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_linear_reduction(backend, made):
    def step(objective, **data):
        weights = torch.full_like(data["advantages"], 0.5)
        return policy_loss(objective, **data, reduction=made(), token_weights=weights)

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)], backend=backend, rtol=1e-10)


def test_packed_tokens():
    def step(objective, **data):
        flat = {name: tensor.reshape(-1) for name, tensor in data.items()}
        ids = torch.arange(24) // 6
        return policy_loss(objective, **flat, reduction=sequence_mean_token_mean, segment_ids=ids)

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)])


def test_prompts_by_their_ids():
    def coefficients(ids, mask):
        return reduction_coefficients(functools.partial(prompt_mean, group_ids=ids), mask, dtype=torch.float64, xp=xp)

    ids, mask = torch.tensor([7, 7, -1, 7]), batch((4, 6))["mask"]
    compiled = torch.compile(coefficients, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, mask), coefficients(ids, mask), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inductor(dtype):
    assert_compiled_equals_eager(
        policy_loss, [DRPO(delta=0.15)], backend="inductor", rtol=1e-10 if dtype == torch.float64 else 3e-6, dtype=dtype
    )


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_every_combination_of_dtypes_in_one_process():
    """Each is compiled anew, as each array's dtype is a guard; a limit on that must not end in an error."""
    for given in itertools.product(DTYPES[:3], repeat=3):
        torch._dynamo.reset()  # noqa: SLF001
        data = batch()
        names = ("log_prob", "behavior_log_prob", "advantages")
        data |= {name: data[name].detach().to(dtype) for name, dtype in zip(names, given, strict=True)}
        del data["divergence"]
        results = []
        for function in (loss_alone, torch.compile(loss_alone, fullgraph=True, backend="aot_eager")):
            own = data | {"log_prob": data["log_prob"].clone().requires_grad_()}
            loss, _ = function(DRPO(delta=0.15), **own)
            loss.backward()
            assert (loss.dtype, own["log_prob"].grad.dtype) == (torch.float32, given[0])
            results.append((loss.detach(), own["log_prob"].grad))
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(given[0]).eps, atol=1e-6)


def test_second_derivatives_are_refused():
    data = batch()
    compiled = torch.compile(lambda data: policy_loss(DRPO(delta=0.15), **data)[0], fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(data), data["log_prob"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"not have been used"):
        torch.autograd.grad(first.sum(), data["log_prob"])


def test_expm1_is_accurate_where_inductor_compiles_it():
    t = torch.cat((-torch.logspace(-12, 2, 500, dtype=torch.float64), torch.tensor([-0.5, -0.0, -torch.inf, torch.nan])))
    compiled = torch.compile(COMPILED.expm1, fullgraph=True, dynamic=True)
    exact = torch.from_numpy(np.expm1(t.float().double().numpy())).float()
    torch.testing.assert_close(compiled(t.float()), exact, rtol=4e-7, atol=0.0, equal_nan=True)
    torch.testing.assert_close(COMPILED.expm1(t), torch.expm1(t), rtol=1e-15, atol=0.0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.usefixtures("without_recompiling")
def test_rows_of_any_width_are_one_graph():
    """What takes elements along rows specialised their width; a scan has as many steps as a width has bits."""
    mode = Mode(PolicyGradient(), corrections=(PrefixBudgetMask(delta=0.2), SecondMomentMask(tau=0.1, edge="policy/behavior")))
    compiled = [
        torch.compile(function, fullgraph=True, backend="eager")
        for function in (
            lambda x: policy_loss(mode, log_prob=x, behavior_log_prob=-x * x, advantages=x, mask=x < 0, diagnostics=False)[0],
            lambda x: pass_at_k_advantages(x, k=3, xp=xp),
        )
    ]
    for width in (5, 8):
        for function in compiled:
            rows = torch.linspace(-2.0, -0.1, 3 * width).reshape(3, width)
            torch._dynamo.mark_dynamic(rows, 1)  # noqa: SLF001 -- the documented name
            function(rows)
