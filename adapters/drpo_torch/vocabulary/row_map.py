"""The checked step from the head's output to the policy's logits: temperature, support and size of the vocabulary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_shape, check_tensor, check_untransformed, looks_at_values
from drpo_torch.vocabulary.graph import depends_on_values
from drpo_torch.vocabulary.softmax import Tempering
from drpo_torch.vocabulary.support import Support, SupportRows

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_row_temperature", "check_support", "check_temperature", "check_vocabulary_size", "row_map"]


def check_temperature(name: str, temperature: object) -> float | torch.Tensor:
    """The temperature as a Python float, or the tensor of one per token."""
    if not isinstance(temperature, torch.Tensor):
        return check_number(name, temperature, above=0.0)
    check_untransformed(name, check_tensor(name, temperature))
    return temperature.detach()


def check_row_temperature(
    name: str,
    temperature: float | torch.Tensor,
    leading: Sequence[int],
    beside: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> float | torch.Tensor:
    """The temperature of flat tokens; raise unless it is one per token and (on the CPU) T > 0 at valid ones."""
    if not isinstance(temperature, torch.Tensor):
        return temperature
    check_tensor(name, temperature, beside=beside)
    check_shape(name, temperature, leading, "the tokens")
    if looks_at_values(temperature):
        wrong = ~((temperature > 0.0) & (temperature < math.inf))
        wrong = wrong if valid is None else wrong & valid
        if bool(wrong.any()):
            where = tuple(wrong.nonzero()[0].tolist())
            at = "" if valid is None else " at valid positions"
            msg = f"{name}: expected finite numbers greater than 0{at}, got {float(temperature[where]):g} at index {where}"
            raise ValueError(msg)
    return temperature.reshape(-1)


def check_vocabulary_size(size: object, columns: int) -> int:
    """The number of ids that are not padding."""
    if size is None:
        return columns
    found = int(check_number("vocabulary_size", size, at_least=1, whole=True))
    if found > columns:
        msg = f"vocabulary_size: expected {columns} (the logits of a token) or less, got {found}"
        raise ValueError(msg)
    return found


def check_support(support: object, leading: Sequence[int], beside: torch.Tensor) -> Support | None:
    """The support, if it is one of these tokens."""
    if support is None:
        return None
    if not isinstance(support, Support):
        msg = f"support: expected a drpo_torch.Support or None, got {type(support).__name__}"
        raise TypeError(msg)
    tokens = math.prod(leading)
    for name in ("ids", "offsets", "bits"):
        tensor = getattr(support, name)
        if tensor is not None:
            check_untransformed(f"support.{name}", check_tensor(f"support.{name}", tensor, "integral", beside=beside))
    if support.offsets is not None:
        check_shape("support.offsets", support.offsets, (tokens + 1,), "the tokens and one more, (N + 1,)")
    return support


def row_map(
    temperature: object,
    support: object,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    size: int,
    leading: Sequence[int],
    beside: torch.Tensor,
    columns: int,
    softcap: float | None = None,
) -> Tempering:
    """The step of all tokens, flat; raise for what is none, and (on the CPU) for a token outside its own support."""
    found = check_row_temperature("temperature", check_temperature("temperature", temperature), leading, beside, mask)
    checked = check_support(support, leading, beside)
    if checked is None:
        return Tempering(found, softcap, None, size)
    if checked.bits is not None:
        words = checked.bits.shape[-1]
        # with the padding or without
        words = words if words == -(-columns // 32) else -(-size // 32)
        check_shape("support.bits", checked.bits, (*leading, words), "the tokens and ⌈V/32⌉")
    valid = torch.ones(math.prod(leading), dtype=torch.bool, device=beside.device) if mask is None else mask.reshape(-1)
    if checked.ids is not None and looks_at_values(checked.ids):
        _check_support_ids(checked, size, valid)
    rows = _support_rows(checked, size, valid)
    if tokens is not None and looks_at_values(tokens):
        some = valid.nonzero()[:, 0]
        without = some[~rows.at(some).holds(tokens.reshape(-1, 1)[some].to(torch.int64))[:, 0]]
        if len(without):
            where = tuple(map(int, np.unravel_index(int(without[0]), tuple(leading))))
            msg = (
                f"tokens: expected ids in the support of their token{'' if mask is None else ' at valid positions'}, got "
                f"{int(tokens[where])} at index {where} ({len(without)} such)"
            )
            raise ValueError(msg)
    return Tempering(found, softcap, rows, size)


_support_rows = depends_on_values(SupportRows.of)


def _check_support_ids(support: Support, size: int, valid: torch.Tensor) -> None:
    """Raise for ids outside the vocabulary at valid tokens, naming the first."""
    assert support.ids is not None
    assert support.offsets is not None
    wrong = (support.ids < 0) | (support.ids >= size)
    if not bool(wrong.any()):
        return
    at = wrong.nonzero()[:, 0]
    token = torch.searchsorted(support.offsets.to(torch.int64).contiguous(), at, right=True) - 1
    at, token = at[valid[token]], token[valid[token]]
    if len(at):
        msg = (
            f"support.ids: expected ids in [0, {size}) at valid tokens, got {int(support.ids[at[0]])} at index "
            f"({int(at[0])},), of token {int(token[0])} ({len(at)} such)"
        )
        raise ValueError(msg)
