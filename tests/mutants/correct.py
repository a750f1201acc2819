"""Correct policy losses, one per style in which they are written, as plainly as a trainer would write them.

Each mutant of `mutants.py` is one of these with a line changed. They pass every check that applies to them, so what kills
a mutant is that line. They use nothing of drpo_core: the kit is tested on code that is not ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch


def numpy_drpo(log_prob, behavior_log_prob, advantages, mask, normalizer=None, *, low, high):
    """DRPO, token mean, which returns its own gradient and weight."""
    x = np.where(mask, log_prob, 0.0)
    b = np.where(mask, behavior_log_prob, 0.0)
    a = np.where(mask, advantages, 0.0)
    ell = x - b
    ratio = np.exp(np.minimum(ell, 20.0))
    excess = np.expm1(np.minimum(ell, 20.0))
    shift = np.sign(ell) * np.exp(np.maximum(x, b)) * -np.expm1(-np.abs(ell))
    delta = np.where(a < 0.0, low, high)
    weight = (delta - np.sign(a) * shift) / delta
    loss = -a * ratio + np.abs(a) * excess * shift / (2.0 * delta)
    gradient = -a * ratio * weight
    count = normalizer or max(mask.sum(), 1)
    return loss.sum() / count, gradient / count, weight


def numpy_dppo(log_prob, behavior_log_prob, advantages, mask, *, low, high):
    """DPPO Binary-TV, per token, which returns its own gradient and weight."""
    x = np.where(mask, log_prob, 0.0)
    b = np.where(mask, behavior_log_prob, 0.0)
    a = np.where(mask, advantages, 0.0)
    ell = x - b
    ratio = np.exp(np.minimum(ell, 20.0))
    shift = np.sign(ell) * np.exp(np.maximum(x, b)) * -np.expm1(-np.abs(ell))
    delta = np.where(a < 0.0, low, high)
    kept = np.sign(a) * shift <= delta
    weight = np.where(kept, 1.0, 0.0)
    loss = -a * ratio * weight
    return loss, loss, weight


def numpy_truncated(log_prob, behavior_log_prob, advantages, mask, *, max_ratio):
    """Truncated importance sampling, per token, as a value alone: its gradient is a difference."""
    ell = np.where(mask, log_prob - behavior_log_prob, 0.0)
    a = np.where(mask, advantages, 0.0)
    ratio = np.exp(np.minimum(ell, np.log(max_ratio)))
    beyond = np.maximum(ell - np.log(max_ratio), 0.0)
    return -a * (ratio + max_ratio * beyond)


def numpy_surrogate(log_prob, behavior_log_prob, advantages, mask):
    """Unregularised surrogate, per token, as a value alone: its gradient is a difference."""
    ell = np.where(mask, log_prob - behavior_log_prob, 0.0)
    a = np.where(mask, advantages, 0.0)
    return -a * np.exp(np.minimum(ell, 20.0))


def numpy_packed(log_prob, behavior_log_prob, advantages, mask, segment_ids=None, normalizer=None):
    """Unregularised surrogate, sequence mean of token means, of padded rows or of packed tokens."""
    x = np.where(mask, log_prob, 0.0)
    b = np.where(mask, behavior_log_prob, 0.0)
    a = np.where(mask, advantages, 0.0)
    ids = np.indices(mask.shape)[0] if segment_ids is None else segment_ids
    starts = np.diff(ids.ravel(), prepend=-1) != 0
    sequence = np.cumsum(starts).reshape(mask.shape) - 1
    lengths = np.bincount(sequence[mask], minlength=int(starts.sum()))
    sequences = normalizer or max((lengths > 0).sum(), 1)
    gradient = -a * np.exp(np.minimum(x - b, 20.0)) / np.maximum(lengths[sequence], 1) / sequences
    return gradient.sum(), gradient


def numpy_horizon(log_prob, behavior_log_prob, advantages, mask, normalizer=None):
    """Unregularised surrogate, sequence mean of token sums over a horizon of 5 (Dr. GRPO)."""
    x = np.where(mask, log_prob, 0.0)
    b = np.where(mask, behavior_log_prob, 0.0)
    a = np.where(mask, advantages, 0.0)
    horizon = 5.0
    sequences = normalizer or max(mask.any(axis=-1).sum(), 1)
    gradient = -a * np.exp(np.minimum(x - b, 20.0)) / horizon / sequences
    return gradient.sum(), gradient


def torch_surrogate(log_prob, behavior_log_prob, advantages, mask, normalizer=None):
    """Unregularised surrogate, token mean, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ratio = torch.exp((x - b).clamp(max=20.0))
    loss = -a * ratio
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return loss.sum() / count


def torch_drpo(log_prob, behavior_log_prob, advantages, mask, normalizer=None, *, low, high):
    """DRPO in ratio form, token mean, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ell = (x - b).clamp(max=20.0)
    ratio = torch.exp(ell)
    mu = torch.exp(b)
    delta = torch.where(a < 0.0, low, torch.full_like(a, high))
    # not expm1, whose derivative torch computes as expm1 + 1
    penalty = a.abs() * mu * (ratio - 1.0) ** 2 / (2.0 * delta)
    loss = -a * ratio + penalty
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return loss.sum() / count


def torch_drpo_score(log_prob, behavior_log_prob, advantages, mask, *, low, high):
    """DRPO in score form, per token: a detached coefficient times the log-probability."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ell = (x - b).clamp(max=20.0)
    shift = torch.sign(ell) * torch.exp(torch.maximum(x, b)) * -torch.expm1(-ell.abs())
    delta = torch.where(a < 0.0, low, torch.full_like(a, high))
    weight = (delta - torch.sign(a) * shift) / delta
    coefficient = (torch.exp(ell) * weight).detach()
    return -coefficient * a * x


def torch_mask_drpo(log_prob, behavior_log_prob, advantages, mask, *, low, high):
    """Mask-DRPO in score form, per token."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ell = (x - b).clamp(max=20.0)
    shift = torch.sign(ell) * torch.exp(torch.maximum(x, b)) * -torch.expm1(-ell.abs())
    delta = torch.where(a < 0.0, low, torch.full_like(a, high))
    outward = torch.sign(a) * shift
    weight = torch.where(outward <= delta, 1.0, (delta - outward) / delta)
    return -(torch.exp(ell) * weight).detach() * a * x


def torch_spo(log_prob, behavior_log_prob, advantages, mask, *, low, high):
    """SPO in ratio form, per token, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ell = (x - b).clamp(max=20.0)
    ratio = torch.exp(ell)
    eps = torch.where(a < 0.0, low, torch.full_like(a, high))
    return -a * ratio + a.abs() * (ratio - 1.0) ** 2 / (2.0 * eps)


def torch_ppo(log_prob, behavior_log_prob, advantages, mask, normalizer=None, *, low, high):
    """PPO clip-higher, token mean, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ratio = torch.exp((x - b).clamp(max=20.0))
    clipped = torch.clamp(ratio, 1.0 - low, 1.0 + high)
    loss = torch.maximum(-a * ratio, -a * clipped)
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return loss.sum() / count


def torch_dual_clip(log_prob, behavior_log_prob, advantages, mask, *, low, high, dual_clip):
    """PPO with dual clip, per token, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ratio = torch.exp((x - b).clamp(max=20.0))
    clipped = torch.clamp(ratio, 1.0 - low, 1.0 + high)
    loss = torch.maximum(-a * ratio, -a * clipped)
    return torch.where((a < 0.0) & (ratio > dual_clip), -a * dual_clip, loss)


def torch_dppo(log_prob, behavior_log_prob, advantages, mask, normalizer=None, *, low, high):
    """DPPO Binary-TV in ratio form, token mean, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ratio = torch.exp((x - b).clamp(max=20.0))
    shift = torch.exp(x.detach()) - torch.exp(b)
    delta = torch.where(a < 0.0, low, torch.full_like(a, high))
    kept = torch.sign(a) * shift <= delta
    loss = torch.where(kept, -a * ratio, 0.0)
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return loss.sum() / count


def torch_dppo_score(log_prob, behavior_log_prob, advantages, mask, *, low, high, max_ratio):
    """DPPO Binary-TV in the published score form, per token, with a truncated ratio."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    truncated = torch.exp((x - b).clamp(max=20.0)).clamp(max=max_ratio).detach()
    shift = torch.exp(x.detach()) - torch.exp(b)
    delta = torch.where(a < 0.0, low, torch.full_like(a, high))
    kept = torch.sign(a) * shift <= delta
    return torch.where(kept, -truncated * a * x, 0.0)


def torch_dppo_kl(log_prob, behavior_log_prob, advantages, mask, *, low, high):
    """DPPO Binary-KL in ratio form, per token, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    ratio = torch.exp((x - b).clamp(max=20.0))
    # log(1 − p) from log p, accurate at both ends; of double precision, where p is close to 1
    wide_x, wide_b = x.detach().double(), b.double()
    log_rest_x, log_rest_b = torch.log(-torch.expm1(wide_x)), torch.log(-torch.expm1(wide_b))
    mu, rest = torch.exp(wide_b), -torch.expm1(wide_b)
    kl = mu * (wide_b - wide_x) + torch.where(rest > 0.0, rest * (log_rest_b - log_rest_x), 0.0)
    diverging = a * (x - b) > 0.0
    # not where(…, low, high), which is of torch's default dtype, float32
    delta = torch.where(a < 0.0, low, torch.full_like(kl, high))
    kept = ~diverging | (kl <= delta)
    return torch.where(kept, -a * ratio, 0.0)


def torch_cispo(log_prob, behavior_log_prob, advantages, mask, normalizer=None, *, max_ratio):
    """CISPO, token mean: a detached, capped ratio times the log-probability."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    weight = torch.exp((x - b).clamp(max=20.0)).clamp(max=max_ratio).detach()
    loss = -weight * a * x
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return loss.sum() / count


def torch_sequence_mean(log_prob, behavior_log_prob, advantages, mask, normalizer=None):
    """Unregularised surrogate, sequence mean of token means, autodiff."""
    x = torch.where(mask, log_prob, 0.0)
    b = torch.where(mask, behavior_log_prob, 0.0)
    a = torch.where(mask, advantages, 0.0)
    loss = -a * torch.exp((x - b).clamp(max=20.0))
    lengths = mask.sum(-1, keepdim=True)
    sequences = (lengths > 0).sum().clamp(min=1) if normalizer is None else normalizer
    return (loss / lengths.clamp(min=1)).sum() / sequences


def jax_surrogate(log_prob, behavior_log_prob, advantages, mask):
    """Unregularised surrogate, per token, for jit."""
    x = jnp.where(mask, log_prob, 0.0)
    b = jnp.where(mask, behavior_log_prob, 0.0)
    a = jnp.where(mask, advantages, 0.0)
    return -a * jnp.exp(jnp.minimum(x - b, 20.0))


def jax_custom(log_prob, behavior_log_prob, advantages, mask):
    """Unregularised surrogate, per token, with a rule for its derivative that can be differentiated again."""
    x = jnp.where(mask, log_prob, 0.0)
    b = jnp.where(mask, behavior_log_prob, 0.0)
    a = jnp.where(mask, advantages, 0.0)

    @jax.custom_jvp
    def surrogate(x):
        return -a * jnp.exp(jnp.minimum(x - b, 20.0))

    @surrogate.defjvp
    def derivative(primals, tangents):
        gradient = surrogate(*primals)
        return gradient, gradient * tangents[0]

    return surrogate(x)


def numpy_divergences():
    """Binary, Top-K and full divergences, by the names and arguments of `drpo_core.divergence`."""

    def tv(pi, mu):
        return 0.5 * np.abs(pi - mu).sum(axis=-1)

    def kl(pi, mu):
        return np.where(mu > 0.0, mu * (np.log(np.maximum(mu, 1e-300)) - np.log(np.maximum(pi, 1e-300))), 0.0).sum(axis=-1)

    def two(log_p):
        return np.stack([np.exp(log_p), -np.expm1(log_p)], axis=-1)

    def top(sampled, top_k, sampled_in_top_k):
        forced = np.where(sampled_in_top_k, 0.0, np.exp(sampled))
        shown = np.concatenate([np.exp(top_k), forced[..., None]], axis=-1)
        rest = 1.0 - shown.sum(axis=-1, keepdims=True)
        # what is left of rounding when every token is shown is not a probability
        rest = np.where(rest > 1e-12, rest, 0.0)
        return np.concatenate([shown, rest], axis=-1)

    def of_two(divergence):
        return lambda x, b: divergence(two(x), two(b))

    def of_top(divergence):
        def measure(x, b, *, top_k_log_prob, top_k_behavior_log_prob, sampled_in_top_k):
            pi = top(x, top_k_log_prob, sampled_in_top_k)
            mu = top(b, top_k_behavior_log_prob, sampled_in_top_k)
            return divergence(pi, mu)

        return measure

    def of_all(divergence):
        return lambda x, b: divergence(np.exp(x), np.exp(b))

    return {
        f"{name}_{divergence.__name__}": make(divergence)
        for name, make in (("binary", of_two), ("top_k", of_top), ("full", of_all))
        for divergence in (tv, kl)
    }
