"""Modes in drpo_torch and drpo_jax: the core's loss and gradient, and no derivative of an anchor or a correction."""

import dataclasses
import warnings
from functools import partial

import drpo_jax
import drpo_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from mode_oracles import EXAMPLES, arguments_for, batch, packed

from drpo_core import DRPO, PPOClip, policy_loss_and_gradient, summarize, token_loss_and_gradient, token_mean
from drpo_core.anchors import Behavior, Prefix, Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, LengthScale, RatioMask, Veto
from drpo_core.modes import DoubleRatioWarning, Mode
from drpo_core.modes.mode import REDUCTIONS
from drpo_core.objectives import Reinforce
from drpo_core.penalties import CovariancePenalty, Penalty
from drpo_core.reduction import prompt_mean


def made(*arguments, **fields):
    """A mode that may count a ratio twice: these are tests of arithmetic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubleRatioWarning)
        return Mode(*arguments, **fields)


MODES = {
    "gspo": Mode(PPOClip(eps=0.2), anchor=Sequence(Proximal()), reduction="sequence_mean_token_mean"),
    "decoupled": Mode(PPOClip(eps=0.2), anchor=Proximal(), corrections=(ImportanceWeight(high=1.5), Veto(low=0.1, high=9.0))),
    "rejected": Mode(DRPO(delta=0.3), corrections=(RatioMask(level="geometric", low=0.6, high=1.5),), count_masked=False),
    "prefix": Mode(DRPO(delta=0.3), anchor=Prefix(Proximal()), corrections=(LengthScale(),)),
    # K depends on log π, but is a constant
    "weighted by π": made(
        DRPO(delta=0.3), corrections=(ImportanceWeight(edge="policy/behavior", level="sequence", high=3.0),)
    ),
    "penalties": Mode(
        DRPO(delta=0.3),
        corrections=(Veto(low=0.3, high=3.0),),
        penalties=(
            *(Penalty(coefficient=0.1, estimator=name) for name in ("k1", "k2", "k3", "k1+", "r·k1", "r·k3")),
            CovariancePenalty(coefficient=0.2, share=0.4),
        ),
    ),
    "each correction": made(
        DRPO(delta=0.3), corrections=tuple({type(e): e for e in EXAMPLES if hasattr(e, "factor")}.values())
    ),
}
NAMES = ("log_prob", "behavior_log_prob", "advantages", "proximal_log_prob", "reference_log_prob")
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
each_function = pytest.mark.parametrize("function", ["token_loss", "policy_loss"])


def scalar(result):
    """A loss to differentiate: the tokens' sum, or the policy loss without its diagnostics."""
    return result[0] if isinstance(result, tuple) else result.sum()


def wanted(function, mode, arrays):
    core = token_loss_and_gradient if function == "token_loss" else policy_loss_and_gradient
    result = core(mode, **arrays)
    return result.loss.sum(), result.gradient


def in_torch(function, mode, arrays, **options):
    """Loss and gradients; every floating tensor asks for one."""
    tensors = {n: torch.tensor(a).requires_grad_(n in NAMES) for n, a in arrays.items()}
    loss = scalar(getattr(drpo_torch, function)(mode, **tensors, **options))
    loss.backward()
    others = [t.grad for n, t in tensors.items() if n in NAMES and n != "log_prob"]
    assert all(g is None or not g.any() for g in others), "a constant has a gradient"
    return float(loss.detach()), tensors["log_prob"].grad.numpy()


def in_jax(function, mode, arrays, *, jit):
    """Loss and gradients in every floating array."""
    given = {n: jnp.asarray(a) for n, a in arrays.items()}
    floats = {n: a for n, a in given.items() if n in NAMES}
    rest = {n: a for n, a in given.items() if n not in NAMES}

    def of(floats):
        return scalar(getattr(drpo_jax, function)(mode, **floats, **rest))

    loss, gradients = (jax.jit if jit else lambda f: f)(jax.value_and_grad(of))(floats)
    assert not any(g.any() for n, g in gradients.items() if n != "log_prob"), "a constant has a gradient"
    return float(loss), np.asarray(gradients["log_prob"])


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9, atol=1e-15)


@each_mode
@each_function
def test_torch(function, mode):
    arrays = arguments_for(mode, batch(seed=1))
    expected = wanted(function, mode, arrays)
    assert_same(in_torch(function, mode, arrays), expected)
    if function == "policy_loss":
        for engine in ("arrays", "compiled"):
            assert_same(in_torch(function, mode, arrays, engine=engine), expected)
    flat, _ = packed(batch(seed=1))
    flat = arguments_for(mode, flat)
    assert_same(in_torch(function, mode, flat), wanted(function, mode, flat))


@each_mode
@each_function
def test_jax(function, mode):
    arrays = arguments_for(mode, batch(seed=2))
    assert_same(in_jax(function, mode, arrays, jit=True), wanted(function, mode, arrays))
    if mode is not MODES["each correction"]:
        flat, _ = packed(batch(seed=2))
        flat = arguments_for(mode, flat)
        assert_same(in_jax(function, mode, flat, jit=True), wanted(function, mode, flat))


def test_jax_without_jit():
    mode = MODES["decoupled"]
    arrays = arguments_for(mode, batch(seed=3))
    for function in ("token_loss", "policy_loss"):
        assert_same(in_jax(function, mode, arrays, jit=False), wanted(function, mode, arrays))


@each_mode
def test_diagnostics_are_the_core_s(mode):
    arrays = arguments_for(mode, batch(seed=4))
    expected = summarize(policy_loss_and_gradient(mode, **arrays).diagnostics)
    in_torch_ = drpo_torch.policy_loss(mode, **{n: torch.tensor(a) for n, a in arrays.items()})[1]
    in_jax_ = jax.jit(lambda a: drpo_jax.policy_loss(mode, **a)[1])({n: jnp.asarray(a) for n, a in arrays.items()})
    for found in (in_torch_, in_jax_):
        assert summarize(found) == pytest.approx(expected, rel=1e-9, abs=1e-15, nan_ok=True)
    assert len(expected) > 4 * len(mode.corrections)


def test_corrections_scale_the_gradient_and_are_not_differentiated():
    """With ρ of π itself, a missing detach would give the derivative of ρ too: the gradient is K times the one without."""
    weight = ImportanceWeight(edge="policy/behavior", level="sequence", high=3.0)
    corrected, plain = made(DRPO(delta=0.3), corrections=(weight,)), Mode(DRPO(delta=0.3))
    arrays = arguments_for(corrected, batch(seed=5))
    ell = np.where(arrays["mask"], arrays["log_prob"], 0.0) - np.where(arrays["mask"], arrays["behavior_log_prob"], 0.0)
    factor = np.minimum(np.exp(ell.sum(axis=1, keepdims=True)), 3.0)
    for run in (in_torch, lambda *a: in_jax(*a, jit=True)):
        for function in ("token_loss", "policy_loss"):
            without, found = (run(function, mode, arrays)[1] for mode in (plain, corrected))
            np.testing.assert_allclose(found, factor * without, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_low_precision(dtype):
    """The gradient has the dtype of log π; the arithmetic is in float32 at least."""
    mode = MODES["penalties"]
    arrays = arguments_for(mode, batch(seed=6))
    tensors = {n: torch.tensor(a) if n == "mask" else torch.tensor(a).to(getattr(torch, dtype)) for n, a in arrays.items()}
    tensors["log_prob"].requires_grad_()
    loss, _ = drpo_torch.policy_loss(mode, **tensors)
    loss.backward()
    assert loss.dtype == torch.float32
    assert tensors["log_prob"].grad.dtype == getattr(torch, dtype)
    rounded = {n: t.detach().float().double().numpy() if n != "mask" else t.numpy() for n, t in tensors.items()}
    expected = policy_loss_and_gradient(mode, **rounded)
    coarse = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(float(loss.detach()), expected.loss, rtol=1e-5)
    np.testing.assert_allclose(tensors["log_prob"].grad.float().numpy(), expected.gradient, rtol=coarse, atol=coarse * 1e-2)


def test_vmap_and_compile():
    """Rows on their own are sequences on their own."""
    mode = dataclasses.replace(MODES["gspo"], reduction="token_mean")
    arrays = arguments_for(mode, batch((3, 6), seed=7, valid=1.1))
    tensors = {n: torch.tensor(a) for n, a in arrays.items()}

    def loss(log_prob, rest):
        return drpo_torch.policy_loss(mode, log_prob=log_prob, **rest)[0]

    rest = {n: t for n, t in tensors.items() if n != "log_prob"}
    rows = torch.func.vmap(torch.func.grad(loss))(tensors["log_prob"], rest)
    counts = rest["mask"].sum(axis=1, keepdims=True)
    expected = policy_loss_and_gradient(mode, **arrays).gradient * arrays["mask"].sum()
    np.testing.assert_allclose((rows * counts).numpy(), expected, rtol=1e-10, atol=1e-15)
    x = tensors["log_prob"].clone().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(x, rest).backward()
    np.testing.assert_allclose(x.grad.numpy() * arrays["mask"].sum(), expected, rtol=1e-10, atol=1e-15)


def test_plain_objectives_refuse_the_other_policies():
    arrays = {n: a for n, a in batch(seed=8).items() if n != "reference_log_prob"}
    with pytest.raises(ValueError, match=r"proximal_log_prob: expected None, because DRPO\(.* is no Mode that uses it"):
        drpo_torch.policy_loss(DRPO(delta=0.1), **{n: torch.tensor(a) for n, a in arrays.items()})
    with pytest.raises(ValueError, match=r"proximal_log_prob: expected None, because DRPO\(.* is no Mode that uses it"):
        drpo_jax.token_loss(DRPO(delta=0.1), **{n: jnp.asarray(a) for n, a in arrays.items()})


CANCELLING = Mode(Reinforce(), penalties=(Penalty(coefficient=1.0, estimator="k2"),))
"""−A + ℓ_ref: with A = 1.003 and ℓ_ref = 1 it is −0.003, and 0 where −A is rounded to 16 bits first."""
TOKEN = {"log_prob": -1.0, "behavior_log_prob": -1.0, "advantages": 1.003, "reference_log_prob": -2.0, "mask": True}


@pytest.mark.parametrize("function", ["policy_loss", "token_loss"])
def test_gradients_of_penalties_are_added_before_they_are_rounded(function):
    tensors = {n: torch.tensor([[v]]) for n, v in TOKEN.items()}
    tensors["log_prob"] = tensors["log_prob"].bfloat16().requires_grad_()
    found = getattr(drpo_torch, function)(CANCELLING, **tensors)
    (found[0] if isinstance(found, tuple) else found.sum()).backward()
    assert float(tensors["log_prob"].grad) == pytest.approx(-0.003, rel=0.01)
    arrays = {n: jnp.asarray([[v]], jnp.float32 if isinstance(v, float) else bool) for n, v in TOKEN.items()}

    def loss(log_prob):
        found = getattr(drpo_jax, function)(CANCELLING, **arrays | {"log_prob": log_prob})
        return found[0] if isinstance(found, tuple) else found.sum()

    assert float(jax.grad(loss)(arrays["log_prob"].astype(jnp.bfloat16))[0, 0]) == pytest.approx(-0.003, rel=0.01)


@pytest.mark.parametrize("engine", ["arrays", "compiled"])
def test_the_core_adds_them_before_too(engine):
    arrays = {n: np.array([[v]]) for n, v in TOKEN.items()} | {"log_prob": np.array([[-1.0]], np.float16)}
    found = policy_loss_and_gradient(CANCELLING, **arrays | {"advantages": np.array([[1.0003]], np.float32)}, engine=engine)
    assert found.gradient.dtype == np.float16
    assert float(found.gradient[0, 0]) == pytest.approx(-0.0003, rel=0.01)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("library", ["core", "torch", "jax"])
def test_means_over_sequences_that_ranks_share_are_refused(library, reduction):
    mode = Mode(PPOClip(eps=0.2), anchor=Sequence(Behavior()), reduction=reduction)
    arrays = arguments_for(mode, batch(seed=2))
    arrays.pop("proximal_log_prob", None)
    names = ("log_prob", "behavior_log_prob", "advantages", "mask")
    make, function = {
        "core": (np.asarray, policy_loss_and_gradient),
        "torch": (torch.tensor, drpo_torch.policy_loss),
        "jax": (jnp.asarray, drpo_jax.policy_loss),
    }[library]

    def run(across):
        return float(function(mode, **{n: make(arrays[n]) for n in names}, across=across)[0])

    if reduction in {"token_mean", "token_sum"}:
        assert run(lambda array, _: array) == pytest.approx(run(None), rel=1e-12)
    else:
        with pytest.raises(ValueError, match=f"^across: .*'token_sum'.*, got '{reduction}'"):
            run(lambda array, _: array)


@each_function
def test_what_a_correction_leaves_out_may_hold_a_nan(function):
    mode = Mode(
        DRPO(delta=0.3),
        corrections=(RatioMask(edge="policy/behavior", low=0.8, high=1.2), Veto(edge="policy/behavior", low=0.2, high=5.0)),
        penalties=(Penalty(coefficient=0.1, to="behavior"),),
    )
    arrays = arguments_for(mode, batch(seed=1))
    left_out = token_loss_and_gradient(mode, **arrays).weight == 0.0
    assert (left_out & arrays["mask"]).any()
    arrays["advantages"] = np.where(left_out, np.nan, arrays["advantages"])
    expected = wanted(function, mode, arrays)
    assert np.isfinite(expected[0])
    assert_same(in_torch(function, mode, arrays), expected)
    assert_same(in_jax(function, mode, arrays, jit=True), expected)


def test_penalties_leave_out_what_does_not_count_also_without_a_mask():
    mode = Mode(
        DRPO(delta=0.3),
        corrections=(RatioMask(edge="policy/behavior", high=1.1),),
        penalties=(Penalty(coefficient=0.1, to="behavior"), CovariancePenalty(coefficient=0.2, share=0.7, to="behavior")),
        count_masked=False,
    )
    arrays = {n: np.where(batch()["mask"], batch()[n], -0.5) for n in NAMES[:3]}
    expected = wanted("token_loss", mode, arrays)
    assert (token_loss_and_gradient(mode, **arrays).weight == 0.0).any()
    assert_same(in_torch("token_loss", mode, arrays), expected)
    assert_same(in_jax("token_loss", mode, arrays, jit=True), expected)


@pytest.mark.parametrize("library", ["core", "torch", "jax"])
def test_prompts(library):
    """A mode says that it averages over prompts, and the call which prompt each sequence answers."""
    mode = Mode(PPOClip(eps=0.2), reduction="prompt_mean")
    arrays = {n: a for n, a in arguments_for(mode, batch(seed=5)).items() if not n.startswith(("proximal", "reference"))}
    ids, mask = np.array([4, 0, 4, 9, 9]), arrays["mask"]
    tokens = {i: mask[ids == i].sum() for i in set(ids)}
    assert tokens[0] == 0
    each = np.array([1.0 / (max(1, tokens[i]) * sum(n > 0 for n in tokens.values())) for i in ids])[:, None]
    expected = np.where(mask, token_loss_and_gradient(mode, **arrays).gradient * each, 0.0)

    def gradient(reduction, ids=ids):
        options = {"reduction": reduction} if reduction is None else {"reduction": partial(reduction, group_ids=ids)}
        options["diagnostics"] = False
        if library == "core":
            return policy_loss_and_gradient(mode, **arrays, **options, engine="arrays").gradient
        if library == "torch":
            tensors = {n: torch.tensor(a) for n, a in arrays.items()}
            x = tensors["log_prob"].requires_grad_()
            return torch.autograd.grad(drpo_torch.policy_loss(mode, **tensors, **options, engine="arrays")[0], x)[0].numpy()
        given = {n: jnp.asarray(a) for n, a in arrays.items()}
        x = given.pop("log_prob")
        return np.asarray(jax.jit(jax.grad(lambda x: drpo_jax.policy_loss(mode, log_prob=x, **given, **options)[0]))(x))

    make = {"core": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}[library]
    np.testing.assert_allclose(gradient(prompt_mean, make(ids)), expected, rtol=1e-10)
    for wrong in (None, token_mean):
        message = r"^reduction: expected functools.partial\(drpo_core.reduction.prompt_mean, group_ids=ids\), because Mode"
        with pytest.raises(ValueError, match=message):
            gradient(wrong)
    with pytest.raises(TypeError, match=r"^reduction: expected group_ids bound, as in functools\.partial"):
        gradient(prompt_mean, None)
