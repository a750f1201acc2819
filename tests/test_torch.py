"""What drpo_torch promises beyond what both adapters do: transforms, compilation, devices, memory, errors."""

import functools

import array_api_compat.torch as xp
import pytest
import torch
from drpo_torch import policy_loss, token_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    diagnostics,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)

RATIO_FORMS = [
    PolicyGradient(),
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    SPO(eps=0.2),
    DPPO(delta=0.15),
    DPPO(delta=0.05, divergence="binary_kl"),
    DPPO(delta=0.1, divergence="per_token", max_ratio=2.0),
    DRPO(delta=0.15),
    DRPO(delta_low=0.1, delta_high=0.2),
    MaskDRPO(delta=0.15),
]
OBJECTIVES = [*RATIO_FORMS, CISPO(max_ratio=2.0)]
REDUCTIONS = [token_mean, sequence_mean_token_mean, functools.partial(sequence_mean_token_sum, horizon=7.0)]

each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS, ids=["token-mean", "seq-mean-token-mean", "token-sum"])


def batch(shape=(4, 6), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    behavior = -3.0 * torch.rand(shape, generator=generator, dtype=dtype) - 0.01
    log_prob = (behavior + 0.8 * torch.randn(shape, generator=generator, dtype=dtype)).clamp(max=-0.001)
    return {
        "log_prob": log_prob.requires_grad_(),
        "behavior_log_prob": behavior,
        "advantages": torch.randn(shape, generator=generator, dtype=dtype),
        "mask": torch.rand(shape, generator=generator) < 0.7,
        "divergence": 0.3 * torch.rand(shape, generator=generator, dtype=dtype),
    }


def gradient_of(objective, data, **options):
    """Gradient of the policy loss in `log_prob`, eagerly."""
    log_prob = data["log_prob"].detach().clone().requires_grad_()
    policy_loss(objective, **data | {"log_prob": log_prob}, **options)[0].backward()
    return log_prob.grad


def in_log_prob(objective, data, function=policy_loss, **options):
    """The loss as a function of `log_prob` alone."""

    def loss(log_prob):
        result = function(objective, **data | {"log_prob": log_prob}, **options)
        return result[0] if isinstance(result, tuple) else result

    return loss


# derivatives


@pytest.mark.parametrize("objective", RATIO_FORMS, ids=repr)
def test_gradcheck(objective):
    data = batch()
    log_prob = data["log_prob"]
    assert torch.autograd.gradcheck(in_log_prob(objective, data, token_loss), log_prob, check_batched_grad=True)
    assert torch.autograd.gradcheck(in_log_prob(objective, data), log_prob, check_batched_grad=True)


@each_objective
def test_func_grad_vmap_and_jacrev(objective):
    data = batch()
    detached = {name: tensor.detach() for name, tensor in data.items()}
    expected = gradient_of(objective, data)
    x = detached["log_prob"]
    torch.testing.assert_close(torch.func.grad(in_log_prob(objective, detached))(x), expected)
    losses = token_loss(objective, **detached)
    gradient = torch.autograd.grad(token_loss(objective, **data).sum(), data["log_prob"])[0]
    jacobian = torch.func.jacrev(in_log_prob(objective, detached, token_loss))(x)
    torch.testing.assert_close(jacobian.reshape(24, 24), torch.diag(gradient.reshape(-1)))

    def of_one_row(row):
        return torch.func.grad_and_value(lambda y: policy_loss(objective, **row | {"log_prob": y}), has_aux=True)(
            row["log_prob"]
        )

    gradients, (values, _) = torch.func.vmap(of_one_row)(detached)
    for i in range(4):
        row = {name: tensor[i] for name, tensor in data.items()}
        torch.testing.assert_close(gradients[i], gradient_of(objective, row))
        torch.testing.assert_close(values[i], losses[i].sum() / row["mask"].sum().clamp(min=1))


def test_second_derivatives_are_refused():
    data = batch()
    loss = in_log_prob(DRPO(delta=0.15), data)
    x = data["log_prob"]
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of a policy loss is not implemented"):
        first.sum().backward()
    (first,) = torch.autograd.grad(loss(x) ** 2, x, create_graph=True)  # the cotangent depends on x as well
    with pytest.raises(RuntimeError, match="second derivative of a policy loss is not implemented"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="second derivative of a policy loss is not implemented"):
        torch.func.grad(lambda y: torch.func.grad(loss)(y).sum())(x.detach())


# functorch's own import of torch.jit
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_forward_mode_is_refused():
    data = batch()
    x = data["log_prob"].detach()
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(in_log_prob(DRPO(delta=0.15), data), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.hessian(in_log_prob(DRPO(delta=0.15), data))(x)


def test_gradients_flow_to_a_model_and_accumulate():
    torch.manual_seed(0)
    data = batch()
    head = torch.nn.Linear(5, 9, dtype=torch.float64)
    states, labels = torch.randn(4, 6, 5, dtype=torch.float64), torch.randint(9, (4, 6, 1))

    def log_prob():
        return torch.log_softmax(head(states), dim=-1).gather(-1, labels)[..., 0]

    policy_loss(DRPO(delta=0.15), **data | {"log_prob": log_prob()})[0].backward()
    once = head.weight.grad.clone()
    expected = torch.autograd.grad(
        (log_prob() * gradient_of(DRPO(delta=0.15), data | {"log_prob": log_prob()})).sum(), head.weight
    )[0]
    torch.testing.assert_close(once, expected)
    assert once.abs().max() > 0.0
    (3.0 * policy_loss(DRPO(delta=0.15), **data | {"log_prob": log_prob()})[0]).backward()
    torch.testing.assert_close(head.weight.grad, 4.0 * once)


def test_only_log_prob_needs_a_graph():
    data = batch()
    data = {name: t.detach() if name == "mask" else t.detach().requires_grad_() for name, t in data.items()}
    data["log_prob"] = data["log_prob"].detach()
    loss, _ = policy_loss(DRPO(delta=0.15), **data, token_weights=torch.ones_like(data["log_prob"]).requires_grad_())
    assert not loss.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    data = batch()
    expected, _ = policy_loss(DRPO(delta=0.15), **data)
    with mode():
        loss, _ = policy_loss(DRPO(delta=0.15), **data)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=0.0, atol=0.0)


def test_constants_made_in_inference_mode():
    data = batch()
    expected = gradient_of(DPPO(delta=0.1, divergence="per_token"), data)
    with torch.inference_mode():
        rollout = {name: data[name].clone() for name in ("behavior_log_prob", "advantages", "divergence")}
    torch.testing.assert_close(gradient_of(DPPO(delta=0.1, divergence="per_token"), data | rollout), expected)


# inputs


@each_objective
def test_non_contiguous_and_expanded_inputs(objective):
    data = batch((6, 4))
    data["advantages"] = data["advantages"][:, :1].expand(6, 4)
    data["divergence"] = data["divergence"][:1].expand(6, 4)
    expected = gradient_of(objective, {name: tensor.contiguous() for name, tensor in data.items()})
    strided = {name: tensor.detach().t().contiguous().t() for name, tensor in data.items() if not _is_expanded(tensor)}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    torch.testing.assert_close(gradient_of(objective, data | strided), expected, rtol=1e-14, atol=0.0)


def _is_expanded(tensor):
    return 0 in tensor.stride()


@each_objective
@each_reduction
def test_inputs_are_not_mutated(objective, reduction):
    data = batch() | {"token_weights": torch.full((4, 6), 0.5, dtype=torch.float64)}
    data["behavior_log_prob"][~data["mask"]] = float("nan")
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in data.items()}  # noqa: SLF001 -- torch's own counter
    policy_loss(objective, **data, reduction=reduction)[0].backward()
    for name, (values, version) in before.items():
        torch.testing.assert_close(data[name].detach(), values, rtol=0.0, atol=0.0, equal_nan=True)
        assert data[name]._version == version  # noqa: SLF001


def test_losses_may_be_changed_in_place():
    data = batch()
    losses = token_loss(DRPO(delta=0.15), **data)
    losses *= 2.0
    losses[0] = 0.0
    losses.sum().backward()
    expected = torch.autograd.grad(token_loss(DRPO(delta=0.15), **data).sum(), data["log_prob"])[0]
    expected[0] = 0.0
    torch.testing.assert_close(data["log_prob"].grad, 2.0 * expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    data = batch(dtype=torch.float32)
    x = data.pop("log_prob").detach()
    layer = torch.nn.Linear(6, 6)
    with torch.autocast("cpu", dtype=dtype):
        log_prob = torch.nn.functional.logsigmoid(layer(x))
        low = log_prob.to(dtype)
        low.retain_grad()
        loss, statistics = policy_loss(DRPO(delta=0.15), log_prob=low, **data)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(part.dtype == torch.float32 for statistic in statistics.values() for part in statistic)
    assert low.grad.dtype == dtype
    expected = gradient_of(DRPO(delta=0.15), data | {"log_prob": low.detach()})
    torch.testing.assert_close(low.grad, expected)
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().max() > 0.0


def test_loss_scaling_keeps_float16_gradients_from_underflowing():
    # 1/N ≈ 4e-5 and gradients near 1e-3: representable in float16 only while the scaler's factor is on them
    data = batch((4, 8192), dtype=torch.float32)
    data["advantages"] = data["advantages"] * 1e-3
    low = data["log_prob"].detach().half().requires_grad_()
    loss, _ = policy_loss(DRPO(delta=0.15), **data | {"log_prob": low})
    (loss * 2.0**16).backward()
    expected = gradient_of(DRPO(delta=0.15), data | {"log_prob": low.detach().float()})
    # rounded to float16, whose spacing is 2⁻²⁴ near 0, only with the scaler's factor
    torch.testing.assert_close(low.grad.float() / 2.0**16, expected, rtol=1e-3, atol=2.0**-40)


# devices and synchronisation


class NoSynchronisation(TorchDispatchMode):
    """Refuses every operation that reads a value back to Python or has a shape that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Check the operation, then run it."""
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            msg = f"synchronises: {func}"
            raise AssertionError(msg)
        return func(*args, **(kwargs or {}))


def test_the_no_synchronisation_mode_can_fail():
    with NoSynchronisation():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(()).item()
        with pytest.raises(AssertionError, match="nonzero"):
            torch.ones(3).nonzero()
        with pytest.raises(AssertionError, match="synchronises"):
            torch.ones(3)[torch.ones(3) > 0.0]


@each_objective
@each_reduction
def test_nothing_synchronises(objective, reduction):
    data = batch()
    packed = {name: tensor.detach().reshape(-1) for name, tensor in data.items()}
    packed["log_prob"].requires_grad_()
    # backward passes on a device are test_any_device's: on the CPU they read the cotangent, which synchronises nothing
    with NoSynchronisation():
        options = {"reduction": reduction, "normalizer": torch.tensor(9.0), "token_weights": torch.ones(4, 6)}
        policy_loss(objective, **data, **options)
        policy_loss(objective, **packed, reduction=reduction, segment_ids=torch.arange(24) // 6)


@each_objective
@each_reduction
def test_any_device(objective, reduction):
    # the meta device has shapes and no data: a constant made on the CPU, or a value read, would raise
    data = {name: tensor.detach().to("meta") for name, tensor in batch().items()}
    data["log_prob"].requires_grad_()
    loss, statistics = policy_loss(objective, **data, reduction=reduction)
    loss.backward()
    assert (loss.device.type, loss.shape) == ("meta", ())
    assert data["log_prob"].grad.shape == (4, 6)
    packed = {name: tensor.detach().reshape(-1) for name, tensor in data.items()}
    packed["segment_ids"] = torch.arange(24, device="meta") // 6
    assert policy_loss(objective, **packed, reduction=reduction)[0].device.type == "meta"
    for statistic in statistics.values():
        for part in statistic:
            assert (part.device.type, part.shape, part.requires_grad) == ("meta", (), False)


@each_objective
def test_fake_tensors(objective):
    # they raise on whatever would need a value; on a device other than the CPU they need a build of torch that has it
    with FakeTensorMode(allow_non_fake_inputs=False):
        data = {name: torch.empty_like(tensor) for name, tensor in _shapes().items()}
        data["log_prob"].requires_grad_()
        loss, _ = policy_loss(objective, **data)
        loss.backward()
        assert (loss.shape, data["log_prob"].grad.shape) == ((), (4, 6))


def _shapes():
    kinds = dict.fromkeys(("log_prob", "behavior_log_prob", "advantages", "divergence"), torch.float32)
    return {name: torch.empty((4, 6), dtype=dtype) for name, dtype in (kinds | {"mask": torch.bool}).items()}


def test_diagnostics_are_detached():
    _, statistics = policy_loss(DRPO(delta=0.15), **batch())
    assert not any(part.requires_grad for statistic in statistics.values() for part in statistic)


# memory


def kept_for_backward(objective, data, **options):
    """Bytes of each distinct tensor that autograd keeps and that is not an input."""
    given = [*data.values(), *(value for value in options.values() if isinstance(value, torch.Tensor))]
    inputs = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = policy_loss(objective, **data, **options)
    assert loss.requires_grad
    return sorted(kept.values(), reverse=True)


@each_reduction
@each_objective
def test_only_the_gradient_is_kept(objective, reduction):
    rows, columns = 16, 1024
    gradient, *others = kept_for_backward(objective, batch((rows, columns), dtype=torch.float32), reduction=reduction)
    assert gradient == 4 * rows * columns
    assert not others


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 4), (torch.float64, 8)], ids=str)
def test_the_gradient_is_kept_in_the_dtype_of_log_prob(dtype, size):
    data = batch((16, 1024), dtype=torch.float32)
    data["log_prob"] = data["log_prob"].detach().to(dtype).requires_grad_()
    # float16 in float32, where a gradient divided by the number of tokens does not underflow
    assert kept_for_backward(DRPO(delta=0.15), data)[0] == size * 16 * 1024


def test_no_factors_are_kept():
    # what differs from token to token is in the gradient already
    data = batch((16, 1024), dtype=torch.float32)
    assert sum(kept_for_backward(DRPO(delta=0.15), data, token_weights=torch.ones((16, 1024)))) == 2**16
    packed = {name: tensor.detach().reshape(-1) for name, tensor in data.items()}
    packed["log_prob"].requires_grad_()
    options = {"reduction": sequence_mean_token_mean, "segment_ids": torch.arange(2**14) // 1024}
    assert sum(kept_for_backward(DRPO(delta=0.15), packed, **options)) == 2**16


def test_under_activation_checkpointing():
    data = batch()
    loss = checkpoint(in_log_prob(DRPO(delta=0.15), data), data["log_prob"], use_reentrant=False)
    loss.backward()
    torch.testing.assert_close(data["log_prob"].grad, gradient_of(DRPO(delta=0.15), data))


# compilation


def assert_compiled_equals_eager(function, objectives, *, shapes=((4, 6),), rtol=1e-12, **options):
    torch._dynamo.reset()  # noqa: SLF001 -- the documented way
    compiled = torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)
    for i, objective in enumerate(objectives):
        for shape in shapes if i == 0 else shapes[:1]:
            data, same = batch(shape, seed=i), batch(shape, seed=i)
            loss, statistics = compiled(objective, **data)
            expected, expected_statistics = function(objective, **same)
            loss.backward()
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=rtol, atol=rtol)
            torch.testing.assert_close(data["log_prob"].grad, same["log_prob"].grad, rtol=rtol, atol=rtol)
            for name, statistic in expected_statistics.items():
                torch.testing.assert_close(tuple(statistics[name]), tuple(statistic), rtol=rtol, atol=rtol, equal_nan=True)


def test_compile_with_diagnostics():
    assert_compiled_equals_eager(policy_loss, [DPPO(delta=0.15)])


def loss_alone(objective, **data):
    return policy_loss(objective, **data)[0], {}


def token_losses(objective, **data):
    return token_loss(objective, **data).sum(), {}


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_compile_with_changing_thresholds_and_shapes(dynamic):
    objectives = [DRPO(delta=0.1), DRPO(delta=0.2)]
    assert_compiled_equals_eager(token_losses, objectives, shapes=((4, 6), (5, 7)), dynamic=dynamic)
    assert_compiled_equals_eager(loss_alone, objectives, dynamic=dynamic)


def test_compile_every_kind_of_objective_through_one_function():
    objectives = [OBJECTIVES[i] for i in (2, 3, 5, 6, 8, 9, 10)]
    assert len({type(objective) for objective in objectives}) == 6
    assert_compiled_equals_eager(token_losses, objectives)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compile_code_that_uses_the_objective_before_and_after_the_loss(dynamic):
    # Dynamo can't hand a float attribute that it lifted into an autograd.Function back to the code around it
    # ("Argument 'item' of Node does not belong to this Graph"), so no objective may be an argument of one
    def step(objective, **data):
        loss = token_loss(objective, **data).sum()
        after = diagnostics(objective, **data | {"log_prob": data["log_prob"].detach()}, xp=xp)
        return loss, {"weight_mean": after["weight_mean"]}

    assert_compiled_equals_eager(step, [DRPO(delta=0.1), DRPO(delta=0.2)], dynamic=dynamic)


@each_reduction
def test_compile_reductions(reduction):
    def step(objective, **data):
        weights = torch.ones_like(data["advantages"])
        return policy_loss(objective, **data, reduction=reduction, token_weights=weights, normalizer=3.0)[0], {}

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)])


def test_compile_packed():
    def step(objective, **data):
        packed = {name: tensor.reshape(-1) for name, tensor in data.items()}
        ids = torch.arange(24) // 6
        return policy_loss(objective, **packed, reduction=sequence_mean_token_mean, segment_ids=ids)[0], {}

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)])


def test_compile_with_inductor():
    assert_compiled_equals_eager(loss_alone, [DRPO(delta=0.15)], backend="inductor", rtol=1e-10)


def test_compiled_double_backward_is_refused():
    torch._dynamo.reset()  # noqa: SLF001
    data = batch()
    compiled = torch.compile(lambda data: policy_loss(DRPO(delta=0.15), **data)[0], fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(data), data["log_prob"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"not have been used"):
        torch.autograd.grad(first.sum(), data["log_prob"])
