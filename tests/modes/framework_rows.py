"""A batch as rows of valid tokens, for losses that are written down sequence by sequence and differentiated by torch."""

from typing import NamedTuple

import numpy as np
import torch
from framework_batches import batch

from drpo_core import policy_loss_and_gradient


class Row(NamedTuple):
    """The valid tokens of one sequence: log-probs, and its advantage."""

    x: torch.Tensor
    mu: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    a: torch.Tensor


def differentiated(loss, arrays):
    """Value and gradient of `loss`, a function of rows."""
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    x = tensors["log_prob"].requires_grad_()
    names = ("behavior_log_prob", "proximal_log_prob", "reference_log_prob")
    rows = [
        Row(x[i][m], *(tensors[name][i][m] for name in names), tensors["advantages"][i, 0])
        for i, m in enumerate(tensors["mask"])
    ]
    value = loss(rows)
    (gradient,) = torch.autograd.grad(value, x)
    return value.item(), gradient.numpy()


def assert_same(mode, loss, *, value=True, tolerance=1e-9, arrays=None, reduction=None):
    """Assert that a mode's loss and gradient are those of `loss`, a function of rows.

    `value=False` is for a loss that is another function of the same gradient; `reduction` for a mode that needs one.
    """
    arrays = batch() if arrays is None else arrays
    others = {name: arrays[name] for name in ("mask", *mode.arguments)} | {"reduction": reduction}
    ours = policy_loss_and_gradient(mode, *(arrays[n] for n in ("log_prob", "behavior_log_prob", "advantages")), **others)
    theirs, expected = differentiated(loss, arrays)
    assert np.any(expected)
    np.testing.assert_allclose(ours.gradient, expected, rtol=0.0, atol=tolerance * np.abs(expected).max())
    if value:
        np.testing.assert_allclose(ours.loss, theirs, rtol=tolerance, atol=1e-12)


def kl_cov(rows, *, share, beta):
    """KL-Cov's losses of the tokens of each row: with β abs(log π − log π_old) at the top share by covariance."""
    x = torch.cat([row.x for row in rows]).detach()
    a = torch.cat([row.a.expand(len(row.x)) for row in rows])
    covariance = (a - a.mean()) * (x - x.mean())
    top = set(torch.topk(covariance, max(1, int(len(x) * share))).indices.tolist())
    lengths = [len(row.x) for row in rows]
    chosen = torch.tensor([i in top for i in range(len(x))]).split(lengths)
    ells = [row.x - row.old for row in rows]
    return [
        -row.a * torch.exp(ell) + torch.where(c, beta * ell.abs(), 0.0) for row, ell, c in zip(rows, ells, chosen, strict=True)
    ]


def keeps_some(kept):
    """The masks of rows, after checking that they neither keep all nor nothing."""
    flat = torch.cat([torch.as_tensor(k, dtype=torch.float64).reshape(-1) for k in kept])
    assert 0.0 < float(flat.mean()) < 1.0
    return kept
