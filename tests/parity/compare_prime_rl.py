"""prime-rl: its default loss until August 2026 is run; the later ones are formulas written down in tests/modes."""

from types import SimpleNamespace

from sources import checkout, isolate

RELEASE = "559b447"
PLACEHOLDERS = ("prime_rl.configs", "prime_rl.utils", "beartype", "jaxtyping")
isolate("prime_rl", root=checkout("prime_rl", RELEASE) / "src", placeholders=PLACEHOLDERS)

import torch  # noqa: E402
from prime_rl.trainer.rl.loss import compute_loss, default_loss_fn  # noqa: E402
from tensors import by_autograd, by_formula  # noqa: E402
from test_prime_rl import CASES, THEIRS  # noqa: E402

from drpo_core.modes._prime_rl import DEFAULTS  # noqa: E402

FUNCTION = "`default_loss_fn` and `compute_loss` of `trainer/rl/loss.py`"
PACKAGES = ("torch",)
FORMULAS = ("ipo", "icepop", "ppo", "cispo")
SETTINGS = CASES


def theirs(name, keys):
    """Loss and gradient of prime-rl."""
    if name in FORMULAS:
        return by_formula(lambda rows: torch.cat([THEIRS[name](row, **keys) for row in rows]).mean())
    config = SimpleNamespace(**{**DEFAULTS[name], **keys})

    def loss(batch):
        x, mask = batch["log_prob"], batch["mask"]
        rows = [list(batch[name]) for name in ("behavior_log_prob", "advantages", "mask")]
        behavior, advantages, masks = rows
        value, _ = compute_loss(
            list(x),
            behavior,
            None,
            advantages,
            masks,
            None,
            None,
            None,
            lambda row: default_loss_fn(row, config),
            mask.sum(),
            1,
            1,
        )
        return value

    return by_autograd(loss)
