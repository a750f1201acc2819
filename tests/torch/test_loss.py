"""What drpo_torch promises of a loss beyond what both adapters do: transforms, inputs, devices, memory."""

import pytest
import torch
from drpo_torch import policy_loss, token_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch_cases import batch, each_engine, each_reduction, gradient_of, in_log_prob, packed
from variants import MEASURED, each_kind, each_objective, each_ratio_form

from drpo_core import DRPO, sequence_mean_token_mean

SUBJECT = DRPO(delta=0.15)
SECOND = "second derivative of a policy loss is not implemented"


# --- derivatives ---


@each_ratio_form
def test_gradcheck(objective):
    data = batch()
    for function in (token_loss, policy_loss):
        assert torch.autograd.gradcheck(in_log_prob(objective, data, function), data["log_prob"], check_batched_grad=True)


@each_kind
def test_grad_vmap_and_jacrev(objective):
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


BATCHED = ("log_prob", "behavior_log_prob", "advantages", "mask", "divergence")


@each_engine
@pytest.mark.parametrize(
    ("function", "name"),
    [*((token_loss, name) for name in BATCHED), *((policy_loss, name) for name in (*BATCHED, "token_weights"))],
)
def test_vmap_over_one_argument_alone(function, name, engine):
    """The others stay plain tensors, and so may a loss that nothing of the transform has reached."""
    data = {key: tensor.detach() for key, tensor in batch().items()}
    options = {}
    if function is policy_loss:
        data["token_weights"] = torch.rand((4, 6), dtype=torch.float64)
        options = {"engine": engine, "diagnostics": False}
    several = torch.stack([data[name].roll(k, 0) for k in range(3)])

    def loss(one):
        result = function(MEASURED, **data | {name: one}, **options)
        return result[0] if isinstance(result, tuple) else result

    torch.testing.assert_close(torch.func.vmap(loss)(several), torch.stack([loss(one) for one in several]))


@each_engine
@each_kind
def test_many_cotangents_at_once(objective, engine):
    """`is_grads_batched` and vectorised jacobians are vmaps over the backward pass alone."""
    data = batch()
    x, weights = data["log_prob"], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = gradient_of(objective, data, engine=engine)
    loss = in_log_prob(objective, data, engine=engine)
    (rows,) = torch.autograd.grad(loss(x), x, weights, is_grads_batched=True)
    torch.testing.assert_close(rows, weights[:, None, None] * expected)
    (rows,) = torch.autograd.grad(loss(x), x, weights, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(rows, weights[:, None, None] * expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(loss, x.detach(), vectorize=True), expected)


@each_engine
def test_second_derivatives_are_refused(engine):
    data = batch()
    loss = in_log_prob(SUBJECT, data, engine=engine)
    x = data["log_prob"]
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    torch.testing.assert_close(first.detach(), gradient_of(SUBJECT, data, engine=engine))
    with pytest.raises(RuntimeError, match=SECOND):
        first.sum().backward()
    # the cotangent depends on x as well
    (first,) = torch.autograd.grad(loss(x) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        first.sum().backward()
    with pytest.raises(RuntimeError, match=SECOND):
        torch.func.grad(lambda y: torch.func.grad(loss)(y).sum())(x.detach())
    (first,) = torch.autograd.grad(in_log_prob(SUBJECT, data, token_loss)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        first.sum().backward()


# functorch's own import of torch.jit
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@each_engine
def test_forward_mode_is_refused(engine):
    data = batch()
    x = data["log_prob"].detach()
    loss = in_log_prob(SUBJECT, data, engine=engine)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.hessian(loss)(x)


def test_gradients_flow_to_a_model_and_accumulate():
    torch.manual_seed(0)
    data = batch()
    head = torch.nn.Linear(5, 9, dtype=torch.float64)
    states, labels = torch.randn(4, 6, 5, dtype=torch.float64), torch.randint(9, (4, 6, 1))

    def log_prob():
        return torch.log_softmax(head(states), dim=-1).gather(-1, labels)[..., 0]

    policy_loss(SUBJECT, **data | {"log_prob": log_prob()})[0].backward()
    once = head.weight.grad.clone()
    expected = torch.autograd.grad((log_prob() * gradient_of(SUBJECT, data | {"log_prob": log_prob()})).sum(), head.weight)[0]
    torch.testing.assert_close(once, expected)
    assert once.abs().max() > 0.0
    (3.0 * policy_loss(SUBJECT, **data | {"log_prob": log_prob()})[0]).backward()
    torch.testing.assert_close(head.weight.grad, 4.0 * once)


@each_engine
def test_only_log_prob_needs_a_graph(engine):
    data = batch()
    data = {name: t.detach() if name == "mask" else t.detach().requires_grad_() for name, t in data.items()}
    data["log_prob"] = data["log_prob"].detach()
    weights = torch.ones_like(data["log_prob"]).requires_grad_()
    loss, statistics = policy_loss(SUBJECT, **data, token_weights=weights, engine=engine)
    assert not loss.requires_grad
    assert not any(field.requires_grad for statistic in statistics.values() for field in statistic)
    assert not token_loss(SUBJECT, **data).requires_grad


# --- inputs ---


@each_engine
@each_kind
def test_non_contiguous_and_expanded_inputs(objective, engine):
    data = batch((6, 4))
    data["advantages"] = data["advantages"][:, :1].expand(6, 4)
    data["divergence"] = data["divergence"][:1].expand(6, 4)
    expected = gradient_of(objective, {name: tensor.contiguous() for name, tensor in data.items()}, engine=engine)
    strided = {name: t.detach().t().contiguous().t() for name, t in data.items() if 0 not in t.stride()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    torch.testing.assert_close(gradient_of(objective, data | strided, engine=engine), expected, rtol=1e-14, atol=0.0)


@each_engine
@each_kind
@each_reduction
def test_inputs_are_not_mutated(objective, reduction, engine):
    data = batch() | {"token_weights": torch.full((4, 6), 0.5, dtype=torch.float64)}
    data["behavior_log_prob"][~data["mask"]] = float("nan")
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in data.items()}  # noqa: SLF001 -- torch's own counter
    (2.0 * policy_loss(objective, **data, reduction=reduction, engine=engine)[0]).backward()
    for name, (values, version) in before.items():
        torch.testing.assert_close(data[name].detach(), values, rtol=0.0, atol=0.0, equal_nan=True)
        assert data[name]._version == version  # noqa: SLF001


@each_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, engine):
    torch.manual_seed(0)
    data = batch(dtype=torch.float32)
    x = data.pop("log_prob").detach()
    layer = torch.nn.Linear(6, 6)
    with torch.autocast("cpu", dtype=dtype):
        log_prob = torch.nn.functional.logsigmoid(layer(x))
        low = log_prob.to(dtype)
        low.retain_grad()
        loss, statistics = policy_loss(SUBJECT, log_prob=low, **data, engine=engine)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(part.dtype == torch.float32 for statistic in statistics.values() for part in statistic)
    assert low.grad.dtype == dtype
    expected = gradient_of(SUBJECT, data | {"log_prob": low.detach()}, engine=engine)
    torch.testing.assert_close(low.grad, expected, rtol=0.0, atol=0.0)
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().max() > 0.0


# --- devices and synchronisation ---


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


@each_engine
@each_kind
@each_reduction
def test_nothing_synchronises(objective, reduction, engine):
    data = batch()
    # backward passes on a device are test_any_device's: on the CPU they read the cotangent, which synchronises nothing
    with NoSynchronisation():
        options = {"reduction": reduction, "engine": engine}
        policy_loss(objective, **data, normalizer=torch.tensor(9.0), token_weights=torch.ones(4, 6), **options)
        policy_loss(objective, **packed(data), **options)


@each_objective
def test_no_objective_synchronises(objective):
    data = batch()
    with NoSynchronisation():
        policy_loss(objective, **data, engine="arrays")
        token_loss(objective, **data)


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
    assert policy_loss(objective, **packed(data), reduction=reduction)[0].device.type == "meta"
    for statistic in statistics.values():
        for part in statistic:
            assert (part.device.type, part.shape, part.requires_grad) == ("meta", (), False)


@each_objective
def test_fake_tensors(objective):
    # they raise on whatever would need a value; on a device other than the CPU they need a build of torch that has it
    kinds = dict.fromkeys(("log_prob", "behavior_log_prob", "advantages", "divergence"), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=False):
        data = {name: torch.empty((4, 6), dtype=dtype) for name, dtype in (kinds | {"mask": torch.bool}).items()}
        data["log_prob"].requires_grad_()
        loss, _ = policy_loss(objective, **data)
        loss.backward()
        assert (loss.shape, data["log_prob"].grad.shape) == ((), (4, 6))


# --- memory ---


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


@each_engine
@each_reduction
@each_kind
def test_only_the_gradient_is_kept(objective, reduction, engine):
    rows, columns = 16, 1024
    data = batch((rows, columns), dtype=torch.float32)
    gradient, *others = kept_for_backward(objective, data, reduction=reduction, engine=engine)
    assert gradient == 4 * rows * columns
    assert not others


@each_engine
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 4), (torch.float64, 8)], ids=str)
def test_the_gradient_is_kept_in_the_dtype_of_log_prob(dtype, size, engine):
    data = batch((16, 1024), dtype=torch.float32)
    data["log_prob"] = data["log_prob"].detach().to(dtype).requires_grad_()
    # float16 in float32, where a gradient divided by the number of tokens does not underflow
    assert kept_for_backward(SUBJECT, data, engine=engine) == [size * 16 * 1024]


@each_engine
def test_no_factors_are_kept(engine):
    # what differs from token to token is in the gradient already
    data = batch((16, 1024), dtype=torch.float32)
    assert kept_for_backward(SUBJECT, data, token_weights=torch.ones((16, 1024)), engine=engine) == [2**16]
    assert kept_for_backward(SUBJECT, packed(data), reduction=sequence_mean_token_mean, engine=engine) == [2**16]


@each_engine
def test_under_activation_checkpointing(engine):
    data = batch()
    loss = checkpoint(in_log_prob(SUBJECT, data, engine=engine), data["log_prob"], use_reentrant=False)
    loss.backward()
    torch.testing.assert_close(data["log_prob"].grad, gradient_of(SUBJECT, data, engine=engine), rtol=0.0, atol=0.0)
