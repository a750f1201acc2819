"""Other libraries' own functions, each absent if it can't be imported here (Triton kernels need a GPU)."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[[], object]
    # hidden, weight, ids, log μ, A, loss of log-probs → scalar loss
    Head = Callable[[Any, Any, Any, Any, Any, Callable[[Any], Any]], Any]


def verl_policy_losses(tokens: Any) -> dict[str, Function]:
    """The registered losses, with the metrics that they always compute, and the backward pass."""
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: PLC0415
        from verl.workers.config import ActorConfig  # noqa: PLC0415
    except ImportError:
        return {}
    settings = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0}
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)

    def run(mode: str) -> object:
        tokens.log_prob.grad = None
        loss, _ = get_policy_loss_fn(mode)(
            old_log_prob=tokens.behavior_log_prob,
            log_prob=tokens.log_prob,
            advantages=tokens.advantages,
            response_mask=tokens.mask,
            loss_agg_mode="token-mean",
            config=config,
            rollout_is_weights=None,
        )
        loss.backward()
        return loss

    return {f"verl {mode}": partial(run, mode) for mode in ("vanilla", "dppo_tv", "dppo_kl")}


VERL_MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "gspo": ("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "loss_agg_mode": "seq-mean-token-mean"}),
    "decoupled_geo_rs_token_tis": (
        "vanilla",
        {"rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.99_1.01"},
    ),
}
"""By verl's own word, its loss and keys: PPO clip of the sequence's ratio, and PPO clip corrected for the rollout."""


def verl_modes(tokens: Any, proximal: torch.Tensor) -> dict[str, Function]:
    """Those modes as verl's trainer puts them together: its correction from log-probs, its loss, its backward pass."""
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: PLC0415
        from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask  # noqa: PLC0415
        from verl.workers.config import ActorConfig  # noqa: PLC0415
    except ImportError:
        return {}

    def run(loss_mode: str, keys: dict[str, Any]) -> object:
        tokens.log_prob.grad = None
        clip = {name: value for name, value in keys.items() if name.startswith("clip_")}
        config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **clip)
        weights, mask = None, tokens.mask
        correction = {name: value for name, value in keys.items() if name.startswith("rollout_")}
        if correction:
            found, mask, _ = compute_rollout_correction_and_rejection_mask(
                proximal, tokens.behavior_log_prob, tokens.mask, **correction
            )
            weights = found.batch["rollout_is_weights"]
        loss, _ = get_policy_loss_fn(loss_mode)(
            old_log_prob=proximal,
            log_prob=tokens.log_prob,
            advantages=tokens.advantages,
            response_mask=mask,
            loss_agg_mode=keys.get("loss_agg_mode", "token-mean"),
            config=config,
            rollout_is_weights=weights,
        )
        loss.backward()
        return loss

    return {name: partial(run, *mode) for name, mode in VERL_MODES.items()}


def log_probs() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Log-probs of sampled tokens from logits."""
    found: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
    try:
        from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits  # noqa: PLC0415
    except ImportError:
        pass
    else:

        def with_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                entropy_from_logits(logits)
            chosen: torch.Tensor = logprobs_from_logits(logits, ids)
            return chosen

        found["verl `logprobs_from_logits`"] = logprobs_from_logits
        found["verl `logprobs_from_logits` + `entropy_from_logits`"] = with_entropy
    try:
        from trl.trainer.utils import selective_log_softmax  # noqa: PLC0415
    except ImportError:
        pass
    else:
        found["TRL `selective_log_softmax`"] = selective_log_softmax
    return found


def liger_log_softmax() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Log-probs by its Triton kernel, which has no backward pass, of logits (1, n + 1, V) and ids (1, n)."""
    try:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax  # noqa: PLC0415
    except ImportError:
        return None
    return partial(fused_selective_log_softmax, temperature=1.0)


def liger_grpo() -> Callable[..., torch.Tensor] | None:
    """Its GRPO loss by Triton kernels, of logits (1, n + 1, V), and of ids and log μ, (1, n); an advantage a sequence."""
    try:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss  # noqa: PLC0415
    except ImportError:
        return None

    def loss(logits: torch.Tensor, ids: torch.Tensor, behavior: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        # the mean of these is every reduction's at the same mask
        per_token = triton_grpo_loss(logits, behavior, None, ids, advantages, temperature=1.0, beta=0.0, inplace=False)[0]
        mean: torch.Tensor = per_token.mean()
        return mean

    return loss


def linear_log_probs() -> dict[str, Callable[..., Any]]:
    """Log-probs of sampled tokens, and entropies or None, from hidden states and the LM head."""
    found: dict[str, Callable[..., Any]] = {}
    fused = _verl_fused_head()
    if fused is not None:
        found["verl `FusedLinearForPPO`, with its entropy"] = fused
    try:
        from trl.kernels import ChunkedLogProbFunction  # noqa: PLC0415
    except ImportError:
        pass
    else:
        # 32,768: what its trainers take at a time
        def chunked(h: Any, w: Any, ids: Any, *, outputs: tuple[str, ...] = ()) -> Any:
            return ChunkedLogProbFunction.apply(h, w, None, ids, 1.0, 32_768, None, 1.0, outputs)[:2]

        found["TRL `ChunkedLogProbFunction`"] = chunked
        found["TRL `ChunkedLogProbFunction`, entropy"] = partial(chunked, outputs=("entropy",))
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        function = torch.nn.functional.linear_cross_entropy

        def cross_entropy(h: Any, w: Any, ids: Any) -> Any:
            return -function(h, w, ids, reduction="none", options=options(batch_chunk_size=128)), None

        found["torch `linear_cross_entropy`, chunks of 128, per token"] = cross_entropy
    return found


def _verl_fused_head() -> Callable[..., Any] | None:
    try:
        # beside a Liger without Triton, verl fails to import; without Liger it takes its own chunks
        with patch.dict(sys.modules, {"liger_kernel": None}):  # type: ignore[dict-item]
            from verl.utils.experimental.torch_functional import FusedLinearForPPO  # noqa: PLC0415
    except ImportError:
        return None
    fused: Callable[..., Any] = FusedLinearForPPO()
    return fused


def head_labels(chunk: int = 128) -> tuple[str, ...]:
    """What `heads` may find."""
    return (
        "verl `FusedLinearForPPO`",
        "Liger `LigerFusedLinearGRPOLoss`, its own GRPO loss",
        f"torch `linear_cross_entropy`, chunks of {chunk}, its own mean",
        f"torch `linear_cross_entropy`, chunks of {chunk}, per token",
    )


def heads(chunk: int = 128) -> dict[str, Head]:
    """Losses from hidden states and the LM head; torch's takes so many tokens at a time."""
    found: dict[str, Head] = {}
    of_verl, of_liger, of_torch, of_torch_per_token = head_labels(chunk)
    fused = _verl_fused_head()
    if fused is not None:
        found[of_verl] = lambda h, w, ids, _mu, _a, loss: loss(fused(h, w, ids)[0])
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: PLC0415
    except ImportError:
        pass
    else:
        liger = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)

        def grpo(h: Any, w: Any, ids: Any, mu: Any, advantages: Any, _loss: Any) -> Any:
            # sequences of 128 tokens, which it takes one at a time; an advantage a sequence
            def rows(x: Any) -> Any:
                return x.reshape(-1, min(128, len(x)), *x.shape[1:])

            ones = torch.ones_like(rows(ids))
            return liger(rows(h), w, rows(ids), ones, rows(advantages)[:, 0], old_per_token_logps=rows(mu))[0]

        found[of_liger] = grpo
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:

        def cross_entropy(h: Any, w: Any, ids: Any, _mu: Any, _a: Any, loss: Any) -> Any:
            chunks = options(batch_chunk_size=chunk)
            function = torch.nn.functional.linear_cross_entropy
            return loss(-function(h, w, ids, reduction="none", options=chunks))

        def mean(h: Any, w: Any, ids: Any, _mu: Any, _a: Any, _loss: Any) -> Any:
            return torch.nn.functional.linear_cross_entropy(h, w, ids, options=options(batch_chunk_size=chunk))

        found[of_torch] = mean
        found[of_torch_per_token] = cross_entropy
    return found
