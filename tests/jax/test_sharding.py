"""Every function on explicit mesh axes gives what it gives on one device, divided as its inputs are.

The devices exist in one process that does everything (explicit_axes.py); the tests judge what it measured.
"""

import json
from functools import partial
from pathlib import Path

import drpo_jax
import jax
import jax.numpy as jnp
import pytest
import several_devices
from drpo_jax._sharding import is_explicitly_sharded
from made_once import made_once

SCRIPT = Path(__file__).with_name("explicit_axes.py")
VOCABULARY_FUNCTIONS = {
    "token_log_prob",
    "linear_log_prob",
    "logits_policy_loss",
    "linear_policy_loss",
    "full_divergences",
    "top_k_divergences",
}
LAYOUTS = ("sequences", "tokens", "sequences × tokens", "vocabulary")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    run = partial(several_devices.run, "-W", "ignore", SCRIPT, timeout=550)
    return json.loads(made_once(tmp_path_factory, "explicit_axes.json", run).read_text())


@pytest.fixture(scope="module")
def laid_out(measured):
    return [r for r in measured if "layout" in r]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_on_explicit_axes_is_the_whole_batch(laid_out, layout):
    results = [r for r in laid_out if r["layout"] == layout]
    assert len({r["case"] for r in results}) >= {"tokens": 15, "vocabulary": 8}.get(layout, 20)
    assert not [r for r in results if "error" in r]
    assert not [r for r in results if not r["difference"] < 1e-11]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_divided_as_their_arrays(laid_out, layout):
    assert not [r for r in laid_out if r["layout"] == layout and not r.get("placed")]


def test_a_vocabulary_over_devices_is_the_whole_one(measured):
    """Also with the tokens over others, under shard_map."""
    results = [r for r in measured if "vocabulary" in r]
    assert {r["how"] for r in results} == {"shard_map", "jit"}
    assert {r["vocabulary"].split()[0] for r in results} == VOCABULARY_FUNCTIONS
    assert not [r for r in results if not r["gap"] < 1e-14]


def test_inputs_may_be_the_same_on_all_devices_where_the_tokens_are_divided(measured):
    results = [r for r in measured if "replicated" in r]
    assert len(results) == 2
    assert not [r for r in results if not r["gap"] < 1e-14]


def test_nothing_is_gathered_where_the_vocabulary_is_over_devices(measured):
    """Logits, or a chunk of them, or the head would cost what dividing them saves."""
    results = [r for r in measured if r.get("layout") == "vocabulary" or ("vocabulary" in r and r["how"] == "jit")]
    assert len(results) >= 9
    assert not [r for r in results if r["gathers"]]


NOT_DIVIDED = {
    "logits": ({}, "expected a part of the vocabulary on each device of vocabulary_axis='v'"),
    "tokens": ({"logits": 1}, "expected the same on each device of vocabulary_axis='v'"),
}


@pytest.mark.parametrize("name", NOT_DIVIDED)
def test_what_is_divided_and_what_is_not_is_checked(name):
    axes, message = NOT_DIVIDED[name]
    mesh = jax.make_mesh((1,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P(*(None, "v") if "logits" in axes else ()), jax.P("v") if name == "tokens" else jax.P())

    def function(logits, tokens):
        return drpo_jax.token_log_prob(logits=logits, tokens=tokens, vocabulary_axis="v").log_prob

    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=jax.P())
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        run(jnp.zeros((2, 3)), jnp.zeros(2, int))


def test_an_axis_is_a_name():
    with pytest.raises(TypeError, match="vocabulary_axis: expected the name of a mesh axis, a tuple of names or None, got 3"):
        drpo_jax.token_log_prob(logits=jnp.zeros((2, 3)), tokens=jnp.zeros(2, int), vocabulary_axis=3)


def test_one_device_is_no_explicit_axis():
    assert not is_explicitly_sharded({"a": jnp.ones(3), "b": (None, jnp.ones(()))})
