"""The kit on modes: correct losses written in plain torch pass, and each class of failure is found by its property."""

import functools
from typing import get_args

import matrix
import pytest
import torch

from drpo_core import PPOClip
from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, RatioMask
from drpo_core.modes import Mode
from drpo_core.objectives import Reinforce
from drpo_core.penalties import Estimator, Penalty
from drpo_core.testing import CHECKS, check_implementation, from_adapter, from_core, from_function, run_check

GSPO = Mode(PPOClip(eps=0.2), anchor=Sequence(Proximal()), reduction="sequence_mean_token_mean")
DECOUPLED = Mode(
    PPOClip(eps=0.2),
    anchor=Proximal(),
    corrections=(ImportanceWeight(high=2.0), RatioMask(level="geometric", low=0.5, high=2.0)),
)
KIMI = Mode(Reinforce(), penalties=(Penalty(coefficient=0.3, estimator="k2"),), reduction="token_sum")
ON_POLICY_EDGE = Mode(Reinforce(), corrections=(ImportanceWeight(edge="policy/behavior", high=2.0),))


def quiet(x, mask):
    return torch.where(mask, x, 0.0)


def mean_of_sequences(x, mask):
    return quiet(x, mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def surrogate(ell, advantages, eps=0.2):
    ratio = ell.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)


def gspo(log_prob, behavior_log_prob, advantages, mask, proximal_log_prob, normalizer=None, *, fault=""):  # noqa: ARG001
    x, a = quiet(log_prob, mask), quiet(advantages, mask)
    ell = x - quiet(proximal_log_prob, mask)
    mean = ell.sum(-1, keepdim=True) if fault == "a sum for the mean" else mean_of_sequences(ell, mask)
    ratio = ell if fault == "the ratio of tokens" else mean.detach() + x - x.detach()
    losses = quiet(surrogate(ratio.clamp(max=20.0), a), mask)
    lengths = mask.sum(-1).clamp(min=1)
    if fault == "the padded width":
        lengths = torch.full_like(lengths, mask.shape[-1])
    if fault == "a local denominator":
        normalizer = None
    sequences = (mask.sum(-1) > 0).sum().clamp(min=1) if normalizer is None else normalizer
    return (losses.sum(-1) / lengths).sum() / sequences


def decoupled(log_prob, behavior_log_prob, advantages, mask, proximal_log_prob, normalizer=None, *, fault=""):
    x, b, old = (quiet(array, mask) for array in (log_prob, behavior_log_prob, proximal_log_prob))
    rho = old - b
    whole = (rho.sum(-1, keepdim=True) if fault == "a sum for the mean" else mean_of_sequences(rho, mask)).clamp(-20, 20).exp()
    weights = (x.detach() - b if fault == "the ratio twice" else rho).clamp(-20, 20).exp()
    if fault == "the weight of the sequence":
        weights = rho.sum(-1, keepdim=True).clamp(-20, 20).exp().expand_as(rho)
    if fault == "a weight without its bound":
        kept = weights
    elif fault == "a lower bound for an upper one":
        kept = weights.clamp(min=2.0)
    else:
        kept = weights.clamp(max=2.0)
    band = ((whole >= 0.5) & (whole <= 2.0)).to(x.dtype)
    if fault == "a mask that leaves something":
        band = band.clamp(min=1e-6)
    ell = x - (b if fault == "the wrong anchor" else old)
    losses = surrogate(ell.clamp(max=20.0), quiet(advantages, mask)) * kept * band
    return quiet(losses, mask).sum() / (mask.sum().clamp(min=1) if normalizer is None else normalizer)


def kimi(log_prob, behavior_log_prob, advantages, mask, reference_log_prob, *, fault=""):  # noqa: ARG001
    x = quiet(log_prob, mask)
    ell = x - quiet(reference_log_prob, mask)
    penalty = 0.5 * ell * ell
    if fault == "k1 in the loss":
        penalty = ell
    elif fault == "the other direction":
        penalty = torch.expm1(-ell) + ell
    elif fault == "a clamp that kills the gradient":
        penalty = 0.5 * ell.clamp(-0.5, 0.5) ** 2
    elif fault == "no gradient":
        penalty = penalty.detach()
    return quiet(-quiet(advantages, mask) * x + 0.3 * penalty, mask).sum()


def truncated(log_prob, behavior_log_prob, advantages, mask, *, fault=""):
    x = quiet(log_prob, mask)
    ell = (x - quiet(behavior_log_prob, mask)).clamp(-20.0, 20.0)
    weights = ell.exp().clamp(max=2.0)
    weights = weights if fault == "a weight that is not detached" else weights.detach()
    return quiet(-quiet(advantages, mask) * weights * x, mask).sum() / mask.sum().clamp(min=1)


FEW = matrix.settings(14)
LOSSES = {gspo: GSPO, decoupled: DECOUPLED, kimi: KIMI, truncated: ON_POLICY_EDGE}
FAULTS = {
    gspo: {
        "a sum for the mean": "P25",
        "the ratio of tokens": "P25",
        "the padded width": "P6",
        "a local denominator": "P7",
    },
    decoupled: {
        "a sum for the mean": "P25",
        "the ratio twice": "P25",
        "the weight of the sequence": "P25",
        "a weight without its bound": "P25",
        "a lower bound for an upper one": "P25",
        "a mask that leaves something": "P26",
        "the wrong anchor": "P25",
    },
    kimi: {
        "k1 in the loss": "P27",
        "the other direction": "P27",
        "a clamp that kills the gradient": "P27",
        "no gradient": "P27",
    },
    truncated: {"a weight that is not detached": "P25"},
}


def implementation(loss, fault="", **claims):
    function = functools.partial(loss, fault=fault) if fault else loss
    return from_function(function, "torch", name=f"{loss.__name__}-{fault}", objective=LOSSES[loss], **claims)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_correct_losses_pass(loss):
    report = check_implementation(implementation(loss), settings=FEW)
    assert [(r.check, r.reason) for r in report.results if r.status == "failed"] == []
    passed = {r.property for r in report.results if r.status == "passed"}
    assert {"P1", "P5", "P6", "P8", "P25"} <= passed
    assert ("P27" in passed) == (loss is kimi)


@pytest.mark.parametrize(
    ("loss", "fault"),
    [(loss, fault) for loss, faults in FAULTS.items() for fault in faults],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_each_fault_is_found(loss, fault):
    checks = [info for info in CHECKS.values() if info.property == FAULTS[loss][fault]]
    results = [run_check(info, implementation(loss, fault), FEW) for info in checks]
    found = [result.reason for result in results if result.status == "failed"]
    assert found
    assert not found[0].startswith("raised")


def test_every_property_of_modes_finds_a_fault():
    assert {"P25", "P26", "P27"} <= {found for faults in FAULTS.values() for found in faults.values()}


@pytest.mark.parametrize("mode", [GSPO, DECOUPLED, KIMI], ids=["gspo", "decoupled", "kimi"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_our_own_pass(mode, framework):
    ours = from_core(mode) if framework == "numpy" else from_adapter(mode, framework)
    report = check_implementation(ours, settings=FEW, checks=["P1", "P7", "P24", "P25", "P26", "P27"])
    assert [(r.check, r.reason) for r in report.results if r.status == "failed"] == []


def test_our_own_in_jax_under_jit():
    ours = from_adapter(DECOUPLED, "jax", transform="jit")
    report = check_implementation(ours, settings=FEW, checks=["P25", "P26"])
    assert [(r.check, r.status, r.reason) for r in report.results if r.status != "passed"] == []


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_what_each_penalty_follows(estimator):
    """k1 and the square follow no divergence that P27 knows."""
    ours = from_core(Mode(Reinforce(), penalties=(Penalty(coefficient=0.3, estimator=estimator),)))
    (result,) = check_implementation(ours, settings=FEW, checks=["P27"]).results
    assert result.status == ("not applicable" if estimator in {"k1", "square"} else "passed"), result.reason


def test_a_failure_s_snippet_has_the_log_probs_of_all_policies():
    info = next(info for info in CHECKS.values() if info.property == "P25")
    wrong = implementation(gspo, "the ratio of tokens", call_source="function = loss_of_tokens")
    result = run_check(info, wrong, FEW)
    assert "proximal_log_prob" in result.snippet
    with pytest.raises(AssertionError, match="the gradient is −c K A R w"):
        exec(result.snippet, {"loss_of_tokens": functools.partial(gspo, fault="the ratio of tokens")})  # noqa: S102


def test_a_plain_mode_is_checked_as_its_objective():
    ours = from_function(truncated, "torch", objective=Mode(PPOClip(eps=0.2), reduction="sequence_mean_token_mean"))
    assert (ours.objective, ours.reduction, ours.local) == (PPOClip(eps=0.2), "sequence_mean_token_mean", True)


@pytest.mark.parametrize("local", [False, True])
def test_losses_of_sequences_get_one_advantage_a_sequence(local):
    """GSPO as it was published has a sequence's mean advantage at each of its tokens, which P9 knows if it is declared."""

    def published(log_prob, behavior_log_prob, advantages, mask):
        ratio = mean_of_sequences(quiet(log_prob, mask) - quiet(behavior_log_prob, mask), mask).clamp(max=20.0).exp()
        losses = mean_of_sequences(-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), mask)
        return losses.sum() / (mask.sum(-1) > 0).sum().clamp(min=1)

    bare = from_function(published, "torch", reduction="sequence_mean_token_mean", local=local)
    (result,) = check_implementation(bare, settings=FEW, checks=["P9"]).results
    assert (result.status == "passed") != local
