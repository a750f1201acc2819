"""The same training in JAX, and in two processes: how close they follow."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from study import model, parallel, parity, twin
from study.cells import EXACT, SETTINGS, TUNED_IN
from study.precision import TRAINERS
from study.task import Task

ROLLOUTS = 2


def test_the_forward_pass_of_the_twin_is_the_transformers():
    shape = model.SHAPES["dense"]
    parameters = model.initial(shape, 0)
    tokens = Task().prompts(16, torch.Generator().manual_seed(0)).tokens
    ours, _ = model.hidden_states(parameters, shape, tokens, TRAINERS["float32"])
    theirs = twin.hidden_states(
        {n: jnp.asarray(p.numpy()) for n, p in parameters.items()}, shape, jnp.asarray(tokens.int().numpy())
    )
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), atol=2e-5)


@pytest.mark.parametrize("setting", [EXACT, SETTINGS[TUNED_IN]], ids=["float32", TUNED_IN])
def test_jax_follows_torch_on_the_same_batches(start, setting):
    found = parity.compare(start[0], Task(), setting, rollouts=ROLLOUTS, same_batches=True)
    assert found.losses.shape == (2, 8 * ROLLOUTS)
    assert np.abs(found.losses).max() > 1e-3
    assert found.differences["loss"] < 1e-5
    assert found.differences["gradient norm"] < 1e-3
    assert found.differences["parameter"] < 1e-3
    # a few of 256 samples: a last-place difference of a probability can choose another token
    assert found.differences["reward"] <= 4 / 256


def test_two_processes_follow_one(start):
    setting = SETTINGS[TUNED_IN]
    alone = parallel.follow(start[0], setting, ROLLOUTS)
    shared = parallel.together(start[0], setting, ROLLOUTS, alone.rollouts)
    moved = max(float((p - start[0][n]).abs().max()) for n, p in alone.parameters.items())
    found = parallel.differences(alone, shared)
    assert found["loss"] < 1e-5
    assert found["parameter"] < 0.02 * moved
    assert found["reward"] <= 4 / 256


def test_the_shares_of_two_processes_are_whole_groups_and_make_up_every_step():
    one, two = (parallel.shares(64, 4, rank, 2) for rank in (0, 1))
    for step in range(4):
        assert sorted([*one[8 * step : 8 * step + 8].tolist(), *two[8 * step : 8 * step + 8].tolist()]) == list(
            range(16 * step, 16 * step + 16)
        )
