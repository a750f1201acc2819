"""An explicit namespace is used as given and never inferred, which Dynamo and torch.fx could not trace."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

import drpo_core
from drpo_core import checks, validation

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
    **{f"policy_gradient_{kind}": (X, B, A) for kind in ("loss", "weight")},
    **{f"cispo_{kind}": (X, B, A, {"max_ratio": 2.0}) for kind in ("loss", "weight")},
    **{f"{name}_{kind}": (X, B, A, {"eps": 0.2}) for name in ("ppo_clip", "spo") for kind in ("loss", "weight")},
    **{f"{name}_{kind}": (X, B, A, {"delta": 0.2}) for name in ("dppo", "drpo", "mask_drpo") for kind in ("loss", "weight")},
    **{
        name: (drpo_core.DRPO(delta=0.2), X, B, A, {"mask": MASK})
        for name in ("token_loss_and_gradient", "diagnostics", "policy_loss_and_gradient")
    },
    **dict.fromkeys(("masked_sum", "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"), (X, MASK)),
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

    monkeypatch.setattr(checks, "array_namespace", refuse)
    given = call(name, xp=xp)
    np.testing.assert_equal(given, inferred)


def test_problems_are_found_in_a_given_namespace(monkeypatch):
    monkeypatch.setattr(checks, "array_namespace", None)
    assert len(validation.find_problems(np.array([np.nan]), np.zeros(1), np.zeros(1), xp=xp)) == 1
