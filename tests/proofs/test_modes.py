"""Proofs for `docs/derivations/modes.md`: what anchors and corrections do, on the library's own code."""

from __future__ import annotations

import warnings
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import sympy
import z3
from provers import Term, prove, xp_at

from drpo_core import PolicyGradient, PPOClip, policy_loss_and_gradient, token_loss_and_gradient
from drpo_core.anchors import Behavior, Proximal, Sequence
from drpo_core.corrections import (
    ClippedGeometricRatio,
    ImportanceWeight,
    LengthScale,
    OutwardMask,
    RatioMask,
    VariationalWeight,
)
from drpo_core.modes import DoubleRatioWarning, Mode
from drpo_core.objectives import OBJECTIVES, Reinforce

STEPS = (-0.7, 0.0, 0.3, 0.9)
GRID = np.array(list(product(STEPS, STEPS, (-1.0, 1.0))))
"""log π/π_old, log π_old/μ and A: every combination."""


def policy(*logits):
    weights = np.exp(np.array(logits))
    return weights / weights.sum()


PI, OLD, MU = policy(0.3, -0.2, 1.1, 0.0), policy(0.1, 0.1, 0.8, 0.3), policy(0.8, 0.1, 0.5, -0.6)
ADVANTAGES = np.array([1.0, -0.5, 0.3, -2.0])


def tokens_of_grid():
    update, mismatch, advantages = GRID.T
    behavior = np.full(len(GRID), -3.0)
    proximal = behavior + mismatch
    arrays = {"log_prob": proximal + update, "behavior_log_prob": behavior, "proximal_log_prob": proximal}
    return arrays | {"advantages": advantages}


def gradient(mode, arrays):
    needed = {"log_prob", "behavior_log_prob", "advantages", "mask", *getattr(mode, "arguments", ())}
    return token_loss_and_gradient(mode, **{name: array for name, array in arrays.items() if name in needed}).gradient


def mean_gradient(mode, samples, *, advantages=ADVANTAGES, behavior=MU):
    """E[∂L/∂logits of π] over a vocabulary of four: each token once, with its probability under the policy that samples."""
    arrays = {"log_prob": np.log(PI), "behavior_log_prob": np.log(behavior), "proximal_log_prob": np.log(OLD)}
    g = gradient(mode, arrays | {"advantages": advantages})
    return (samples * g) @ (np.eye(4) - PI)


@pytest.mark.parametrize("family", OBJECTIVES, ids=lambda family: family.name)
def test_product(family):
    """enumeration: a mode's gradient is K times its objective's at the anchor, for every objective and 32 tokens."""
    arrays = tokens_of_grid()
    objective = family.make(family.typical[0] if family.typical else None)
    weight = ImportanceWeight(low=0.6, high=1.5)
    mode = Mode(objective, anchor=Proximal(), corrections=(weight,))
    plain = {**arrays, "behavior_log_prob": arrays["proximal_log_prob"]}
    factor = np.clip(np.exp(GRID[:, 1]), 0.6, 1.5)
    np.testing.assert_allclose(gradient(mode, arrays), factor * gradient(objective, plain), rtol=1e-12)


def test_edges():
    """enumeration: the sampler's ratio is the update's times the mismatch: one as a weight is the other as an anchor."""
    arrays = tokens_of_grid()
    at_proximal = Mode(PolicyGradient(), anchor=Proximal(), corrections=(ImportanceWeight(low=0.6, high=1.5, outside="zero"),))
    at_behavior = Mode(PolicyGradient(), anchor=Behavior(), corrections=(RatioMask(low=0.6, high=1.5),))
    np.testing.assert_allclose(gradient(at_proximal, arrays), gradient(at_behavior, arrays), rtol=1e-12)


def test_gspo():
    """enumeration: PPO clip on the anchor of sequences has the derivative of GSPO's loss: 128 sequences of three tokens."""
    eps, step = 0.2, 1e-30
    for gaps in product((-0.6, 0.05, 0.4, 0.9), repeat=3):
        for advantage in (-1.0, 1.0):
            x = np.array([-1.0, -2.0, -0.5])
            arrays = {"log_prob": x[None], "behavior_log_prob": x[None], "proximal_log_prob": (x - np.array(gaps))[None]}
            arrays |= {"advantages": np.full((1, 3), advantage), "mask": np.ones((1, 3), dtype=bool)}
            mode = Mode(PPOClip(eps=eps), anchor=Sequence(Proximal()), reduction="sequence_mean_token_mean")
            found = policy_loss_and_gradient(mode, **arrays).gradient[0]

            def loss(log_prob, advantage=advantage, arrays=arrays):
                s = np.exp(np.mean(log_prob - arrays["proximal_log_prob"][0]))
                # min(s A, clip(s) A), by the side on which the real part lies
                clipped = s if 1 - eps <= s.real <= 1 + eps else min(max(s.real, 1 - eps), 1 + eps)
                return -(s if (s * advantage).real <= (clipped * advantage).real else clipped) * advantage

            # the derivative by a step along the imaginary axis, exact to rounding
            expected = [np.imag(loss(x + 1j * step * np.eye(3)[t])) / step for t in range(3)]
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_gmpo():
    """enumeration: REINFORCE with GMPO's two corrections has the derivative of GMPO's loss: 128 sequences of three tokens."""
    low, high, step = 0.3, 0.5, 1e-30
    bounds = {"eps_low": low, "eps_high": high}
    corrections = (ClippedGeometricRatio(**bounds), OutwardMask(**bounds))
    mode = Mode(Reinforce(), corrections=corrections, reduction="sequence_mean_token_mean")
    for gaps in product((-0.6, -0.1, 0.4, 0.9), repeat=3):
        for advantage in (-1.0, 1.0):
            x = np.array([-1.0, -2.0, -0.5])
            arrays = {"log_prob": x[None], "behavior_log_prob": x[None], "proximal_log_prob": (x - np.array(gaps))[None]}
            arrays |= {"advantages": np.full((1, 3), advantage), "mask": np.ones((1, 3), dtype=bool)}
            found = policy_loss_and_gradient(mode, **arrays).gradient[0]

            def loss(log_prob, advantage=advantage, arrays=arrays):
                ell = log_prob - arrays["proximal_log_prob"][0]
                outward = ell.real > high if advantage > 0 else ell.real < -low
                return -advantage * np.exp(np.mean(np.where(outward, high if advantage > 0 else -low, ell)))

            expected = [np.imag(loss(x + 1j * step * np.eye(3)[t])) / step for t in range(3)]
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_length_scale():
    """enumeration: LUSPO's factor T turns the mean over a sequence's tokens into their sum, for every length up to five."""
    for length in range(1, 6):
        x = np.linspace(-1.0, -2.0, 5)[None]
        mask = np.arange(5)[None] < length
        arrays = {
            "log_prob": x,
            "behavior_log_prob": x,
            "proximal_log_prob": x - 0.1,
            "advantages": np.ones((1, 5)),
            "mask": mask,
        }
        scaled, summed = (
            Mode(PPOClip(eps=0.2), anchor=Sequence(Proximal()), corrections=corrections, reduction=reduction)
            for corrections, reduction in (((LengthScale(),), "sequence_mean_token_mean"), ((), "sequence_mean_token_sum"))
        )
        one, other = (policy_loss_and_gradient(mode, **arrays).gradient for mode in (scaled, summed))
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_decoupled():
    """enumeration: weighted by π_old/μ, PPO at the anchor π_old has on samples of μ PPO's expected gradient on π_old's."""
    weighted = Mode(PPOClip(eps=0.25), anchor=Proximal(), corrections=(ImportanceWeight(),))
    plain = mean_gradient(PPOClip(eps=0.25), OLD, behavior=OLD)
    np.testing.assert_allclose(mean_gradient(weighted, MU), plain, rtol=1e-12)
    # the weight is what does it
    assert np.abs(mean_gradient(Mode(PPOClip(eps=0.25), anchor=Proximal()), MU) - plain).max() > 0.01


def test_truncation():
    """enumeration: truncated at C, E_μ[min(ρ, C) g] = E_old[min(1, C/ρ) g]: tokens of large ρ count less than they should."""
    cap = 1.1
    truncated = Mode(PolicyGradient(), anchor=Proximal(), corrections=(ImportanceWeight(high=cap),))
    kept = np.minimum(1.0, cap * MU / OLD)
    assert (kept < 1.0).any()
    expected = mean_gradient(PolicyGradient(), OLD * kept, behavior=OLD)
    np.testing.assert_allclose(mean_gradient(truncated, MU), expected, rtol=1e-12)


def test_double_ratio():
    """enumeration: a constant advantage teaches nothing; with π_old/μ counted twice its expected gradient is not 0."""
    constant = np.ones(4)
    once = Mode(PolicyGradient(), anchor=Behavior())
    np.testing.assert_allclose(mean_gradient(once, MU, advantages=constant), 0.0, atol=1e-15)
    with pytest.warns(DoubleRatioWarning, match="proximal/behavior"):
        twice = Mode(PolicyGradient(), anchor=Behavior(), corrections=(ImportanceWeight(),))
    assert np.abs(mean_gradient(twice, MU, advantages=constant)).max() > 0.03


def test_levels():
    """enumeration: over sequences of two tokens the product of ratios is unbiased as a weight; a token's own ratio is not."""
    second = {  # the second token's policies, by the first token
        "log_prob": (policy(0.3, -0.4), policy(-0.2, 0.5)),
        "proximal_log_prob": (policy(0.1, 0.0), policy(0.4, -0.1)),
        "behavior_log_prob": (policy(-0.5, 0.6), policy(0.7, 0.2)),
    }
    first = {
        "log_prob": policy(0.2, 0.0),
        "proximal_log_prob": policy(-0.1, 0.3),
        "behavior_log_prob": policy(0.6, -0.2),
    }
    paths = list(product(range(2), repeat=2))
    arrays = {name: np.log([[first[name][y], second[name][y][z]] for y, z in paths]) for name in first}
    arrays |= {"advantages": np.array([[1.0, 1.0], [-1.0, -1.0], [0.5, 0.5], [2.0, 2.0]]), "mask": np.ones((4, 2), dtype=bool)}
    score = np.array([(y == 0) - first["log_prob"][0] for y, _ in paths])  # of the first token, in its first logit

    def mean(mode, sampler, arrays=arrays):
        chances = np.exp(arrays[sampler].sum(axis=1))
        return (chances * gradient(mode, arrays)[:, 0] * score).sum()

    on_policy = mean(PolicyGradient(), "proximal_log_prob", {**arrays, "behavior_log_prob": arrays["proximal_log_prob"]})
    levels = {
        level: mean(
            Mode(PolicyGradient(), anchor=Proximal(), corrections=(ImportanceWeight(level=level),)), "behavior_log_prob"
        )
        for level in ("token", "sequence", "geometric")
    }
    assert levels["sequence"] == pytest.approx(on_policy, rel=1e-12)
    assert abs(levels["token"] - on_policy) > 0.01
    assert abs(levels["geometric"] - on_policy) > 0.01


def test_second_moments_rise():
    """z3: a value that is at least the mean of others does not lower it: M2PO's means rise along the sorted ℓ², for any n."""
    total, count, value = z3.Reals("total count value")
    given = [count >= 1, value >= total / count, total >= 0]
    prove((total + value) / (count + 1) >= total / count, *given)
    prove((total + value) / (count + 1) <= value, *given)


@pytest.mark.parametrize("sign", [1, -1])
def test_variational_weight(sign):
    """SymPy: VESPO's φ(W) = e^λ W^k e^(−λW) is 1 at W = 1 and largest at W = k/λ, with (k, λ) by the sign of A."""
    log_w, k, rate = sympy.symbols("log_w k lambda", positive=True)
    correction = object.__new__(VariationalWeight)
    pairs = {"positive": (k, rate) if sign > 0 else (1, 1), "negative": (1, 1) if sign > 0 else (k, rate)}
    for name, value in {"edge": "policy/behavior", **pairs}.items():
        object.__setattr__(correction, name, tuple(map(Term, value)) if isinstance(value, tuple) else value)
    policies = SimpleNamespace(xp=xp_at({}))
    evidence = SimpleNamespace(policies=policies, advantages=Term(sign), at_level=lambda *_: Term(log_w))
    phi = Term(correction.factor(evidence)).e
    w = sympy.Symbol("W", positive=True)
    assert sympy.simplify(phi.subs(log_w, sympy.log(w)) - sympy.exp(rate) * w**k * sympy.exp(-rate * w)) == 0
    slope = sympy.diff(phi, log_w) / phi
    assert sympy.simplify(slope - (k - rate * sympy.exp(log_w))) == 0
    assert sympy.simplify(phi.subs(log_w, 0)) == 1


def test_normalised_weights_forget_their_scale():
    """enumeration: divided by their mean, weights are the same whatever all ρ are multiplied with; and of mean 1."""
    arrays = tokens_of_grid()
    shifted = arrays | {"behavior_log_prob": arrays["behavior_log_prob"] - 0.4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mode = Mode(PolicyGradient(), anchor=Proximal(), corrections=(ImportanceWeight(normalize=True),))
    np.testing.assert_allclose(gradient(mode, arrays), gradient(mode, shifted), rtol=1e-12)
    on_update = gradient(PolicyGradient(), arrays | {"behavior_log_prob": arrays["proximal_log_prob"]})
    assert (gradient(mode, arrays) / on_update).mean() == pytest.approx(1.0)
