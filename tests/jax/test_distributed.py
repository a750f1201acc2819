"""The same batch over four host devices, under jit with a sharded mesh and under shard_map: the same loss and gradient.

The devices exist in one process that does everything (sharding.py); the tests judge what it measured, in units of the
dtype's precision relative to the loss or to the largest element of the gradient.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from drpo_jax import policy_loss
from drpo_jax.distributed import across, all_reduce_diagnostics, global_coefficients, global_normalizer
from made_once import made_once
from mode_oracles import arguments_for, batch

from drpo_core import DRPO, PPOClip, merge_diagnostics, summarize, token_diagnostics, token_mean
from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, LengthScale, Veto
from drpo_core.modes import Mode

REDUCTIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]
WITHIN = {"float64": 1e-12 / 2**-52, "float32": 8.0}  # relative 1e-12, and 8 units in the last place


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    run = functools.partial(several_devices.run, "-W", "ignore", Path(__file__).with_name("sharding.py"))
    return json.loads(made_once(tmp_path_factory, "jax_sharding.json", run).read_text())


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_spread_batch_is_the_whole_batch(measured, reduction, dtype):
    chosen = {"reduction": reduction, "dtype": dtype}
    cases = [c for c in measured if chosen.items() <= c.items() and "local means" not in c["layout"]]
    assert len(cases) == {"float64": 8, "float32": 4}[dtype]
    assert not [c for c in cases if not max(c["loss"], c["gradient"], c["diagnostics"]) <= WITHIN[dtype]]


def test_local_means_are_not_the_whole_batch(measured):
    """The cases tell a right denominator from a wrong one: with every device's own, gradients are off by per cents."""
    cases = [c for c in measured if "local means" in c["layout"] and c["dtype"] == "float64"]
    assert {c["reduction"] for c in cases} == set(REDUCTIONS)
    assert min(c["gradient"] for c in cases) * 2**-52 > 0.01


def test_a_nan_on_one_device_is_seen_on_all():
    x = jnp.log(jnp.array([[0.5, 0.2], [0.3, 0.4]]))
    b = jnp.log(jnp.array([[0.25, 0.3], [0.3, 0.1]]))
    a = jnp.array([[1.0, -1.0], [2.0, 1.0]])
    parts = [token_diagnostics(DRPO(delta=0.1), x[i], b[i], a[i]) for i in range(2)]
    parts[1]["ratio_max"] = parts[1]["ratio_max"]._replace(value=jnp.asarray(jnp.nan))
    spread = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    merged = jax.vmap(lambda d: all_reduce_diagnostics(d, axis_name="data"), axis_name="data")(spread)
    expected = summarize(merge_diagnostics(*parts))
    for device in range(2):
        found = summarize(jax.tree.map(lambda leaf, device=device: leaf[device], merged))
        assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert expected["ratio_max"] != expected["ratio_max"]


def test_sequences_divided_over_devices_are_whole_to_a_mode():
    corrections = (ImportanceWeight(level="sequence", high=2.0, normalize=True), Veto(low=0.1, high=9.0), LengthScale())
    mode = Mode(PPOClip(eps=0.2), anchor=Sequence(Proximal()), corrections=corrections)
    arrays = {name: jnp.asarray(array) for name, array in arguments_for(mode, batch((4, 12), seed=5)).items()}
    total = int(arrays["mask"].sum())

    def loss(log_prob, others, **options):
        return policy_loss(mode, log_prob=log_prob, **others, normalizer=total, diagnostics=False, **options)[0]

    others = {name: array for name, array in arrays.items() if name != "log_prob"}
    expected, gradient = jax.value_and_grad(loss)(arrays["log_prob"], others)
    halves = {name: jnp.stack([array[:, :6], array[:, 6:]]) for name, array in arrays.items()}
    x = halves.pop("log_prob")
    of_half = jax.value_and_grad(lambda x, others: loss(x, others, across=across("columns")))
    losses, gradients = jax.vmap(of_half, axis_name="columns")(x, halves)
    assert float(losses.sum()) == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_allclose(np.concatenate(np.asarray(gradients), axis=1), gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("helper", [global_normalizer, global_coefficients])
def test_unknown_reduction_is_refused(helper):
    names = {"axis_name": "data"} if helper is global_normalizer else {"shard_axis_name": "data", "normalizer": 1}
    with pytest.raises(TypeError, match="reduction: expected token_mean"):
        jax.vmap(lambda m: helper(lambda values, mask: (values * mask).sum(), m, **names), axis_name="data")(
            jnp.ones((2, 3), bool)
        )


def test_a_number_is_no_shard_of_a_sequence():
    def coefficients(mask):
        return global_coefficients(token_mean, mask, normalizer=1, shard_axis_name="tokens")

    with pytest.raises(ValueError, match=r"^mask: expected \(…, tokens\), a shard of each sequence, got a 0-d array"):
        jax.vmap(coefficients, axis_name="tokens")(jnp.array([True, True]))
