"""torch.fx can trace what an objective computes: no branch on a value, no function that refuses a proxy."""

import pytest
import torch
from drpo_torch.engines._namespace import namespace
from torch.fx import symbolic_trace

from drpo_core import CISPO, DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip, Tokens, objectives
from drpo_core.divergence import binary_kl_of

OBJECTIVES = [
    PolicyGradient(),
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps=0.2),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    CISPO(max_ratio=2.0),
    SPO(eps=0.2),
    SPO(eps_low=0.1, eps_high=0.3),
    DPPO(delta=0.15),
    DPPO(delta_low=0.1, delta_high=0.2, max_ratio=2.0),
    DPPO(delta=0.05, divergence="binary_kl"),
    DPPO(delta=0.1, divergence="per_token"),
    DRPO(delta=0.15),
    DRPO(delta_low=0.1, delta_high=0.2),
    MaskDRPO(delta=0.15),
    objectives.Reinforce(),
    CISPO(min_ratio=0.8, max_ratio=1.2),
    objectives.SAPO(tau_positive=1.0, tau_negative=1.05),
    objectives.IcePop(min_ratio=0.5, max_ratio=5.0),
    objectives.IPO(delta=0.1, max_ratio=2.0),
    objectives.TOPR(),
]


DTYPE = torch.float32
METHODS = ("loss", "weight", "inside", "ratio_weight")


def test_every_class_of_the_table_is_here():
    assert {type(objective) for objective in OBJECTIVES} == {family.objective for family in objectives.OBJECTIVES}


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    behavior = -3.0 * torch.rand(size, generator=generator)
    log_prob = (behavior + 0.8 * torch.randn(size, generator=generator)).clamp(max=0.0)
    return log_prob, behavior, torch.randn(size, generator=generator), 0.3 * torch.rand(size, generator=generator)


@pytest.mark.parametrize(
    ("objective", "method"),
    [(objective, method) for objective in OBJECTIVES for method in METHODS if hasattr(objective, method)],
    ids=str,
)
def test_fx_traces_an_objective_once_for_any_batch(objective, method):
    def per_token(log_prob, behavior_log_prob, advantages, divergence):
        tokens = Tokens.of(log_prob, behavior_log_prob, advantages, divergence=divergence, dtype=DTYPE, xp=namespace())
        return getattr(objective, method)(tokens)

    traced = symbolic_trace(per_token)
    for size, seed in ((7, 0), (1000, 1)):
        arguments = batch(size, seed)
        torch.testing.assert_close(traced(*arguments), per_token(*arguments), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_fx_traces_the_gradient(objective):
    def gradient(log_prob, behavior_log_prob, advantages, divergence):
        tokens = Tokens.of(log_prob, behavior_log_prob, advantages, divergence=divergence, dtype=DTYPE, xp=namespace())
        return -tokens.advantages * tokens.ratio * objective.weight(tokens)

    def loss(log_prob, behavior_log_prob, advantages, divergence):
        return objective.loss(
            Tokens.of(log_prob, behavior_log_prob, advantages, divergence=divergence, dtype=DTYPE, xp=namespace())
        )

    log_prob, *constants = batch(100, 2)
    expected = symbolic_trace(gradient)(log_prob, *constants)
    if isinstance(objective, CISPO):  # its value has no stop-gradient, see `drpo_core.CISPO`
        torch.testing.assert_close(expected, gradient(log_prob, *constants))
        return
    log_prob.requires_grad_()
    symbolic_trace(loss)(log_prob, *constants).sum().backward()
    torch.testing.assert_close(log_prob.grad, expected)


def test_fx_traces_a_kl_with_the_terms_of_float64():
    """The dtype is not known when it is traced, and float32's fewer terms would leave 1e-9."""

    def kl(log_prob, behavior_log_prob):
        return binary_kl_of(Tokens.of(log_prob, behavior_log_prob, log_prob, dtype=torch.float64, xp=namespace()))

    log_prob, behavior, *_ = (x.double() for x in batch(1000, 3))
    torch.testing.assert_close(symbolic_trace(kl)(log_prob, behavior), kl(log_prob, behavior), rtol=0.0, atol=0.0)
