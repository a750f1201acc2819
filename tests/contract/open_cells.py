"""Cells that are known not to hold, and why: each kind counted apart, neither hidden nor taken for held.

A line is a pattern of subjects, a pattern of what is raised, and the reason. A kind of failure that is not here fails.
"""

from __future__ import annotations

import re

OPEN: tuple[tuple[str, str, str], ...] = (
    (
        r"^drpo_torch\.linear_policy_loss$",
        r"^AssertionError: gradient of (weight: 0|hidden: \S+), expected \S+ \([12] of ",
        "1 − π of a token that is certain to rounding is 0, where the other entries of its row still have a gradient",
    ),
    (
        r"^drpo_torch\.logits_policy_loss$",
        r"^AssertionError: gradient of logits: (rows sum to|0, expected \S+ \(1 of )",
        "1 − π of a token that is certain to rounding is 0, where the other entries of its row still have a gradient",
    ),
    (
        r"^drpo_torch\.linear_policy_loss$",
        r"naming 'divergence' .*, got a result$",
        "a batch without tokens runs nothing that asks for the divergence per token",
    ),
    (
        r"^drpo_torch\.linear_policy_loss$",
        r"^AssertionError: diagnostics/attenuated_fraction: 1, expected 0 \(1 of 1 ",
        "on policy, a product that autocast rounds decides whether a weight is 1 or next to it",
    ),
)


def reason(subject: str, error: Exception) -> str | None:
    """Why a failure is known, or None."""
    text = f"{type(error).__name__}: {error}"
    for subjects, raised, why in OPEN:
        if re.search(subjects, subject) and re.search(raised, text):
            return why
    return None
