"""The public functions at vocabulary scale, each as one scalar of named tensors, and the same scalar by plain formulas.

Tests take what they vary (dtypes, engines, layouts, transforms, ambient states) from here, so that a function that is added
here is held to all of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from drpo_torch import (
    full_divergences,
    linear_log_prob,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    token_log_prob,
    top_k_divergences,
)

from drpo_core import DPPO, DRPO

V, H, K = 11, 4, 3
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ENGINES = ("arrays", "compiled", "auto")


class Function(NamedTuple):
    """A public function at vocabulary scale.

    `outputs(tensors, **options)` calls it and gives its differentiable outputs; `plain(tensors)` gives the same by formulas,
    from tensors in float64.
    """

    differentiated: tuple[str, ...]
    constant: tuple[str, ...]
    integers: tuple[str, ...]
    outputs: Callable[..., tuple[torch.Tensor, ...]]
    plain: Callable[..., tuple[torch.Tensor, ...]]
    engines: tuple[str, ...] = ENGINES

    @property
    def has_head(self):
        """Whether it takes hidden states and an LM head."""
        return "hidden" in self.differentiated

    def tensors(self, shape=(5,), seed=0):
        """Everything that the function takes, in float64."""
        every = every_tensor(shape, seed)
        return {name: every[name] for name in (*self.differentiated, *self.constant, *self.integers)}

    def gradients(self, tensors, factor=1.0, *, plain=False, **options):
        """A scalar that depends on each output differently, and its gradients."""
        leaves = {name: tensors[name].detach().clone().requires_grad_() for name in self.differentiated}
        outputs = (self.plain if plain else self.outputs)(tensors | leaves, **options)
        scalar = scalar_of(outputs) * factor
        return scalar.detach(), torch.autograd.grad(scalar, list(leaves.values()))


def scalar_of(outputs):
    """A number that depends on each element of each output differently."""
    total = 0.0
    for i, output in enumerate(outputs):
        coefficients = torch.linspace(1.0, 2.0, max(1, output.numel()), dtype=torch.float64)[: output.numel()]
        total = total + (i + 1.0) * (output.double() * coefficients.reshape(output.shape)).sum()
    return total


def every_tensor(shape, seed):
    """Tensors of all names that the functions have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    behavior_logits = normal(*shape, V)
    logits = behavior_logits + 0.5 * normal(*shape, V)
    tokens = torch.randint(V, shape, generator=generator)
    log_mu = behavior_logits.log_softmax(-1)
    top, ids = log_mu.topk(K, dim=-1)
    return {
        "logits": logits,
        "behavior_logits": behavior_logits,
        "hidden": normal(*shape, H),
        "weight": normal(V, H),
        "bias": normal(V),
        "tokens": tokens,
        "behavior_log_prob": log_mu.gather(-1, tokens[..., None])[..., 0],
        "advantages": normal(*shape),
        "mask": torch.rand(shape, generator=generator) < 0.8,
        "token_weights": 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64),
        # far from the threshold, so that no rounding moves a token across it
        "divergence": torch.where(torch.rand(shape, generator=generator) < 0.7, 0.1, 0.9).double(),
        "log_normalizer": logits.logsumexp(-1),
        "top_k_ids": ids,
        "top_k_behavior_log_prob": top,
    }


MEASURED = DPPO(delta=0.4, divergence="per_token")
UNMEASURED = DRPO(delta=0.9)


def _objective(tensors):
    return MEASURED if "divergence" in tensors else UNMEASURED


def _loss(function):
    def outputs(tensors, **options):
        result = function(_objective(tensors), **tensors, **options)
        return (result.loss,)

    return outputs


def _plain_loss(logits, tensors):
    safe = torch.where(tensors["mask"][..., None], logits, 0.0)
    tokens = torch.where(tensors["mask"], tensors["tokens"], 0)
    log_prob = safe.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    names = ("behavior_log_prob", "advantages", "mask", "token_weights", "divergence")
    rest = {name: tensors[name] for name in names if name in tensors}
    return (policy_loss(_objective(tensors), log_prob=log_prob, **rest, engine="arrays")[0],)


def _plain_linear(tensors):
    hidden = torch.where(tensors["mask"][..., None], tensors["hidden"], 0.0)
    return _plain_loss(hidden @ tensors["weight"].T + tensors["bias"], tensors)


def _plain_log_prob(tensors, ids=None):
    log_p = tensors["logits"].log_softmax(-1)
    tokens = tensors["tokens"].to(torch.int64)
    ids = log_p.detach().argsort(dim=-1, descending=True, stable=True)[..., :K] if ids is None else ids.to(torch.int64)
    entropy = -(log_p.exp() * log_p).sum(-1)
    log_prob = log_p.gather(-1, tokens[..., None])[..., 0]
    return log_prob, entropy, tensors["logits"].logsumexp(-1), log_p.gather(-1, ids)


def _plain_linear_log_prob(tensors):
    mask = tensors["mask"]
    hidden = torch.where(mask[..., None], tensors["hidden"], 0.0)
    logits = hidden @ tensors["weight"].T + tensors["bias"]
    *per_token, top_k = _plain_log_prob(tensors | {"logits": logits}, tensors["top_k_ids"])
    return *(torch.where(mask, x, 0.0) for x in per_token), torch.where(mask[..., None], top_k, 0.0)


def _plain_divergences(tensors):
    x, y = tensors["logits"].log_softmax(-1), tensors["behavior_logits"].log_softmax(-1)
    return 0.5 * (x.exp() - y.exp()).abs().sum(-1), (y.exp() * (y - x)).sum(-1)


def _plain_top_k(tensors):
    x = tensors["logits"] - tensors["log_normalizer"][..., None]
    tokens, ids = tensors["tokens"].to(torch.int64), tensors["top_k_ids"].to(torch.int64)
    among = (ids == tokens[..., None]).any(-1)
    p = torch.cat((x.gather(-1, ids), x.gather(-1, tokens[..., None])), -1).exp()
    q = torch.cat((tensors["top_k_behavior_log_prob"], tensors["behavior_log_prob"][..., None]), -1).exp()
    keep = torch.cat((torch.ones_like(ids, dtype=torch.bool), ~among[..., None]), -1)
    p, q = torch.where(keep, p, 0.0), torch.where(keep, q, 0.0)
    p, q = (torch.cat((m, 1.0 - m.sum(-1, keepdim=True)), -1) for m in (p, q))
    kl = torch.where(q > 0.0, q * (torch.where(q > 0.0, q, 1.0) / torch.where(q > 0.0, p, 1.0)).log(), 0.0).sum(-1)
    return 0.5 * (p - q).abs().sum(-1), kl


FUNCTIONS = {
    "token_log_prob": Function(
        ("logits",),
        (),
        ("tokens",),
        lambda tensors, **options: token_log_prob(**tensors, entropy=True, top_k=K, **options)[:4],
        _plain_log_prob,
    ),
    "linear_log_prob": Function(
        ("hidden", "weight", "bias"),
        (),
        ("tokens", "top_k_ids", "mask"),
        lambda tensors, **options: linear_log_prob(**tensors, entropy=True, **options)[:4],
        _plain_linear_log_prob,
    ),
    "logits_policy_loss": Function(
        ("logits",),
        ("behavior_log_prob", "advantages", "token_weights", "divergence"),
        ("tokens", "mask"),
        _loss(logits_policy_loss),
        lambda tensors: _plain_loss(tensors["logits"], tensors),
    ),
    "linear_policy_loss": Function(
        ("hidden", "weight", "bias"),
        ("behavior_log_prob", "advantages", "token_weights"),
        ("tokens", "mask"),
        _loss(linear_policy_loss),
        _plain_linear,
    ),
    "full_divergences": Function(
        ("logits",),
        ("behavior_logits",),
        (),
        lambda tensors, **options: tuple(full_divergences(**tensors, **options)),
        _plain_divergences,
    ),
    "top_k_divergences": Function(
        ("logits",),
        ("log_normalizer", "behavior_log_prob", "top_k_behavior_log_prob"),
        ("tokens", "top_k_ids"),
        lambda tensors, **options: tuple(top_k_divergences(**tensors, **options)),
        _plain_top_k,
        ("arrays",),
    ),
}
