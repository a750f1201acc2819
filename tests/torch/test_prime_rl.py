"""The prime-rl integration against prime-rl's contract: its own loss module where it is installed, else its two types.

It is on no package index. Contract as of PrimeIntellect-ai/prime-rl 349283dbb7f6, src/prime_rl/trainer/rl/loss.py.
"""

import importlib.util
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drpo_core import DPPO, DRPO, summarize, token_diagnostics, token_mean
from drpo_core.objectives import OBJECTIVES

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "prime_rl.md"
LENGTHS = (3, 6, 1, 4)
BITING = {
    "delta": {"delta_low": 0.05, "delta_high": 0.15},
    "eps": {"eps_low": 0.1, "eps_high": 0.2},
    "max_ratio": {"max_ratio": 1.2},
}
FAMILIES = {family.name: family for family in OBJECTIVES}


def parameters_of(name):
    """Of a family, at which a dozen tokens lie on both sides."""
    family = FAMILIES[name]
    if family.threshold is None:
        return {}
    return BITING.get(family.threshold, {family.threshold: next(iter(family.typical), None)})


if importlib.util.find_spec("prime_rl") is None:

    @dataclass
    class LossInputs:
        """The fields of prime-rl's class of this name."""

        trainer_logprobs: torch.Tensor
        inference_logprobs: torch.Tensor
        ref_logprobs: torch.Tensor | None
        advantages: torch.Tensor
        loss_mask: torch.Tensor
        loss_weights: torch.Tensor | None = None
        score_correction: torch.Tensor | None = None

    @dataclass
    class LossOutputs:
        """The fields of prime-rl's class of this name."""

        loss: torch.Tensor
        metrics: dict

    names = ["prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss"]
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].LossInputs, modules[names[-1]].LossOutputs = LossInputs, LossOutputs
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        from drpo_torch.integrations.prime_rl import policy_loss
else:
    from drpo_torch.integrations.prime_rl import policy_loss
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs


def sequences(*, weights=False, dtype=torch.float64):
    """What prime-rl hands to a loss, sequence by sequence; the leaves are the trainer's log-probs."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for n in LENGTHS:
        log_prob = torch.empty(n, dtype=dtype).uniform_(-3.0, -0.05, generator=generator)
        drift = torch.empty(n, dtype=dtype).uniform_(-0.8, 0.8, generator=generator)
        weight = torch.empty(n, dtype=dtype).uniform_(0.2, 2.0, generator=generator)
        result.append(
            LossInputs(
                trainer_logprobs=log_prob.requires_grad_(),
                inference_logprobs=(log_prob.detach() + drift).clamp(max=-1e-3),
                ref_logprobs=None,
                advantages=torch.randn(n, dtype=dtype, generator=generator),
                loss_mask=torch.arange(n) != 2,
                loss_weights=weight if weights else None,
            )
        )
    return result


def step(batch, **kwargs):
    """Loss of a step, gradients, and metrics as the trainer logs them: sums over sequences, over the count of tokens."""
    outputs = [policy_loss(inputs, **kwargs) for inputs in batch]
    scale = sum(inputs.loss_mask.sum() for inputs in batch)
    loss = sum(output.loss for output in outputs) / scale
    gradients = torch.autograd.grad(loss, [inputs.trainer_logprobs for inputs in batch])
    merged = {name: torch.cat([output.metrics[name] for output in outputs]) for name in outputs[0].metrics}
    return loss.detach(), torch.cat(gradients), merged


def padded(batch):
    """The same batch, (sequences, tokens)."""

    def pad(name):
        rows = [getattr(inputs, name) for inputs in batch]
        return None if rows[0] is None else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return {field.name: pad(field.name) for field in fields(LossInputs)}


@pytest.mark.parametrize("weights", [False, True], ids=["", "loss_weights"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_library_on_the_padded_batch(name, weights):
    batch = sequences(weights=weights)
    loss, gradient, _ = step(batch, objective=name, **parameters_of(name))
    whole = padded(batch)
    from drpo_torch import policy_loss as reference  # noqa: PLC0415

    expected, _ = reference(
        FAMILIES[name].objective(**FAMILIES[name].fixed, **parameters_of(name)),
        log_prob=whole["trainer_logprobs"],
        behavior_log_prob=whole["inference_logprobs"],
        advantages=whole["advantages"],
        mask=whole["loss_mask"],
        reduction=token_mean,
        token_weights=whole["loss_weights"],
    )
    gradients = torch.autograd.grad(expected, [inputs.trainer_logprobs for inputs in batch])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, torch.cat(gradients), rtol=1e-12, atol=1e-15)
    assert gradient.abs().max() > 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_outputs_are_what_prime_rl_aggregates(name):
    output = policy_loss(sequences()[1], objective=name, **parameters_of(name))
    assert isinstance(output, LossOutputs)
    assert output.loss.shape == ()
    for metric in output.metrics.values():
        assert metric.shape == (1,)
        assert not metric.requires_grad


def test_metrics_are_those_of_each_sequence():
    batch = sequences()
    _, _, metrics = step(batch, objective="DPPO-TV", delta=0.05)
    for i, inputs in enumerate(batch):
        arrays = (inputs.trainer_logprobs.detach(), inputs.inference_logprobs, inputs.advantages)
        for name, figure in summarize(token_diagnostics(DPPO(delta=0.05), *arrays, mask=inputs.loss_mask)).items():
            assert float(metrics[f"trust_region/{name}"][i]) == pytest.approx(figure, rel=1e-12)
    dropped = [float(x) for x in metrics["is_masked"]]
    assert 0.0 < max(dropped) <= 1.0


def test_a_sequence_without_an_advantage_adds_no_figure_of_weights():
    inputs = sequences()[1]
    inputs.advantages = torch.zeros_like(inputs.advantages)
    metrics = policy_loss(inputs, objective="DRPO", delta=0.1).metrics
    assert metrics["trust_region/weight_mean"].shape == (0,)
    assert metrics["trust_region/ratio_mean"].shape == (1,)
    assert metrics["is_masked"].tolist() == [0.0]


def test_masked_tokens_may_hold_anything():
    clean, spoilt = sequences(weights=True), sequences(weights=True)
    for inputs in spoilt:
        with torch.no_grad():
            for tensor in (inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, inputs.loss_weights):
                tensor[~inputs.loss_mask] = float("nan")
    results = [step(batch, objective="DRPO", delta=0.1) for batch in (clean, spoilt)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


class Own:
    """Half of −A r."""

    def loss(self, tokens):
        """−A r / 2."""
        return -0.5 * tokens.advantages * tokens.ratio

    def weight(self, tokens):
        """1 / 2."""
        return 0.5 * tokens.xp.ones_like(tokens.ratio)


def test_an_objective_of_ones_own():
    batch = sequences()
    assert torch.equal(step(batch, objective=DRPO(delta=0.1))[1], step(batch, objective="DRPO", delta=0.1)[1])
    torch.testing.assert_close(2.0 * step(batch, objective=Own())[1], step(batch, objective="PG-IS")[1], rtol=1e-14, atol=0.0)


def test_parity_with_importance_policy_optimization():
    """Prime-rl's default loss drops by distance alone; where no token returns to μ from outside, that is DPPO."""
    batch, eps = sequences(), 0.1
    for inputs in batch:
        gap = inputs.trainer_logprobs.detach().exp() - inputs.inference_logprobs.exp()
        inputs.advantages = inputs.advantages.abs() * gap.sign()
    _, gradient, metrics = step(batch, objective="DPPO-TV", delta=eps)
    count = sum(inputs.loss_mask.sum() for inputs in batch)
    expected, shares = [], []
    for inputs in batch:
        pi, mu = inputs.trainer_logprobs.detach().exp(), inputs.inference_logprobs.exp()
        kept = inputs.loss_mask & ((pi - mu).abs() <= eps)
        expected.append(torch.where(kept, -inputs.advantages * pi / mu / count, 0.0))
        shares.append(float((inputs.loss_mask & ~kept).sum() / inputs.loss_mask.sum()))
    torch.testing.assert_close(gradient, torch.cat(expected), rtol=1e-12, atol=1e-15)
    assert metrics["is_masked"].tolist() == pytest.approx(shares)
    assert 0.0 < sum(shares) < len(shares)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"objective": "drpo", "delta": 0.1}, ValueError, "objective: expected one of PG-IS, .*DPPO-KL, .*got 'drpo'"),
        ({"objective": "DRPO"}, TypeError, "expected either delta or both"),
        ({"objective": "DRPO", "eps": 0.1}, TypeError, "eps"),
        ({"objective": "DRPO", "delta": -1.0}, ValueError, "delta: expected a finite number greater than 0"),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message):
        policy_loss(sequences()[0], **kwargs)


def test_the_configuration_of_the_page_runs():
    source = PAGE.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    loss = tomllib.loads(source)["trainer"]["loss"]
    assert loss["type"] == "custom"
    assert loss["import_path"] == f"{policy_loss.__module__}.{policy_loss.__name__}"
    assert policy_loss(sequences()[0], **loss["kwargs"]).loss.isfinite()
