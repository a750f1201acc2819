"""Policy losses, log-probs and divergences from logits against the plain formulas, differentiated by autograd."""

import functools
import inspect

import array_api_compat.torch as xp
import pytest
import torch
from drpo_torch import (
    FullDivergence,
    LinearHead,
    TopKDivergence,
    full_divergences,
    logits_policy_loss,
    policy_loss,
    selective_log_prob,
    top_k_divergences,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import drpo_core
from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    full_kl,
    full_tv,
    sampled_in_top_k,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
    top_k_kl,
    top_k_tv,
)
from drpo_core.testing import from_function, parametrize_with_checks

OBJECTIVES = [
    PolicyGradient(),
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    CISPO(max_ratio=2.0),
    SPO(eps=0.2),
    DPPO(delta=0.05),
    DPPO(delta=0.05, divergence="binary_kl"),
    DRPO(delta_low=0.1, delta_high=0.2),
    MaskDRPO(delta=0.15),
]
REDUCTIONS = [token_mean, sequence_mean_token_mean, functools.partial(sequence_mean_token_sum, horizon=7.0)]
V = 37
NAN = float("nan")

each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
each_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
each_engine = pytest.mark.parametrize("engine", ["eager", "jit"])


def budget(monkeypatch, function, size):
    """Bytes a thread of a step's buffers, in the modules that this function uses: doctests import others of that name."""
    workspace = inspect.unwrap(function).__globals__["Workspace"]
    monkeypatch.setitem(workspace.__init__.__globals__, "_CPU_BYTES_PER_THREAD", size)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Several steps and chunks even for the few tokens of a test."""
    budget(monkeypatch, logits_policy_loss, 3 * V * 8)
    monkeypatch.setitem(inspect.unwrap(logits_policy_loss).__globals__, "_CHUNK_BYTES", 7 * V * 8)


def batch(shape=(4, 6), seed=0, dtype=torch.float64, vocabulary=V):
    """Logits near the behaviour policy's, with NaN logits, wild ids and NaN figures at masked tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    behavior_logits = 2.0 * normal(*shape, vocabulary)
    logits = behavior_logits + 0.5 * normal(*shape, vocabulary)
    tokens = torch.randint(vocabulary, shape, generator=generator)
    behavior = behavior_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mask = torch.rand(shape, generator=generator) < 0.7
    data = {"logits": logits, "behavior_log_prob": behavior, "advantages": normal(*shape)}
    data = {
        name: tensor.masked_fill(~mask[..., None] if tensor.ndim > mask.ndim else ~mask, NAN) for name, tensor in data.items()
    }
    data = {name: tensor.to(dtype) for name, tensor in data.items()}
    return data | {"tokens": tokens.masked_fill(~mask, -100), "mask": mask}, behavior_logits.to(dtype)


def plain(objective, data, temperature=1.0, **options):
    """The same loss through log-softmax, gather and autograd, and ∂/∂logits, in float64."""
    options = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()}
    logits = data["logits"].detach().double().requires_grad_()
    safe = torch.where(data["mask"][..., None], logits, 0.0)
    tokens = data["tokens"].clamp(min=0)
    log_prob = (safe / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    tensors = {name: data[name].double() for name in ("behavior_log_prob", "advantages")}
    loss, statistics = policy_loss(objective, log_prob=log_prob, **tensors, mask=data["mask"], **options)
    loss.backward()
    return loss.detach(), logits.grad, statistics, log_prob.detach()


def fused(objective, data, **options):
    logits = data["logits"].detach().clone().requires_grad_()
    result = logits_policy_loss(objective, **data | {"logits": logits}, **options)
    result.loss.backward()
    return result, logits.grad


def assert_close(actual, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-30)
    assert float((actual.detach().double() - expected).abs().max() / scale) <= tolerance


# logits_policy_loss


@each_objective
@each_dtype
@each_engine
def test_logits_policy_loss_is_the_plain_one(objective, dtype, tolerance, engine):
    data, _ = batch(dtype=dtype)
    loss, gradient, statistics, log_prob = plain(objective, data, temperature=0.7)
    result, actual = fused(objective, data, temperature=0.7, entropy=True, engine=engine)
    assert actual.dtype == dtype
    # (tokens' losses cancel)
    assert_close(result.loss, loss, 5 * tolerance)
    assert_close(actual, gradient, tolerance)
    assert_close(result.log_prob, torch.where(data["mask"], log_prob, 0.0), tolerance)
    assert (actual[~data["mask"]] == 0.0).all()
    for name, statistic in result.diagnostics.items():
        torch.testing.assert_close(statistic.value.double(), statistics[name].value, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("packed", [False, True])
def test_reductions_normalizers_and_token_weights(reduction, packed):
    data, _ = batch((24,) if packed else (4, 6))
    options = {"reduction": reduction, "normalizer": 11.0, "token_weights": torch.rand(data["mask"].shape).double()}
    if packed:
        options["segment_ids"] = torch.arange(24) // 5
    loss, gradient, _, _ = plain(DRPO(delta=0.15), data, **options)
    result, actual = fused(DRPO(delta=0.15), data, **options)
    assert_close(result.loss, loss, 1e-12)
    assert_close(actual, gradient, 1e-10)


@each_engine
def test_overwriting_puts_the_gradient_in_the_logits(engine):
    data, _ = batch(dtype=torch.float32)
    expected, gradient = fused(DRPO(delta=0.15), data, engine=engine)
    leaf = data["logits"].detach().clone().requires_grad_()
    logits = leaf * 1.0
    result = logits_policy_loss(DRPO(delta=0.15), **data | {"logits": logits}, overwrite_logits=True, engine=engine)
    assert torch.equal(logits, gradient)
    result.loss.backward()
    assert torch.equal(leaf.grad, gradient)
    assert torch.equal(result.loss, expected.loss)


@pytest.mark.parametrize("function", ["logits_policy_loss", "selective_log_prob"])
def test_overwriting_logits_that_something_else_needs_is_refused(function):
    data, _ = batch(dtype=torch.float32)
    data["logits"] = torch.nan_to_num(data["logits"])
    leaf = data["logits"].clone().requires_grad_()
    logits = leaf.tanh()  # its backward pass needs what it returned
    if function == "logits_policy_loss":
        loss = logits_policy_loss(DRPO(delta=0.15), **data | {"logits": logits}, overwrite_logits=True).loss
    else:
        loss = selective_log_prob(logits=logits, tokens=data["tokens"].clamp(min=0), overwrite_logits=True).log_prob.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_engine
def test_bfloat16_logits_are_computed_in_float32(engine):
    data, _ = batch(dtype=torch.bfloat16)
    loss, gradient, _, log_prob = plain(DRPO(delta=0.15), data)
    result, actual = fused(DRPO(delta=0.15), data, engine=engine)
    assert actual.dtype == torch.bfloat16
    assert result.log_prob.dtype == torch.float32
    assert_close(result.log_prob, torch.where(data["mask"], log_prob, 0.0), 1e-6)
    assert_close(result.loss, loss, 1e-5)
    assert_close(actual, gradient, 2.0**-8)


@each_engine
def test_a_nan_at_a_dropped_token_does_not_reach_the_gradient(engine):
    data, _ = batch()
    data["mask"][0, 0] = True
    data |= {"tokens": data["tokens"].clamp(min=0)}
    for name in ("behavior_log_prob", "advantages"):
        data[name][0, 0] = -1.0
    data["logits"][0, 0] = NAN
    _, gradient = fused(DPPO(delta=0.05), data, engine=engine)
    assert (gradient[0, 0] == 0.0).all()
    assert gradient.isfinite().all()


@each_engine
def test_impossible_tokens_have_probability_and_gradient_zero(engine):
    data, _ = batch()
    data["logits"][..., 3:9] = -torch.inf
    data["tokens"] = torch.where(data["mask"], 0, -100)
    loss, gradient, _, _ = plain(DRPO(delta=0.15), data)
    result, actual = fused(DRPO(delta=0.15), data, entropy=True, engine=engine)
    assert_close(result.loss, loss, 1e-12)
    assert_close(actual, gradient, 1e-10)
    assert (actual[..., 3:9] == 0.0).all()
    assert result.entropy.isfinite().all()


@each_engine
def test_nothing_valid_is_a_loss_and_gradient_of_zero(engine):
    data, _ = batch()
    data["mask"] = torch.zeros_like(data["mask"])
    result, gradient = fused(DRPO(delta=0.15), data, engine=engine)
    assert result.loss == 0.0
    assert (gradient == 0.0).all()


def test_without_a_gradient_the_logits_stay_as_they_are():
    data, _ = batch()
    before = data["logits"].clone()
    with torch.no_grad():
        result = logits_policy_loss(DRPO(delta=0.15), **data, overwrite_logits=True)
    assert not result.loss.requires_grad
    assert torch.equal(data["logits"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("form", ["per token", "top-k", "full", "log-probs", "head"])
@each_engine
def test_divergences_measured_in_the_chunk_mask_as_if_given(kind, form, engine):
    data, behavior_logits = batch()
    mask, tokens = data["mask"], data["tokens"].clamp(min=0)
    x, y = data["logits"].nan_to_num().log_softmax(-1), behavior_logits.log_softmax(-1)
    top_behavior, ids = y.topk(4, dim=-1)
    if form == "top-k":
        measured = (top_k_tv if kind == "tv" else top_k_kl)(
            x.gather(-1, tokens[..., None])[..., 0],
            torch.where(mask, data["behavior_log_prob"], -1.0),
            top_k_log_prob=x.gather(-1, ids),
            top_k_behavior_log_prob=top_behavior,
            sampled_in_top_k=sampled_in_top_k(tokens, ids, xp=xp),
            xp=xp,
        )
    else:
        measured = (full_tv if kind == "tv" else full_kl)(x, y, xp=xp)
    head = LinearHead(hidden=behavior_logits, weight=torch.eye(V, dtype=torch.float64))
    divergence = {
        "per token": measured,
        "top-k": TopKDivergence(kind=kind, ids=ids, behavior_log_prob=top_behavior),
        "full": FullDivergence(kind=kind, behavior=behavior_logits),
        "log-probs": FullDivergence(kind=kind, behavior=y),
        "head": FullDivergence(kind=kind, behavior=head),
    }[form]
    objective = DPPO(delta=float(measured[mask].median()), divergence="per_token")
    loss, gradient, statistics, _ = plain(objective, data, divergence=measured)
    result, actual = fused(objective, data, divergence=divergence, engine=engine)
    assert 0.0 < statistics["dropped_fraction"].value < 1.0
    assert result.diagnostics["dropped_fraction"].value == statistics["dropped_fraction"].value
    assert_close(result.loss, loss, 1e-10)
    assert_close(actual, gradient, 1e-10)


def test_scaling_and_accumulating_the_loss():
    data, _ = batch(dtype=torch.float32)
    _, gradient = fused(DRPO(delta=0.15), data)
    logits = data["logits"].clone().requires_grad_()
    loss = logits_policy_loss(DRPO(delta=0.15), **data | {"logits": logits}).loss
    (0.5 * loss).backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 0.5 * gradient)
    (0.5 * loss).backward()
    torch.testing.assert_close(logits.grad, gradient)


@pytest.mark.parametrize("function", [logits_policy_loss, selective_log_prob, full_divergences])
def test_a_second_derivative_is_refused(function):
    data, behavior_logits = batch()
    logits = data["logits"].nan_to_num().requires_grad_()
    if function is logits_policy_loss:
        scalar = function(DRPO(delta=0.15), **data | {"logits": logits}).loss
    elif function is selective_log_prob:
        scalar = function(logits=logits, tokens=data["tokens"].clamp(min=0)).log_prob.sum()
    else:
        scalar = function(logits=logits, behavior_logits=behavior_logits).kl.sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(scalar, logits, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"tokens": torch.zeros(4, 6)}, TypeError, "tokens: expected an integral dtype"),
        ({"tokens": torch.full((4, 6), V)}, ValueError, "tokens: expected ids in"),
        ({"advantages": torch.zeros(4)}, ValueError, "advantages: expected the shape"),
        ({"logits": torch.zeros(4, 6, V, dtype=torch.int64)}, TypeError, "logits: expected a real floating"),
        ({"logits": [1.0]}, TypeError, r"logits: expected a torch\.Tensor"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        ({"engine": "fast"}, ValueError, "engine: expected 'eager' or 'jit', got 'fast'"),
        ({"logits": torch.zeros(4, 6, V).half(), "engine": "jit"}, ValueError, "engine: 'jit' takes float32"),
        ({"reduction": lambda values, _mask, **_: values.sum()}, TypeError, "reduction: expected one of"),
        ({"divergence": "tv"}, TypeError, "divergence: expected a"),
        ({"divergence": torch.zeros(4)}, ValueError, "divergence: expected the shape"),
        (
            {"divergence": FullDivergence(kind="tv", behavior=torch.zeros(4, 6, 3))},
            ValueError,
            r"divergence\.behavior: expected",
        ),
    ],
)
def test_errors_name_the_argument(change, error, match):
    data, _ = batch()
    with pytest.raises(error, match=match):
        logits_policy_loss(DPPO(delta=0.1, divergence="per_token"), **data | change)


# selective_log_prob


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@each_engine
def test_selective_log_prob_and_its_gradients(dtype, tolerance, temperature, engine):
    data, _ = batch(dtype=dtype)
    logits = data["logits"].nan_to_num().requires_grad_()
    tokens = data["tokens"].clamp(min=0)
    actual = selective_log_prob(logits=logits, tokens=tokens, temperature=temperature, entropy=True, engine=engine)
    exact = logits.detach().double().requires_grad_()
    log_p = (exact / temperature).log_softmax(-1)
    expected = (
        log_p.gather(-1, tokens[..., None])[..., 0],
        -(log_p.exp() * log_p).sum(-1),
        (exact / temperature).logsumexp(-1),
    )
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a.detach(), e.detach(), tolerance)
        cotangent = torch.randn(e.shape, generator=torch.Generator().manual_seed(i)).double()
        (ga,) = torch.autograd.grad(a, logits, cotangent.to(a.dtype), retain_graph=True)
        (ge,) = torch.autograd.grad(e, exact, cotangent, retain_graph=True)
        assert_close(ga, ge, 10 * tolerance)


@pytest.mark.parametrize("entropy", [False, True])
@each_engine
def test_selective_log_prob_gradcheck(entropy, engine):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def outputs(z):
        result = selective_log_prob(logits=z, tokens=torch.tensor([0, 4, 2]), temperature=0.7, entropy=entropy, engine=engine)
        return tuple(t for t in result if t is not None)

    assert torch.autograd.gradcheck(outputs, logits)


@pytest.mark.parametrize("overwrite", [False, True])
@each_engine
def test_rows_of_no_influence_may_hold_nan(overwrite, engine):
    data, _ = batch()
    leaf = data["logits"].clone().requires_grad_()
    result = selective_log_prob(
        logits=leaf * 1.0, tokens=data["tokens"].clamp(min=0), entropy=True, overwrite_logits=overwrite, engine=engine
    )
    (result.log_prob + 0.1 * result.entropy)[data["mask"]].sum().backward()
    assert (leaf.grad[~data["mask"]] == 0.0).all()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[data["mask"]] != 0.0).any()


@pytest.mark.parametrize(("dtype", "engine"), [(torch.bfloat16, "eager"), (torch.float16, "eager"), (torch.bfloat16, "jit")])
def test_selective_log_prob_accumulates_in_float32(dtype, engine):
    logits = (3.0 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    actual = selective_log_prob(logits=logits, tokens=torch.arange(4), entropy=True, engine=engine)
    log_p = logits.double().log_softmax(-1)
    assert_close(actual.log_prob, log_p[range(4), range(4)], 1e-6)
    assert_close(actual.entropy, -(log_p.exp() * log_p).sum(-1), 1e-6)


@pytest.mark.parametrize("spread", [1.0, 6.0])
@each_engine
def test_the_sum_of_a_large_vocabulary_keeps_its_digits_in_float32(spread, engine):
    logits = spread * torch.randn(4, 150_001, generator=torch.Generator().manual_seed(0))
    likely, exact = logits.argmax(-1), logits.double().requires_grad_()
    log_p = exact.log_softmax(-1)
    logits.requires_grad_()
    actual = selective_log_prob(logits=logits, tokens=likely, entropy=True, engine=engine)
    expected = log_p.gather(-1, likely[:, None])[:, 0]
    torch.testing.assert_close(actual.log_prob.double(), expected, rtol=5e-7, atol=1e-7)
    torch.testing.assert_close(actual.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=2e-6, atol=0.0)
    (gradient,) = torch.autograd.grad(actual.log_prob.sum(), logits)
    (exactly,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient.double(), exactly, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("rows", [(0, 3), (2, 5)])
def test_loops_over_any_strides_and_blocks_of_impossible_tokens(rows):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 9000, generator=generator, dtype=torch.float64)
    wide[:, :4100] = -torch.inf
    wide[1] = -torch.inf
    tokens = torch.tensor([4200, 4100, 8000, 8900, 5000])[slice(*rows)]
    for logits in (wide[slice(*rows), 3:8990], wide.T.contiguous().T[slice(*rows), 3:8990]):
        ours = [selective_log_prob(logits=logits, tokens=tokens, entropy=True, engine=e) for e in ("eager", "jit")]
        for eager, jit in zip(*ours, strict=True):
            torch.testing.assert_close(jit, eager, rtol=1e-12, atol=1e-12, equal_nan=True)


# divergences


@each_dtype
@each_engine
def test_full_divergences_and_their_gradients(dtype, tolerance, engine):
    data, behavior_logits = batch(dtype=dtype)
    logits = data["logits"].nan_to_num().requires_grad_()
    options = {"temperature": 0.8, "behavior_temperature": 1.2, "engine": engine}
    actual = full_divergences(logits=logits, behavior_logits=behavior_logits, **options)
    exact = logits.detach().double().requires_grad_()
    x, y = (exact / 0.8).log_softmax(-1), (behavior_logits.double() / 1.2).log_softmax(-1)
    expected = 0.5 * (x.exp() - y.exp()).abs().sum(-1), (y.exp() * (y - x)).sum(-1)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.detach(), e.detach(), tolerance)
        cotangent = torch.rand(e.shape).double().masked_fill_(~data["mask"], 0.0)
        (ga,) = torch.autograd.grad(a, logits, cotangent.to(a.dtype), retain_graph=True)
        (ge,) = torch.autograd.grad(e, exact, cotangent, retain_graph=True)
        assert_close(ga, ge, 10 * tolerance)


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("kl", [1e-7, 1e-4, 1e-1])
@each_engine
def test_full_kl_keeps_its_digits_in_float32(kl, offset, engine):
    generator = torch.Generator().manual_seed(0)
    behavior_logits = 3.0 * torch.randn(4, 20_000, generator=generator)
    logits = offset + behavior_logits + (2.0 * kl) ** 0.5 * torch.randn(4, 20_000, generator=generator)
    exact = full_kl(logits.double().log_softmax(-1), behavior_logits.double().log_softmax(-1), xp=xp)
    actual = full_divergences(logits=logits, behavior_logits=behavior_logits, engine=engine)
    assert float(((actual.kl - exact) / exact).abs().max()) <= 1e-4
    exact_tv = full_tv(logits.double().log_softmax(-1), behavior_logits.double().log_softmax(-1), xp=xp)
    torch.testing.assert_close(actual.tv.double(), exact_tv, rtol=2e-6 if offset == 0.0 else 1e-5, atol=2e-7)


@each_engine
def test_full_divergences_of_disjoint_identical_and_impossible_outcomes(engine):
    inf = torch.inf
    logits = torch.tensor([[0.0, -inf, -inf], [0.0, 0.0, -inf], [0.0, -inf, 0.0], [NAN, 0.0, 0.0]])
    behavior = torch.tensor([[-inf, 0.0, -inf], [0.0, 0.0, -inf], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    actual = full_divergences(logits=logits, behavior_logits=behavior, engine=engine)
    torch.testing.assert_close(actual.tv, torch.tensor([1.0, 0.0, 1 / 3, NAN]), equal_nan=True)
    torch.testing.assert_close(actual.kl, torch.tensor([inf, 0.0, inf, NAN]), equal_nan=True)
    reverse = full_divergences(logits=behavior, behavior_logits=logits, engine=engine)
    assert float(reverse.kl[2]) == pytest.approx(torch.tensor(1.5).log().item(), rel=1e-6)


def test_top_k_divergences_are_the_core_formulas():
    data, behavior_logits = batch()
    logits, tokens = data["logits"].nan_to_num(), data["tokens"].clamp(min=0)
    y = behavior_logits.log_softmax(-1)
    top, ids = y.topk(5, dim=-1)
    behavior = y.gather(-1, tokens[..., None])[..., 0]
    normalizer = selective_log_prob(logits=logits, tokens=tokens, temperature=0.8).log_normalizer
    actual = top_k_divergences(
        logits=logits,
        log_normalizer=normalizer,
        tokens=tokens,
        behavior_log_prob=behavior,
        top_k_ids=ids,
        top_k_behavior_log_prob=top,
        temperature=0.8,
    )
    x = (logits / 0.8).log_softmax(-1)
    arguments = {
        "top_k_log_prob": x.gather(-1, ids),
        "top_k_behavior_log_prob": top,
        "sampled_in_top_k": sampled_in_top_k(tokens, ids, xp=xp),
    }
    sampled = x.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(actual.tv, top_k_tv(sampled, behavior, **arguments, xp=xp))
    torch.testing.assert_close(actual.kl, top_k_kl(sampled, behavior, **arguments, xp=xp))


# memory


class Largest(TorchDispatchMode):
    """Records the most elements that a tensor newly allocated by an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at it."""
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.numel())
        return result


def test_the_counter_sees_a_softmax():
    logits = torch.randn(64, V, requires_grad=True)
    with Largest() as largest:
        logits.log_softmax(-1).sum().backward()
    assert largest.elements >= 64 * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_engine
def test_no_other_array_of_the_size_of_the_logits(dtype, engine):
    data, _ = batch((64,), dtype=dtype)
    data["mask"][:] = True
    data |= {"tokens": data["tokens"].clamp(min=0)}
    data["logits"] = data["logits"].nan_to_num()
    logits = data["logits"].requires_grad_() * 1.0
    with Largest() as largest:
        options = {"overwrite_logits": True, "entropy": True, "engine": engine}
        result = logits_policy_loss(DRPO(delta=0.15), **data | {"logits": logits}, **options)
        torch.autograd.grad(result.loss, logits)
    assert 0 < largest.elements < 64 * V / 2


# the verification kit


def two_token_logits(log_prob, mask):
    """Logits of a vocabulary of two whose first log-prob is `log_prob`: its log-probs log π and log(1 − π), in float64.

    A log-softmax rounds log π, which the kit takes as given: float64 keeps that below the float32 it asks for. A tiny
    shift stands for π = 1, where the logits' gradient would hold nothing of that in log π.
    """
    x = torch.where(mask, log_prob.double(), -1.0) - 1e-300
    return torch.stack((x, torch.log(-torch.expm1(x))), dim=-1)


def through_the_kit(name, loss_of_logits, objective, reduction):
    """A loss of (logits of two tokens, keywords) as an implementation that the kit can check."""

    def loss(log_prob, behavior_log_prob, advantages, mask, segment_ids=None, normalizer=None):
        return loss_of_logits(
            objective,
            two_token_logits(log_prob, mask),
            tokens=torch.where(mask, 0, -100),
            behavior_log_prob=behavior_log_prob.double(),
            advantages=advantages.double(),
            mask=mask,
            segment_ids=segment_ids,
            normalizer=normalizer,
            reduction=getattr(drpo_core, reduction),
        ).float()

    return from_function(
        loss,
        "torch",
        name=f"{name}-{reduction}-{objective!r}",
        objective=objective,
        form="score" if isinstance(objective, CISPO) else "ratio",
        reduction=reduction,
        second_order="error",
        keeps_boundary=False,  # the log-softmax's rounding moves a token off it
        dtypes=("float32",),
        cost=8.0,
        family=lambda other: through_the_kit(name, loss_of_logits, other, reduction),
    )


def of_logits(objective, logits, **batch):
    return logits_policy_loss(objective, logits=logits, **batch).loss


IN_THE_KIT = [
    (DRPO(delta_low=0.3, delta_high=0.1), "sequence_mean_token_mean"),
    (PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0), "token_mean"),
    (CISPO(max_ratio=5.0), "token_mean"),
]


def of_logits_in_loops(objective, logits, **batch):
    return logits_policy_loss(objective, logits=logits, engine="jit", **batch).loss


@parametrize_with_checks(
    [
        *(through_the_kit("logits", of_logits, *claims) for claims in IN_THE_KIT),
        *(through_the_kit("logits-jit", of_logits_in_loops, *claims) for claims in IN_THE_KIT),
    ],
    settings="ci",
)
def test_the_kit(check):
    check()
