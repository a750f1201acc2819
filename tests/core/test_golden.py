"""Parity with published implementations, and with exact sums on recorded distributions.

`python tests/core/test_golden.py` prints, for each array: compared, excluded (why), maximum relative difference.
"""

from pathlib import Path

import mpmath
import numpy as np
import pytest

import drpo_core
from drpo_core import (
    DPPO,
    DRPO,
    SPO,
    PPOClip,
    VacuousTrustRegionWarning,
    binary_kl,
    binary_tv,
    sampled_in_top_k,
    token_loss_and_gradient,
    top_k_kl,
    top_k_tv,
)

DATA = Path(__file__).parents[1] / "data"
ROLLOUTS = Path(drpo_core.__file__).parent / "audit" / "data"
TOLERANCE = 1e-9


def drpo_12_5():
    """The published setting, at which DRPO warns that it has no boundary."""
    with pytest.warns(VacuousTrustRegionWarning):
        return DRPO(delta=12.5)


def near_certain(log_prob, behavior):
    """Where the 1e-8 offset of the published KL dominates 1 − p."""
    return np.maximum(log_prob, behavior) > np.log1p(-1e-6)


def none(log_prob, _behavior):
    return np.zeros(log_prob.shape, dtype=bool)


NOTHING = (none, "")
CERTAIN = (near_certain, "p > 1 − 1e-6, published KL has a 1e-8 offset")
# array: objective, which output, and what its source computes differently
PUBLISHED = {
    "drpo_loss_delta12.5": (drpo_12_5, "loss", NOTHING),
    "drpo_grad_delta12.5": (drpo_12_5, "gradient", NOTHING),
    "drpo_loss_delta0.5": (lambda: DRPO(delta=0.5), "loss", NOTHING),
    "drpo_grad_delta0.5": (lambda: DRPO(delta=0.5), "gradient", NOTHING),
    "drpo_loss_delta0.15": (lambda: DRPO(delta=0.15), "loss", NOTHING),
    "drpo_grad_delta0.15": (lambda: DRPO(delta=0.15), "gradient", NOTHING),
    "spo_loss_eps12.5": (lambda: SPO(eps=12.5), "loss", NOTHING),
    "spo_grad_eps12.5": (lambda: SPO(eps=12.5), "gradient", NOTHING),
    "spo_loss_eps0.5": (lambda: SPO(eps=0.5), "loss", NOTHING),
    "spo_grad_eps0.5": (lambda: SPO(eps=0.5), "gradient", NOTHING),
    "spo_loss_eps0.15": (lambda: SPO(eps=0.15), "loss", NOTHING),
    "spo_grad_eps0.15": (lambda: SPO(eps=0.15), "gradient", NOTHING),
    "dppo_tv_grad_delta0.15_maxratio20": (lambda: DPPO(delta=0.15, max_ratio=20.0), "gradient", NOTHING),
    "dppo_tv_grad_low0.1_high0.3_maxratio1e9": (
        lambda: DPPO(delta_low=0.1, delta_high=0.3, max_ratio=1e9),
        "gradient",
        NOTHING,
    ),
    "dppo_kl_grad_delta0.05_maxratio20": (
        lambda: DPPO(delta=0.05, divergence="binary_kl", max_ratio=20.0),
        "gradient",
        CERTAIN,
    ),
    "dppo_tv_untruncated_grad_delta0.2": (lambda: DPPO(delta=0.2), "gradient", NOTHING),
    "ppo_clip_grad_low0.2_high0.2_dual3": (lambda: PPOClip(eps=0.2, dual_clip=3.0), "gradient", NOTHING),
    "ppo_clip_grad_low0.2_high0.28_dual10": (
        lambda: PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=10.0),
        "gradient",
        NOTHING,
    ),
}
TOP_K = ("topk_log_prob", "topk_behavior_log_prob", "topk_tv", "topk_kl", "full_tv", "full_kl")


@pytest.fixture(scope="module", name="reference")
def reference_fixture():
    return load(DATA / "reference_losses.npz")


@pytest.fixture(scope="module", name="recorded")
def recorded_fixture():
    return load(ROLLOUTS / "gemma3_270m_teacher_forced_topk.npz")


def load(path):
    with np.load(path) as arrays:
        return dict(arrays)


def relative_difference(ours, theirs):
    """|a − b| / max(|a|, |b|): 0 where both are 0, 1 where only one is."""
    size = np.maximum(np.abs(ours), np.abs(theirs))
    return np.abs(ours - theirs) / np.where(size == 0.0, 1.0, size)


def compare(name, reference):
    """(relative difference of every token, excluded tokens, why)."""
    make, output, (excluded, why) = PUBLISHED[name]
    arrays = (reference["log_prob"], reference["behavior_log_prob"], reference["advantages"])
    ours = getattr(token_loss_and_gradient(make(), *arrays), output)
    return relative_difference(ours, reference[name]), excluded(*arrays[:2]), why


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_implementations_return_the_same(reference, name):
    difference, excluded, _ = compare(name, reference)
    assert difference.shape == (4096,)
    assert difference[~excluded].max() <= TOLERANCE


def test_every_published_array_is_compared(reference):
    inputs = {"log_prob", "behavior_log_prob", "advantages"}
    assert set(reference) - inputs == {*PUBLISHED, *TOP_K}


def test_no_token_of_the_file_reaches_the_published_clamp(reference):
    """The published losses return gradient 0 at |ℓ| ≥ 20; nothing is excluded for it because no token is there."""
    assert np.abs(reference["log_prob"] - reference["behavior_log_prob"]).max() < 20.0


def test_the_documented_exclusions_have_not_grown(reference):
    excluded = {name: int(compare(name, reference)[1].sum()) for name in PUBLISHED}
    assert {name: n for name, n in excluded.items() if n} == {"dppo_kl_grad_delta0.05_maxratio20": 388}


def test_the_excluded_tokens_that_differ_are_four_dropped_ones(reference):
    """All have π = 1 − 1e-9 and a KL the offset puts below the threshold: published keeps them, the exact KL drops."""
    difference, excluded, _ = compare("dppo_kl_grad_delta0.05_maxratio20", reference)
    differing = np.flatnonzero(difference > TOLERANCE)
    assert len(differing) == 4
    assert excluded[differing].all()
    x, b = (reference[name][differing] for name in ("log_prob", "behavior_log_prob"))
    for pi, mu in zip(x, b, strict=True):
        with mpmath.workdps(50):
            p, q = mpmath.exp(mpmath.mpf(pi)), mpmath.exp(mpmath.mpf(mu))
            assert q * mpmath.log(q / p) + (1 - q) * mpmath.log((1 - q) / (1 - p)) > mpmath.mpf("0.05")
            offset = mpmath.mpf("1e-8")
            assert q * mpmath.log(q / p) + (1 - q) * mpmath.log((1 - q + offset) / (1 - p + offset)) < mpmath.mpf("0.05")


def exact_top_k(log_prob, behavior):
    """(TV, KL) of K tokens and a rest, to 50 digits of the given log-probs."""
    with mpmath.workdps(50):
        tv, kl = [], []
        for x, b in zip(log_prob, behavior, strict=True):
            pi, mu = ([mpmath.exp(mpmath.mpf(float(v))) for v in row] for row in (x, b))
            pi.append(1 - mpmath.fsum(pi))
            mu.append(1 - mpmath.fsum(mu))
            tv.append(float(mpmath.fsum(abs(p - q) for p, q in zip(pi, mu, strict=True)) / 2))
            kl.append(float(mpmath.fsum(q * mpmath.log(q / p) for p, q in zip(pi, mu, strict=True))))
    return np.array(tv), np.array(kl)


def top_k(reference, dtype):
    """Our (TV, KL), computed in `dtype`; the sampled token is the first of the K."""
    x, b = (reference[name].astype(dtype) for name in ("topk_log_prob", "topk_behavior_log_prob"))
    known = {"top_k_log_prob": x, "top_k_behavior_log_prob": b, "sampled_in_top_k": np.ones(len(x), dtype=bool)}
    return top_k_tv(x[:, 0], b[:, 0], **known), top_k_kl(x[:, 0], b[:, 0], **known)


def test_published_top_k_within_the_absolute_precision_of_float32(reference):
    """Published sums in float32 have an absolute error: 2⁻²³ for TV, 2⁻²² for KL; relatively they can be off by 41×."""
    for dtype in (np.float32, np.float64):
        tv, kl = top_k(reference, dtype)
        assert np.abs(tv - reference["topk_tv"]).max() <= (2.0**-23 if dtype is np.float64 else 2.0**-22)
        assert np.abs(kl - reference["topk_kl"]).max() <= (2.0**-22 if dtype is np.float64 else 2.0**-21)


def test_ours_is_the_exact_top_k_divergence(reference):
    """The published float32 arrays are as far as that from the exact sums; ours are right, relatively."""
    exact_tv, exact_kl = exact_top_k(reference["topk_log_prob"], reference["topk_behavior_log_prob"])
    for dtype, tolerance in ((np.float64, 4e-15), (np.float32, 1e-6)):
        tv, kl = top_k(reference, dtype)
        assert relative_difference(tv, exact_tv).max() <= tolerance
        assert relative_difference(kl, exact_kl).max() <= tolerance
    assert relative_difference(reference["topk_tv"], exact_tv).max() > 1e-4
    assert relative_difference(reference["topk_kl"], exact_kl).max() > 0.5


def test_top_k_is_at_most_the_published_full_divergence(reference):
    tv, kl = top_k(reference, np.float64)
    assert (tv <= reference["full_tv"]).all()
    assert (kl <= reference["full_kl"]).all()


def test_binary_top_k_and_full_divergences_are_ordered_on_real_rollouts(recorded):
    """Gemma 3 270M, 6115 tokens: Binary ≤ Top-20 ≤ full.

    Binary ≤ Top-K holds to rounding. The log-probs were stored in float32, whose log-softmax is only good to about
    1e-6 nats, while full_tv and full_kl come from the unrounded logits: so Top-20 may exceed full by less than 1e-6.
    """
    tokens = load(ROLLOUTS / "gemma3_270m_arithmetic.npz")["tokens"]
    mask = recorded["mask"]
    inside = sampled_in_top_k(tokens, recorded["topk_ids"])
    x, b, top_x, top_b = (
        recorded[name].astype(np.float64)
        for name in ("log_prob", "behavior_log_prob", "topk_log_prob", "topk_behavior_log_prob")
    )
    known = {"top_k_log_prob": top_x, "top_k_behavior_log_prob": top_b, "sampled_in_top_k": inside}
    assert int(mask.sum()) == 6115
    assert int((inside & mask).sum()) == 6069  # the other 46 are forced in
    for binary, top, full, typical in (
        (binary_tv(x, b), top_k_tv(x, b, **known), recorded["full_tv"], (0.00258, 0.00438, 0.00446)),
        (binary_kl(x, b), top_k_kl(x, b, **known), recorded["full_kl"], (1.104e-4, 2.581e-4, 2.668e-4)),
    ):
        assert (binary - top)[mask].max() <= 1e-16
        assert (top - full)[mask].max() <= 1e-6
        assert ((top - full)[mask] > 0.0).mean() < 0.12
        np.testing.assert_allclose([binary[mask].mean(), top[mask].mean(), full[mask].mean()], typical, rtol=2e-3)


def test_the_recorded_log_probs_of_sampled_tokens_are_those_of_the_top_k(recorded):
    """One file, one alignment: where the sampled token is among the K, both columns hold the same number."""
    tokens = load(ROLLOUTS / "gemma3_270m_arithmetic.npz")["tokens"]
    hit = recorded["topk_ids"] == tokens[..., None]
    for name in ("log_prob", "behavior_log_prob"):
        column = recorded[f"topk_{name}"]
        np.testing.assert_array_equal(column[hit], np.broadcast_to(recorded[name][..., None], hit.shape)[hit])


def table(reference):
    """Rows of (array, compared, excluded, maximum relative difference)."""
    for name in PUBLISHED:
        difference, excluded, why = compare(name, reference)
        reason = f"{excluded.sum()} ({why})" if excluded.any() else "0"
        yield name, str((~excluded).sum()), reason, f"{difference[~excluded].max():.1e}"
    exact = exact_top_k(reference["topk_log_prob"], reference["topk_behavior_log_prob"])
    for name, ours, right in zip(("tv", "kl"), top_k(reference, np.float64), exact, strict=True):
        published = reference[f"topk_{name}"]
        yield f"topk_{name} (absolute)", str(len(ours)), "0", f"{np.abs(ours - published).max():.1e}"
        yield f"topk_{name}: ours, exact", str(len(ours)), "0", f"{relative_difference(ours, right).max():.1e}"
        yield f"topk_{name}: published, exact", str(len(ours)), "0", f"{relative_difference(published, right).max():.1e}"


if __name__ == "__main__":
    for row in [
        ("array", "compared", "excluded (why)", "max rel. difference"),
        *table(load(DATA / "reference_losses.npz")),
    ]:
        print("{:42s} {:>8s}  {:52s} {}".format(*row))  # noqa: T201 -- this is the table
