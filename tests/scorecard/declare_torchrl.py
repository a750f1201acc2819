"""torchrl: `GRPOLoss.forward` and `CISPOLoss.forward`, from the distribution on.

The actor is a module whose `get_dist` returns a distribution of the given log-probs and mask, which is what torchrl's
own wrappers return for a language model. There is no input for the denominator of a whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from row import Row
from tensordict import TensorDict
from torchrl.objectives.llm import CISPOLoss, GRPOLoss

from drpo_core import CISPO, PPOClip
from drpo_core.testing import from_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.testing import Implementation

PACKAGES = ("torchrl", "torch", "tensordict")


LARGEST_LOW = 1.0 - 2.0**-24
"""torchrl takes the logarithm of 1 − ε_low in float32, so ε_low must stay below 1."""


class Given:
    """A distribution whose log-probs are known."""

    def __init__(self, log_prob: torch.Tensor, mask: torch.Tensor) -> None:
        """Of one batch."""
        self.given = log_prob
        self.mask = mask

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        """Whatever the action."""
        del action
        return self.given


class Actor(torch.nn.Module):
    """Returns the distribution that travels in the batch."""

    in_keys = ()

    def get_dist(self, tensordict: TensorDict, logits_key: str = "logits") -> Given:
        """As torchrl calls it when it has log-probs to compute."""
        del logits_key
        return Given(tensordict["given"], tensordict["mask"])


def policy_loss(loss_class: type[GRPOLoss], clip_epsilon: tuple[float, float]) -> Callable[..., torch.Tensor]:
    """A loss module as a function of the kit's arguments."""
    module = loss_class(Actor(), clip_epsilon=clip_epsilon, entropy_bonus=False)

    def loss(
        log_prob: torch.Tensor, behavior_log_prob: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        batch = TensorDict(
            {
                "given": log_prob,
                "mask": mask,
                ("tokens", "full"): torch.zeros(mask.shape, dtype=torch.long),
                ("log_probs", "full"): behavior_log_prob,
                "advantage": advantages[..., None],
            },
            batch_size=mask.shape[:1],
        )
        return module(batch).loss_objective.sum()  # one value: sums away the trailing dimension

    return loss


def clipped(objective: PPOClip) -> Implementation:
    """GRPOLoss of a clipping region."""
    low, high = objective.region
    return _implementation(GRPOLoss, (min(low, LARGEST_LOW), high), objective=objective, family=clipped)


def cispo(objective: CISPO) -> Implementation:
    """CISPOLoss, whose ratio is clamped to [1 − low, 1 + high]."""
    return _implementation(CISPOLoss, (LARGEST_LOW, objective.max_ratio - 1.0), objective=objective, form="score")


def _implementation(loss_class: type[GRPOLoss], clip_epsilon: tuple[float, ...], **claims: Any) -> Implementation:
    return from_function(
        policy_loss(loss_class, clip_epsilon),
        "torch",
        name=f"torchrl {loss_class.__name__}",
        call_source=(
            f"from torchrl.objectives.llm import {loss_class.__name__}\n\n"
            "from declare_torchrl import policy_loss  # tests/scorecard\n\n"
            f"function = policy_loss({loss_class.__name__}, {clip_epsilon!r})"
        ),
        reduction="token_mean",
        dtypes=("float32",),
        **claims,
    )


def rows() -> list[Row]:
    """Every row of torchrl."""
    return [
        Row(
            implementation=clipped(PPOClip(eps_low=0.2, eps_high=0.28)),
            called="`GRPOLoss(clip_epsilon=(0.2, 0.28), entropy_bonus=False)`, default `token_mean`",
        ),
        Row(
            implementation=cispo(CISPO(max_ratio=5.0)),
            called="`CISPOLoss(clip_epsilon=(1 − 2⁻²⁴, 4), entropy_bonus=False)`: the ratio is clamped to [6e-8, 5]",
            boundary="the formula in the class's docstring has no stop-gradient; the paper it cites has one",
        ),
    ]
