"""What a declaration module gives for each implementation: the kit's view of it, and words for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drpo_core.testing import Implementation

__all__ = ["Row"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the scorecard.

    Parameters
    ----------
    implementation
        The loss as the kit calls it, with what it is declared to be.
    called
        Which function of the release runs, and with what settings.
    boundary
        What in the release is stated by the declaration rather than counted as a failure; may be empty.
    counts_empty_rows
        Whether its mean is over all rows, also those without a valid token. P6 is about such rows; the other properties
        are then checked on batches that have none, so that one fact isn't counted many times.
    """

    implementation: Implementation
    called: str
    boundary: str = ""
    counts_empty_rows: bool = False

    @property
    def objective(self) -> str:
        """The claimed objective with the hyper-parameters that are set."""
        objective = self.implementation.objective
        names = getattr(type(objective), "__dataclass_fields__", {})
        given = [f"{name}={getattr(objective, name)!r}" for name in names if getattr(objective, name) is not None]
        return f"{type(objective).__name__}({', '.join(given)})"
