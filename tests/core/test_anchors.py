"""Every anchor against its scalar oracle: log R, seen through an objective whose weight it is."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from mode_oracles import LogRatio, anchor_log_prob, arguments_for, batch, examples_of, made_by, packed, sequences, spread_out

from drpo_core import DRPO, PolicyGradient, PPOClip, anchors, policy_loss_and_gradient, token_loss_and_gradient
from drpo_core.anchors import Behavior, Prefix, Proximal, Sequence, interpolated_proximal_log_prob
from drpo_core.modes import Mode

EXAMPLES = examples_of(anchors)
FUZZ = settings(max_examples=60, derandomize=True, deadline=None)
each = pytest.mark.parametrize("anchor", EXAMPLES, ids=str)


def log_ratio(backend, anchor, arrays):
    """Log R per token, 0 at masked tokens."""
    mode = Mode(LogRatio(), anchor=anchor)
    return backend.run(token_loss_and_gradient, mode, **arguments_for(mode, arrays)).weight


def expected(anchor, arrays):
    found = [[t.policy - a for t, a in zip(row, anchor_log_prob(anchor, row), strict=True)] for row in sequences(arrays)]
    return spread_out(found, arrays["mask"])


def test_every_public_anchor_has_an_example():
    assert made_by(anchors, "log_prob") == {type(example) for example in EXAMPLES}


@each
def test_padded_and_packed(backend, anchor):
    arrays = batch(seed=1)
    wanted = expected(anchor, arrays)
    np.testing.assert_allclose(log_ratio(backend, anchor, arrays), wanted, rtol=1e-12, atol=1e-14)
    flat, places = packed(arrays)
    np.testing.assert_allclose(log_ratio(backend, anchor, flat), wanted[places], rtol=1e-12, atol=1e-14)
    mask = flat["mask"]
    short = {name: array[mask] for name, array in flat.items()}
    if backend is not Backend.JAX_JIT:
        np.testing.assert_allclose(log_ratio(backend, anchor, short), wanted[places][mask], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (2, 3)], ids=str)
@each
def test_nothing_or_one_token(backend, anchor, shape):
    """The mean over one token is its own ratio."""
    arrays = batch(shape, seed=2, valid=1.1 if shape == (1, 1) else -1.0)
    np.testing.assert_allclose(log_ratio(backend, anchor, arrays), expected(anchor, arrays), rtol=1e-12)
    if shape == (1, 1):
        inner = anchor
        while hasattr(inner, "of"):
            inner = inner.of
        np.testing.assert_allclose(log_ratio(backend, anchor, arrays), log_ratio(backend, inner, arrays), rtol=1e-12)


@each
def test_padding_and_other_sequences_do_not_matter(anchor):
    arrays = batch(seed=3)
    found = log_ratio(Backend.NUMPY, anchor, arrays)
    for axis in (0, 1):
        for parts in ((0, 1), (1, 0)):
            wider = {n: np.concatenate([(a, np.zeros_like(a))[i] for i in parts], axis=axis) for n, a in arrays.items()}
            place = np.s_[-found.shape[axis] :] if parts == (1, 0) else np.s_[: found.shape[axis]]
            again = log_ratio(Backend.NUMPY, anchor, wider)
            np.testing.assert_allclose(again[place] if axis == 0 else again[:, place], found, rtol=1e-12, atol=1e-15)


@each
def test_on_policy_every_ratio_is_1(anchor):
    arrays = batch(seed=4)
    arrays |= dict.fromkeys(("log_prob", "proximal_log_prob"), arrays["behavior_log_prob"])
    assert (log_ratio(Backend.NUMPY, anchor, arrays) == 0.0).all()


def test_all_tokens_of_a_sequence_have_one_ratio_and_those_of_a_prefix_do_not():
    arrays = batch(seed=5)
    mask = arrays["mask"]
    ratios = log_ratio(Backend.NUMPY, Sequence(Proximal()), arrays)
    causal = log_ratio(Backend.NUMPY, Prefix(Proximal()), arrays)
    plain = log_ratio(Backend.NUMPY, Proximal(), arrays)
    for i in np.flatnonzero(mask.any(axis=1)):
        row = mask[i]
        np.testing.assert_allclose(ratios[i, row], ratios[i, row][0], rtol=1e-12)
        # the last prefix is the sequence, the first is the token
        np.testing.assert_allclose(causal[i, row][[0, -1]], [plain[i, row][0], ratios[i, row][0]], rtol=1e-12)


@given(st.lists(st.floats(-2.0, 2.0), min_size=2, max_size=12), st.integers(0, 11), st.floats(-2.0, 2.0))
@FUZZ
def test_a_prefix_does_not_see_later_tokens(gaps, place, changed):
    place = place % len(gaps)
    later = [*gaps[:place], changed, *gaps[place + 1 :]]

    def prefixes(row):
        x = np.array([row]) - 4.0
        arrays = {"log_prob": x, "behavior_log_prob": np.full(x.shape, -4.0), "advantages": np.ones(x.shape)}
        return log_ratio(Backend.NUMPY, Prefix(Behavior()), arrays | {"mask": np.ones(x.shape, dtype=bool)})[0]

    np.testing.assert_array_equal(prefixes(gaps)[:place], prefixes(later)[:place])


@pytest.mark.parametrize("anchor", [Sequence(Proximal()), Prefix(Behavior()), Proximal()], ids=str)
def test_the_anchor_is_a_constant_of_the_gradient(anchor):
    """∂R/∂log π = R at each token: the gradient is the central difference at an anchor that is held where it is."""
    arrays = batch(seed=6)
    arrays = {name: a if name == "mask" else np.where(arrays["mask"], a, -1.0) for name, a in arrays.items()}
    objective = PolicyGradient()
    mode = Mode(objective, anchor=anchor)
    gradient = token_loss_and_gradient(mode, **arguments_for(mode, arrays)).gradient
    held = np.where(arrays["mask"], arrays["log_prob"] - expected(anchor, arrays), arrays["log_prob"])
    fixed = {"behavior_log_prob": held, "advantages": arrays["advantages"], "mask": arrays["mask"]}
    up, down = (token_loss_and_gradient(objective, arrays["log_prob"] + h, **fixed).loss for h in (1e-6, -1e-6))
    np.testing.assert_allclose(gradient, (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


def test_gspo_is_ppo_clip_with_the_sequence_s_ratio():
    """arXiv:2507.18071: whole sequences are clipped, by s = (Π r_t)^(1/T), and a kept one has the gradient −A s c."""
    arrays = batch(seed=7)
    arrays["advantages"] = np.broadcast_to(np.array([[1.0], [1.0], [-1.0], [1.0], [-1.0]]), arrays["mask"].shape)
    mode = Mode(PPOClip(eps_low=0.2, eps_high=0.2), anchor=Sequence(Proximal()), reduction="sequence_mean_token_mean")
    gradient = policy_loss_and_gradient(mode, **arguments_for(mode, arrays)).gradient
    count = arrays["mask"].any(axis=1).sum()
    for row, found, advantage in zip(sequences(arrays), gradient, arrays["advantages"][:, 0], strict=True):
        if row:
            s = np.exp(np.mean([t.policy - t.proximal for t in row]))
            kept = not (s > 1.2 if advantage > 0 else s < 0.8)
            wanted = -advantage * s * kept / len(row) / count
            np.testing.assert_allclose(found[[t.place for t in row]], wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("where", [np.s_[:], np.s_[:, 3], np.s_[:, 1:]], ids=["all", "one", "all but one"])
@pytest.mark.parametrize("nats", [1e4, np.inf])
@each
def test_extreme_log_probs_stay_finite(anchor, nats, where, dtype):
    """One token may pull the sequence's mean, and with it the anchor of the others, above a log-prob of 0."""
    arrays = batch((2, 16), seed=8)
    arrays = {n: a if n == "mask" else np.where(arrays["mask"], a, -1.0).astype(dtype) for n, a in arrays.items()}
    for name in ("log_prob", "proximal_log_prob", "behavior_log_prob"):
        extreme = arrays | {name: arrays[name].copy()}
        extreme[name][where] -= dtype(nats)
        mode = Mode(DRPO(delta=0.3), anchor=anchor)
        result = policy_loss_and_gradient(mode, **arguments_for(mode, extreme))
        assert np.isfinite(result.loss)
        assert np.isfinite(result.gradient).all()


def test_a_long_sequence_in_float32():
    """The mean of 32,768 log-ratios, to 1e-6."""
    arrays = {n: a if n == "mask" else a.astype(np.float32) for n, a in batch((2, 32_768), seed=9, spread=0.05).items()}
    for anchor in (Sequence(Behavior()), Prefix(Behavior())):
        x, b = (np.where(arrays["mask"], arrays[n], 0.0).astype(np.float64) for n in ("log_prob", "behavior_log_prob"))
        ell = x - b
        mean = ell.cumsum(axis=1) / np.maximum(arrays["mask"].cumsum(axis=1), 1)
        wanted = mean[:, -1:] if isinstance(anchor, Sequence) else mean
        found = log_ratio(Backend.NUMPY, anchor, arrays)
        np.testing.assert_allclose(found, np.where(arrays["mask"], wanted, 0.0), atol=2e-6)


def test_arguments_and_policies():
    inner = {Behavior(): ("behavior", ("behavior_log_prob",)), Proximal(): ("proximal", ("proximal_log_prob",))}
    for anchor, (policy, arguments) in inner.items():
        for outer in (lambda a: a, Sequence, Prefix, lambda a: Prefix(Sequence(a))):
            assert (outer(anchor).policy, outer(anchor).arguments) == (policy, arguments)
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert all(dataclasses.replace(one) == one != other for one, other in itertools.permutations(EXAMPLES, 2))


@pytest.mark.parametrize("wrong", [Proximal, None, "proximal", PPOClip(eps=0.2)], ids=str)
@pytest.mark.parametrize("kind", [Sequence, Prefix])
def test_the_anchor_of_an_anchor_is_checked(kind, wrong):
    with pytest.raises(TypeError, match=r"of: expected an anchor such as Proximal\(\), got"):
        kind(wrong)


# --- without a forward pass ---------------------------------------------------------------------------------------------


def areal_s_loglinear(policy, behavior, version, current):
    """(1 − α) log μ + α log π, with AReaL's α = (v_proximal − v)/(v_π − v) within [0, 1], and 0 where v = v_π."""
    alpha = min(max((current - 1 - version) / (current - version), 0.0), 1.0) if current > version else 0.0
    return (1 - alpha) * behavior + alpha * policy


def test_the_proximal_policy_between_the_sampler_and_the_current_one(backend):
    """The ratio against it is that against μ to the power of 1/d; masked tokens hold junk, which stays their own."""
    arrays = batch(seed=12)
    mask, current = arrays["mask"], 9
    versions = np.random.default_rng(0).integers(0, current + 1, mask.shape)
    x, b = arrays["log_prob"], arrays["behavior_log_prob"]
    with np.errstate(invalid="ignore"):
        found = backend.run(interpolated_proximal_log_prob, x, b, current - versions)
    wanted = [areal_s_loglinear(*token, current) for token in zip(x[mask], b[mask], versions[mask], strict=True)]
    np.testing.assert_allclose(found[mask], wanted, rtol=1e-13)
    mode = Mode(LogRatio(), anchor=Proximal())
    given = {name: arrays[name] for name in ("behavior_log_prob", "advantages", "mask")}
    ratios = backend.run(token_loss_and_gradient, mode, x, **given, proximal_log_prob=found).weight
    power = 1.0 / np.maximum(current - versions, 1)
    np.testing.assert_allclose(ratios[mask], power[mask] * (x[mask] - b[mask]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_probabilities_of_0_give_no_nan(backend, staleness):
    x, b = np.array([-np.inf, -np.inf, -1.0]), np.array([-1.0, -np.inf, -np.inf])
    found = backend.run(interpolated_proximal_log_prob, x, b, np.full(3, staleness))
    np.testing.assert_array_equal(found, b if staleness <= 1 else np.full(3, -np.inf))


def test_it_is_a_constant_in_float32_at_least_and_checks_its_arrays():
    x, d = torch.full((2,), -1.0, dtype=torch.bfloat16, requires_grad=True), torch.tensor([1, 3])
    found = interpolated_proximal_log_prob(x, torch.full((2,), -4.0), d)
    assert (found.dtype, found.requires_grad, found.tolist()) == (torch.float32, False, [-4.0, -2.0])
    with pytest.raises(TypeError, match=r"staleness: expected an integral dtype, got .*float64"):
        interpolated_proximal_log_prob(np.zeros(2), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"staleness: expected the shape of log_prob, \(2,\), got \(1,\)"):
        interpolated_proximal_log_prob(np.zeros(2), np.zeros(2), np.zeros(1, int))
