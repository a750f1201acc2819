"""Tunix: its registered loss on a batch whose log-probs are given, in the place of those it computes with the model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core, common

from drpo_core.modes._tunix import DEFAULTS, LOSSES, REDUCTIONS

FUNCTION = "`grpo_loss_fn` of `algo_core`"
PACKAGES = ("google-tunix", "jax")
PRECISION = "float32"
CLIP = {"epsilon": 0.05, "epsilon_high": 0.1}
KEYS = [
    {**CLIP, "epsilon_c": 1.1, "beta": 0.0},
    *({**CLIP, "kl_loss_mode": mode} for mode in ("kl", "mse_kl", "low_var_kl")),
    *({**CLIP, "loss_agg_mode": mode} for mode in REDUCTIONS),
]
SETTINGS = [(name, keys) for name in LOSSES for keys in KEYS]


def theirs(name, keys):
    """Loss and gradient of Tunix."""
    values = {**DEFAULTS, **keys}
    high = values["epsilon"] if values["epsilon_high"] is None else values["epsilon_high"]
    config = SimpleNamespace(**{**values, "epsilon_high": high}, loss_algo=name, temperature=1.0, kl_clamp_value=None)

    def of(arrays):
        ids = jnp.zeros(arrays["mask"].shape, dtype=jnp.int32)
        example = SimpleNamespace(
            prompt_ids=ids[:, :1],
            completion_ids=ids,
            completion_mask=jnp.asarray(arrays["mask"]),
            advantages=jnp.asarray(arrays["advantages"][:, 0]),
            old_per_token_logps=jnp.asarray(arrays["behavior_log_prob"]),
            ref_per_token_logps=jnp.asarray(arrays["reference_log_prob"]),
        )

        def loss(x):
            own = common.compute_per_token_logps
            common.compute_per_token_logps = lambda *_arguments, **_options: (x, jnp.zeros((*x.shape, 2)))
            try:
                return algo_core.grpo_loss_fn(nnx.Module(), example, config, 0, 1)[0]
            finally:
                common.compute_per_token_logps = own

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(arrays["log_prob"], dtype=jnp.float32))
        return float(value), np.asarray(gradient, dtype=np.float64)

    return of
