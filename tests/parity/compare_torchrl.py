"""TorchRL: `forward` of its loss modules, from the distribution on."""

import torch
from tensordict import TensorDict
from tensors import by_autograd
from torchrl.objectives import llm

FUNCTION = "`forward` of `GRPOLoss`, `DAPO` and `CISPOLoss`"
PACKAGES = ("torchrl", "tensordict", "torch")
KEYS = [
    {"clip_epsilon": (0.05, 0.1)},
    {"clip_epsilon": 0.1, "aggregation": "prompt_mean"},
    {"kl_mask_threshold": 0.01},
]
SETTINGS = [(name, keys) for name in ("GRPOLoss", "DAPO", "CISPOLoss") for keys in KEYS]


class Given:
    """A distribution whose log-probs are known."""

    def __init__(self, log_prob, mask):
        self.given, self.mask = log_prob, mask

    def log_prob(self, _action):
        """Whatever the action."""
        return self.given


class Actor(torch.nn.Module):
    """Returns the distribution that travels in the batch, as TorchRL's wrappers of a model do."""

    in_keys = ()

    def get_dist(self, tensordict, logits_key="logits"):  # noqa: ARG002 -- TorchRL's name
        """As TorchRL calls it when it has log-probs to compute."""
        return Given(tensordict["given"], tensordict["mask"])


def own_value(name, _keys):
    """TorchRL's is constant outside of the bounds."""
    return name == "CISPOLoss"


def theirs(name, keys):
    """Loss and gradient of TorchRL."""
    module = getattr(llm, name)(Actor(), entropy_bonus=False, **keys)

    def loss(batch):
        data = {
            "given": batch["log_prob"],
            "mask": batch["mask"],
            ("tokens", "full"): torch.zeros(batch["mask"].shape, dtype=torch.long),
            ("log_probs", "full"): batch["behavior_log_prob"],
            "advantage": batch["advantages"][..., None],
        }
        # one value: sums away the trailing dimension
        return module(TensorDict(data, batch_size=batch["mask"].shape[:1])).loss_objective.sum()

    return by_autograd(loss)
