"""The linear head's policy loss against the plain formula, differentiated by autograd; its chunks, memory and contexts."""

import functools
import inspect

import pytest
import torch
from drpo_torch import FullDivergence, LinearHead, TopKDivergence, linear_policy_loss, logits_policy_loss
from vocabulary_batches import OBJECTIVES, REDUCTIONS, Largest, assert_close, budget, plain, small_steps, through_the_kit

from drpo_core import DPPO, DRPO, sequence_mean_token_mean
from drpo_core.testing import parametrize_with_checks

H, V = 8, 37
NAN = float("nan")
MODES = {
    "chunks": {"chunk_tokens": 5},
    "one chunk": {},
    "low memory": {"chunk_tokens": 7, "chunk_vocabulary": 10},
    "compiled": {"chunk_tokens": 5, "engine": "compiled"},
    "compiled, low memory": {"chunk_tokens": 7, "chunk_vocabulary": 10, "engine": "compiled"},
}

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Several steps even for the few tokens of a test."""
    small_steps(monkeypatch)
    monkeypatch.setitem(inspect.unwrap(linear_policy_loss).__globals__["Head"].__init__.__globals__, "_WEIGHT_ROWS", 16)


def batch(shape=(4, 6), dtype=torch.float64, seed=0):
    """A head, hidden states near those of the behaviour policy, and NaN wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight, bias, behavior_hidden = normal(V, H), normal(V), normal(*shape, H)
    tokens = torch.randint(V, shape, generator=generator)
    behavior = (behavior_hidden @ weight.T + bias).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mask = torch.rand(shape, generator=generator) < 0.7
    data = {
        "hidden": (behavior_hidden + 0.2 * normal(*shape, H)).masked_fill_(~mask[..., None], NAN),
        "weight": weight,
        "bias": bias,
        "behavior_log_prob": behavior.masked_fill_(~mask, NAN),
        "advantages": normal(*shape).masked_fill_(~mask, NAN),
    }
    data = {name: tensor.to(dtype) for name, tensor in data.items()}
    return data | {"tokens": tokens.masked_fill_(~mask, -100), "mask": mask}, behavior_hidden.to(dtype)


def expected_of(objective, data, logit_softcap=None, temperature=1.0, **options):
    """Loss and gradients through the whole matrix of logits, in float64."""
    inputs = [data[name].detach().double().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = inputs
    logits = torch.where(data["mask"][..., None], hidden, 0.0) @ weight.T + bias
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    arguments = {name: x for name, x in data.items() if name not in ("hidden", "weight", "bias")}
    loss, of_logits, statistics, _ = plain(objective, arguments | {"logits": logits}, temperature=temperature, **options)
    return loss, torch.autograd.grad(logits, inputs, of_logits), statistics


def fused(objective, data, **options):
    inputs = {name: data[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    result = linear_policy_loss(objective, **data | inputs, **options)
    result.loss.backward()
    return result, tuple(tensor.grad for tensor in inputs.values())


@pytest.mark.parametrize(
    ("objective", "dtype", "tolerance"),
    [*((objective, torch.float64, 1e-10) for objective in OBJECTIVES), (OBJECTIVES[0], torch.float32, 2e-5)],
)
@each_mode
def test_loss_and_gradients_are_the_plain_ones(objective, dtype, tolerance, mode):
    data, _ = batch(dtype=dtype)
    options = {"logit_softcap": 5.0, "temperature": 0.7}
    loss, gradients, statistics = expected_of(objective, data, **options)
    result, actual = fused(objective, data, **options, **mode)
    assert_close(result.loss, loss, tolerance)
    for ours, theirs in zip(actual, gradients, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, tolerance)
    assert (actual[0][~data["mask"]] == 0.0).all()
    for name, statistic in result.diagnostics.items():
        torch.testing.assert_close(statistic.value.double(), statistics[name].value, rtol=100 * tolerance, atol=tolerance)


@each_mode
def test_without_soft_cap_or_temperature(mode):
    data, _ = batch()
    loss, gradients, _ = expected_of(DRPO(delta=0.15), data)
    result, actual = fused(DRPO(delta=0.15), data, **mode)
    assert_close(result.loss, loss, 1e-10)
    for ours, theirs in zip(actual, gradients, strict=True):
        assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("packed", [False, True])
def test_reductions_normalizers_and_token_weights(reduction, packed):
    data, _ = batch((24,) if packed else (4, 6))
    options = {"reduction": reduction, "normalizer": 11.0, "token_weights": torch.rand(data["mask"].shape).double()}
    if packed:
        options["segment_ids"] = torch.arange(24) // 5
    loss, gradients, _ = expected_of(DRPO(delta=0.15), data, **options)
    result, actual = fused(DRPO(delta=0.15), data, **options, chunk_tokens=5)
    assert_close(result.loss, loss, 1e-10)
    for ours, theirs in zip(actual, gradients, strict=True):
        assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("mode", [MODES["chunks"], MODES["low memory"]], ids=["chunks", "low memory"])
def test_log_probs_and_entropies_are_those_of_the_logits(mode):
    data, _ = batch()
    data["bias"][30:] = -torch.inf  # padding of the vocabulary: with the low-memory mode, more than a whole part
    data["bias"][3] = -torch.inf
    data["tokens"] = torch.where(data["mask"], 0, -100)
    result, gradients = fused(DRPO(delta=0.15), data, entropy=True, temperature=0.7, **mode)
    rest = {name: x for name, x in data.items() if name not in ("hidden", "weight", "bias")}
    logits = data["hidden"] @ data["weight"].T + data["bias"]
    expected = logits_policy_loss(DRPO(delta=0.15), **rest, logits=logits, entropy=True, temperature=0.7)
    torch.testing.assert_close(result.log_prob, expected.log_prob)
    torch.testing.assert_close(result.entropy, expected.entropy)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][30:] == 0.0).all()


@each_mode
@pytest.mark.parametrize("frozen", [{"weight"}, {"hidden"}, {"bias"}, {"weight", "bias"}, {"weight", "bias", "hidden"}])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen, mode):
    data, _ = batch()
    _, expected = fused(DRPO(delta=0.15), data, **mode)
    inputs = {name: data[name].clone().requires_grad_(name not in frozen) for name in ("hidden", "weight", "bias")}
    result = linear_policy_loss(DRPO(delta=0.15), **data | inputs, **mode)
    assert result.loss.requires_grad == (len(frozen) < 3)
    if result.loss.requires_grad:
        result.loss.backward()
    for (name, tensor), gradient in zip(inputs.items(), expected, strict=True):
        assert tensor.grad is None if name in frozen else torch.allclose(tensor.grad, gradient, atol=1e-12)


def test_a_tied_head_adds_both_gradients():
    data, _ = batch()
    weight = data["weight"].clone().requires_grad_()
    ids = data["tokens"].clamp(min=0)
    linear_policy_loss(DRPO(delta=0.15), **data | {"weight": weight, "hidden": weight[ids]}).loss.backward()
    _, (of_hidden, of_weight, _) = fused(DRPO(delta=0.15), data | {"hidden": data["weight"][ids]})
    expected = of_weight.index_add(0, ids.reshape(-1), of_hidden.reshape(-1, H))
    torch.testing.assert_close(weight.grad, expected)


@each_mode
def test_dropped_tokens_get_exactly_no_gradient(mode):
    data, _ = batch()
    objective = DPPO(delta=0.02)
    result, gradients = fused(objective, data, **mode)
    _, expected, _ = expected_of(objective, data)
    dropped = (expected[0] == 0.0).all(-1)
    assert (dropped & data["mask"]).any()
    assert result.diagnostics["dropped_fraction"].value > 0.0
    assert torch.equal((gradients[0] == 0.0).all(-1), dropped)


class Products(Largest):
    """Counts the rows that go through matrix products."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at it."""
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.rows += min(size for size in args[-2].shape if size not in (H, V))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_masked_and_dropped_tokens_cost_no_matrix_product():
    data, _ = batch((24,))
    valid = int(data["mask"].sum())
    with Products() as products:
        result, _ = fused(DPPO(delta=0.02), data)
    dropped = int(result.diagnostics["dropped_fraction"].total)
    assert 0 < dropped < valid < 24
    assert products.rows == valid + 2 * (valid - dropped)


@pytest.mark.parametrize("mode", [MODES["chunks"], MODES["low memory"]], ids=["chunks", "low memory"])
def test_nothing_valid_is_a_loss_and_gradients_of_zero(mode):
    data, _ = batch()
    data["mask"] = torch.zeros_like(data["mask"])
    result, gradients = fused(DRPO(delta=0.15), data, **mode)
    assert result.loss == 0.0
    assert all((gradient == 0.0).all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("form", ["top-k", "top-k in low memory", "full", "head"])
def test_divergences_measured_in_the_chunk(kind, form):
    data, behavior_hidden = batch()
    behavior_logits = behavior_hidden @ data["weight"].T + data["bias"]
    top, ids = behavior_logits.log_softmax(-1).topk(4, dim=-1)
    divergence = {
        "top-k": TopKDivergence(kind=kind, ids=ids, behavior_log_prob=top),
        "full": FullDivergence(kind=kind, behavior=behavior_logits),
        "head": FullDivergence(kind=kind, behavior=LinearHead(behavior_hidden, data["weight"], data["bias"])),
    }[form.split(" in ")[0]]
    objective = DPPO(delta=0.05 if kind == "tv" else 0.02, divergence="per_token")
    rest = {name: x for name, x in data.items() if name not in ("hidden", "weight", "bias")}
    hidden = data["hidden"].clone().requires_grad_()
    expected = logits_policy_loss(objective, **rest, logits=hidden @ data["weight"].T + data["bias"], divergence=divergence)
    expected.loss.backward()
    mode = MODES["low memory"] if "low memory" in form else MODES["chunks"]
    result, (of_hidden, _, _) = fused(objective, data, divergence=divergence, **mode)
    assert 0.0 < result.diagnostics["dropped_fraction"].value < 1.0
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(of_hidden[data["mask"]], hidden.grad[data["mask"]])


def test_gradcheck():
    data, _ = batch((3,))
    data = {name: torch.nan_to_num(x) if x.is_floating_point() else x.clamp(min=0) for name, x in data.items()}
    data["mask"] = torch.ones(3, dtype=torch.bool)
    data["behavior_log_prob"] = data["behavior_log_prob"].clamp(max=-2.0)

    def loss(hidden, weight, bias):
        inputs = {"hidden": hidden, "weight": weight, "bias": bias}
        return linear_policy_loss(DRPO(delta=0.3), **data | inputs, logit_softcap=4.0, temperature=1.3).loss

    inputs = [data[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(loss, inputs)


@each_mode
def test_bfloat16(mode):
    data, _ = batch(dtype=torch.bfloat16)
    loss, gradients, _ = expected_of(DRPO(delta=0.9), data)
    result, actual = fused(DRPO(delta=0.9), data, **mode)
    assert result.loss.dtype == torch.float32
    # logits of about 4 are rounded to 2^-7, as any bfloat16 head rounds them
    assert float(abs(result.loss.detach() - loss)) <= 0.01
    for ours, theirs in zip(actual, gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        assert_close(ours, theirs, 0.05)


@pytest.mark.parametrize("mode", [MODES["chunks"], MODES["low memory"]], ids=["chunks", "low memory"])
def test_autocast_takes_the_products_in_bfloat16_and_accumulates_in_float32(mode):
    data, _ = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, actual = fused(DRPO(delta=0.9), data, **mode)
    low = {name: x.bfloat16() if name in ("hidden", "weight", "bias") else x for name, x in data.items()}
    expected, gradients = fused(DRPO(delta=0.9), low, **mode)
    torch.testing.assert_close(result.loss, expected.loss, rtol=0.0, atol=0.01)
    for ours, theirs in zip(actual, gradients, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs.double(), 0.05)
    # sums that a bfloat16 can't hold
    assert (actual[1] != actual[1].bfloat16()).any()


def test_micro_batches_with_the_normalizer_of_the_whole_add_up():
    data, _ = batch()
    whole, expected = fused(DRPO(delta=0.15), data, reduction=sequence_mean_token_mean)
    inputs = {name: data[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: x if name in ("weight", "bias") else x[rows] for name, x in (data | inputs).items()}
        sequences = float(data["mask"].any(-1).sum())
        loss = linear_policy_loss(DRPO(delta=0.15), **part, reduction=sequence_mean_token_mean, normalizer=sequences).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.loss.detach())
    for tensor, gradient in zip(inputs.values(), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_scaling_the_loss_and_going_backward_twice():
    data, _ = batch()
    _, expected = fused(DRPO(delta=0.15), data)
    weight = data["weight"].clone().requires_grad_()
    loss = linear_policy_loss(DRPO(delta=0.15), **data | {"weight": weight}).loss
    (0.5 * loss).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 0.5 * expected[1])
    (0.5 * loss).backward()
    torch.testing.assert_close(weight.grad, expected[1])


def test_a_second_derivative_is_refused():
    data, _ = batch()
    hidden = data["hidden"].clone().requires_grad_()
    loss = linear_policy_loss(DRPO(delta=0.15), **data | {"hidden": hidden}).loss
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


# Dynamo's own, of tensors that cross a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("from_logits", [False, True], ids=["linear", "logits"])
def test_a_compiled_model_may_call_it(from_logits):
    data, _ = batch(dtype=torch.float32)
    rest = {name: x for name, x in data.items() if name not in ("hidden", "weight", "bias")}
    torch.manual_seed(0)
    body, head = torch.nn.Linear(H, H), torch.nn.Linear(H, V)
    x = data["hidden"].nan_to_num()

    def step(x):
        hidden = torch.tanh(body(x))
        if from_logits:
            return logits_policy_loss(DRPO(delta=0.15), logits=head(hidden), **rest).loss * 2.0
        return linear_policy_loss(DRPO(delta=0.15), hidden=hidden, weight=head.weight, bias=head.bias, **rest).loss * 2.0

    parameters = [*body.parameters(), *head.parameters()]
    expected = torch.autograd.grad(step(x), parameters)
    actual = torch.autograd.grad(torch.compile(step, backend="aot_eager")(x), parameters)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("mode", [{"chunk_tokens": 16}, {"chunk_tokens": 32, "chunk_vocabulary": 12}], ids=str)
def test_memory_is_that_of_a_chunk(tokens, mode, dtype, monkeypatch):
    budget(monkeypatch, 1)
    data, _ = batch((tokens,), dtype=dtype)
    data = {name: torch.nan_to_num(x) if x.is_floating_point() else x.clamp(min=0) for name, x in data.items()}
    data["mask"] = torch.ones(tokens, dtype=torch.bool)
    inputs = {name: data[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    chunk = mode["chunk_tokens"] * mode.get("chunk_vocabulary", V)
    with Largest() as largest:
        linear_policy_loss(DRPO(delta=0.15), **data | inputs, **mode, entropy=True).loss.backward()
    assert chunk <= largest.elements <= max(chunk, tokens * H, V * H)
    assert largest.elements < tokens * V / 2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.zeros(V, H + 1)}, ValueError, "weight: expected the shape of"),
        ({"weight": torch.zeros(V, H)}, TypeError, "weight: expected the dtype of hidden"),
        ({"bias": torch.zeros(V + 1)}, ValueError, "bias: expected the shape of"),
        ({"hidden": None}, TypeError, r"hidden: expected a torch\.Tensor"),
        ({"tokens": torch.full((4, 6), V)}, ValueError, "tokens: expected ids in"),
        ({"mask": torch.ones(4, 6)}, TypeError, "mask: expected a bool dtype"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected a finite number, 1 or more"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap: expected a finite number"),
        (
            {"chunk_vocabulary": 8, "divergence": FullDivergence(kind="tv", behavior=torch.zeros(4, 6, V))},
            ValueError,
            "chunk_vocabulary: expected None with a FullDivergence",
        ),
        ({"reduction": functools.partial(sum)}, TypeError, "reduction: expected token_mean"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change, error, match):
    data, _ = batch()
    with pytest.raises(error, match=match):
        linear_policy_loss(DRPO(delta=0.15), **data | change)


def of_hidden(objective, hidden, **batch):
    """Logits of two tokens are hidden states of which the head is the identity."""
    weight = torch.eye(2, dtype=hidden.dtype)
    return linear_policy_loss(objective, hidden=hidden, weight=weight, chunk_tokens=3, **batch).loss


@parametrize_with_checks(
    [through_the_kit("linear", of_hidden, DRPO(delta_low=0.3, delta_high=0.1), "token_mean")], settings="ci"
)
def test_the_kit(check):
    check()
