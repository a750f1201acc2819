"""The shapes in the signatures hold at run time: jaxtyping and beartype, in a process of their own.

`drpo_core._arrays` uses jaxtyping only if something imported it first, and the annotations' names are imported under
`TYPE_CHECKING` only, so the process imports jaxtyping, turns `TYPE_CHECKING` on, and hooks the import of the core.
"""

import subprocess
import sys

CHECKED_IMPORT = '''
import contextlib, sys, types, typing
import array_api_compat.numpy, array_api_compat.torch
import beartype, jaxtyping, numpy as np, torch

def checker(function):
    """beartype, which can check an argument against a protocol only if that is checkable at run time."""
    of_core = [module for name, module in sys.modules.items() if name.startswith("drpo_core")]
    for value in [value for module in of_core for value in vars(module).values()]:
        if getattr(value, "_is_protocol", False) and value is not typing.Protocol:
            typing.runtime_checkable(value)
    return beartype.beartype(function)

hook = types.ModuleType("hook")
hook.checker = checker
sys.modules["hook"] = hook
typing.TYPE_CHECKING = True
with jaxtyping.install_import_hook("drpo_core", "hook.checker"):
    import drpo_core
    from drpo_core import *
    from drpo_core.objectives import OBJECTIVES
    from drpo_core.objectives.thresholds import within
    from drpo_core.reduction import masked_sum, reduction_coefficients, reduction_count
typing.TYPE_CHECKING = False

@contextlib.contextmanager
def caught():
    """Passes if the run-time check, and nothing else, refuses what is done inside."""
    try:
        yield
    except jaxtyping.TypeCheckError:
        return
    except Exception as error:
        raise AssertionError(f"not by the type check: {error!r}") from error
    raise AssertionError("not caught")

x, b = np.log([[0.5, 0.2, 0.3]]), np.log([[0.25, 0.2, 0.6]])
a, mask = np.array([[1.0, 1.0, -1.0]]), np.array([[True, True, False]])
ids = np.array([0, 0, 1])
'''
REPRESENTATIVE_CALLS = """
def check(to, xp):
    X, B, A, M, ID = map(to, (x, b, a, mask, ids))
    for function in (log_ratio, importance_ratio, probability_shift, binary_tv, binary_kl, k1, k2, k3, full_tv, full_kl):
        function(X, B)
    top = {"top_k_log_prob": X[..., None], "top_k_behavior_log_prob": B[..., None], "sampled_in_top_k": M}
    top_k_tv(X, B, **top), top_k_kl(X, B, **top)
    sampled_in_top_k(ID, ID[:, None])
    objectives = [family.make(0.2 if family.threshold else None) for family in OBJECTIVES]
    objectives += [family.make((0.1, 0.2)) for family in OBJECTIVES if family.measure]
    objectives += [PolicyGradient(max_ratio=2.0), PPOClip(eps=0.2, dual_clip=3.0), DPPO(delta=0.2, max_ratio=2.0)]
    parts = []
    for objective in objectives:
        result = token_loss_and_gradient(objective, X, B, A, mask=M)
        assert result.loss.shape == result.weight.shape == (1, 3)
        assert token_loss_and_gradient(objective, X[0], B[0], A[0]).loss.shape == (3,)
        parts.append(token_diagnostics(objective, X, B, A, mask=M))
        parts.append(policy_loss_and_gradient(objective, X, B, A, mask=M, engine="arrays").diagnostics)
        policy_loss_and_gradient(objective, X[0], B[0], A[0], mask=M[0], segment_ids=ID, engine="arrays")
    summarize(merge_diagnostics(*parts))
    token_loss_and_gradient(DPPO(delta=0.2, divergence="per_token"), X, B, A, divergence=abs(A))
    measured = DPPO(delta=0.2, divergence="per_token")
    policy_loss_and_gradient(measured, X, B, A, mask=M, divergence=abs(A), engine="arrays")
    for reduction in (token_mean, sequence_mean_token_mean, sequence_mean_token_sum):
        assert reduction(A, M, token_weights=A, normalizer=2).shape == ()
        assert reduction(A[0], M[0], segment_ids=ID).shape == ()
        reduction_coefficients(reduction, M, dtype=X.dtype, token_weights=A), reduction_count(reduction, M, dtype=X.dtype)
    masked_sum(A, M)
    group_advantages(A), group_advantages(A[0], group_ids=ID, divide_by_std=True, leave_one_out=True)
    expand_advantages(A[0, :1], M), expand_advantages(A[0], M[0], segment_ids=ID)
    validate(X, B, A, mask=M)

check(np.asarray, array_api_compat.numpy)
check(torch.as_tensor, array_api_compat.torch)
"""
BREAKS = {
    "the sum of two shapes": """
from drpo_core.tokens import Tokens
with caught():
    Tokens.of(x, b, a[:, :1], dtype=x.dtype, xp=array_api_compat.numpy)  # broadcasts silently without the check
""",
    "a dtype": """
from drpo_core.tokens import Tokens
with caught():
    Tokens.of(x, b, mask, dtype=x.dtype, xp=array_api_compat.numpy)
""",
    "the number of axes": """
with caught():
    expand_advantages(a, mask)
""",
    "a boolean": """
with caught():
    token_mean(a, a)
""",
    "an integer": """
with caught():
    token_mean(a[0], mask[0], segment_ids=a[0])
""",
    "a dtype inside a kernel": """
region = SPO(eps=0.2).region
within(x, region)
with caught():
    within(mask, region)
""",
    "a torch shape": """
with caught():
    token_loss_and_gradient(DRPO(delta=0.2), torch.as_tensor(x), torch.as_tensor(b), torch.as_tensor(a)[0])
""",
    "and the check of the check": """
try:
    with caught():
        token_loss_and_gradient(DRPO(delta=0.2), x, b, a)
except AssertionError as error:
    assert str(error) == "not caught"
else:
    raise AssertionError("a call without a fault counts as caught")
""",
    "what is no objective": """
with caught():
    token_loss_and_gradient("drpo", x, b, a)
""",
}


def run(code):
    command = [sys.executable, "-W", "error", "-c", CHECKED_IMPORT + code]
    result = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 -- our own interpreter and code
    assert result.returncode == 0, result.stderr[-3000:]


def test_representative_calls_match_their_annotations():
    run(REPRESENTATIVE_CALLS)


def test_the_checks_are_alive():
    """Each of these passes unnoticed, or fails later and elsewhere, without the run-time check."""
    run("\n".join(BREAKS.values()))
