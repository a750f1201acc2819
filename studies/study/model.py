"""A small decoder-only transformer, dense or mixture of experts, as a function of a dict of parameters.

The engine's copy is then a dict of rounded tensors, and the JAX twin is the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from study.task import CONTEXT, VOCABULARY

if TYPE_CHECKING:
    from study.precision import Float32

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model. With `experts`, each token goes to the two experts with the highest affinity."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    experts: int = 0

    @property
    def chosen(self) -> int:
        """Experts for each token."""
        return 2


SHAPES = {"dense": Shape(), "moe": Shape(hidden=64, experts=8)}


def initial(shape: Shape, seed: int) -> Parameters:
    """Initial parameters, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden = shape.width, shape.hidden

    def normal(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(size, generator=generator) * scale

    parameters = {"embedding": normal(VOCABULARY, width, scale=0.1), "position": normal(CONTEXT, width, scale=0.1)}
    several = (shape.experts,) if shape.experts else ()
    for i in range(shape.layers):
        parameters |= {
            f"{i}.norm1": torch.ones(width),
            f"{i}.qkv": normal(3 * width, width, scale=width**-0.5),
            f"{i}.out": normal(width, width, scale=(2 * width) ** -0.5),
            f"{i}.norm2": torch.ones(width),
            f"{i}.up": normal(*several, hidden, width, scale=width**-0.5),
            f"{i}.down": normal(*several, width, hidden, scale=(2 * hidden) ** -0.5),
        }
        if shape.experts:
            parameters[f"{i}.router"] = normal(shape.experts, width, scale=width**-0.5)
    parameters["norm"] = torch.ones(width)
    return parameters


def copied(parameters: Parameters) -> Parameters:
    """Detached copies of the parameters."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def prepared(parameters: Parameters, precision: Float32) -> Parameters:
    """The parameters in the number format of an engine."""
    return {name: precision.prepare(name, p) for name, p in parameters.items()}


@dataclass(slots=True)
class Cache:
    """Keys and values of the positions so far, one pair for each layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def empty(cls, shape: Shape, batch: int, dtype: torch.dtype) -> Cache:
        """A cache of no position."""
        nothing = torch.zeros(batch, shape.heads, 0, shape.width // shape.heads, dtype=dtype)
        return cls([nothing] * shape.layers, [nothing] * shape.layers)

    def rows(self, which: torch.Tensor) -> Cache:
        """The cache of the sequences with these indices, which may repeat."""
        return Cache([k[which] for k in self.keys], [v[which] for v in self.values])


def hidden_states(
    parameters: Parameters, shape: Shape, tokens: torch.Tensor, precision: Float32, cache: Cache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States before the head, (batch, tokens, width), and the routers' load-balancing term, which is 0 without experts."""
    p = parameters
    cache = cache or Cache.empty(shape, tokens.shape[0], precision.dtype)
    past = cache.keys[0].shape[2]
    new = tokens.shape[1]
    causal = torch.arange(past + new) <= torch.arange(past, past + new)[:, None]
    x = p["embedding"][tokens] + p["position"][past : past + new]
    imbalance = torch.zeros(())
    for i in range(shape.layers):
        x = x + _attention(p, i, shape, _normalised(x, p[f"{i}.norm1"]), causal, precision, cache)
        y = _normalised(x, p[f"{i}.norm2"]).flatten(0, 1)
        if shape.experts:
            update, term = mixture(p, i, shape, y, precision)
            imbalance = imbalance + term
        else:
            update = _feed_forward(p, i, y, precision)
        x = x + update.view_as(x)
    return _normalised(x, p["norm"]), imbalance


def logits(parameters: Parameters, states: torch.Tensor) -> torch.Tensor:
    """Float32 logits. The head is the embedding, multiplied in the dtype of the states."""
    return (states @ parameters["embedding"].mT).float()


def _normalised(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * gain


def _attention(
    p: Parameters, i: int, shape: Shape, x: torch.Tensor, causal: torch.Tensor, precision: Float32, cache: Cache
) -> torch.Tensor:
    batch, new, width = x.shape
    size = width // shape.heads
    q, k, v = precision.linear(x.flatten(0, 1), p[f"{i}.qkv"]).view(batch, new, 3, shape.heads, size).permute(2, 0, 3, 1, 4)
    cache.keys[i] = k = torch.cat([cache.keys[i], k], 2)
    cache.values[i] = v = torch.cat([cache.values[i], v], 2)
    scores = (q @ k.mT).float() * size**-0.5
    share = scores.masked_fill(~causal, -torch.inf).softmax(-1).to(v.dtype)
    return precision.linear((share @ v).transpose(1, 2).reshape(batch * new, width), p[f"{i}.out"]).view(batch, new, width)


def _feed_forward(p: Parameters, i: int, x: torch.Tensor, precision: Float32) -> torch.Tensor:
    return precision.linear(torch.nn.functional.silu(precision.linear(x, p[f"{i}.up"])), p[f"{i}.down"])


def mixture(p: Parameters, i: int, shape: Shape, x: torch.Tensor, precision: Float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixture of experts for x of shape (tokens, width), and its load-balancing term.

    All experts see all tokens, and the gate selects: at this size that is cheaper than gathering.
    """
    affinity = (x @ p[f"{i}.router"].mT).float().softmax(-1)
    best, index = affinity.topk(shape.chosen, -1)
    gate = torch.zeros_like(affinity).scatter(-1, index, best / best.sum(-1, keepdim=True))
    y = torch.einsum("ne,enw->nw", gate.to(x.dtype), _feed_forward(p, i, x, precision))
    used = (gate > 0).float().mean(0) * shape.experts / shape.chosen
    return y, (used * affinity.mean(0)).sum() - 1.0
