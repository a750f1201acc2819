"""What the tests of all integrations share; each folder runs in the environment of its framework."""

import pytest


@pytest.fixture
def compiled_only(monkeypatch):
    """Fail where a policy loss on torch tensors is not run by the compiled loop."""
    from drpo_torch import engines  # noqa: PLC0415 -- one of the environments has no torch

    def refuse(*_args, **_kwargs):
        pytest.fail("array operations instead of the compiled loop")

    for name in ("chunked_pass", "policy_pass"):
        monkeypatch.setitem(engines.run_pass.__globals__, name, refuse)
