"""Divergences from logits against the formulas of the core, differentiated by autograd."""

import array_api_compat.torch as xp
import pytest
import torch
from drpo_torch import full_divergences, token_log_prob, top_k_divergences
from vocabulary_batches import NAN, assert_close, batch, each_dtype, each_engine, small_steps

from drpo_core import full_kl, full_tv, sampled_in_top_k, top_k_kl, top_k_tv


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    small_steps(monkeypatch)


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
    normalizer = token_log_prob(logits=logits, tokens=tokens, temperature=0.8).log_normalizer
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
