"""Every property P1 to P24, of the core on every backend and of both adapters, searched for counterexamples.

`DRPO_PROFILE` chooses how hard (default here: `ci`). `python tests/core/testing/test_properties.py` prints what is covered.
"""

import itertools
import os
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from drpo_core import CISPO, DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip, VacuousTrustRegionWarning
from drpo_core.objectives import (
    ASPO,
    GPPO,
    IPO,
    PSPO,
    SAPO,
    TOPR,
    UP,
    DCPOBounds,
    IcePop,
    KLBounds,
    Reinforce,
    TokenwiseClip,
)
from drpo_core.testing import CHECKS, TokenBatch, Vocabulary, from_adapter, from_core, parametrize_with_checks

PROFILE = os.environ.get("DRPO_PROFILE", "ci")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", VacuousTrustRegionWarning)
    GENTLE = DRPO(delta=12.5)  # the paper's setting: a re-weighting, no boundary

EVERY_OBJECTIVE = [
    PolicyGradient(),
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps=0.2),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    CISPO(max_ratio=5.0),
    SPO(eps=0.2),
    SPO(eps_low=0.1, eps_high=0.3),
    DPPO(delta=0.15),
    DPPO(delta_low=0.1, delta_high=0.3),
    DPPO(delta=0.05, divergence="binary_kl"),
    DPPO(delta_low=0.02, delta_high=0.2, divergence="binary_kl", max_ratio=3.0),
    DRPO(delta=0.15),
    DRPO(delta_low=0.3, delta_high=0.1),
    GENTLE,
    MaskDRPO(delta_low=0.1, delta_high=0.3),
    Reinforce(),
    CISPO(min_ratio=0.8, max_ratio=1.2),
    SAPO(tau_positive=1.0, tau_negative=1.05),
    IcePop(min_ratio=0.5, max_ratio=5.0),
    IPO(delta_low=0.1, delta_high=0.3, max_ratio=1.5),
    TOPR(),
    GPPO(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    UP(eps_low=0.2),
    ASPO(eps=0.2, max_ratio=3.0, dual_clip=3.0),
    PSPO(alpha=0.1),
    TokenwiseClip(bounds=DCPOBounds(eps_low=0.16, eps_high=0.2)),
    TokenwiseClip(bounds=KLBounds(delta=0.05)),
]
ASYMMETRIC_DRPO = DRPO(delta_low=0.3, delta_high=0.1)
TYPICAL = [ASYMMETRIC_DRPO, DPPO(delta_low=0.1, delta_high=0.3), PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0)]
RATIO_FORMS = [ASYMMETRIC_DRPO, SPO(eps=0.2), DPPO(delta=0.05, divergence="binary_kl"), MaskDRPO(delta=0.2), *TYPICAL[1:]]
RATIO_FORMS += [SAPO(tau_positive=1.0, tau_negative=1.05), TOPR()]
NO_DIVERGENCES = {"divergences": {}}  # they don't depend on the objective: once a backend is enough

AGAIN = {"cost": 4.0}  # a quarter of the cases: the formulas are those that another implementation has all of them for
AGAIN_WITHOUT = AGAIN | NO_DIVERGENCES

# their arithmetic is float32 wherever dtype is not the question; JAX then runs with x64 off
SINGLE = {"dtypes": ("float32", "bfloat16"), **NO_DIVERGENCES}

ON_NUMPY = [
    from_core(EVERY_OBJECTIVE[0]),
    *(
        from_core(objective, **NO_DIVERGENCES, cost=4.0 if type(objective) is type(before) else 1.0)
        for before, objective in itertools.pairwise(EVERY_OBJECTIVE)
    ),
    *(from_core(objective, "numpy-readonly", **AGAIN_WITHOUT) for objective in TYPICAL),
    from_core(ASYMMETRIC_DRPO, "array-api-strict"),
    *(from_core(objective, "array-api-strict", **AGAIN_WITHOUT) for objective in TYPICAL[1:]),
    replace(from_core(ASYMMETRIC_DRPO, **SINGLE | {"dtypes": ("float32",)}), name="core[numpy-float32]"),
]


def token(log_prob, behavior_log_prob):
    x, b = np.array([[log_prob]]), np.array([[behavior_log_prob]])
    return TokenBatch(x, b, np.ones((1, 1)), np.ones((1, 1), dtype=bool))


# Counterexamples of the past.

# the rest of a vocabulary that is all shown, rounded to less than 0, had a KL of infinity
ALL_SHOWN = Vocabulary(
    np.log([[0.5, 0.5]]), np.array([[-0.09872720878216075, -2.3643522087821607]]), np.array([[1.0, -1.0]]), np.array([0])
)
OF_DIVERGENCES = {
    "check_divergences_are_ordered": [ALL_SHOWN],
    "check_top_k_reaches_the_full_divergence": [ALL_SHOWN],
    "check_divergence_inequalities": [ALL_SHOWN],
}
# r − 1 did not saturate with r
SATURATED = token(-10.0, -100.0)
# 1 − π had no digits; −log μ was subnormal, and a quotient overflowed
BESIDE_CERTAINTY = [
    ("float32", token(float(np.float32(x)), float(np.float32(b)))) for x, b in [(-1.4914e-7, -8.6869e-8), (-0.7, -1e-45)]
]
PINNED = OF_DIVERGENCES | {
    "core[numpy]-SPO(eps=0.2)-check_gradient_matches_the_formula": [SATURATED],
    "core[numpy]-SPO(eps=0.2)-check_rounding_error": [("float64", SATURATED), ("float32", SATURATED)],
    "core[numpy]-DPPO(delta=0.05, divergence='binary_kl')-check_rounding_error": BESIDE_CERTAINTY,
}


@parametrize_with_checks(ON_NUMPY, settings=PROFILE, examples=PINNED)
def test_core_on_numpy(check):
    check()


REDUCTIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]

ON_TORCH = [
    from_core(ASYMMETRIC_DRPO, "torch"),
    *(from_core(objective, "torch", **AGAIN_WITHOUT) for objective in TYPICAL[1:]),
    *(from_core(objective, "torch", autodiff=True, cost=4.0, **NO_DIVERGENCES) for objective in RATIO_FORMS),
    *(from_adapter(objective, "torch", **AGAIN) for objective in [*TYPICAL, CISPO(max_ratio=5.0)]),
    *(from_adapter(ASYMMETRIC_DRPO, "torch", reduction=reduction, **AGAIN) for reduction in REDUCTIONS),
    from_adapter(ASYMMETRIC_DRPO, "torch", transform="vmap"),
    replace(from_adapter(ASYMMETRIC_DRPO, "torch", **SINGLE), name="drpo_torch[float32]"),
]


@parametrize_with_checks(ON_TORCH, settings=PROFILE, examples=OF_DIVERGENCES)
def test_torch(check):
    check()


# each dtype and shape is compiled anew, so only what compilation can change
COMPILED = ["P1", "P2", "P3", "P4", "P5", "P9", "P11", "P20", "check_transforms_agree"]


@parametrize_with_checks(
    [from_adapter(ASYMMETRIC_DRPO, "torch", transform="compile", cost=5.0)], checks=COMPILED, settings=PROFILE
)
def test_torch_compiled(check):
    check()


# other code than eager torch's, in float32 as in training
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@parametrize_with_checks(
    [from_adapter(ASYMMETRIC_DRPO, "torch", transform="inductor", cost=10.0, dtypes=("float32",))],
    checks=["P1", "P2", "P3", "check_weight_sign_is_the_trust_region", "P20", "check_transforms_agree"],
    settings=PROFILE,
)
def test_torch_inductor(check):
    check()


COMPILED_ANEW = {"cost": 6.0}  # for each dtype and shape

ON_JAX = [
    from_core(ASYMMETRIC_DRPO, "jax"),
    *(from_core(objective, "jax", transform="jit", **COMPILED_ANEW | NO_DIVERGENCES) for objective in TYPICAL),
    *(
        from_core(objective, "jax", transform="jit", autodiff=True, **COMPILED_ANEW | NO_DIVERGENCES)
        for objective in RATIO_FORMS[:2]
    ),
    *(
        from_adapter(objective, "jax", transform="jit", **COMPILED_ANEW)
        for objective in (ASYMMETRIC_DRPO, CISPO(max_ratio=5.0))
    ),
    from_adapter(ASYMMETRIC_DRPO, "jax", transform="jit", reduction="token_mean", **COMPILED_ANEW),
    from_adapter(ASYMMETRIC_DRPO, "jax", transform="jit", reduction="sequence_mean_token_mean", **COMPILED_ANEW),
    from_adapter(ASYMMETRIC_DRPO, "jax", transform="vmap", **COMPILED_ANEW),
    replace(from_adapter(ASYMMETRIC_DRPO, "jax", transform="jit", **SINGLE), name="drpo_jax[jit-float32]"),
]


@parametrize_with_checks(ON_JAX, settings=PROFILE, examples=OF_DIVERGENCES)
def test_jax(check):
    check()


def coverage() -> Counter[tuple[str, str]]:
    """How many implementations each (property, group of subjects) runs on."""
    groups = {"numpy": ON_NUMPY, "torch": ON_TORCH, "jax": ON_JAX}
    return Counter(
        (info.property, group)
        for group, implementations in groups.items()
        for implementation in implementations
        for info in CHECKS.values()
        if info.not_applicable(implementation) is None
    )


def test_every_property_runs_on_every_backend():
    covered = coverage()
    for group in ("numpy", "torch", "jax"):
        missing = [f"P{n}" for n in range(1, 25) if not covered[f"P{n}", group]]
        assert not missing, group


if __name__ == "__main__":
    table, groups = coverage(), ("numpy", "torch", "jax")
    rows = [["", *groups]]
    rows += [[f"P{n}", *(table[f"P{n}", group] for group in groups)] for n in range(1, 25)]
    rows += [["total", *(sum(count for (_, g), count in table.items() if g == group) for group in groups)]]
    sys.stdout.writelines("\t".join(map(str, row)) + "\n" for row in rows)
