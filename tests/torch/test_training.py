"""What training loops do to a loss and around it: scale it in place, keep its graph, reduce, save, switch torch's modes."""

import contextlib
import functools
import io
import itertools
import math

import numpy as np
import pytest
import torch
from drpo_torch import linear_reduction, policy_loss, token_loss
from torch_cases import ENGINES, REDUCTIONS, batch, each_engine, each_reduction, gradient_of
from variants import ALL, each_kind

from drpo_core import DRPO, merge_diagnostics, sequence_mean_token_sum, summarize, token_mean
from drpo_core.objectives import label

SUBJECT = DRPO(delta=0.15)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (24,), (4, 6), (2, 3, 4), (0,), (3, 0), (40, 1000)]
"""The last is more than a chunk of the array operations."""


def losses(engine, objective=SUBJECT, data=None, **options):
    """The loss of a function and engine, and its other outputs; `log_prob` is a leaf of its own."""
    data = batch() if data is None else data
    data = data | {"log_prob": data["log_prob"].detach().clone().requires_grad_()}
    if engine == "token_loss":
        return data, token_loss(objective, **data), {}
    loss, statistics = policy_loss(objective, **data, engine=engine, **options)
    return data, loss, statistics or {}


each_way = pytest.mark.parametrize("engine", [*ENGINES, "token_loss"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def of_dtype(dtype, shape=(4, 6)):
    """A batch whose log π has this dtype."""
    data = batch(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return data | {"log_prob": data["log_prob"].detach().to(dtype)}


# --- in place ---


def tensors_of(loss, statistics):
    """Every output by name."""
    return {"loss": loss} | {
        f"{name}.{field}": tensor for name, s in statistics.items() for field, tensor in s._asdict().items()
    }


@each_way
@each_kind
def test_every_output_may_be_changed_in_place(objective, engine):
    data, loss, statistics = losses(engine, objective)
    outputs = tensors_of(loss, statistics)
    before = {name: tensor.detach().clone() for name, tensor in outputs.items()}
    for i, tensor in enumerate(outputs.values()):
        tensor.mul_(i + 2.0)
    for i, (name, tensor) in enumerate(outputs.items()):
        torch.testing.assert_close(tensor.detach(), before[name] * (i + 2.0), rtol=0.0, atol=0.0, equal_nan=True, msg=name)
    loss.sum().backward()
    same, plain, _ = losses(engine, objective)
    plain.sum().backward()
    torch.testing.assert_close(data["log_prob"].grad, 2.0 * same["log_prob"].grad, rtol=1e-15, atol=0.0)


@each_way
@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss.div_(4.0),
        lambda loss: loss.mul_(3.0).add_(1.0),
        lambda loss: loss.neg_(),
        lambda loss: loss.clamp_(max=100.0),
        lambda loss: loss.zero_(),
        lambda loss: loss.copy_(loss.detach()),
        lambda loss: loss.detach().fill_(math.nan),
    ],
)
def test_a_loss_changed_in_place_has_the_derivative_of_the_change(engine, change):
    data, loss, _ = losses(engine)
    other, out_of_place, _ = losses(engine)
    change(loss)
    expected = 1.0 * out_of_place
    change(expected)
    torch.autograd.backward(loss.sum())
    torch.autograd.backward(expected.sum())
    torch.testing.assert_close(data["log_prob"].grad, other["log_prob"].grad, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_way
@each_dtype
def test_no_outputs_share_memory(engine, dtype, shape):
    """With each other, with an input, or with what backward needs: an all-reduce in place would corrupt the other."""
    data, loss, statistics = losses(engine, data=of_dtype(dtype, shape))
    outputs = tensors_of(loss, statistics) | dict(data)
    outputs |= {f"kept {i}": tensor for i, tensor in enumerate(loss.grad_fn.saved_tensors)}
    spans = {name: _span(tensor) for name, tensor in outputs.items() if tensor.numel()}
    for (name, (start, end)), (other, (from_, to)) in itertools.combinations(spans.items(), 2):
        assert end <= from_ or to <= start, (name, other)


def _span(tensor):
    start = tensor.data_ptr()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + tensor.element_size() * (1 + last)


# --- the backward pass ---


@each_way
@each_dtype
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 65536.0, 0.0, -2.0])
def test_keeping_the_graph_changes_nothing(engine, dtype, scale):
    found = []
    for retain in (False, True):
        data, loss, _ = losses(engine, data=of_dtype(dtype, (40, 100)))
        (loss.mean() * scale).backward(retain_graph=retain)
        found.append(data["log_prob"].grad)
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)
    assert found[0].isfinite().all()
    assert found[0].abs().max() > 0.0 or scale == 0.0


@each_engine
@each_dtype
def test_a_scaled_loss_has_a_scaled_gradient(engine, dtype):
    """Of each size that a loss scaler takes; a factor of 2^16 is infinite in float16, and is on a float32 loss."""
    data = of_dtype(dtype, (4, 8192))
    data["advantages"] = data["advantages"] * 1e-3
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in data.items()}
    expected = gradient_of(SUBJECT, exact, engine="arrays")
    unit = torch.finfo(dtype).eps
    for power in (0, 8, 16):
        own, loss, _ = losses(engine, data=data)
        (loss * 2.0**power).backward()
        found = own["log_prob"].grad.double() / 2.0**power
        # float16 is spaced by 2⁻²⁴ near 0: only with the scaler's factor is a small gradient not one of a few numbers
        coarse = 2.0 ** (-24 - power) if dtype == torch.float16 else 1e-12
        torch.testing.assert_close(found, expected, rtol=max(2 * unit, 1e-5), atol=coarse)


@each_engine
@each_kind
def test_backward_twice_and_with_any_cotangent(objective, engine):
    data, loss, _ = losses(engine, objective, diagnostics=False)
    expected = gradient_of(objective, data, engine=engine)
    for factor in (1.0, -2.0, 0.0):
        (gradient,) = torch.autograd.grad(factor * loss, data["log_prob"], retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected)


@each_engine
@each_dtype
@pytest.mark.parametrize("cotangent", [1.0, 0.5])
def test_gradients_accumulate_over_backward_passes_of_one_graph(engine, cotangent, dtype):
    """Backward may give away the array it kept, or change it, in its last pass only."""
    data, loss, _ = losses(engine, data=of_dtype(dtype))
    (once,) = torch.autograd.grad(cotangent * loss, data["log_prob"], retain_graph=True)
    expected = once.clone()
    for passes in (1, 2):
        (cotangent * loss).backward(retain_graph=passes < 2)
        torch.testing.assert_close(data["log_prob"].grad, passes * expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(once, expected, rtol=0.0, atol=0.0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@each_engine
def test_the_last_backward_pass_makes_no_array(engine):
    data, loss, _ = losses(engine)
    kept = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert data["log_prob"].grad.data_ptr() == kept


@each_engine
def test_micro_batches_of_a_loop_add_up(engine):
    """`loss /= n` and one graph that several losses share, as accumulation over micro-batches writes them."""
    data = batch()
    expected = gradient_of(SUBJECT, data, engine=engine)
    shared = data["log_prob"].detach().clone().requires_grad_()
    through = shared * 1.0
    total = 0.0
    for _ in range(4):
        loss, _ = policy_loss(SUBJECT, **data | {"log_prob": through}, engine=engine)
        loss /= 4
        total += loss
    total.backward()
    torch.testing.assert_close(shared.grad, expected)


# --- around the call ---


@contextlib.contextmanager
def _set(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


AMBIENT = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),  # noqa: FBT003 -- torch's signature
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "anomaly": functools.partial(torch.autograd.detect_anomaly, check_nan=True),
    "one thread": lambda: _set(torch.set_num_threads, 1, torch.get_num_threads()),
}


def everything(engine, data, **options):
    """Gradient (if there is a graph) and all outputs, by name."""
    data, loss, statistics = losses(engine, data=data, **options)
    gradient = {}
    if loss.requires_grad:
        loss.sum().backward()
        gradient = {"gradient": data["log_prob"].grad}
    return gradient | tensors_of(loss.detach(), statistics)


# the mode says itself that it is for debugging
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "linear"])
@pytest.mark.parametrize("state", AMBIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_way
def test_torchs_modes_change_nothing(state, reduction, engine, dtype):
    linear = linear_reduction(lambda values, mask: torch.where(mask, values, 0.0).sum() / 7.0)
    options = {} if engine == "token_loss" else {"reduction": REDUCTIONS.get(reduction, linear)}
    data = of_dtype(dtype)
    expected = everything(engine, data, **options)
    with AMBIENT[state]():
        found = everything(engine, data, **options)
    if state in ("no_grad", "inference_mode"):
        del expected["gradient"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=0.0, equal_nan=True, msg=name)


@each_way
def test_constants_made_in_inference_mode(engine):
    data = batch()
    expected = everything(engine, data)
    with torch.inference_mode():
        rollout = {name: tensor.clone() for name, tensor in data.items() if name != "log_prob"}
    found = everything(engine, data | rollout)
    torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=0.0, atol=0.0)


# --- checkpoints ---


def saved(value):
    """As `torch.load` gives it back, whose default refuses classes that it does not know."""
    file = io.BytesIO()
    torch.save({"step": 3, "value": value}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["value"]


@pytest.mark.parametrize("objective", ALL, ids=label)
def test_objectives_in_a_checkpoint(objective):
    loaded = saved(objective)
    assert type(loaded) is type(objective)
    assert loaded == objective
    data = batch()
    # not compiled, which would be the slowest part
    found, expected = (gradient_of(each, data, engine="arrays") for each in (loaded, objective))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@each_engine
def test_diagnostics_in_a_checkpoint(engine):
    _, _, statistics = losses(engine)
    loaded = saved(statistics)
    assert {name: type(s) for name, s in loaded.items()} == {name: type(s) for name, s in statistics.items()}
    assert summarize(merge_diagnostics(loaded, statistics)) == pytest.approx(summarize(statistics), nan_ok=True)


# --- numbers ---

NOT_NUMBERS = ["3", None, True, np.True_, [2.0], np.ones(1), np.ones(2), 1j, object(), torch.ones(1), torch.tensor([])]
NOT_NUMBERS += [torch.ones(()).bool(), torch.ones(()) * 1j]
OUT_OF_RANGE = [-1, -1e-300, math.nan, math.inf, -math.inf, np.float64(-1.0), np.float32(math.nan), np.array(-2.0), 10**400]


def reduced(**options):
    return policy_loss(SUBJECT, **batch(), **options)[0]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("normalizer", value) for value in [*NOT_NUMBERS, *OUT_OF_RANGE] if value is not None]
    + [("horizon", value) for value in [*NOT_NUMBERS, *OUT_OF_RANGE, 0, 0.0]],
    ids=lambda value: repr(value)[:20],
)
def test_a_number_that_is_none_is_named(name, bad):
    bound = {"horizon": {"reduction": functools.partial(sequence_mean_token_sum, horizon=bad)}}
    ways = [bound.get(name, {"reduction": token_mean, name: bad})]
    if name == "normalizer":
        ways.append({"reduction": functools.partial(token_mean, normalizer=bad)})
    for options in ways:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            reduced(**options)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@each_reduction
def test_a_tensor_that_is_none_gives_nan(reduction, bad):
    """Its value may be on a device, so that nothing can be raised without waiting for it."""
    assert reduced(reduction=reduction, normalizer=torch.tensor(bad)).isnan()


@pytest.mark.parametrize("good", [8, 8.0, np.float32(8), np.int64(8), np.array(8), torch.tensor(8), torch.tensor(8.0)])
@each_engine
def test_numbers_of_any_kind_are_one_number(good, engine):
    data = of_dtype(torch.float32)
    expected = policy_loss(SUBJECT, **data, normalizer=8.0, engine=engine)[0]
    for options in ({"normalizer": good}, {"reduction": functools.partial(token_mean, normalizer=good)}):
        loss = policy_loss(SUBJECT, **data, engine=engine, **options)[0]
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0.0)


def test_what_is_passed_goes_before_what_is_bound():
    bound = functools.partial(token_mean, normalizer=1000.0)
    assert reduced(reduction=bound) == reduced(normalizer=1000.0)
    assert reduced(reduction=bound, normalizer=10.0) == reduced(normalizer=10.0)
    weights = torch.rand((4, 6), dtype=torch.float64)
    assert reduced(reduction=functools.partial(token_mean, token_weights=weights)) == reduced(token_weights=weights)
