"""What the tests of the core share."""

import pytest


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    """The core on JAX arrays is compiled without most optimisations; tests/jax has all of them."""
