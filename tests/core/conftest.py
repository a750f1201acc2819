"""What the tests of the core share."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compilation():
    """The core on JAX arrays is compiled without most optimisations, a fourth of the time; tests/jax has all of them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # noqa: FBT003 -- JAX's signature
    yield
    jax.config.update("jax_disable_most_optimizations", before)
