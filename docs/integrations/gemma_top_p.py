"""Replay the supports of truncated sampling with Gemma 3 270M: ``python gemma_top_p.py`` writes gemma_top_p.json.

μ samples in bfloat16 with a KV cache, from the tokens that top-p, top-k or min-p keeps; it records their ids and the log-prob
of each token after renormalising. π is the same weights in float32, teacher-forced, before any update: where π is over the
recorded supports, all that is left between the two is rounding.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from drpo_torch import Support, token_log_prob
from gemma_arithmetic import load

from drpo_core import DRPO, summarize, token_diagnostics

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

# one token each, so that prompts are equally long
SUBJECTS = ("sea", "bridge", "winter", "bread", "moon", "clock", "garden", "train")
PROMPTS = [f"Write one sentence about the {subject}.\nAnswer:" for subject in SUBJECTS]
SAMPLES, LENGTH = 8, 32
DELTA = 0.15


def top_p(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep the most likely tokens up to this share of the probability, the one that reaches it included."""

    def keep(probability: torch.Tensor) -> torch.Tensor:
        ordered, ids = probability.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        return torch.zeros_like(probability, dtype=torch.bool).scatter_(-1, ids, before < share)

    return keep


def top_k(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep the K most likely tokens."""
    return lambda probability: probability >= probability.topk(k, -1).values[:, -1:]


def min_p(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep the tokens that are at least this share as likely as the most likely one."""
    return lambda probability: probability >= share * probability.amax(-1, keepdim=True)


TRUNCATIONS = {
    "top-p 0.95": top_p(0.95),
    "top-p 0.8": top_p(0.8),
    "top-k 20": top_k(20),
    "min-p 0.05": min_p(0.05),
}


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: torch.Tensor, keep: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, Support]:
    """Tokens, their log μ (B, T), and the supports of all of them, row by row."""
    fed, cache, tokens, log_probs, kept = prompts, None, [], [], []
    for _ in range(LENGTH):
        output = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        mask = keep(logits.softmax(-1))
        every = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
        fed = torch.multinomial(every.exp(), 1)
        tokens.append(fed)
        log_probs.append(every.gather(-1, fed))
        kept.append([row.nonzero()[:, 0] for row in mask])
    rows = [ids for row in zip(*kept, strict=True) for ids in row]
    offsets = torch.tensor([0, *(len(ids) for ids in rows)]).cumsum(0)
    return torch.cat(tokens, 1), torch.cat(log_probs, 1), Support(torch.cat(rows), offsets)


@torch.no_grad()
def figures(pi: torch.Tensor, mu: torch.Tensor) -> dict[str, float]:
    """How far log π is from log μ at the sampled tokens, and what DRPO makes of it at advantages of 1 and −1."""
    ratio, found = (pi - mu).exp(), {}
    for sign in (1.0, -1.0):
        found[sign] = summarize(token_diagnostics(DRPO(delta=DELTA), pi, mu, torch.full_like(pi, sign)))
    return {
        "ratio_mean": float(ratio.mean()),
        "ratio_standard_error": float(ratio.std() / ratio.numel() ** 0.5),
        "log_ratio_abs_mean": found[1.0]["log_ratio_abs_mean"],
        "log_ratio_abs_max": float((pi - mu).abs().max()),
        "binary_tv_mean": found[1.0]["binary_tv_mean"],
        "outside_fraction": found[1.0]["outside_fraction"],
        "weight_min": min(each["weight_min"] for each in found.values()),
        "weight_max": max(each["weight_max"] for each in found.values()),
    }


def main() -> None:
    """Sample with each truncation, and compare with and without its supports."""
    model, tokenizer = load(seed=0)
    prompt_ids = torch.tensor(tokenizer(PROMPTS).input_ids).repeat_interleave(SAMPLES, 0)
    engine = copy.deepcopy(model).bfloat16()
    results = {}
    for name, keep in TRUNCATIONS.items():
        tokens, mu, support = sample(engine, prompt_ids, keep)
        with torch.no_grad():
            every = model(input_ids=torch.cat((prompt_ids, tokens), 1), logits_to_keep=LENGTH + 1).logits[:, :-1]
        over = {"whole vocabulary": None, "support": support}
        results[name] = {"mean_support": len(support.ids) / tokens.numel()} | {
            label: figures(token_log_prob(logits=every, tokens=tokens, support=s).log_prob, mu) for label, s in over.items()
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
