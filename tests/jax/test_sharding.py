"""Every function on explicit mesh axes gives what it gives on one device, divided as its inputs are.

The devices exist in one process that does everything (explicit_axes.py); the tests judge what it measured.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
import several_devices
from drpo_jax._sharding import is_explicitly_sharded

SCRIPT = Path(__file__).with_name("explicit_axes.py")
LAYOUTS = ("sequences", "tokens", "sequences × tokens", "vocabulary")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("explicit") / "results.json"
    several_devices.run("-W", "ignore", SCRIPT, path, timeout=550)
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_on_explicit_axes_is_the_whole_batch(measured, layout):
    results = [r for r in measured if r["layout"] == layout]
    assert len({r["case"] for r in results}) >= {"tokens": 15, "vocabulary": 8}.get(layout, 20)
    assert not [r for r in results if "error" in r]
    assert not [r for r in results if not r["difference"] < 1e-11]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_divided_as_their_arrays(measured, layout):
    assert not [r for r in measured if r["layout"] == layout and not r.get("placed")]


def test_one_device_is_no_explicit_axis():
    assert not is_explicitly_sharded({"a": jnp.ones(3), "b": (None, jnp.ones(()))})
