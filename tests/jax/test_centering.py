"""Score centring in JAX: the function and its derivatives, and the vocabulary losses against plain formulas."""

import drpo_jax
import drpo_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drpo_jax import FullCentering, TopKCentering, logits_policy_loss, score_centering

from drpo_core import DRPO
from drpo_core import centering as core
from drpo_core.anchors import Proximal
from drpo_core.corrections import ImportanceWeight, RatioMask, Veto
from drpo_core.modes import Mode
from drpo_core.objectives import IPO, Reinforce

N, V, K, H, T = 7, 23, 4, 3, 0.7
DECOUPLED = Mode(DRPO(delta=0.5), anchor=Proximal(), corrections=(ImportanceWeight(high=1.5),))
# (at this level XLA also computes a log-prob twice and rounds it differently: what compares it with itself would fail)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MASK = np.array([1, 1, 0, 1, 1, 0, 1], dtype=bool)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def every():
    """Arrays in float32, NaN and wild ids where the mask is False, and an id that comes twice."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(N, H)), rng.normal(size=(V, H))
    behavior_weight = weight + 0.3 * rng.normal(size=weight.shape)
    behavior = log_softmax(hidden @ behavior_weight.T)
    old, tokens = log_softmax(behavior + 0.2 * rng.normal(size=behavior.shape)), rng.integers(V, size=N)
    ids = np.argsort(-behavior, -1)[:, :K].copy()
    ids[0, 3] = ids[0, 1]
    kept, recorded = MASK[:, None], {"behavior_log_prob": behavior, "proximal_log_prob": old}
    arrays = {
        "hidden": np.where(kept, hidden, np.nan),
        "weight": weight,
        "behavior_hidden": np.where(kept, hidden, np.nan),
        "behavior_weight": behavior_weight,
        "tokens": np.where(MASK, tokens, -100),
        "advantages": np.where(MASK, rng.normal(size=N), np.nan),
        "token_weights": rng.random(N),
        "ids": np.where(kept, ids, V),
        "mask": MASK,
        **{name: np.where(MASK, np.take_along_axis(x, tokens[:, None], -1)[:, 0], np.nan) for name, x in recorded.items()},
        **{f"top_k_{name}": np.take_along_axis(x, ids, -1) for name, x in recorded.items()},
    }
    return {name: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else None) for name, x in arrays.items()}


def batch_of(data, objective):
    others = ("proximal_log_prob",) if isinstance(objective, Mode) else ()
    return {name: data[name] for name in ("behavior_log_prob", "advantages", "mask", "token_weights", *others)}


def recorded_of(data, objective):
    others = ("proximal_log_prob",) if isinstance(objective, Mode) else ()
    return {name: data[f"top_k_{name}"] for name in ("behavior_log_prob", *others)}


def recorded_by(adapter, name, objective, kind, data):
    """The record of either adapter."""
    if kind == "top_k":
        return adapter.TopKCentering(ids=data["ids"], **recorded_of(data, objective))
    if name == "linear_policy_loss":
        return adapter.FullCentering(behavior=adapter.LinearHead(data["behavior_hidden"], data["behavior_weight"]))
    return adapter.FullCentering(behavior=data["behavior_hidden"] @ data["behavior_weight"].T)


def through(adapter, name, objective, data, **made):
    """A loss of hidden states, weight and record by either adapter, whose functions have one signature."""
    options = batch_of(data, objective) | {"tokens": data["tokens"], "temperature": T, "diagnostics": False} | made

    def loss(hidden, weight, centering):
        rows = {"hidden": hidden, "weight": weight, "chunk_tokens": 2}
        rows = {"logits": hidden @ weight.T} if name == "logits_policy_loss" else rows
        return getattr(adapter, name)(objective, **rows, **options, centering=centering).loss

    return loss


def by_torch(name, objective, kind, data):
    """Loss and gradients by the torch adapter in float64, whose own tests are against plain formulas."""
    tensors = {key: torch.tensor(np.asarray(x)) for key, x in data.items()}
    tensors = {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}
    both = [tensors[key].requires_grad_() for key in ("hidden", "weight")]
    recorded = recorded_by(drpo_torch, name, objective, kind, tensors)
    loss = through(drpo_torch, name, objective, tensors, engine="arrays")(*both, recorded)
    loss.backward()
    # a NaN of a masked row of hidden states comes from the product before the loss
    return [loss.detach(), *(x.grad.nan_to_num() for x in both)]


@pytest.mark.parametrize(
    ("name", "objective", "kind"),
    [
        ("logits_policy_loss", Reinforce(), "top_k"),
        ("logits_policy_loss", DRPO(delta=0.5), "full"),
        ("linear_policy_loss", Reinforce(), "top_k"),
        ("linear_policy_loss", IPO(delta=0.02), "full"),
    ],
    ids=["logits top_k", "logits full", "linear top_k", "linear full from a head"],
)
def test_losses_and_their_gradients(name, objective, kind):
    data = every()
    gradient = jax.jit(jax.value_and_grad(through(drpo_jax, name, objective, data), (0, 1)), compiler_options=QUICK)
    found = gradient(data["hidden"], data["weight"], recorded_by(drpo_jax, name, objective, kind, data))
    for one, other in zip(jax.tree.leaves(found), by_torch(name, objective, kind, data), strict=True):
        np.testing.assert_allclose(np.nan_to_num(one), other, rtol=2e-5, atol=2e-6)
    if kind == "top_k":
        broken = recorded_by(drpo_jax, name, objective, kind, data | {"ids": data["ids"].at[1, 2].set(V)})
        loss, (of_hidden, _) = gradient(data["hidden"], data["weight"], broken)
        assert np.isnan(loss), "an id outside the vocabulary"
        assert np.isnan(of_hidden[1]).all()
        assert not np.isnan(of_hidden[3]).any()


def test_the_function_and_its_derivatives():
    """The core's coefficients, here of a mode; a second derivative is that of their formula, checked by differences."""
    rng = np.random.default_rng(1)
    x, b, old = (log_softmax(rng.normal(size=(3, 4)))[:, :3] for _ in range(3))
    a, mask = rng.normal(size=3), np.array([True, True, False])
    options = {"mask": mask, "proximal_log_prob": old}
    wanted = core.score_centering(DECOUPLED, x, b, a, **options)

    def of(direction, step):
        return core.score_centering(DECOUPLED, x + step * direction, b, a, **options).gradient

    with jax.enable_x64(True):  # noqa: FBT003
        arrays = {"behavior_log_prob": b, "advantages": a, **options}
        arrays = {name: jnp.asarray(array) for name, array in arrays.items()}

        def total(log_prob):
            term = score_centering(DECOUPLED, log_prob=log_prob, **arrays)
            return term.sum(), term

        direction = rng.normal(size=x.shape)
        gradient = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)
        (found, term), (change, _) = jax.jvp(gradient, (jnp.asarray(x),), (jnp.asarray(direction),))
    np.testing.assert_allclose(term, wanted.loss, rtol=1e-11)
    np.testing.assert_allclose(found, wanted.gradient, rtol=1e-11)
    np.testing.assert_allclose(change, (of(direction, 1e-6) - of(direction, -1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("objective", "change", "error", "message"),
    [
        (DRPO(delta=0.3), {"centering": 3.0}, TypeError, "centering: expected a TopKCentering or a FullCentering, got float"),
        (
            DRPO(delta=0.3),
            {"ids": jnp.zeros(2, int)},
            ValueError,
            r"centering\.ids: expected the shape of the tokens and one more",
        ),
        (
            DRPO(delta=0.3),
            {"ids": jnp.zeros((2, 0), int), "behavior_log_prob": jnp.zeros((2, 0))},
            ValueError,
            r"centering\.ids: expected shape \(…, K\)",
        ),
        (
            DRPO(delta=0.3),
            {"behavior_log_prob": jnp.zeros((2, 3))},
            ValueError,
            r"centering\.behavior_log_prob: expected the shape",
        ),
        (
            DRPO(delta=0.3),
            {"centering": FullCentering(behavior=jnp.zeros((2, 4)))},
            ValueError,
            r"centering\.behavior: expected",
        ),
        (Mode(DRPO(delta=0.3), anchor=Proximal()), {}, ValueError, r"centering\.proximal_log_prob: expected log-probs"),
        (
            Mode(DRPO(delta=0.3), corrections=(Veto(edge="policy/behavior"),)),
            {},
            ValueError,
            r"one token at a time, got one with Veto",
        ),
        (
            Mode(DRPO(delta=0.3), corrections=(RatioMask(edge="policy/behavior", high=2.0),), count_masked=False),
            {},
            ValueError,
            "centering: expected a mode with count_masked=True",
        ),
    ],
)
def test_bad_arguments(objective, change, error, message):
    recorded = {"ids": jnp.zeros((2, 2), int), "behavior_log_prob": jnp.zeros((2, 2))} | change
    centering = recorded.pop("centering", None)
    arrays = {"tokens": jnp.zeros(2, int), "behavior_log_prob": jnp.zeros(2), "advantages": jnp.ones(2)}
    needs = {"proximal_log_prob": jnp.zeros(2)} if isinstance(objective, Mode) and objective.arguments else {}
    centering = TopKCentering(**recorded) if centering is None else centering

    def traced(logits):
        options = {"mask": jnp.ones(2, bool), "centering": centering}
        return logits_policy_loss(objective, logits=logits, **arrays, **needs, **options)

    with pytest.raises(error, match=message):
        jax.eval_shape(traced, jnp.zeros((2, 3)))
