"""What integrations do with a mode, whether their framework is installed or not: it stands in for with a mock.

Those of frameworks that reduce by themselves refuse it by name, when it is given; tinker's takes it.
"""

import importlib
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from drpo_core import PPOClip, modes, policy_loss_and_gradient
from drpo_core.anchors import Proximal
from drpo_core.corrections import ImportanceWeight
from drpo_core.modes import Mode
from drpo_core.penalties import Penalty

WHOLE = Mode(
    PPOClip(eps=0.2), anchor=Proximal(), corrections=(ImportanceWeight(high=2.0),), penalties=(Penalty(coefficient=0.1),)
)
# imported by the integration, how it is given a mode, and what is missing
REFUSE = {
    "drpo_torch.integrations.verl": (["verl.trainer.ppo.core_algos"], lambda m, mode: m.register("mine", mode)),
    "drpo_torch.integrations.skyrl": (
        [f"skyrl.backends.skyrl_train.utils.{name}" for name in ("off_policy_correction_utils", "ppo_utils")],
        lambda m, mode: m.register("mine", mode),
    ),
    "drpo_torch.integrations.trl": (["trl"], lambda m, mode: m.PolicyLossMixin(objective=mode)),
    "drpo_torch.integrations.torchrl": (["torchrl.objectives.llm"], lambda m, mode: m.PolicyLossModule(objective=mode)),
    "drpo_torch.integrations.prime_rl": (
        ["prime_rl.trainer.rl.loss"],
        lambda m, mode: m.policy_loss(None, objective=mode),
    ),
    "drpo_jax.integrations.tunix": (
        ["flax", "tunix.rl", "tunix.rl.algo_core", "tunix.rl.function_registry"],
        lambda m, mode: m.register("mine", mode),
    ),
}


@pytest.fixture
def imported(monkeypatch):
    """A function that imports an integration with mocks of what it imports."""
    names = []

    def load(module, mocked):
        for name in mocked:
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), MagicMock())
            for base in ("GRPOTrainer", "GRPOLoss", "LLMLossOutput"):
                setattr(sys.modules[name], base, type(base, (), {}))
        monkeypatch.delitem(sys.modules, module, raising=False)
        names.append(module)
        return importlib.import_module(module)

    yield load
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", REFUSE)
def test_a_mode_is_refused_by_what_would_be_left_out(module, imported):
    """One that is no more than an objective too: its reduction would be ignored."""
    mocked, give = REFUSE[module]
    integration = imported(module, mocked)
    for mode, missing in ((WHOLE, "anchor, corrections, penalties, reduction"), (Mode(PPOClip(eps=0.2)), "reduction")):
        with pytest.raises(ValueError, match=rf"^objective: .* takes no mode, whose {missing} it would leave out; expected"):
            give(integration, mode)


def test_tinker_takes_its_own_modes_with_their_reduction(imported):
    integration = imported("drpo_torch.integrations.tinker", ["tinker"])
    x, b, a = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), torch.tensor([1.0, -1.0])
    columns = {"target_tokens": torch.tensor([1, 2]), "logprobs": b, "advantages": a}
    inputs = {name: SimpleNamespace(to_torch=lambda column=column: column, shape=[2]) for name, column in columns.items()}
    for mode in (modes.tinker("dro", beta=0.1), modes.tinker("ppo"), Mode(PPOClip(eps=0.2), reduction="token_mean")):
        loss, _ = integration.custom_loss(mode)([SimpleNamespace(loss_fn_inputs=inputs)], [x])
        wanted = policy_loss_and_gradient(mode, x, b, a, mask=torch.ones(2, dtype=torch.bool)).loss
        torch.testing.assert_close(loss, wanted)
    with pytest.raises(ValueError, match=r"^objective: tinker's data have no proximal_log_prob and no reference_log_prob"):
        integration.custom_loss(WHOLE)
