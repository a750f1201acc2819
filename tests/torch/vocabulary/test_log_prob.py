"""`token_log_prob` and `linear_log_prob` against log-softmax and gather, differentiated by autograd."""

import pytest
import torch
from drpo_torch import linear_log_prob, linear_policy_loss, token_log_prob
from vocabulary_batches import Largest, assert_close, batch, each_dtype, each_engine, small_steps

from drpo_core import PolicyGradient


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
    assert actual.top_k_log_prob is None
    for i, (a, e) in enumerate(zip(actual[:3], expected, strict=True)):
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
        for actual, wanted in zip(other[:3], expected[:3], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


# --- masks and more columns, from logits and from the head ----------------------------------------------------------------

H, WIDTH = 8, 37
CHUNKS = {
    "whole": {"chunk_tokens": 99},
    "chunks": {"chunk_tokens": 5},
    "low memory": {"chunk_tokens": 5, "chunk_vocabulary": 13},
    "narrow": {"chunk_tokens": 7, "chunk_vocabulary": 1},
}


def head(dtype=torch.float64, *, requires_grad=True):
    """A head and tokens of which some are masked and hold NaN and wild ids, with ids that come twice among the K."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand((4, 6), generator=generator) < 0.7
    ids = torch.randint(WIDTH, (4, 6, 3), generator=generator)
    ids[..., 2] = ids[..., 0]
    inputs = {"hidden": normal(4, 6, H).masked_fill(~mask[..., None], float("nan")), "weight": normal(WIDTH, H)}
    inputs["bias"] = normal(WIDTH)
    tokens = torch.randint(WIDTH, (4, 6), generator=generator).masked_fill(~mask, -100)
    columns = {"tokens": tokens, "top_k_ids": ids.masked_fill(~mask[..., None], -100), "mask": mask}
    return {name: tensor.requires_grad_(requires_grad) for name, tensor in inputs.items()}, columns


def plainly(logits, tokens, top_k_ids, mask):
    """The four results by log-softmax, 0 where masked."""
    log_p = torch.where(mask[..., None], logits, 0.0).log_softmax(-1)
    log_probs = log_p.gather(-1, torch.cat((tokens[..., None], top_k_ids), dim=-1).clamp(min=0)) * mask[..., None]
    entropy = -(log_p.exp() * log_p).sum(-1) * mask
    return log_probs[..., 0], entropy, torch.where(mask[..., None], logits, 0.0).logsumexp(-1) * mask, log_probs[..., 1:]


def compared(found, expected, inputs, exact, tolerance):
    """Values, and the gradients of all results at once and of each alone."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(e.shape, generator=generator, dtype=torch.float64) for e in expected]
    for actual, wanted in zip(found[:4], expected, strict=True):
        assert_close(actual, wanted.detach(), tolerance)
    for some in ([0, 1, 2, 3], [0], [1], [2], [3]):
        loss = sum((found[i].double() * cotangents[i]).sum() for i in some)
        wanted_loss = sum((expected[i] * cotangents[i]).sum() for i in some)
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        wanted = torch.autograd.grad(wanted_loss, exact, retain_graph=True)
        for gradient, e in zip(gradients, wanted, strict=True):
            assert_close(gradient, e.nan_to_num(), 20 * tolerance)


@each_dtype
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@each_engine
def test_linear_log_prob_and_its_gradients(dtype, tolerance, softcap, chunks, engine):
    inputs, columns = head(dtype)
    found = linear_log_prob(**inputs, **columns, temperature=0.7, logit_softcap=softcap, entropy=True, engine=engine, **chunks)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs.values()]
    z = torch.where(columns["mask"][..., None], exact[0], 0.0) @ exact[1].T + exact[2]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    compared(found, plainly(z / 0.7, **columns), tuple(inputs.values()), exact, tolerance)


@each_dtype
@each_engine
def test_masks_and_more_columns_from_logits(dtype, tolerance, engine):
    inputs, columns = head(dtype, requires_grad=False)
    logits = (inputs["hidden"] @ inputs["weight"].T).requires_grad_()
    found = token_log_prob(logits=logits, **columns, temperature=0.7, entropy=True, engine=engine)
    exact = logits.detach().double().requires_grad_()
    compared(found, plainly(exact / 0.7, **columns), (logits,), (exact,), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [CHUNKS["chunks"], CHUNKS["low memory"]], ids=["chunks", "low memory"])
def test_linear_log_prob_in_low_precision(dtype, chunks):
    inputs, columns = head(dtype)
    found = linear_log_prob(**inputs, **columns, entropy=True, **chunks)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs.values()]
    expected = plainly(torch.where(columns["mask"][..., None], exact[0], 0.0) @ exact[1].T + exact[2], **columns)
    assert all(result.dtype == torch.float32 for result in found[:4])
    (found.log_prob - 0.1 * found.entropy + found.top_k_log_prob.sum(-1)).sum().backward()
    (expected[0] - 0.1 * expected[1] + expected[3].sum(-1)).sum().backward()
    for tensor, wanted in zip(inputs.values(), exact, strict=True):
        assert tensor.grad.dtype == dtype
        assert_close(tensor.grad, wanted.grad.nan_to_num(), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_no_gradient_is_formed_where_none_is_wanted(frozen):
    inputs, columns = head()
    for name in frozen:
        inputs[name].requires_grad_(False)  # noqa: FBT003 -- torch's signature
    linear_log_prob(**inputs, **columns).log_prob.sum().backward()
    assert {name for name, tensor in inputs.items() if tensor.grad is None} == set(frozen)


def test_both_passes_need_the_memory_of_a_chunk():
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with Largest() as largest:
        found = linear_log_prob(hidden=hidden, weight=weight, tokens=torch.arange(64) % 50, entropy=True, chunk_tokens=8)
        (found.log_prob + found.entropy).sum().backward()
    assert largest.elements <= 8 * 50


@pytest.mark.parametrize("fused", [False, True], ids=["log-probs", "loss"])
def test_chunks_do_not_round_the_sum_of_their_gradients(fused):
    """∂weight of 64 chunks is as near to float64's as that of one, in bfloat16 too; rounded at each, it was 5 times as far."""
    torch.manual_seed(0)
    rows, vocabulary = 512, 20
    inputs = {"hidden": torch.randn(rows, 8).bfloat16(), "weight": torch.randn(vocabulary, 8).bfloat16()}
    tokens, advantages = torch.arange(rows) % vocabulary, torch.ones(rows)

    def of_weight(dtype, chunk_tokens):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        if fused:
            rest = {"behavior_log_prob": -3.0 * advantages, "advantages": advantages, "mask": advantages > 0.0}
            found = linear_policy_loss(PolicyGradient(), **leaves, tokens=tokens, **rest, chunk_tokens=chunk_tokens).loss
        else:
            found = linear_log_prob(**leaves, tokens=tokens, chunk_tokens=chunk_tokens).log_prob.sum()
        return torch.autograd.grad(found, leaves["weight"])[0].double()

    exact = of_weight(torch.float64, rows)
    one, many = ((of_weight(torch.bfloat16, chunk) - exact).norm() for chunk in (rows, rows // 64))
    assert many < 1.5 * one


def test_rows_that_no_cotangent_reaches_cost_no_product(monkeypatch):
    """The backward pass takes its products for the others only."""
    inputs, columns = head()
    rows = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: rows.append(len(a)) or multiply(a, b, **options))
    found = linear_log_prob(**inputs, **columns)
    before, wanted = sum(rows), columns["mask"].clone()
    wanted[:, 2:] = False
    rows.clear()
    found.log_prob[wanted].sum().backward()
    assert before == int(columns["mask"].sum())
    assert rows[0] == int(wanted.sum())


def test_autocast_is_the_same_in_both_passes():
    inputs, columns = head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_log_prob(**inputs, **columns)
    found.log_prob.sum().backward()
    low = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in inputs.items()}
    low["bias"] = inputs["bias"].detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear_log_prob(**low, **columns)
    expected.log_prob.sum().backward()
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0.0, atol=0.0)
    assert_close(inputs["hidden"].grad, low["hidden"].grad.double(), 2.0**-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.full((4, 6), 37)}, r"^tokens: expected ids in \[0, 37\) at valid positions, got 37"),
        ({"top_k_ids": torch.full((4, 6, 2), -1)}, r"^top_k_ids: expected ids in \[0, 37\) at valid positions, got -1"),
        ({"top_k_ids": torch.zeros(4, 5, 2, dtype=torch.int64)}, r"^top_k_ids: expected the shape of the tokens and one more"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, "^mask: expected the shape of the tokens"),
        ({"chunk_tokens": 0}, "^chunk_tokens: expected"),
    ],
    ids=["tokens", "ids", "ids' shape", "mask", "chunk"],
)
def test_errors_of_linear_log_prob(change, message):
    inputs, columns = head()
    with pytest.raises(ValueError, match=message):
        linear_log_prob(**inputs, **columns | change)
