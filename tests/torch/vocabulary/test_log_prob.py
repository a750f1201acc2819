"""`token_log_prob` against log-softmax and gather, differentiated by autograd."""

import pytest
import torch
from drpo_torch import token_log_prob
from vocabulary_batches import assert_close, batch, each_dtype, each_engine, small_steps


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    small_steps(monkeypatch)


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@each_engine
def test_token_log_prob_and_its_gradients(dtype, tolerance, temperature, engine):
    data, _ = batch(dtype=dtype)
    logits = data["logits"].nan_to_num().requires_grad_()
    tokens = data["tokens"].clamp(min=0)
    actual = token_log_prob(logits=logits, tokens=tokens, temperature=temperature, entropy=True, engine=engine)
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
def test_token_log_prob_gradcheck(entropy, engine):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def outputs(z):
        result = token_log_prob(logits=z, tokens=torch.tensor([0, 4, 2]), temperature=0.7, entropy=entropy, engine=engine)
        return tuple(t for t in result if t is not None)

    assert torch.autograd.gradcheck(outputs, logits)


@pytest.mark.parametrize("overwrite", [False, True])
@each_engine
def test_rows_of_no_influence_may_hold_nan(overwrite, engine):
    data, _ = batch()
    leaf = data["logits"].clone().requires_grad_()
    result = token_log_prob(
        logits=leaf * 1.0, tokens=data["tokens"].clamp(min=0), entropy=True, overwrite_logits=overwrite, engine=engine
    )
    (result.log_prob + 0.1 * result.entropy)[data["mask"]].sum().backward()
    assert (leaf.grad[~data["mask"]] == 0.0).all()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[data["mask"]] != 0.0).any()


@pytest.mark.parametrize(
    ("dtype", "engine"), [(torch.bfloat16, "arrays"), (torch.float16, "arrays"), (torch.bfloat16, "compiled")]
)
def test_token_log_prob_accumulates_in_float32(dtype, engine):
    logits = (3.0 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    actual = token_log_prob(logits=logits, tokens=torch.arange(4), entropy=True, engine=engine)
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
    actual = token_log_prob(logits=logits, tokens=likely, entropy=True, engine=engine)
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
    logits, strided = wide[slice(*rows), 3:8990], wide.T.contiguous().T[slice(*rows), 3:8990]
    given = [(logits, "arrays"), (logits, "compiled"), (strided, "arrays"), (strided, "auto")]
    expected, *others = (token_log_prob(logits=z, tokens=tokens, entropy=True, engine=engine) for z, engine in given)
    for other in others:
        for actual, wanted in zip(other, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
