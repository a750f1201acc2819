"""Losses of torch as functions of a batch's arrays."""

import torch
from framework_rows import differentiated


def by_autograd(loss):
    """Their loss and its gradient, of `loss`, a function of tensors by the names of our arguments."""

    def theirs(arrays):
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        x = tensors["log_prob"].requires_grad_()
        value = loss(tensors)
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), gradient.double().numpy()

    return theirs


def by_formula(loss):
    """The same of a formula of tests/modes, which is a function of rows of valid tokens."""
    return lambda arrays: differentiated(loss, arrays)
