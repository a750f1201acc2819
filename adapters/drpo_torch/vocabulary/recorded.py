"""Records of the behaviour policy μ beside the sampled token: log-probs of K tokens, those of all, or its head.

What a divergence is measured from, or the score-centring term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_shape, check_tensor
from drpo_torch.vocabulary.row_map import check_temperature
from drpo_torch.vocabulary.softmax import Tempering

if TYPE_CHECKING:
    from typing import TypeAlias

__all__ = [
    "FullCentering",
    "FullDivergence",
    "LinearHead",
    "TopKCentering",
    "TopKDivergence",
    "check_head",
    "head_logits",
    "product_dtype",
    "products_like",
]


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """An LM head and its input, from which logits can be recomputed: cap·tanh((h Wᵀ + b)/cap).

    Parameters
    ----------
    hidden
        Hidden states h, (…, H).
    weight, bias
        W, (V, H), in the dtype of `hidden` except under autocast; and b, (V,), or None.
    logit_softcap
        cap > 0, in units of a logit; None for none.

    Raises
    ------
    TypeError
        If an array is not a floating-point tensor, or the soft-cap is not a number.
    ValueError
        If the shapes disagree or the soft-cap is not finite and positive.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import LinearHead
    >>> head = LinearHead(torch.randn(4, 8), torch.randn(10, 8), logit_softcap=30.0)
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        check_head(self.hidden, self.weight, self.bias, may_be_empty=True)
        if self.logit_softcap is not None:
            object.__setattr__(self, "logit_softcap", check_number("logit_softcap", self.logit_softcap, above=0.0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopKDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, from recorded log μ of K tokens.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    ids, behavior_log_prob
        Ids of the K recorded tokens and their log μ, nats; (…, K). An id that comes twice counts once.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the kind is unknown or the shapes differ.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import TopKDivergence
    >>> recorded = TopKDivergence(
    ...     kind="tv", ids=torch.tensor([[3, 5]]), behavior_log_prob=torch.tensor([[0.6, 0.3]]).log()
    ... )
    """

    kind: str
    ids: torch.Tensor
    behavior_log_prob: torch.Tensor

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        _check_kind(self.kind)
        _check_top_k(self.ids, behavior_log_prob=self.behavior_log_prob)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, over the whole vocabulary.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    behavior
        Logits or log-probs of μ, (…, V), or the `LinearHead` to recompute them from, chunk by chunk.
    temperature
        μ is softmax(behavior / temperature): 1 for recorded log-probs; a number, or one per token, (…).

    Raises
    ------
    TypeError
        If a type or dtype is wrong.
    ValueError
        If the kind is unknown, or the temperature is not finite and positive.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import FullDivergence
    >>> recorded = FullDivergence(kind="kl", behavior=torch.randn(4, 10).log_softmax(-1))
    """

    kind: str
    behavior: torch.Tensor | LinearHead
    temperature: float | torch.Tensor = 1.0

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        _check_kind(self.kind)
        _check_full(self)

    @property
    def tempering(self) -> Tempering:
        """The step from the recorded logits to those of μ, over the whole vocabulary."""
        return _tempering(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopKCentering:
    """The score-centring term of a policy loss over recorded log μ of K tokens and one tail for all others.

    The K tokens must not depend on which token was sampled, or the term's expectation is another one.

    Parameters
    ----------
    ids, behavior_log_prob
        Ids of the K recorded tokens (usually μ's most likely ones) and their log μ, nats; (…, K). An id that comes twice
        counts once, the first time.
    proximal_log_prob
        Their log π_old, nats, (…, K), where the mode needs it.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes differ or K is 0.

    See Also
    --------
    drpo_core.centering.score_centering : the formula.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import TopKCentering
    >>> recorded = TopKCentering(ids=torch.tensor([[3, 5]]), behavior_log_prob=torch.tensor([[0.6, 0.3]]).log())
    """

    ids: torch.Tensor
    behavior_log_prob: torch.Tensor
    proximal_log_prob: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        others = {} if self.proximal_log_prob is None else {"proximal_log_prob": self.proximal_log_prob}
        _check_top_k(self.ids, behavior_log_prob=self.behavior_log_prob, **others)
        if self.ids.shape[-1] == 0:
            msg = f"ids: expected shape (…, K) with K of 1 or more, got {tuple(self.ids.shape)}"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullCentering:
    """The score-centring term of a policy loss over the whole vocabulary: exact, in another pass over the logits.

    Parameters
    ----------
    behavior
        Logits or log-probs of μ, (…, V), or the `LinearHead` to recompute them from, chunk by chunk.
    temperature
        μ is softmax(behavior / temperature): 1 for recorded log-probs; a number, or one per token, (…).

    Raises
    ------
    TypeError
        If a type or dtype is wrong.
    ValueError
        If the temperature is not finite and positive.

    See Also
    --------
    drpo_core.centering.score_centering : the formula.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import FullCentering
    >>> recorded = FullCentering(behavior=torch.randn(4, 10).log_softmax(-1))
    """

    behavior: torch.Tensor | LinearHead
    temperature: float | torch.Tensor = 1.0

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        _check_full(self)

    @property
    def tempering(self) -> Tempering:
        """The step from the recorded logits to those of μ, over the whole vocabulary."""
        return _tempering(self)


if TYPE_CHECKING:
    Divergence: TypeAlias = torch.Tensor | TopKDivergence | FullDivergence
    Centering: TypeAlias = TopKCentering | FullCentering


def _check_top_k(ids: object, **log_probs: object) -> None:
    """Raise unless these are ids (…, K) and log-probs of them."""
    ids = check_tensor("ids", ids, "integral")
    if ids.ndim == 0:
        msg = "ids: expected shape (…, K), got ()"
        raise ValueError(msg)
    for name, log_prob in log_probs.items():
        check_shape(name, check_tensor(name, log_prob, beside=ids), ids.shape, "ids")


def _check_full(record: FullDivergence | FullCentering) -> None:
    """Raise for what is no behaviour policy, and keep the temperature as a Python float or a tensor without a graph."""
    if not isinstance(record.behavior, LinearHead):
        check_tensor("behavior", record.behavior)
    temperature = check_temperature("temperature", record.temperature)
    rows = record.behavior.hidden if isinstance(record.behavior, LinearHead) else record.behavior
    if isinstance(temperature, torch.Tensor):
        check_shape("temperature", check_tensor("temperature", temperature, beside=rows), rows.shape[:-1], "the tokens")
    object.__setattr__(record, "temperature", temperature)


def _tempering(record: FullDivergence | FullCentering) -> Tempering:
    cap = record.behavior.logit_softcap if isinstance(record.behavior, LinearHead) else None
    temperature = record.temperature
    return Tempering(temperature.reshape(-1) if isinstance(temperature, torch.Tensor) else temperature, cap)


def check_head(hidden: object, weight: object, bias: object | None, *, may_be_empty: bool = False) -> None:
    """Raise unless these are hidden states (…, H), a weight (V, H) and a bias (V,), none of them of size 0 in H or V.

    V may be 0 where other ranks hold the rest of the vocabulary.
    """
    hidden = check_tensor("hidden", hidden)
    weight = check_tensor("weight", weight, beside=hidden)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        msg = f"hidden: expected shape (…, H) with H of 1 or more, got {tuple(hidden.shape)}"
        raise ValueError(msg)
    if weight.ndim != 2 or (weight.shape[0] == 0 and not may_be_empty):
        msg = f"weight: expected shape (V, H) with V of 1 or more, got {tuple(weight.shape)}"
        raise ValueError(msg)
    check_shape("weight", weight, (weight.shape[0], hidden.shape[-1]), "the vocabulary and hidden, (V, H)")
    if bias is not None:
        check_shape("bias", check_tensor("bias", bias, beside=hidden), weight.shape[:1], "the vocabulary, (V,)")


def _check_kind(kind: object) -> None:
    if not isinstance(kind, str) or kind not in ("tv", "kl"):
        msg = f"kind: expected 'tv' or 'kl', got {kind!r}"
        raise ValueError(msg)


def product_dtype(hidden: torch.Tensor, weight: torch.Tensor, name: str = "") -> torch.dtype:
    """The dtype in which the head's products are taken: that of autocast, which leaves float64 alone, or of both inputs."""
    device = hidden.device.type
    may_cast = torch.float64 not in (hidden.dtype, weight.dtype) and torch.amp.is_autocast_available(device)
    if may_cast and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        msg = (
            f"{name}weight: expected the dtype of {name}hidden, {hidden.dtype}, except under autocast (which leaves float64 "
            f"as it is), got {weight.dtype}"
        )
        raise TypeError(msg)
    return hidden.dtype


def products_like(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty stand-in for logits, with the dtype and device that products with these hidden states will have."""
    return torch.empty((0, 1), dtype=dtype, device=hidden.device)


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden (rows, H) times weight (V, H) transposed, plus bias, in `out` (rows, V) if given."""
    logits = torch.mm(hidden, weight.mT, out=out)
    return logits if bias is None else logits.add_(bias)
