"""Settings, methods with their thresholds, and cells: each is one run of a method in a setting from a seed."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from drpo_core import DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip, VacuousTrustRegionWarning
from study.objectives import Penalised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drpo_core import Objective


@dataclass(frozen=True, slots=True)
class Setting:
    """A model, the number formats of engine and trainer, and the lag of the engine's weights in rollout batches."""

    architecture: str
    engine: str
    trainer: str = "float32"
    lag: int = 0


SIX = {
    "dense-bf16": Setting("dense", "bfloat16"),
    "dense-fp8-rollout": Setting("dense", "fp8"),
    "dense-fp8-e2e": Setting("dense", "fp8", "fp8"),
    "moe-bf16": Setting("moe", "bfloat16"),
    "moe-fp8-rollout": Setting("moe", "fp8"),
    "moe-fp8-e2e": Setting("moe", "fp8", "fp8"),
}
FURTHER = {"dense-int8-rollout": Setting("dense", "int8"), "dense-fp8-lag": Setting("dense", "fp8", lag=2)}
SETTINGS = SIX | FURTHER
EXACT = Setting("dense", "float32")
"""Without mismatch, to compare implementations: a rounded engine turns differences of 1e-7 into other tokens."""
TUNED_IN = "dense-fp8-rollout"


@dataclass(frozen=True, slots=True)
class Training:
    """Parameters that all methods share. `learning_rate` is PG-IS's best in `TUNED_IN`: see preregistration.md."""

    rollouts: int = 120
    prompts: int = 32
    samples: int = 8
    steps: int = 8
    """Optimiser steps for each rollout batch, each on its own part of the batch."""
    learning_rate: float = 4e-4
    clip_norm: float = 1.0


DEFAULT = Training()


@dataclass(frozen=True, slots=True)
class Method:
    """A family with one threshold: its constructor, the published thresholds, and the thresholds that tuning tries."""

    build: Callable[[float], Objective]
    published: tuple[float, ...]
    grid: tuple[float, ...]


SMOOTH = (0.05, 0.15, 0.5, 2.5, 12.5)
MASKS = (0.05, 0.1, 0.15, 0.3, 0.6)
METHODS = {
    "pg-is": Method(lambda _: PolicyGradient(), (0.0,), ()),
    # the threshold is ε_high; ε_high / ε_low stays at the published 0.28 / 0.2
    "grpo": Method(lambda e: PPOClip(eps_low=e / 1.4, eps_high=e), (0.28,), (0.07, 0.14, 0.28, 0.56, 1.12)),
    "spo": Method(lambda e: SPO(eps=e), (12.5,), SMOOTH),
    "dppo-tv": Method(lambda d: DPPO(delta=d), (0.15,), MASKS),
    "dppo-kl": Method(lambda d: DPPO(delta=d, divergence="binary_kl"), (0.05,), (0.01, 0.05, 0.1, 0.2, 0.5)),
    "drpo": Method(lambda d: DRPO(delta=d), (12.5, 2.5), SMOOTH),
    "mask-drpo": Method(lambda d: MaskDRPO(delta=d), (), SMOOTH),
    "drpo-without-a": Method(lambda d: Penalised(penalty="l2", delta=d, by_advantage=False), (12.5,), SMOOTH),
    "k1": Method(lambda d: Penalised(penalty="k1", delta=d), (), SMOOTH),
    "k2": Method(lambda d: Penalised(penalty="k2", delta=d), (), SMOOTH),
    "k3": Method(lambda d: Penalised(penalty="k3", delta=d), (), SMOOTH),
    "tv": Method(lambda d: Penalised(penalty="tv", delta=d), (), SMOOTH),
    # with |A| this penalty is SPO
    "chi2-without-a": Method(lambda d: Penalised(penalty="chi2", delta=d, by_advantage=False), (), SMOOTH),
}


def objective(method: str, threshold: float) -> Objective:
    """Make an objective, without the library's warning that δ ≥ 1 is no boundary: the study compares the paper's δ = 12.5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        return METHODS[method].build(threshold)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    setting: str
    method: str
    threshold: float
    seed: int
    training: Training = DEFAULT

    @property
    def name(self) -> str:
        """The name of the run and of its file: readable, with a digest of everything else that the result depends on."""
        what = json.dumps([asdict(SETTINGS[self.setting]), asdict(self.training)], sort_keys=True)
        digest = hashlib.sha256(what.encode()).hexdigest()[:8]
        return f"{self.setting}.{self.method}.{self.threshold:g}.{self.seed}.{digest}"


TUNING_SEEDS, QUICK_SEEDS = (100, 101), (200, 201, 202)
SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
HEADLINE = ("pg-is", "grpo", "spo", "dppo-tv", "dppo-kl", "drpo")
"""The methods of the paper's main comparison; the others are its ablations."""
STRESS = 3.0
"""Factor on the learning rate under stress."""
STRESSED = ("dense-fp8-rollout", "moe-fp8-rollout")


def tuning_cells(training: Training = DEFAULT) -> list[Cell]:
    """Five runs for each method and tuning seed in one setting: five thresholds, or five learning rates for PG-IS."""
    rates = [replace(training, learning_rate=rate) for rate in LEARNING_RATES]
    return [Cell(TUNED_IN, "pg-is", 0.0, seed, how) for seed in TUNING_SEEDS for how in rates] + [
        Cell(TUNED_IN, name, threshold, seed, training)
        for seed in TUNING_SEEDS
        for name, method in METHODS.items()
        for threshold in method.grid
    ]


def thresholds(name: str, tuned: dict[str, float]) -> list[float]:
    """The published thresholds of a method, then the tuned one unless it is one of them."""
    return list(dict.fromkeys([*METHODS[name].published, *([tuned[name]] if name in tuned else [])]))


def comparison_cells(tuned: dict[str, float], seeds: Sequence[int] = SEEDS, training: Training = DEFAULT) -> list[Cell]:
    """Every method in the six settings; the headline methods in two further ones, and in two at a higher learning rate."""
    stressed = replace(training, learning_rate=STRESS * training.learning_rate)
    six = [(setting, name, training) for setting in SIX for name in METHODS]
    apart = [(setting, name, training) for setting in FURTHER for name in HEADLINE]
    apart += [(setting, name, stressed) for setting in STRESSED for name in HEADLINE]
    # the six settings first, as the hypotheses need them; seed by seed, so that interim results are whole comparisons
    return [
        Cell(setting, name, threshold, seed, how)
        for runs in (six, apart)
        for seed in seeds
        for setting, name, how in runs
        for threshold in thresholds(name, tuned)
    ]


def quick_cells() -> list[Cell]:
    """Three methods in one setting, from three seeds of their own."""
    three = (("pg-is", 0.0), ("grpo", 0.28), ("drpo", 12.5))
    return [Cell(TUNED_IN, name, threshold, seed) for seed in QUICK_SEEDS for name, threshold in three]
