"""Where JAX has no 64-bit numbers, nothing asks for them: JAX would warn and take 32. Traced only: that is where it does."""

from functools import partial

import jax
from mode_oracles import EXAMPLES, arguments_for, quiet

from drpo_core import group_advantages, token_loss_and_gradient
from drpo_core.advantages import informative_groups, length_weighted_advantages, pass_at_k_advantages
from drpo_core.anchors import interpolated_proximal_log_prob
from drpo_core.corrections import clip_cov_weights
from drpo_core.modes import Mode
from drpo_core.objectives import Reinforce

FLOATS, INTEGERS, BOOLS = (jax.ShapeDtypeStruct((3, 4), dtype) for dtype in ("float32", "int32", "bool"))
NAMES = ("log_prob", "behavior_log_prob", "advantages", "proximal_log_prob", "reference_log_prob")


def test_nothing_asks_for_64_bits():
    with jax.enable_x64(new_val=False):
        for part in {type(part): part for part in EXAMPLES}.values():
            mode = quiet(part) if not hasattr(part, "policy") else Mode(Reinforce(), anchor=part)
            arrays = arguments_for(mode, dict.fromkeys(NAMES, FLOATS) | {"mask": BOOLS})
            jax.eval_shape(partial(token_loss_and_gradient, mode), **arrays)
        jax.eval_shape(clip_cov_weights, FLOATS, FLOATS, BOOLS, FLOATS)
        jax.eval_shape(interpolated_proximal_log_prob, FLOATS, FLOATS, INTEGERS)
        jax.eval_shape(length_weighted_advantages, FLOATS, INTEGERS)
        for function in (informative_groups, partial(pass_at_k_advantages, k=3), group_advantages):
            jax.eval_shape(function, FLOATS)
