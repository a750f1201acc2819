"""One optimisation step under DRPO of the same small model in PyTorch and in JAX, from recorded rollouts.

Run it with ``python docs/examples/one_step.py``. It prints both steps side by side and fails if they disagree.
"""

import sys
from importlib.resources import files

import drpo_jax
import drpo_torch
import jax
import jax.numpy as jnp
import numpy as np
import torch

from drpo_core import DRPO, expand_advantages, group_advantages, summarize
from drpo_core.diagnostics import Diagnostics

OBJECTIVE = DRPO(delta=0.15)
LEARNING_RATE = 1.0
WIDTH = 32
TOLERANCE = 1e-6  # a few units in the last place of a float32 parameter between −4 and 4

Arrays = dict[str, np.ndarray]


def load_rollouts() -> Arrays:
    """16 prompts × 8 sampled answers of at most 48 tokens, with token ids renumbered to a small vocabulary."""
    recorded = np.load(str(files("drpo_core.audit") / "data" / "gemma3_270m_arithmetic.npz"))
    vocabulary, tokens = np.unique(recorded["tokens"], return_inverse=True)
    tokens = tokens.reshape(recorded["tokens"].shape)
    mask = recorded["mask"]
    # one row per prompt: each answer is compared with the other answers to the same question
    advantages = group_advantages(recorded["rewards"].reshape(16, 8)).reshape(-1)
    start = np.full((len(tokens), 1), len(vocabulary))
    return {
        "tokens": tokens,
        "previous": np.concatenate([start, tokens[:, :-1]], axis=1),
        "mask": mask,
        "advantages": expand_advantages(advantages, mask),
    }


def initial_weights(vocabulary_size: int) -> Arrays:
    """The same numbers for both frameworks; one extra embedding for the start of an answer."""
    rng = np.random.default_rng(0)
    return {
        "embedding": rng.normal(size=(vocabulary_size + 1, WIDTH)).astype(np.float32),
        "head": rng.normal(size=(WIDTH, vocabulary_size)).astype(np.float32),
    }


def torch_log_prob(weights: dict[str, torch.Tensor], previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log π of each token given the one before it."""
    logits = weights["embedding"][previous] @ weights["head"]
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]


def jax_log_prob(weights: dict[str, jax.Array], previous: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log π of each token given the one before it."""
    logits = weights["embedding"][previous] @ weights["head"]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def torch_step(weights: Arrays, batch: Arrays) -> tuple[float, dict[str, float], Arrays, Arrays]:
    """Loss, diagnostics, gradients and updated weights."""
    parameters = {name: torch.tensor(array, requires_grad=True) for name, array in weights.items()}
    data = {name: torch.tensor(array) for name, array in batch.items()}
    loss, diagnostics = drpo_torch.policy_loss(
        OBJECTIVE,
        log_prob=torch_log_prob(parameters, data["previous"], data["tokens"]),
        behavior_log_prob=data["behavior_log_prob"],
        advantages=data["advantages"],
        mask=data["mask"],
    )
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.numpy() for name, p in parameters.items() if p.grad is not None}
    updated = {name: p.detach().numpy() - LEARNING_RATE * gradients[name] for name, p in parameters.items()}
    return loss.item(), summarize(diagnostics), gradients, updated


def jax_step(weights: Arrays, batch: Arrays) -> tuple[float, dict[str, float], Arrays, Arrays]:
    """Loss, diagnostics, gradients and updated weights."""
    data = {name: jnp.asarray(array) for name, array in batch.items()}

    def loss_and_diagnostics(parameters: dict[str, jax.Array]) -> tuple[jax.Array, Diagnostics]:
        return drpo_jax.policy_loss(
            OBJECTIVE,
            log_prob=jax_log_prob(parameters, data["previous"], data["tokens"]),
            behavior_log_prob=data["behavior_log_prob"],
            advantages=data["advantages"],
            mask=data["mask"],
        )

    parameters = {name: jnp.asarray(array) for name, array in weights.items()}
    (loss, diagnostics), gradients = jax.jit(jax.value_and_grad(loss_and_diagnostics, has_aux=True))(parameters)
    updated = {name: np.asarray(p - LEARNING_RATE * gradients[name]) for name, p in parameters.items()}
    return float(loss), summarize(diagnostics), {name: np.asarray(g) for name, g in gradients.items()}, updated


def norm(gradients: Arrays) -> float:
    """Euclidean norm over all parameters."""
    return float(np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values())))


def main() -> int:
    """Take the step twice and compare."""
    batch = load_rollouts()
    weights = initial_weights(vocabulary_size=int(batch["tokens"].max()) + 1)
    # the sampler held slightly older weights, in bfloat16: π/μ is not 1 even before the first update
    rng = np.random.default_rng(1)
    older = {name: array + 0.1 * rng.normal(size=array.shape).astype(np.float32) for name, array in weights.items()}
    rounded = {name: torch.tensor(array).bfloat16().float() for name, array in older.items()}
    batch["behavior_log_prob"] = torch_log_prob(
        rounded, torch.tensor(batch["previous"]), torch.tensor(batch["tokens"])
    ).numpy()

    loss, diagnostics, gradients, updated = torch_step(weights, batch)
    jax_loss, jax_diagnostics, jax_gradients, jax_updated = jax_step(weights, batch)

    print(f"{'':24}{'torch':>12}{'jax':>12}")
    print(f"{'loss':24}{loss:12.6f}{jax_loss:12.6f}")
    print(f"{'gradient norm':24}{norm(gradients):12.6f}{norm(jax_gradients):12.6f}")
    for name in ("ratio_mean", "ratio_max", "binary_tv_max", "attenuated_fraction", "effective_sample_size"):
        print(f"{name:24}{diagnostics[name]:12.6f}{jax_diagnostics[name]:12.6f}")
    difference = max(float(np.abs(updated[name] - jax_updated[name]).max()) for name in weights)
    moved = max(float(np.abs(updated[name] - weights[name]).max()) for name in weights)
    print(f"largest change of a parameter: {moved:.3g}")
    print(f"largest difference of an updated parameter between the two: {difference:.3g} (tolerance {TOLERANCE:g})")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
