"""A chunk's tokens, checked and made once for everything that is computed of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from drpo_core.audit.readers import Chunk

    Values = np.ndarray[Any, Any]

__all__ = ["ChunkTokens"]


class ChunkTokens(NamedTuple):
    """A chunk's tokens: which count, which have a gradient, and which of those the update moves further from μ.

    ==============  =======================================================================================
    `tokens`        what objectives are functions of; masked positions hold an inert token
    `mask`          valid tokens
    `active`        valid tokens with a finite A ≠ 0 and usable log-probs, as in `drpo_core.diagnostics`
    `diverging`     active tokens with A·ℓ > 0
    ==============  =======================================================================================
    """

    tokens: Tokens
    mask: Values
    active: Values
    diverging: Values

    @classmethod
    def of(cls, chunk: Chunk) -> ChunkTokens:
        """Check a chunk and compute its log-ratios, ratios and shifts."""
        tokens = Tokens.checked(*chunk[:3], mask=chunk.mask)
        a = tokens.advantages
        finite = np.isfinite(a) & np.isfinite(tokens.behavior_log_prob) & (tokens.log_prob < np.inf)
        active = chunk.mask & finite & (a != 0.0)
        return cls(tokens, chunk.mask, active, active & (tokens.along_advantage(tokens.log_ratio) > 0.0))
