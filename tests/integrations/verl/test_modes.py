"""The names, defaults and presets of verl's modes against the installed verl; tests/parity runs its losses."""

import pytest

pytest.importorskip("verl", reason="runs in the environment of `nox -s integration-verl`")

from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import FSDPActorConfig

from drpo_core import modes
from drpo_core.modes._verl import DEFAULTS, LOSSES

NOT_OF_THE_ACTOR = ("dro_beta", "kl_cov_ratio", "ppo_kl_coef", "bypass_mode", "loss_type")


@pytest.mark.parametrize("preset", modes.VERL_PRESETS)
def test_presets(preset):
    keys = dict(modes.VERL_PRESETS[preset])
    made = getattr(RolloutCorrectionConfig, preset)()
    # the methods spell out what the configuration has by default anyway
    assert all(getattr(made, name) == value for name, value in keys.items())
    assert {name for name in ("rollout_is", "rollout_rs") if getattr(made, name)} == keys.keys() & {"rollout_is", "rollout_rs"}


def test_presets_are_all():
    methods = {name for name, value in vars(RolloutCorrectionConfig).items() if isinstance(value, classmethod)}
    assert methods == modes.VERL_PRESETS.keys()


def test_names_and_defaults_are_verls():
    # plug-ins, ours among them, are in the registry too
    theirs = {name for name, loss in POLICY_LOSS_REGISTRY.items() if loss.__module__ == "verl.trainer.ppo.core_algos"}
    assert LOSSES.keys() | {"clip_cov"} == theirs
    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    actor = [name for name in DEFAULTS if not name.startswith("rollout_") and name not in NOT_OF_THE_ACTOR]
    assert {name: getattr(config, name) for name in actor} == {name: DEFAULTS[name] for name in actor}
