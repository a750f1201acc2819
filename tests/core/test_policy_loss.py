"""`policy_loss_and_gradient` against its parts: token losses, reductions and diagnostics, each computed on its own."""

import subprocess
import sys
import tracemalloc
import warnings
from functools import partial

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    SlowEngineWarning,
    UntraceableError,
    loss,
    objectives,
    policy_loss_and_gradient,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    summarize,
    token_diagnostics,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core.reduction import reduction_coefficients
from drpo_core.testing import from_function, parametrize_with_checks

DELTA = DRPO(delta_low=0.3, delta_high=0.1)
OBJECTIVES = [
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    CISPO(max_ratio=5.0),
    SPO(eps=0.2),
    DPPO(delta_low=0.02, delta_high=0.2, divergence="binary_kl", max_ratio=3.0),
    DELTA,
    MaskDRPO(delta_low=0.1, delta_high=0.3),
    objectives.Reinforce(),
    CISPO(min_ratio=0.8, max_ratio=1.2),
    objectives.SAPO(tau_positive=1.0, tau_negative=1.05),
    objectives.IcePop(min_ratio=0.5, max_ratio=5.0),
    objectives.IPO(delta=0.1, max_ratio=2.0),
    objectives.TOPR(),
]
ENGINES = ["arrays", "compiled"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """So that few tokens make many chunks, some of several rows and some of a part of one."""
    monkeypatch.setitem(loss.chunked_pass.__kwdefaults__, "chunk", 5)


def tokens(shape, *, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(1.5, shape)
    log_prob = np.minimum(behavior + rng.normal(0.0, 0.5, shape), 0.0)
    mask = rng.random(shape) > 0.2
    log_prob[~mask] = np.nan
    return {
        "log_prob": log_prob.astype(dtype),
        "behavior_log_prob": behavior.astype(dtype),
        "advantages": (rng.normal(size=shape) * (rng.random(shape) > 0.1)).astype(dtype),
        "mask": mask,
    }


def expected(objective, batch, *, reduction=token_mean, divergence=None, **options):
    parts = token_loss_and_gradient(objective, **batch, divergence=divergence)
    coefficients = reduction_coefficients(reduction, batch["mask"], dtype=parts.loss.dtype, **options)
    gradient = np.where(batch["mask"], coefficients * parts.gradient, 0.0)
    return (
        reduction(parts.loss, batch["mask"], **options),
        gradient,
        token_diagnostics(objective, **batch, divergence=divergence),
    )


def assert_same(result, reference, *, rtol=1e-12):
    scalar, gradient, statistics = reference
    np.testing.assert_allclose(result.loss, scalar, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(result.gradient, gradient, rtol=rtol, atol=0.0)
    got, wanted = summarize(result.diagnostics), summarize(statistics)
    assert list(got) == list(wanted)
    for name, statistic in result.diagnostics.items():
        assert type(statistic) is type(statistics[name])
        np.testing.assert_allclose(got[name], wanted[name], rtol=rtol, atol=1e-15, err_msg=name)
        np.testing.assert_allclose(statistic.count, statistics[name].count, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_objectives(objective, engine):
    batch = tokens((4, 9))
    assert_same(policy_loss_and_gradient(objective, **batch, engine=engine), expected(objective, batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(3, 4), (2, 13), (1, 6), (6, 1), (2, 3, 4), (7,)])
@pytest.mark.parametrize(
    "reduction",
    [token_mean, sequence_mean_token_mean, partial(sequence_mean_token_sum, horizon=3.0)],
    ids=["token_mean", "mean_of_means", "mean_of_sums"],
)
@pytest.mark.parametrize("option", ["none", "normalizer", "token_weights"])
def test_reductions(option, reduction, shape, engine):
    batch = tokens(shape)
    options = {"normalizer": 7.0} if option == "normalizer" else {}
    if option == "token_weights":
        options["token_weights"] = np.where(batch["mask"], np.random.default_rng(1).random(shape), np.nan)
    result = policy_loss_and_gradient(DELTA, **batch, reduction=reduction, **options, engine=engine)
    assert_same(result, expected(DELTA, batch, reduction=reduction, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_packed(engine):
    batch, ids = tokens((17,)), np.array([3, 3, 3, 1, 1, 1, 1, 1, 9, 9, 9, 9, 9, 9, 9, 0, 0])
    options = {"reduction": sequence_mean_token_mean, "segment_ids": ids}
    result = policy_loss_and_gradient(DELTA, **batch, **options, engine=engine)
    assert_same(result, expected(DELTA, batch, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_measured_divergence(engine):
    objective, batch = DPPO(delta=0.1, divergence="per_token"), tokens((4, 9))
    batch_divergence = np.random.default_rng(1).random((4, 9)) * 0.2
    result = policy_loss_and_gradient(objective, **batch, divergence=batch_divergence, engine=engine)
    assert_same(result, expected(objective, batch, divergence=batch_divergence))
    with pytest.raises(TypeError, match="divergence: expected an array"):
        policy_loss_and_gradient(objective, **batch, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("reduction", [token_mean, sequence_mean_token_mean])
def test_no_tokens(reduction, shape, engine):
    result = policy_loss_and_gradient(DELTA, **tokens(shape), reduction=reduction, engine=engine)
    assert result.loss == 0.0
    assert result.gradient.shape == shape
    assert result.diagnostics["ratio_max"].value == -np.inf
    assert all(statistic.count == 0.0 for statistic in result.diagnostics.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_fully_masked(engine):
    batch = tokens((2, 9))
    batch["mask"][:] = False
    result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
    assert result.loss == 0.0
    assert (result.gradient == 0.0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_strided_and_read_only_arrays(engine):
    batch = tokens((9, 4))
    turned = {name: np.asfortranarray(array) for name, array in batch.items()}
    for array in turned.values():
        array.flags.writeable = False
    assert_same(policy_loss_and_gradient(DELTA, **turned, engine=engine), expected(DELTA, batch))
    every_other = {name: np.repeat(array, 2, axis=-1)[:, ::2] for name, array in batch.items()}
    assert_same(policy_loss_and_gradient(DELTA, **every_other, engine=engine), expected(DELTA, batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gradient_has_the_dtype_of_log_prob(dtype, engine):
    batch = tokens((4, 9), dtype=dtype)
    result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
    assert result.loss.dtype == np.float32
    assert result.gradient.dtype == dtype
    widened = {name: array if name == "mask" else array.astype(np.float64) for name, array in batch.items()}
    _, gradient, _ = expected(DELTA, widened)
    np.testing.assert_allclose(result.gradient, gradient, rtol=2.0 * np.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_dtypes(engine):
    batch = tokens((4, 9), dtype=np.float32)
    batch["advantages"] = batch["advantages"].astype(np.float64)
    result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
    assert (result.loss.dtype, result.gradient.dtype) == (np.float64, np.float32)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_diagnostics(engine):
    batch = tokens((4, 9))
    result = policy_loss_and_gradient(DELTA, **batch, diagnostics=False, engine=engine)
    assert result.diagnostics is None
    scalar, gradient, _ = expected(DELTA, batch)
    np.testing.assert_allclose(result.loss, scalar, rtol=1e-12)
    np.testing.assert_allclose(result.gradient, gradient, rtol=1e-12)


@pytest.mark.parametrize("asarray", [array_api_strict.asarray, torch.from_numpy, jnp.asarray])
def test_other_namespaces(asarray):
    batch = tokens((4, 9), dtype=np.float32)
    result = policy_loss_and_gradient(DELTA, **{name: asarray(array) for name, array in batch.items()})
    scalar, gradient, _ = expected(DELTA, batch)
    np.testing.assert_allclose(float(result.loss), scalar, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(result.gradient), gradient, rtol=1e-5, atol=1e-8)
    assert summarize(result.diagnostics)["dropped_fraction"] == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_the_gradient_and_a_chunk(monkeypatch, engine):
    monkeypatch.setitem(loss.chunked_pass.__kwdefaults__, "chunk", 1 << 12)
    batch = tokens((64, 1 << 12), dtype=np.float32)
    policy_loss_and_gradient(DELTA, **batch, engine=engine)
    tracemalloc.start()
    try:
        result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
        peak = tracemalloc.get_traced_memory()[1] - result.gradient.nbytes
    finally:
        tracemalloc.stop()
    # a chunk's intermediate results of 16 KiB, some fifty at most; an array of all tokens has 1 MiB
    assert peak < (1 << 20 if engine == "arrays" else 1 << 17)


@pytest.mark.parametrize("engine", ["plain", "jit", "numba", "eager", "", None, 1, ["auto"], b"auto"])
def test_unknown_engine(engine):
    with pytest.raises(ValueError, match=r"^engine: expected 'auto', 'arrays' or 'compiled', got "):
        policy_loss_and_gradient(DELTA, **tokens((2, 3)), engine=engine)


@pytest.mark.parametrize(
    ("asarray", "name"),
    [(torch.from_numpy, r"torch\.Tensor"), (jnp.asarray, r"jax.*ArrayImpl"), (array_api_strict.asarray, r"array_api_.*Array")],
)
def test_compiled_for_other_arrays(asarray, name):
    batch = {key: asarray(array) for key, array in tokens((2, 3)).items()}
    with pytest.raises(ValueError, match=rf"^engine: 'compiled' takes NumPy arrays, got {name}$"):
        policy_loss_and_gradient(DELTA, **batch, engine="compiled")


def test_auto_is_the_default_and_compiles_where_it_can(monkeypatch):
    batch, ran = tokens((4, 9)), []
    for name in ("compiled_pass", "chunked_pass", "policy_pass"):
        function = getattr(loss, name)
        monkeypatch.setattr(loss, name, lambda *a, f=function, n=name, **k: ran.append(n) or f(*a, **k))
    for options in ({}, {"engine": "auto"}, {"engine": "compiled"}):
        ran.clear()
        policy_loss_and_gradient(DELTA, **batch, **options)
        assert ran[0] == "compiled_pass", options
        assert "chunked_pass" not in ran
    ran.clear()
    policy_loss_and_gradient(DELTA, **batch, engine="arrays")
    assert ran[0] == "chunked_pass"
    ran.clear()
    policy_loss_and_gradient(DELTA, **{name: torch.from_numpy(array) for name, array in batch.items()})
    assert ran == ["policy_pass"]


@pytest.fixture(name="without_numba")
def without_numba_fixture(monkeypatch):
    """As if numba were not installed, in a process that has not yet said so."""
    loss._is_installed.cache_clear()  # noqa: SLF001 -- a cache of the process
    loss._say_once_how_to_compile.cache_clear()  # noqa: SLF001
    monkeypatch.setattr(loss, "find_spec", lambda _: None)
    yield
    loss._is_installed.cache_clear()  # noqa: SLF001
    loss._say_once_how_to_compile.cache_clear()  # noqa: SLF001


@pytest.mark.usefixtures("without_numba")
def test_without_numba_auto_warns_once_a_process_and_at_the_caller():
    batch = tokens((4, 9))
    with pytest.warns(SlowEngineWarning) as caught:
        result = policy_loss_and_gradient(DELTA, **batch)
    assert_same(result, expected(DELTA, batch))
    (warning,) = caught
    assert str(warning.message) == (
        "policy losses on a CPU run as array operations, several times slower than the compiled loop: "
        "pip install 'drpo-core[compiled]' (or pass engine='arrays')"
    )
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_loss_and_gradient(DELTA, **batch)
        policy_loss_and_gradient(DRPO(delta=0.5), **batch)


@pytest.mark.usefixtures("without_numba")
def test_without_numba_what_is_asked_for_is_done_or_refused():
    batch = tokens((4, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_loss_and_gradient(DELTA, **batch, engine="arrays")
        with pytest.raises(ImportError, match=r"^engine: 'compiled' needs numba: pip install 'drpo-core\[compiled\]'$"):
            policy_loss_and_gradient(DELTA, **batch, engine="compiled")
        policy_loss_and_gradient(DELTA, **{name: jnp.asarray(array) for name, array in batch.items()})


def test_a_process_without_numba():
    """The import blocked, as in an environment that lacks it: the same numbers, one warning."""
    code = """
import sys, warnings
import numpy as np
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"numba", "llvmlite"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import importlib.util
import drpo_core.loss
real = drpo_core.loss.find_spec
drpo_core.loss.find_spec = lambda name: None if name == "numba" else real(name)
from drpo_core import DRPO, policy_loss_and_gradient
x, b, a = np.log([[0.5, 0.2]]), np.log([[0.25, 0.4]]), np.array([[1.0, -1.0]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [policy_loss_and_gradient(DRPO(delta=0.5), x, b, a, mask=np.ones((1, 2), dtype=bool)) for _ in range(3)]
print(len(caught), float(results[0].loss), "numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert done.returncode == 0, done.stderr
    count, scalar, imported = done.stdout.split()
    x, b, a = np.log([[0.5, 0.2]]), np.log([[0.25, 0.4]]), np.array([[1.0, -1.0]])
    here = policy_loss_and_gradient(DRPO(delta=0.5), x, b, a, mask=np.ones((1, 2), dtype=bool)).loss
    assert (count, imported) == ("1", "False")
    assert float(scalar) == pytest.approx(float(here), rel=1e-15)


class Ranked:
    """An objective whose region is relative to the other tokens, while its weight is each token's own."""

    def __init__(self, method):
        """`method` looks across tokens."""
        self.method = method

    def of(self, method, tokens):
        """1, or something of all tokens."""
        return tokens.xp.max(tokens.ratio) if method == self.method else 1.0

    def loss(self, tokens):
        """−A r."""
        return -tokens.advantages * tokens.ratio * self.of("loss", tokens)

    def weight(self, tokens):
        """1."""
        return tokens.xp.ones_like(tokens.ratio) * self.of("weight", tokens)

    def inside(self, tokens):
        """At most half of the largest ratio, or of 1."""
        return tokens.ratio <= 0.5 * self.of("inside", tokens)


@pytest.mark.parametrize("engine", ["arrays", "auto"])
@pytest.mark.parametrize("method", ["loss", "weight", "inside", "none"])
def test_an_objective_that_looks_across_tokens_sees_all_of_them(method, engine):
    """Not a chunk of them; masked ones are inert to it, not NaN (fault 22)."""
    batch = tokens((4, 9))
    for name in ("behavior_log_prob", "advantages"):
        batch[name][~batch["mask"]] = np.nan
    result = policy_loss_and_gradient(Ranked(method), **batch, engine=engine)
    assert_same(result, expected(Ranked(method), batch))
    without = policy_loss_and_gradient(Ranked(method), **batch, engine=engine, diagnostics=False)
    np.testing.assert_allclose(without.loss, result.loss, rtol=1e-14)
    np.testing.assert_allclose(without.gradient, result.gradient, rtol=1e-14)
    if method != "none":
        with pytest.raises(UntraceableError, match="engine='arrays' runs any objective"):
            policy_loss_and_gradient(Ranked(method), **batch, engine="compiled")


class Returns:
    """An objective one of whose methods returns what it is told to."""

    def __init__(self, method, value):
        """A function of the tokens."""
        self.method, self.value = method, value

    def loss(self, tokens):
        """−A r, unless told otherwise."""
        return self.value(tokens) if self.method == "loss" else -tokens.advantages * tokens.ratio

    def weight(self, tokens):
        """1, unless told otherwise."""
        return self.value(tokens) if self.method == "weight" else tokens.xp.ones_like(tokens.ratio)

    def inside(self, tokens):
        """True, unless told otherwise."""
        return self.value(tokens) if self.method == "inside" else tokens.ratio == tokens.ratio


WRONG = {
    "None": lambda _: None,
    "a number": lambda _: 1.0,
    "text": lambda _: "1",
    "a list": lambda _: [1.0],
    "a tuple": lambda t: (t.ratio, t.ratio),
    "a sum": lambda t: t.xp.sum(t.ratio),
    "rows": lambda t: t.ratio[..., :1],
    "an axis more": lambda t: t.ratio[None],
    "another size": lambda t: t.ratio[..., 1:],
}


@pytest.mark.parametrize("engine", ["arrays", "auto", "compiled"])
@pytest.mark.parametrize("method", ["loss", "weight", "inside"])
@pytest.mark.parametrize("kind", [*WRONG, "a dtype"])
def test_what_an_objective_returns_is_checked(kind, method, engine):
    """A scalar was broadcast, a truth counted as a number (fault 35)."""
    value = WRONG.get(kind, (lambda t: t.ratio) if method == "inside" else (lambda t: t.ratio > 1.0))
    objective, batch = Returns(method, value), tokens((4, 9))
    message = rf"^Returns\.{method}: expected (an array of the tokens' shape, \(4, 9\)|a .* dtype), got "
    if engine == "compiled":
        with pytest.raises((TypeError, UntraceableError)):
            policy_loss_and_gradient(objective, **batch, engine=engine)
        return
    with pytest.raises(TypeError, match=message):
        policy_loss_and_gradient(objective, **batch, engine=engine)
    for function in (token_loss_and_gradient, token_diagnostics):
        if (function, method) not in {(token_loss_and_gradient, "inside"), (token_diagnostics, "loss")}:
            with pytest.raises(TypeError, match=message):
                function(objective, **batch)


@pytest.mark.parametrize("value", [DRPO, "DRPO", None, 3, object(), type("Half", (), {"loss": lambda _, t: t.ratio})()])
def test_what_is_no_objective(value):
    batch = tokens((2, 3))
    for function in (policy_loss_and_gradient, token_loss_and_gradient, token_diagnostics):
        with pytest.raises(TypeError, match=r"^objective: expected (an instance such as|methods loss and weight, got )"):
            function(value, **batch)


@pytest.mark.parametrize("family", objectives.OBJECTIVES, ids=lambda family: family.name)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_objective_of_the_table(family, engine):
    batch = tokens((4, 9), seed=3)
    for threshold in family.typical or (None,):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", objectives.VacuousTrustRegionWarning)
            made = family.make(threshold)
        assert_same(policy_loss_and_gradient(made, **batch, engine=engine), expected(made, batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": np.ones((2, 3))}, TypeError, "mask: expected a bool dtype"),
        ({"advantages": np.ones(2)}, ValueError, "advantages: expected the shape of log_prob"),
        ({"log_prob": np.ones((2, 3), dtype=int)}, TypeError, "log_prob: expected a real floating dtype"),
        ({"normalizer": -1.0}, ValueError, "normalizer: expected a finite number"),
    ],
)
def test_invalid_arguments(change, error, message, engine):
    with pytest.raises(error, match=message):
        policy_loss_and_gradient(DELTA, **tokens((2, 3)) | change, engine=engine)


def under_test(objective, engine, reduction="token_mean", **claims):
    reductions = {"token_mean": token_mean, "sequence_mean_token_mean": sequence_mean_token_mean}

    def loss_and_gradient(log_prob, behavior_log_prob, advantages, mask, segment_ids=None, normalizer=None):
        # with diagnostics, so that the other tests' kernels serve here
        return policy_loss_and_gradient(
            objective,
            log_prob,
            behavior_log_prob,
            advantages,
            mask=mask,
            segment_ids=segment_ids,
            normalizer=normalizer,
            reduction=reductions[reduction],
            engine=engine,
        )[:2]

    return from_function(
        loss_and_gradient,
        returns_gradient=True,
        objective=objective,
        form="score" if isinstance(objective, CISPO) else "ratio",
        reduction=reduction,
        name=f"{engine}-{type(objective).__name__}-{reduction}",
        **claims,
    )


# every dtype is compiled anew: both for one objective. Of the others, those whose operations differ: `test_objectives`
# has the numbers of every one
COMPILED = [
    OBJECTIVES[0],
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    DPPO(delta_low=0.02, delta_high=0.2, divergence="binary_kl", max_ratio=3.0),
    objectives.SAPO(tau_positive=1.0, tau_negative=1.05),
    objectives.TOPR(),
]
IMPLEMENTATIONS = [
    *(under_test(objective, "compiled", dtypes=("float64",)) for objective in COMPILED),
    under_test(DELTA, "compiled"),
    under_test(DELTA, "compiled", "sequence_mean_token_mean", dtypes=("float64",)),
    under_test(DELTA, "arrays", "sequence_mean_token_mean"),
]


@parametrize_with_checks(IMPLEMENTATIONS, settings="dev")
def test_kit(check):
    check()
