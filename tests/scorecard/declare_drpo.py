"""drpo-core itself: `policy_loss` of both adapters, and the unreduced core on NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from row import Row

from drpo_core import CISPO, DRPO
from drpo_core.objectives import OBJECTIVES
from drpo_core.objectives.configured import at_clip_range
from drpo_core.testing import from_core, from_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core import Objective
    from drpo_core.objectives import Family
    from drpo_core.testing import Implementation

PACKAGES = ("drpo-core", "torch", "jax", "numpy")

RANGES = {"delta": (0.1, 0.2), "DPPO-KL": (0.03, 0.05), "eps": (0.2, 0.28), "max_ratio": (1.0, 4.0)}
"""(low, high) by what the threshold is, or for one family."""

CAPS = {"DPPO-TV": 20.0, "DPPO-KL": 20.0, "PPO-clip": 3.0}


def declared(family: Family) -> Any:
    """The family at the thresholds that are run; one that is new in the table, at the first of its typical ones."""
    (typical,) = family.typical[:1] or (None,)
    given = RANGES.get(family.name, RANGES.get(str(family.threshold)))
    return family.make(typical) if given is None else at_clip_range(family, *given, cap=CAPS.get(family.name))


def policy_loss(adapter: str, objective: Objective) -> Callable[..., Any]:
    """An adapter's `policy_loss`, reduced by `token_mean`, without its diagnostics."""
    reduced = import_module(adapter).policy_loss

    def loss(**batch: Any) -> Any:
        return reduced(objective, **batch)[0]

    return loss


def of_objective(objective: Objective, adapter: str) -> Implementation:
    """One adapter on one objective."""
    kind = getattr(objective, "divergence", "").removeprefix("binary_")
    return from_function(
        _with_signature(policy_loss(adapter, objective)),
        adapter.removeprefix("drpo_"),
        # eager JAX compiles every operation on its own: twenty times slower, and nobody trains so
        transform="jit" if adapter == "drpo_jax" else None,
        name=f"{adapter} {type(objective).__name__}{' ' + kind if kind else ''}",
        call_source=(
            "from drpo_core import *\n\nfrom declare_drpo import policy_loss  # tests/scorecard\n\n"
            f"function = policy_loss({adapter!r}, {objective!r})"
        ),
        objective=objective,
        form="score" if isinstance(objective, CISPO) else "ratio",
        reduction="token_mean",
        dtypes=("float32",),
        family=partial(of_objective, adapter=adapter),
    )


def _with_signature(loss: Callable[..., Any]) -> Callable[..., Any]:
    def named(
        log_prob: Any,
        behavior_log_prob: Any,
        advantages: Any,
        mask: Any,
        normalizer: Any = None,
        segment_ids: Any = None,
    ) -> Any:
        return loss(
            log_prob=log_prob,
            behavior_log_prob=behavior_log_prob,
            advantages=advantages,
            mask=mask,
            normalizer=normalizer,
            segment_ids=segment_ids,
        )

    return named


def rows() -> list[Row]:
    """Every row of this library."""
    core = replace(from_core(DRPO(delta_low=0.1, delta_high=0.2)), name="drpo_core DRPO")
    called = {
        "drpo_torch": "`drpo_torch.policy_loss`, default `token_mean`",
        "drpo_jax": "`drpo_jax.policy_loss` under `jit`, default `token_mean`",
    }
    return [
        Row(implementation=core, called="`drpo_core.token_loss_and_gradient` on NumPy, unreduced"),
        *(
            Row(implementation=of_objective(objective, adapter), called=called[adapter])
            for adapter in called
            for objective in map(declared, OBJECTIVES)
        ),
    ]
