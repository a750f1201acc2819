"""A chunk's tokens, checked and made once for everything that is computed of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from drpo_core.diagnostics import TokenSets, token_sets
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    import numpy as np

    from drpo_core.audit.readers import Chunk

    Values = np.ndarray[Any, Any]

__all__ = ["ChunkTokens"]


class ChunkTokens(NamedTuple):
    """A chunk's tokens and the sets of them that statistics are over.

    `active` tokens have a gradient: they are valid, A is finite and not 0, the log-probs are usable. The update moves
    `diverging` tokens, some of the active ones, further from μ.
    """

    tokens: Tokens
    sets: TokenSets
    active: Values
    diverging: Values

    @classmethod
    def of(cls, chunk: Chunk) -> ChunkTokens:
        """Check a chunk and compute its log-ratios, ratios and shifts."""
        tokens = Tokens.checked(*chunk[:3], mask=chunk.mask)
        sets = token_sets(tokens, chunk.mask)
        active = sets.active.where
        return cls(tokens, sets, active, active & sets.diverging)
