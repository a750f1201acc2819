"""An explicit namespace is used as given and never inferred, which Dynamo and torch.fx could not trace."""

import array_api_compat.numpy as xp
import numpy as np
import pytest
from variants import KINDS

import drpo_core
from drpo_core import _checks, reduction, validation
from drpo_core.objectives import OBJECTIVES

X, B, A = np.log([[0.5, 0.2]]), np.log([[0.25, 0.4]]), np.array([[1.0, -1.0]])
MASK = np.array([[True, True]])
TOKENS = np.array([[0, 1]])
TOP = {
    "top_k_log_prob": X[..., None],
    "top_k_behavior_log_prob": B[..., None],
    "sampled_in_top_k": MASK,
}
CALLS = {
    **dict.fromkeys(("log_ratio", "importance_ratio", "probability_shift", "binary_tv", "binary_kl"), (X, B)),
    **dict.fromkeys(("k1", "k2", "k3", "full_tv", "full_kl"), (X, B)),
    **dict.fromkeys(("top_k_tv", "top_k_kl"), (X, B, TOP)),
    "sampled_in_top_k": (TOKENS, TOKENS[..., None]),
    **{
        name: (drpo_core.DRPO(delta=0.2), X, B, A, {"mask": MASK})
        for name in ("token_loss_and_gradient", "token_diagnostics", "policy_loss_and_gradient")
    },
    **dict.fromkeys(("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"), (X, MASK)),
    "group_advantages": (A,),
    "expand_advantages": (A[0], np.ones((2, 3), dtype=bool)),
    "validate": (X, B, A),
}
NOT_ABOUT_NAMESPACES = {"merge_diagnostics", "summarize"}


def call(name, **more):
    *arrays, options = CALLS[name] if isinstance(CALLS[name][-1], dict) else (*CALLS[name], {})
    return getattr(drpo_core, name)(*arrays, **options, **more)


def test_every_public_function_is_covered():
    functions = {name for name in drpo_core.__all__ if name[0].islower() and callable(getattr(drpo_core, name))}
    assert functions == CALLS.keys() | NOT_ABOUT_NAMESPACES


@pytest.mark.parametrize("name", CALLS)
def test_a_given_namespace_is_not_inferred(name, monkeypatch):
    inferred = call(name)

    def refuse(*_):
        pytest.fail("inferred a namespace that was given")

    monkeypatch.setattr(_checks, "array_namespace", refuse)
    given = call(name, xp=xp)
    np.testing.assert_equal(given, inferred)


def test_problems_are_found_in_a_given_namespace(monkeypatch):
    monkeypatch.setattr(_checks, "array_namespace", None)
    assert len(validation.find_problems(np.array([np.nan]), np.zeros(1), np.zeros(1), xp=xp)) == 1


@pytest.mark.parametrize("family", OBJECTIVES, ids=lambda family: family.name)
def test_no_objective_infers_a_namespace(family, monkeypatch):
    monkeypatch.setattr(_checks, "array_namespace", None)
    made = family.make(family.typical[0] if family.typical else None)
    options = {"mask": MASK, "xp": xp}
    for engine in ("arrays", "compiled") if made in KINDS else ("arrays",):
        result = drpo_core.policy_loss_and_gradient(made, X, B, A, **options, engine=engine)
        assert np.isfinite(result.gradient).all()
    assert np.isfinite(drpo_core.token_loss_and_gradient(made, X, B, A, **options).loss).all()


def test_sums_and_coefficients_take_a_given_namespace(monkeypatch):
    monkeypatch.setattr(_checks, "array_namespace", None)
    assert reduction.masked_sum(X, MASK, xp=xp).count == 2.0
    assert reduction.reduction_coefficients(drpo_core.token_mean, MASK, dtype=np.float64, xp=xp) == 0.5
    assert reduction.reduction_count(drpo_core.token_mean, MASK, dtype=np.float64, xp=xp) == 2.0
