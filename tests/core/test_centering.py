"""The score-centring term of the core: closed forms, namespaces and dtypes, what masks hide, and which modes have it."""

import numpy as np
import pytest
from backends import Backend
from mode_oracles import EXAMPLES, quiet
from variants import ONE_A_FAMILY

from drpo_core import CISPO, DPPO, DRPO, token_loss_and_gradient
from drpo_core.anchors import Behavior, Proximal
from drpo_core.centering import score_centering
from drpo_core.corrections import DivergenceMask, ImportanceWeight, OutwardMask, RatioMask
from drpo_core.modes import Mode
from drpo_core.objectives import Reinforce

# JAX compiles for seconds: tests/jax/test_centering.py
BACKENDS = [Backend.NUMPY_READ_ONLY, Backend.STRICT, Backend.TORCH]
NAN, INF = np.nan, np.inf
DELTA = 0.3
# two tokens of four recorded outcomes, of which the second has one twice, and a token that the mask leaves out
PI = np.array([[0.4, 0.3, 0.15, 0.05], [0.1, 0.6, 0.2, 0.0], [NAN, 2.0, 0.0, 0.3]])
MU = np.array([[0.3, 0.3, 0.2, 0.1], [0.5, 0.2, 0.1, 0.0], [NAN, 0.3, NAN, 0.3]])
A = np.array([1.5, -0.5, NAN])
MASK = np.array([True, True, False])


def drpo(pi, mu, a):
    """A π w − A π w_T: the weight is 1 − sign(A)(π − μ)/δ, and 1 in the tail."""
    return -abs(a) * pi * (pi - mu) / DELTA


def reinforce(pi, mu, a):
    """A μ_v − A (μ_T/π_T) π_v."""
    return a * mu - a * (1.0 - mu.sum()) / (1.0 - pi.sum()) * pi


def cispo(pi, mu, a):
    """With f = r w = min(r, 1.1), A μ f − A (μ_T/π_T) f_T π."""
    f, rest = np.minimum(pi / np.where(mu > 0.0, mu, 1.0), 1.1), (1.0 - mu.sum()) / (1.0 - pi.sum())
    return a * mu * f - a * rest * min(1.0 / rest, 1.1) * pi


FORMS = [(DRPO(delta=DELTA), drpo), (Reinforce(), reinforce), (CISPO(max_ratio=1.1), cispo)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-5)])
def test_closed_forms(backend, dtype, tolerance):
    with np.errstate(divide="ignore", invalid="ignore"):
        arrays = [backend.asarray(array, dtype) for array in (np.log(PI), np.log(MU), A)]
    for objective, form in FORMS:
        found = backend.call(score_centering, objective, *arrays, mask=backend.asarray(MASK))
        assert str(found.gradient.dtype).endswith(dtype)
        found = backend.to_numpy(found)
        expected = np.stack([form(pi, mu, a) if m else np.zeros(4) for pi, mu, a, m in zip(PI, MU, A, MASK, strict=True)])
        np.testing.assert_allclose(found.gradient, expected, rtol=tolerance, atol=tolerance)
        value = [
            (c[:n] * np.log(pi[:n])).sum() if m else 0.0 for c, pi, m, n in zip(expected, PI, MASK, (4, 3, 4), strict=True)
        ]
        np.testing.assert_allclose(found.loss, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_computed_in_float32(dtype):
    arrays = [Backend.TORCH.asarray(array, dtype) for array in (np.log(PI[:1]), np.log(MU[:1]), A[:1])]
    found = score_centering(DRPO(delta=DELTA), *arrays)
    exact = score_centering(DRPO(delta=DELTA), *(array.double() for array in arrays))
    assert (str(found.loss.dtype), str(found.gradient.dtype)) == ("torch.float32", f"torch.{dtype}")
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-4)
    np.testing.assert_allclose(found.gradient.float(), exact.gradient, rtol=1e-2, atol=1e-6)


def test_packed_0d_and_deep_tokens():
    x, b = np.log(PI[:2, :3]), np.log(MU[:2, :3])
    for objective in ONE_A_FAMILY:
        flat = score_centering(objective, x, b, A[:2])
        for shape in ((), (1, 2, 1)):
            some = slice(0, 2) if shape else 0
            found = score_centering(objective, x[some].reshape(*shape, 3), b[some].reshape(*shape, 3), A[some].reshape(shape))
            assert found.loss.shape == shape
            np.testing.assert_array_equal(found.gradient.reshape(-1, 3), flat.gradient[: 2 if shape else 1])


def test_a_divergence_per_token():
    """It is one of the token's, whichever its outcome: DPPO keeps all of its outcomes, or drops the diverging ones."""
    x, b, a = np.log(PI[:2, :3]), np.log(MU[:2, :3]), np.array([1.0, 1.0])
    found = score_centering(DPPO(delta=0.1, divergence="per_token"), x, b, a, tail=False, divergence=np.array([0.05, 0.2]))
    expected = np.where((PI > MU) & (np.array([False, True, True])[:, None]), 0.0, PI)[:2, :3]
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-14)


AT_ONE_TOKEN = (Behavior, Proximal, ImportanceWeight, RatioMask, DivergenceMask, OutwardMask)


@pytest.mark.parametrize("part", EXAMPLES, ids=repr)
def test_every_part_of_a_mode_looks_at_one_token_or_is_refused_by_name(part):
    if hasattr(part, "value_and_gradient"):
        mode = quiet(part)
    else:
        mode = quiet(anchor=part) if hasattr(part, "log_prob") else quiet(part)
    old = np.log(np.array([[0.35, 0.3, 0.1]]))
    needed = {name for one in (mode.anchor, *mode.corrections) for name in one.arguments}
    recorded = {"proximal_log_prob": old} if "proximal_log_prob" in needed else {}
    arrays = np.log(PI[:1, :3]), np.log(MU[:1, :3])
    others = {getattr(part, "level", "token"), getattr(part, "over", "token")} - {"token"}
    if hasattr(part, "value_and_gradient"):
        alone = score_centering(mode.objective, *arrays, A[:1])
        np.testing.assert_array_equal(score_centering(mode, *arrays, A[:1]).gradient, alone.gradient)
    elif isinstance(part, AT_ONE_TOKEN) and not others and not getattr(part, "normalize", False):
        found = score_centering(mode, *arrays, A[:1], tail=False, **recorded)
        outcomes = {name: array.reshape(-1, 1) for name, array in recorded.items()}
        each = (array.reshape(-1, 1) for array in (*arrays, np.full((1, 3), A[0])))
        g = token_loss_and_gradient(mode, *each, **outcomes).gradient
        np.testing.assert_allclose(found.gradient, -MU[:1, :3] * g.reshape(1, 3), rtol=1e-14)
    else:
        with pytest.raises(
            ValueError, match="objective: expected a mode that looks at one token at a time, got one with"
        ) as error:
            score_centering(mode, *arrays, A[:1], **recorded)
        assert type(part).__name__ in str(error.value)


X = np.log(PI[:2, :3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objective": DRPO}, TypeError, "objective: expected an instance"),
        (
            {"log_prob": np.zeros((2, 0)), "behavior_log_prob": np.zeros((2, 0))},
            ValueError,
            r"log_prob: expected shape \(…, K\)",
        ),
        ({"log_prob": np.array(0.0), "behavior_log_prob": np.array(0.0)}, ValueError, r"log_prob: expected shape .* got \(\)"),
        ({"behavior_log_prob": X[:, :2]}, ValueError, r"behavior_log_prob: expected the shape of log_prob, \(2, 3\)"),
        ({"advantages": X}, ValueError, r"advantages: expected the shape of log_prob without its last axis, \(2,\)"),
        ({"advantages": np.array([1, 2])}, TypeError, "advantages: expected a real floating dtype"),
        ({"mask": np.array([1.0, 0.0])}, TypeError, "mask: expected a bool dtype"),
        ({"mask": X > 0.0}, ValueError, "mask: expected the shape of log_prob without its last axis"),
        ({"divergence": X}, ValueError, "divergence: expected the shape of log_prob without its last axis"),
        ({"tail": 1}, TypeError, "tail: expected True or False"),
        ({"proximal_log_prob": X}, ValueError, "proximal_log_prob: expected None, because"),
        ({"objective": Mode(DRPO(delta=0.3), anchor=Proximal())}, ValueError, "proximal_log_prob: expected log-probs of the"),
        (
            {"objective": Mode(DRPO(delta=0.3), anchor=Proximal()), "proximal_log_prob": X[:1]},
            ValueError,
            "proximal_log_prob: expected the shape of log_prob",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"objective": DRPO(delta=0.3), "log_prob": X, "behavior_log_prob": X, "advantages": np.ones(2)}
    with pytest.raises(error, match=message):
        score_centering(**arguments | change)
