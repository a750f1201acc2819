"""A batch as rows of valid tokens, for losses that are written down sequence by sequence and differentiated by torch."""

from typing import NamedTuple

import numpy as np
import torch

from drpo_core import policy_loss_and_gradient

ROWS, WIDTH = 16, 9


class Row(NamedTuple):
    """The valid tokens of one sequence: log-probs, and its advantage."""

    x: torch.Tensor
    mu: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    a: torch.Tensor


def batch(seed=0, *, drift=0.2, mismatch=0.05):
    """Arrays by the names of our arguments: |log π − log π_old| is about `drift`, |log π_old − log μ| about `mismatch`."""
    random = np.random.default_rng(seed)
    behavior = -np.exp(random.normal(size=(ROWS, WIDTH)))

    def near(log_prob, scale):
        return np.minimum(log_prob + scale * random.normal(size=log_prob.shape), -1e-3)

    proximal = near(behavior, mismatch)
    log_prob = near(proximal, drift)
    advantages = np.repeat(random.normal(size=(ROWS, 1)), WIDTH, axis=1)
    advantages[2] = 0.0
    lengths = np.concatenate(([1, WIDTH], random.integers(1, WIDTH + 1, size=ROWS - 2)))
    return {
        "log_prob": log_prob,
        "behavior_log_prob": behavior,
        "proximal_log_prob": proximal,
        "reference_log_prob": near(log_prob, 0.3),
        "advantages": advantages,
        "mask": np.arange(WIDTH) < lengths[:, None],
    }


def assert_same(mode, loss, *, value=True, tolerance=1e-9, arrays=None):
    """Assert that a mode's loss and gradient are those of `loss`, a function of rows.

    `value=False` is for a loss that is another function of the same gradient.
    """
    arrays = batch() if arrays is None else arrays
    others = {name: arrays[name] for name in ("mask", *mode.arguments)}
    ours = policy_loss_and_gradient(mode, *(arrays[n] for n in ("log_prob", "behavior_log_prob", "advantages")), **others)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    x = tensors["log_prob"].requires_grad_()
    names = ("behavior_log_prob", "proximal_log_prob", "reference_log_prob")
    rows = [
        Row(x[i][m], *(tensors[name][i][m] for name in names), tensors["advantages"][i, 0])
        for i, m in enumerate(tensors["mask"])
    ]
    theirs = loss(rows)
    (gradient,) = torch.autograd.grad(theirs, x)
    expected = gradient.numpy()
    assert np.any(expected)
    np.testing.assert_allclose(ours.gradient, expected, rtol=0.0, atol=tolerance * np.abs(expected).max())
    if value:
        np.testing.assert_allclose(ours.loss, theirs.item(), rtol=tolerance, atol=1e-12)


def keeps_some(kept):
    """The masks of rows, after checking that they neither keep all nor nothing."""
    flat = torch.cat([torch.as_tensor(k, dtype=torch.float64).reshape(-1) for k in kept])
    assert 0.0 < float(flat.mean()) < 1.0
    return kept
