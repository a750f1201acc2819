"""The soft-cap's derivative far beyond the cap, where 1 − tanh² is 0 in float32: against 40 digits."""

import drpo_jax
import drpo_torch
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from drpo_core import PolicyGradient

CAP, BEHAVIOR = 3.0, -1.0
LOGITS = (30.0, -33.0)
"""Of the sampled word and another one, 10 and 11 times the cap: the head's weights, for a hidden state of 1."""


def expected():
    """∂(−r)/∂h = −r Σ_v (1[v = 0] − π_v) sech²(z_v/cap) z_v."""
    with mpmath.workdps(40):
        capped = [CAP * mpmath.tanh(mpmath.mpf(z) / CAP) for z in LOGITS]
        total = sum(map(mpmath.exp, capped))
        pi = [mpmath.exp(x) / total for x in capped]
        ratio = pi[0] / mpmath.exp(BEHAVIOR)
        slopes = (1 - pi[0], -pi[1])
        return float(-ratio * sum(s * mpmath.sech(z / CAP) ** 2 * z for s, z in zip(slopes, LOGITS, strict=True)))


@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_log_prob"])
@pytest.mark.parametrize("engine", ["arrays", "compiled", "jax"])
def test_far_beyond_the_cap(engine, name):
    module, make, where = (drpo_jax, jnp.asarray, {}) if engine == "jax" else (drpo_torch, torch.tensor, {"engine": engine})
    head = {"weight": make(np.array(LOGITS, np.float32)[:, None]), "tokens": make(np.array([0]))} | where
    rest = {
        "behavior_log_prob": make(np.array([BEHAVIOR], np.float32)),
        "advantages": make(np.array([1.0], np.float32)),
        "mask": make(np.array([True])),
    }

    def loss(hidden):
        if name == "linear_policy_loss":
            return module.linear_policy_loss(PolicyGradient(), hidden=hidden, **head, **rest, logit_softcap=CAP).loss
        ell = module.linear_log_prob(hidden=hidden, **head, logit_softcap=CAP).log_prob - BEHAVIOR
        return -(jnp if engine == "jax" else torch).exp(ell).sum()

    hidden = make(np.ones((1, 1), np.float32))
    if engine == "jax":
        found = float(jax.jit(jax.grad(loss))(hidden)[0, 0])
    else:
        loss(hidden.requires_grad_()).backward()
        found = float(hidden.grad)
    assert found == pytest.approx(expected(), rel=1e-5)
