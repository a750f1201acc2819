"""The defaults of SkyRL's modes against the installed configuration; tests/parity runs its losses."""

import pytest

pytest.importorskip("skyrl", reason="runs in the environment of `nox -s integration-skyrl`")

from skyrl.train.config import SkyRLTrainConfig

from drpo_core.modes._skyrl import DEFAULTS

SECTIONS = {"cispo": "cispo", "delta": "dppo", "dppo": "dppo", "tau": "sapo"}
SECTIONS |= dict.fromkeys(("kl_cov_frac", "ppo_kl_coef"), "kl_cov")
SECTIONS |= dict.fromkeys(("tis", "token", "sequence", "geo", "product", "outlier"), "off_policy_correction")
# in 0.3.0 cispo's bounds default to what are ratios in 0.4, and it has no anchor to choose
NOT_YET = {"cispo_eps_clip_low", "cispo_eps_clip_high", "cispo_anchor"}


def test_defaults_are_skyrls():
    config = SkyRLTrainConfig().trainer.algorithm
    for key, value in DEFAULTS.items():
        section = SECTIONS.get(key, SECTIONS.get(key.partition("_")[0]))
        place = config if section is None else getattr(config, section)
        if key not in {*NOT_YET, "use_kl_loss", "max_seq_len"}:
            assert getattr(place, key) == value, key
