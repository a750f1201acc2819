"""Emulated number formats: the values they can hold, and an engine that says what it did."""

import pytest
import torch
from study import model, precision
from study.precision import ENGINES, TRAINERS, round_to_fp8, round_to_int8
from study.rollout import inverted, sample, uniforms
from study.task import PROMPT, Task


def test_fp8_holds_three_bits_of_fraction_and_scales_each_row():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    y = round_to_fp8(x)
    largest = x.abs().amax(1, keepdim=True)
    # half a unit of three bits for normal numbers, half the smallest subnormal below
    assert torch.all((y - x).abs() <= torch.maximum(x.abs() / 16, largest / 448 * 2**-10) * 1.0001)
    assert ((y - x).abs() > x.abs() / 64).float().mean() > 0.3
    torch.testing.assert_close(y.abs().amax(1, keepdim=True), largest)
    assert len(torch.unique((y[0] / largest[0] * 448).round(decimals=4))) <= 253
    torch.testing.assert_close(round_to_fp8(y), y)


def test_int8_holds_255_equidistant_values():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    y, step = round_to_int8(x), x.abs().amax(1, keepdim=True) / 127
    assert torch.all((y - x).abs() <= 0.5001 * step)
    torch.testing.assert_close((y / step).round(), y / step, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [precision.FP8, precision.FP8_GRADIENT])
def test_fp8_is_what_torch_converts_to(dtype):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 0, 512)
    scale = x.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max
    assert torch.equal(round_to_fp8(x, dtype), (x / scale).to(dtype).float() * scale)


def test_zero_rows_stay_zero():
    for rounded in (round_to_fp8(torch.zeros(2, 3)), round_to_int8(torch.zeros(2, 3))):
        assert torch.equal(rounded, torch.zeros(2, 3))


def test_end_to_end_fp8_rounds_operands_forward_and_the_gradient_backward():
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*size, generator=generator) for size in ((5, 8), (3, 8), (5, 3)))
    x.requires_grad_()
    w.requires_grad_()
    y = TRAINERS["fp8"].linear(x, w)
    torch.testing.assert_close(y, round_to_fp8(x.detach()) @ round_to_fp8(w.detach()).T)
    y.backward(g)
    rounded = round_to_fp8(g, precision.FP8_GRADIENT)
    assert not torch.equal(rounded, g)
    torch.testing.assert_close(x.grad, rounded @ round_to_fp8(w.detach()))
    torch.testing.assert_close(w.grad, rounded.T @ round_to_fp8(x.detach()))


@pytest.mark.parametrize("architecture", ["dense", "moe"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_engine_samples_with_a_cache_has_the_log_probs_of_one_pass_without(architecture, engine):
    """Batched over positions, sums may round differently: within what one rounding of a format moves a probability."""
    shape, how, task = model.SHAPES[architecture], ENGINES[engine], Task()
    parameters = model.prepared(model.initial(shape, 0), how)
    generator = torch.Generator().manual_seed(0)
    prompts = task.prompts(16, generator).repeat(2)
    rollout = sample(parameters, shape, prompts, how, uniforms(prompts, generator))
    states, _ = model.hidden_states(parameters, shape, rollout.inputs, how)
    log_prob = model.logits(parameters, states[:, PROMPT - 1 :]).log_softmax(-1)
    again = log_prob.gather(-1, rollout.responses[..., None])[..., 0]
    difference = (again - rollout.behavior_log_prob)[rollout.mask].abs()
    assert difference.mean() < (1e-5 if engine == "float32" else 0.02)


def test_inversion_by_blocks_is_inversion():
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(256, 4096, generator=generator)
    u = torch.rand(256, 1, generator=generator, dtype=torch.float64)
    log_prob = logits.double().log_softmax(-1)
    expected = torch.searchsorted(log_prob.exp().cumsum(-1), u, right=True)
    token, found = inverted(logits, u)
    assert torch.equal(token, expected)
    torch.testing.assert_close(found.double(), log_prob.gather(1, expected), rtol=0.0, atol=2e-6)


def test_formats_are_as_far_from_float32_as_their_bits_say():
    """FP8's three bits of fraction move the log-probs more than int8's seven, those more than bfloat16's rounding alone."""
    shape, task = model.SHAPES["dense"], Task()
    parameters = model.initial(shape, 0)
    tokens = task.prompts(256, torch.Generator().manual_seed(0)).tokens

    def log_probs(engine):
        p = model.prepared(parameters, ENGINES[engine])
        return model.logits(p, model.hidden_states(p, shape, tokens, ENGINES[engine])[0]).log_softmax(-1)

    exact = log_probs("float32")
    off = {engine: float((log_probs(engine) - exact).abs().mean()) for engine in ("bfloat16", "int8", "fp8")}
    assert 0.0 < off["bfloat16"] < off["int8"] < off["fp8"]


def test_each_token_goes_to_two_experts_and_the_weights_of_others_do_not_matter():
    shape = model.SHAPES["moe"]
    parameters = model.initial(shape, 0)
    x = torch.randn(6, shape.width, generator=torch.Generator().manual_seed(0))
    y, balance = model.mixture(parameters, 0, shape, x, TRAINERS["float32"])
    assert float(balance) > -1.0
    affinity = (x[0] @ parameters["0.router"].T).softmax(-1)
    best, chosen = affinity.topk(2)
    expected = sum(
        gate * (torch.nn.functional.silu(x[0] @ parameters["0.up"][e].T) @ parameters["0.down"][e].T)
        for gate, e in zip(best / best.sum(), chosen, strict=True)
    )
    torch.testing.assert_close(y[0], expected)
