"""`logits_policy_loss` against the plain formula, differentiated by autograd."""

import array_api_compat.torch as xp
import pytest
import torch
from drpo_torch import FullDivergence, LinearHead, TopKDivergence, full_divergences, logits_policy_loss, token_log_prob
from vocabulary_batches import (
    NAN,
    REDUCTIONS,
    Largest,
    V,
    assert_close,
    batch,
    each_dtype,
    each_engine,
    each_objective,
    fused,
    plain,
    small_steps,
    through_the_kit,
)

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    PPOClip,
    full_kl,
    full_tv,
    sampled_in_top_k,
    top_k_kl,
    top_k_tv,
)
from drpo_core.testing import parametrize_with_checks


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    small_steps(monkeypatch)


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


@pytest.mark.parametrize("function", ["logits_policy_loss", "token_log_prob"])
def test_overwriting_logits_that_something_else_needs_is_refused(function):
    data, _ = batch(dtype=torch.float32)
    data["logits"] = torch.nan_to_num(data["logits"])
    leaf = data["logits"].clone().requires_grad_()
    logits = leaf.tanh()  # its backward pass needs what it returned
    if function == "logits_policy_loss":
        loss = logits_policy_loss(DRPO(delta=0.15), **data | {"logits": logits}, overwrite_logits=True).loss
    else:
        loss = token_log_prob(logits=logits, tokens=data["tokens"].clamp(min=0), overwrite_logits=True).log_prob.sum()
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


@pytest.mark.parametrize("function", [logits_policy_loss, token_log_prob, full_divergences])
def test_a_second_derivative_is_refused(function):
    data, behavior_logits = batch()
    logits = data["logits"].nan_to_num().requires_grad_()
    if function is logits_policy_loss:
        scalar = function(DRPO(delta=0.15), **data | {"logits": logits}).loss
    elif function is token_log_prob:
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
        ({"engine": "fast"}, ValueError, "engine: expected 'auto', 'arrays' or 'compiled', got 'fast'"),
        ({"logits": torch.zeros(4, 6, V).half(), "engine": "compiled"}, ValueError, "engine: 'compiled' takes float32"),
        ({"reduction": lambda values, _mask, **_: values.sum()}, TypeError, "reduction: expected token_mean"),
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


def of_logits(objective, logits, **batch):
    return logits_policy_loss(objective, logits=logits, **batch).loss


IN_THE_KIT = [
    (DRPO(delta_low=0.3, delta_high=0.1), "sequence_mean_token_mean"),
    (PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0), "token_mean"),
    (CISPO(max_ratio=5.0), "token_mean"),
]


def of_logits_in_loops(objective, logits, **batch):
    return logits_policy_loss(objective, logits=logits, engine="compiled", **batch).loss


@parametrize_with_checks(
    [
        *(through_the_kit("logits", of_logits, *claims) for claims in IN_THE_KIT),
        *(through_the_kit("logits-compiled", of_logits_in_loops, *claims) for claims in IN_THE_KIT),
    ],
    settings="dev",
)
def test_the_kit(check):
    check()
