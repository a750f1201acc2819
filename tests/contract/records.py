"""Arguments that hold arrays of their own: the support of truncated sampling, and what is recorded of the sampler's policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import drpo_jax
import drpo_torch
import numpy as np
import torch
from contract.arrays import exact, make
from contract.axes import DType, Library, Measured, Recorded, Supported
from contract.world import SOFTCAP, TEMPERATURE, VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable

    from contract.cells import Cell
    from numpy.typing import NDArray

_BITS = 32


class Records:
    """Makes such arguments of a cell. `arrays` are those they were made of, by their names in the world."""

    def __init__(self, cell: Cell, array: Callable[..., Any], mask: Any, needed: tuple[str, ...]) -> None:
        """With a function that gives an array of the world, and the log-probs that the mode of the cell needs."""
        self.arrays: dict[str, Any] = {}
        self._cell, self._array, self._mask, self._needed = cell, array, mask, needed
        self._library: Library = cell["library"]
        self._module = drpo_torch if self._library is Library.TORCH else drpo_jax

    def of(self, choice: Measured | Recorded) -> Any:
        """A divergence to measure, or a score-centring term."""
        measured = isinstance(choice, Measured)
        kind, of = ({"kind": choice.kind}, choice.of) if isinstance(choice, Measured) else ({}, choice.value)
        if of == "top_k":
            make_record = self._module.TopKDivergence if measured else self._module.TopKCentering
            old = not measured and "proximal_log_prob" in self._needed
            proximal = {"proximal_log_prob": self.kept("top_k_proximal_log_prob")} if old else {}
            ids, log_prob = self.kept("top_k_ids", self._integers), self.kept("top_k_behavior_log_prob")
            return make_record(**kind, ids=ids, behavior_log_prob=log_prob, **proximal)
        make_record = self._module.FullDivergence if measured else self._module.FullCentering
        per_token = isinstance(self._cell["temperature"], DType)
        temperature = self.kept("behavior_temperature", self._cell["temperature"]) if per_token else TEMPERATURE
        return make_record(**kind, behavior=self._behavior(of), temperature=temperature)

    def kept(self, name: str, dtype: DType = DType.FLOAT32, word: str = "") -> Any:
        """An array of the world, the same for all that need it; written down under its name, or another one."""
        word = word or name
        if word not in self.arrays:
            self.arrays[word] = self._array(name, dtype)
        return self.arrays[word]

    def _behavior(self, of: str) -> Any:
        if of == "full":
            # of the sampler's dtype
            return self.kept("behavior_logits", self._cell["behavior_log_prob"])
        dtype = self._cell.get("hidden", DType.FLOAT32)
        head = [self.kept(name, dtype) for name in ("behavior_hidden", "behavior_weight", "behavior_bias")]
        return self._module.LinearHead(*head, logit_softcap=SOFTCAP)

    def support(self, choice: Supported) -> tuple[Any, torch.Tensor]:
        """The argument, and which ids of the vocabulary it holds."""
        given = self._array("support", DType.BOOL)
        rows = exact(given)
        # one without an id was not recorded
        some = rows[..., :VOCABULARY]
        inside = torch.tensor(some | ~some.any(-1, keepdims=True))
        if choice is Supported.MASK:
            support = self._module.Support.from_mask(given)
        elif choice is Supported.BITS:
            self.arrays["support_bits"] = make(_words(rows), DType.INT32, self._library, self._cell["storage"])
            support = self._module.Support.from_bits(self.arrays["support_bits"])
        else:
            ids, offsets = _ids(some, None if self._mask is None else exact(self._mask))
            self.arrays["support_ids"], self.arrays["support_offsets"] = (
                make(values, self._integers, self._library) for values in (ids, offsets)
            )
            support = self._module.Support(self.arrays["support_ids"], self.arrays["support_offsets"])
        return support, inside

    @property
    def _integers(self) -> DType:
        """The dtype of ids: that of the sampled ones, if there are any."""
        dtype: DType = self._cell.get("tokens", DType.INT32)
        return dtype


def _words(rows: NDArray) -> NDArray:
    """Bits of rows, the least significant first."""
    missing = -rows.shape[-1] % _BITS
    bits = np.concatenate((rows, np.zeros((*rows.shape[:-1], missing), dtype=bool)), -1)
    packed = np.packbits(bits, axis=-1, bitorder="little")
    return packed.view("<u4").view(np.int32) if packed.size else np.zeros((*rows.shape[:-1], packed.shape[-1] // 4), np.int32)


def _ids(rows: NDArray, mask: NDArray | None) -> tuple[NDArray, NDArray]:
    """Ids of all tokens, backwards and the last one twice; of masked tokens anything, as many."""
    every = []
    rows = rows.reshape(-1, rows.shape[-1]) if rows.size else rows.reshape(0, VOCABULARY)
    valid = np.ones(len(rows), dtype=bool) if mask is None else mask.reshape(-1)
    for row, counts in zip(rows, valid, strict=True):
        ids = np.flatnonzero(row)[::-1]
        ids = np.concatenate((ids, ids[:1]))
        every.append(ids if counts else np.resize([-1, VOCABULARY, -100], ids.shape))
    offsets = np.cumsum([0, *map(len, every)])
    return np.concatenate(every) if every else np.zeros(0, np.int64), offsets
