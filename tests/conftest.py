"""What all tests share: the namespaces they run on, and warnings that third parties raise about themselves."""

import gc
import os
import shutil
import tempfile

import array_api_strict
import jax
import pytest
from backends import STRICTEST, Backend

# Triton's kernels run on the CPU, by its interpreter; it looks at this when it is imported
os.environ["TRITON_INTERPRET"] = "1"

jax.config.update("jax_enable_x64", True)  # noqa: FBT003 -- JAX's signature
# "raise": a silent (B,) → (B, T) broadcast is how losses went wrong elsewhere
jax.config.update("jax_numpy_rank_promotion", "raise")

THIRD_PARTY_WARNINGS = (
    # Dynamo instantiates the autograd.Function it traces, which torch itself deprecates
    "ignore:.*should not be instantiated:DeprecationWarning",
    # inductor imports torch.utils.mkldnn, which still uses torch.jit
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
)


# programs that XLA has compiled, for the other workers of pytest-xdist and the programs of several devices
COMPILED_PROGRAMS = {
    "JAX_COMPILATION_CACHE_DIR": None,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}


def share_compiled_programs(config):
    """For this run alone: what compiles them may be another version in the next."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp()
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ |= {name: str(value) for name, value in (COMPILED_PROGRAMS | {"JAX_COMPILATION_CACHE_DIR": folder}).items()}
    for name, value in COMPILED_PROGRAMS.items():
        jax.config.update(name.lower(), os.environ[name] if value is None else value)


def pytest_configure(config):
    share_compiled_programs(config)
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_finish():
    """Let no garbage collection go through what imports and twenty thousand tests are made of: 3 % of the time."""
    gc.freeze()


def pytest_generate_tests(metafunc):
    """Run a test with `backend` on each of its module's BACKENDS, by default all, unless it names its own."""
    named = any(mark.args[0] == "backend" for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not named:
        backends = getattr(metafunc.module, "BACKENDS", list(Backend))
        metafunc.parametrize("backend", backends, ids=[b.value for b in backends], indirect=True)


@pytest.fixture
def backend(request):
    """A namespace; array-api-strict with its strictest flags."""
    with array_api_strict.ArrayAPIStrictFlags(**STRICTEST):
        yield request.param


@pytest.fixture(params=[Backend.TORCH, Backend.JAX], ids=lambda backend: backend.value)
def low_precision_backend(request):
    """The namespaces that have bfloat16."""
    return request.param


@pytest.fixture
def quick_compilation():
    """JAX compiles without most optimisations, in a fourth of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # noqa: FBT003 -- JAX's signature
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def interpreted_loops(monkeypatch):
    """Compiled loops that are made in the test are run by Python: the same source, without a second of compilation each."""
    from interpreted_loops import interpreted  # noqa: PLC0415 -- numba takes a second to import

    from drpo_core.engines import numba_loop, recording  # noqa: PLC0415

    monkeypatch.setattr(numba_loop, "_compile", interpreted)
    monkeypatch.setattr(recording, "_programs", {})
