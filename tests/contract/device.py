"""CPU tensors that the adapter of torch takes for those of a GPU: compiled engines are Triton's, interpreted, nothing waits.

To be imported before Triton, which looks at its variable then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from typing import TYPE_CHECKING
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from contract import axes
from drpo_torch import _host, engines
from drpo_torch.engines import trial
from drpo_torch.vocabulary import triton_trial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from contract.calls import Cell


@contextlib.contextmanager
def around(cell: Cell) -> Iterator[None]:
    """The device of a cell, for as long as the block lasts. Kernels count as tried: what they give is compared anyway."""
    if cell.get("device", axes.Device.CPU) is axes.Device.CPU:
        yield
        return
    tried = dict.fromkeys(itertools.product([torch.device("cpu")], [getattr(torch, name) for name in axes.FLOATS]))
    with (
        mock.patch.object(_host, "HOST_DEVICES", set()),
        mock.patch.object(engines, "TRITON_DEVICES", {"cpu"}),
        mock.patch.object(trial, "_finding", return_value=None),
        mock.patch.object(triton_trial, "_findings", tried),
        warnings.catch_warnings(),
    ):
        # NumPy says of the interpreter's operations what is no error in IEEE arithmetic
        warnings.filterwarnings("ignore", ".*encountered in", RuntimeWarning)
        yield
