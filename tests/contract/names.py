"""What the code under test is called: the one place to change when a name changes."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import drpo_jax
import drpo_jax.distributed
import drpo_torch
import drpo_torch.distributed
from array_api_compat import array_namespace

import drpo_core
import drpo_core.advantages
import drpo_core.anchors
import drpo_core.centering
import drpo_core.corrections
import drpo_core.diagnostics
import drpo_core.modes
import drpo_core.penalties
import drpo_core.reduction
from drpo_core import UntraceableError
from drpo_core.engines.numba_loop import compilations
from drpo_core.objectives import OBJECTIVES, label

__all__ = ["UntraceableError", "compilations", "is_per_token", "modes", "namespace", "objectives", "of_label", "public"]

MODULES = (
    drpo_core,
    drpo_core.reduction,
    drpo_core.diagnostics,
    drpo_core.objectives,
    drpo_core.advantages,
    drpo_core.anchors,
    drpo_core.centering,
    drpo_core.corrections,
    drpo_core.penalties,
    drpo_core.modes,
    drpo_torch,
    drpo_torch.distributed,
    drpo_jax,
    drpo_jax.distributed,
)


@functools.cache
def public() -> dict[str, Any]:
    """Every public function and class by its module and name, each once."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value not in found.values():
                found[f"{module.__name__}.{name}"] = value
    return found


@functools.cache
def objectives() -> dict[str, Any]:
    """Every objective of the table at its typical thresholds, and what else its parameters may be; by its label."""
    core = drpo_core
    with warnings.catch_warnings():
        # δ ≥ 1 is the DRPO paper's own setting
        warnings.simplefilter("ignore", core.VacuousTrustRegionWarning)
        every = [core.DRPO(delta=0.15)]
        every += [family.make(value) for family in OBJECTIVES for value in family.typical or (None,)]
        every += [
            core.DRPO(delta_low=0.1, delta_high=0.3),
            core.PolicyGradient(max_ratio=1.1),
            core.PPOClip(eps=0.2, dual_clip=3.0),
            core.CISPO(max_ratio=1.2),
            core.CISPO(min_ratio=0.8, max_ratio=1.2),
            core.DPPO(delta=0.05, divergence="binary_kl", max_ratio=2.0),
            core.DPPO(delta=0.06, divergence="per_token"),
        ]
    return {label(objective): objective for objective in every}


@functools.cache
def modes() -> dict[str, Any]:
    """Modes that between them have each anchor, each level of correction, penalties and each reduction; by a word."""
    anchors, corrections, penalties = drpo_core.anchors, drpo_core.corrections, drpo_core.penalties
    weight, mask, penalty = corrections.ImportanceWeight, corrections.RatioMask, penalties.Penalty
    to_sampler = penalty(coefficient=0.2, estimator="k2", to="behavior")
    every = {
        "alone": (drpo_core.PPOClip(eps=0.2), {"reduction": "sequence_mean_token_mean"}),
        "of sequences": (
            drpo_core.PPOClip(eps=0.2),
            {
                "anchor": anchors.Sequence(anchors.Proximal()),
                "corrections": (weight(low=0.513, high=1.317),),
                "penalties": (penalty(coefficient=0.1),),
                "reduction": "sequence_mean_token_mean",
            },
        ),
        "of masks": (
            drpo_core.DRPO(delta=0.15),
            {
                "corrections": (
                    mask(edge="policy/behavior", level="geometric", low=0.531, high=2.217),
                    corrections.Veto(edge="policy/behavior", low=0.0313, high=31.3),
                ),
                "penalties": (to_sampler,),
                "count_masked": False,
            },
        ),
        "of a batch": (
            drpo_core.objectives.Reinforce(),
            {
                "anchor": anchors.Proximal(),
                "corrections": (
                    weight(level="sequence", high=2.217, normalize=True),
                    corrections.SecondMomentMask(edge="policy/proximal", tau=0.0713),
                ),
                "reduction": "token_sum",
            },
        ),
        "of tokens": (
            drpo_core.DRPO(delta=0.15),
            {
                "anchor": anchors.Proximal(),
                "corrections": (weight(high=1.317), mask(low=0.531, high=2.217)),
                "penalties": (to_sampler,),
            },
        ),
        "of prefixes": (
            drpo_core.PolicyGradient(),
            {
                "anchor": anchors.Prefix(anchors.Behavior()),
                "corrections": (corrections.PrefixBudgetMask(edge="policy/behavior", delta=0.0613),),
                "reduction": "sequence_mean_token_sum",
                "horizon": 7.0,
            },
        ),
    }
    return {f"mode {name}": drpo_core.modes.Mode(objective, **parts) for name, (objective, parts) in every.items()}


def of_label(choice: str | None) -> Any:
    """The objective or mode of a label."""
    return None if choice is None else (objectives() | modes())[choice]


def is_per_token(objective: str | None) -> bool:
    """Whether an objective needs a divergence per token."""
    return getattr(of_label(objective), "divergence", None) == "per_token"


def namespace(array: Any) -> Any:
    """Namespace of an array."""
    return array_namespace(array)
