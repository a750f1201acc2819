"""The names and defaults of TRL's modes against the installed TRL; tests/parity runs its losses."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl", reason="TRL is not installed: nox -s integration-trl")

from trl import GRPOConfig
from trl.experimental.gmpo import GMPOConfig

from drpo_core import modes
from drpo_core.modes._trl import DEFAULTS, LOSSES

pytestmark = pytest.mark.filterwarnings("ignore")


def test_defaults_are_trls():
    fields = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    assert {name: fields[name] for name in DEFAULTS} == DEFAULTS
    assert fields["loss_type"] == "dapo"
    assert GMPOConfig.__dataclass_fields__["epsilon"].default == modes.trl("gmpo").corrections[0].eps_low == 0.4
    assert all(f"`{name!r}`".replace("'", '"') in (GRPOConfig.__doc__ or "") for name in LOSSES if name != "gmpo")
