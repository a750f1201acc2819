"""The first use of the row kernels in a process, once a device and dtype: the same small rows by torch's operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drpo_torch.engines.kernel_error import NOT_TRIED, is_captured, warn_of
from drpo_torch.engines.trial import agree
from drpo_torch.vocabulary import triton_rows
from drpo_torch.vocabulary.divergences import FullDivergences
from drpo_torch.vocabulary.most_probable import most_probable
from drpo_torch.vocabulary.shards import Shard
from drpo_torch.vocabulary.softmax import ArrayRows, Places, Pull, Tempering, Wanted
from drpo_torch.vocabulary.support import SupportRows
from drpo_torch.vocabulary.triton_rows import BLOCK, TritonRows

if TYPE_CHECKING:
    from types import ModuleType

    from drpo_torch.vocabulary.softmax import RowKernels

__all__ = ["finding"]

ROWS, VOCABULARY = 5, BLOCK + 37
"""Of the rows: of more logits than a step."""

_findings: dict[tuple[torch.device, torch.dtype], str | None] = {}


def finding(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels there; None if nothing is."""
    kind = (device, dtype)
    if kind not in _findings:
        if is_captured(device):
            return NOT_TRIED
        _findings[kind] = _compared(device, dtype)
        if _findings[kind] is not None:
            warn_of("the Triton kernels over rows of logits", device, dtype, str(_findings[kind]))
    return _findings[kind]


def _compared(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        wrong = _differences(device, dtype)
    except Exception as error:  # noqa: BLE001 -- a compiler may raise anything
        return f"fails with {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return f"gives another {', '.join(wrong)} than the array expression" if wrong else None


def _differences(device: torch.device, dtype: torch.dtype) -> list[str]:
    generator = torch.Generator("cpu").manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(device)

    z = (12.0 * uniform(ROWS, VOCABULARY) - 6.0).to(dtype)
    z[0, :: VOCABULARY // 3] = -torch.inf
    places, whole = Places.first(ROWS, device), torch.arange(ROWS, device=device) == 1
    words = (uniform(ROWS, -(-VOCABULARY // 32)) * 2.0**31).to(torch.int32)
    support = SupportRows(places.index, whole, places.index[:0], words, VOCABULARY, slice(0, VOCABULARY))
    steps = {
        "plain": Tempering(),
        "divided": Tempering(0.7, 30.1),
        "tempered": Tempering(0.5 + uniform(ROWS), 5.0, support, VOCABULARY),
    }
    columns = (uniform(ROWS, 3) * VOCABULARY).to(torch.int64)
    columns[:, 2] = columns[:, 1]
    recorded = (z.float() + uniform(*z.shape)).to(dtype)
    wrong = []
    for name, step in steps.items():
        ours, theirs = (
            _found(rows, z, places, step, columns) | _of_pair(module, z, recorded, step) | _first(module, z, step)
            for module, rows in zip((triton_rows, None), _both(dtype, device), strict=True)
        )
        wrong += [f"{name} {part}" for part, array in theirs.items() if not agree(ours[part], array, array.dtype)]
    return wrong


def _both(dtype: torch.dtype, device: torch.device) -> tuple[RowKernels, RowKernels]:
    return TritonRows(dtype), ArrayRows(VOCABULARY, dtype, device)


def _found(
    rows: RowKernels, z: torch.Tensor, places: Places, step: Tempering, columns: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Statistics, and a gradient with a slope and one without."""
    statistics, log_normalizer, log_prob = rows.softmaxes(z, places, step, Wanted(columns), entropy=True)
    entropy = statistics.entropy
    assert entropy is not None
    scale = torch.linspace(-1.0, 1.0, ROWS, dtype=entropy.dtype, device=z.device)
    found = {"maximum": statistics.maximum, "log-sum": statistics.log_sum, "entropy": entropy}
    found |= {"log-normaliser": log_normalizer, "log-prob": log_prob}
    for name, slope in (("gradient", None), ("gradient of entropies", scale.square())):
        pull = Pull(columns, torch.stack((scale, scale.abs(), -scale), -1), scale - 1.0, slope)
        found[name] = torch.empty_like(z)
        rows.gradients(z, places, step, pull, statistics=statistics, out=found[name])
        # in the place of the logits
        found[f"{name} in place"] = same = z.clone()
        rows.gradients(same, places, step, pull, statistics=statistics, out=same)
    return found


def _of_pair(module: ModuleType | None, z: torch.Tensor, recorded: torch.Tensor, step: Tempering) -> dict[str, torch.Tensor]:
    """Divergences from other logits, and their gradient."""
    shard = Shard(VOCABULARY, None, None, ROWS, z.device, "logits")
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        step = step._replace(size=VOCABULARY)
        found = FullDivergences.apply(leaf, recorded, (step, step), module, (ROWS,), shard)  # type: ignore[no-untyped-call]
        cotangents = [torch.linspace(-1.0, end, ROWS, dtype=found[0].dtype, device=z.device) for end in (1.0, 2.0)]
        (gradient,) = torch.autograd.grad(found, leaf, cotangents)
    return {"TV": found[0].detach(), "KL": found[1].detach(), "gradient of divergences": gradient}


def _first(module: ModuleType | None, z: torch.Tensor, step: Tempering) -> dict[str, torch.Tensor]:
    """The most probable tokens of a row."""
    some = slice(1, 2)
    found = most_probable(module, z[some], Places.first(1, z.device), step.at(some), 2, 0)
    return {"logits of the most probable tokens": found.z, "most probable tokens": found.ids.to(found.z.dtype)}
