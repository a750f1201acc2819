"""tinker's own client on our losses, over HTTP to a server on this machine whose model is a table of logits (conftest.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("tinker", reason="runs in the environment of `nox -s integration-tinker`")

import numpy as np
import torch
from drpo_torch import policy_loss
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.integrations.tinker import INPUT_RANKS, custom_loss, per_datum_inputs, per_datum_loss, summarize_metrics
from tinker import Datum, ModelInput, SampledSequence
from tinker.lib.public_interfaces.custom_loss import trace_loss
from torch.nn.utils.rnn import pad_sequence

from drpo_core import DPPO, DRPO, PolicyGradient, PPOClip, sequence_mean_token_mean, summarize, token_mean
from drpo_core.anchors import Behavior, Sequence
from drpo_core.modes import Mode
from drpo_core.objectives import OBJECTIVES as FAMILIES
from drpo_core.objectives import label


class Own:
    """An objective of a user."""

    def loss(self, tokens):
        """−A log(1 + r)."""
        return -tokens.advantages * tokens.xp.log1p(tokens.ratio)

    def weight(self, tokens):
        """1 / (1 + r)."""
        return 1.0 / (1.0 + tokens.ratio)


BITING = {"delta": (0.05, 0.15), "eps": (0.2, 0.4), "max_ratio": 1.2}
OBJECTIVES = [
    *(
        family.make(BITING.get(family.threshold, *family.typical[:1])) if family.threshold else family.make()
        for family in FAMILIES
    ),
    PolicyGradient(max_ratio=1.2),
    PPOClip(eps_low=0.1, eps_high=0.2, dual_clip=3.0),
    DPPO(delta_low=0.02, delta_high=0.05, divergence="binary_kl", max_ratio=1.5),
    Own(),
]
EXTREMES = {"ratio_max", "binary_tv_max", "weight_min", "weight_max"}
LENGTHS = (3, 6, 1, 4)
OBJECTIVE = DRPO(delta=0.1)


@pytest.fixture
def client(service):
    return service.create_lora_training_client("bigram").result(timeout=60)


def batch(server, **changes):
    """Sampled sequences, one token of them masked, as a user assembles them."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for n in LENGTHS:
        tokens = torch.randint(len(server.weight), (n + 1,), generator=generator)
        datum = Datum(ModelInput.from_ints(tokens[:-1].tolist()), {"target_tokens": tokens[1:]})
        drift = torch.empty(n).uniform_(-0.8, 0.8, generator=generator)
        inputs = {
            "logprobs": (server.log_prob(datum).detach() + drift).clamp(max=-1e-3),
            "advantages": torch.randn(n, generator=generator),
            "mask": (torch.arange(n) != 2).float(),
        }
        inputs = {**datum.loss_fn_inputs, **inputs, **{name: change(n) for name, change in changes.items()}}
        data.append(Datum(datum.model_input, {name: value for name, value in inputs.items() if value is not None}))
    return data


def log_probs(server, data):
    return [server.log_prob(datum).detach() for datum in data]


def expected(server, data, objective, **options):
    """Loss, gradient of the server's parameter and diagnostics by the library, on the padded batch."""
    columns = ("logprobs", "advantages", "mask")
    padded = {name: pad_sequence([d.loss_fn_inputs[name].to_torch() for d in data], batch_first=True) for name in columns}
    loss, statistics = policy_loss(
        objective,
        log_prob=pad_sequence([server.log_prob(datum) for datum in data], batch_first=True),
        behavior_log_prob=padded["logprobs"],
        advantages=padded["advantages"],
        mask=padded["mask"] != 0,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, server.weight)
    return float(loss.detach()), gradient, summarize(statistics)


def assert_same(server, result, data, objective, **options):
    loss, gradient, figures = expected(server, data, objective, **options)
    assert gradient.abs().max() > 0.0
    torch.testing.assert_close(server.weight.grad, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
    return figures


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_closure_is_the_library(objective, client, server):
    data = batch(server)
    result = client.forward_backward_custom(data, custom_loss(objective)).result(timeout=60)
    # a forward and a backward pass, in two chunks each
    assert sorted(server.requests) == [("cross_entropy", False, 2)] * 2 + [("cross_entropy", True, 2)] * 2
    figures = assert_same(server, result, data, objective, normalizer=1.0)
    for name, figure in figures.items():
        assert result.metrics[f"trust_region/{name}"] == pytest.approx(figure, rel=1e-5, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("uploaded", [False, True], ids=["client-side", "server-side"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_traced_loss_is_the_library(objective, uploaded, service, server):
    server.config["custom_loss_server_side"] = uploaded
    client = service.create_lora_training_client("bigram").result(timeout=60)
    data = batch(server)
    handle = service.create_custom_loss(per_datum_loss(objective), INPUT_RANKS).result(timeout=60)
    result = client.forward_backward_custom(per_datum_inputs(data), handle).result(timeout=60)
    assert {request[:2] for request in server.requests} == (
        {("custom", False)} if uploaded else {("cross_entropy", True), ("cross_entropy", False)}
    )
    figures = assert_same(server, result, data, objective, normalizer=1.0)
    summary = summarize_metrics(result.metrics)
    assert summary.keys() == {f"trust_region/{name}" for name in figures.keys() - EXTREMES}
    for name, figure in summary.items():
        assert figure == pytest.approx(figures[name.removeprefix("trust_region/")], rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_an_uploaded_loss_is_torch_and_operators_only(objective, service, server):
    server.config["custom_loss_server_side"] = True
    handle = service.create_custom_loss(per_datum_loss(objective), INPUT_RANKS).result(timeout=60)
    loss = server.losses[handle.loss_id]
    kinds = {(node["op"], node["target"].split(".")[0]) for node in loss["graph"]["nodes"]}
    calls = {("call_method", "detach"), ("call_function", "torch"), ("call_function", "operator")}
    assert kinds == {*(("placeholder", name) for name in INPUT_RANKS), *calls, ("output", "output")}
    assert loss["name"] == f"drpo_core_{type(objective).__name__.lower()}"


def test_thresholds_matter(client, server):
    gradients = []
    for delta in (0.05, 0.5):
        server.weight.grad = None
        client.forward_backward_custom(batch(server), custom_loss(DRPO(delta=delta))).result(timeout=60)
        gradients.append(server.weight.grad.clone())
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("normalizer", [None, 5.0])
@pytest.mark.parametrize("reduction", [token_mean, sequence_mean_token_mean])
def test_means_over_the_call(reduction, normalizer, client, server):
    data = batch(server)
    loss = custom_loss(OBJECTIVE, reduction=reduction, normalizer=normalizer)
    result = client.forward_backward_custom(data, loss).result(timeout=60)
    assert_same(server, result, data, OBJECTIVE, reduction=reduction, normalizer=normalizer)


def test_weights_multiply_losses(client, server):
    weighted = batch(server, weights=lambda n: torch.full((n,), 2.0))
    result = client.forward_backward_custom(weighted, custom_loss(OBJECTIVE)).result(timeout=60)
    loss, gradient, _ = expected(server, batch(server), OBJECTIVE, normalizer=1.0)
    torch.testing.assert_close(server.weight.grad, 2 * gradient)
    assert result.metrics["loss:sum"] == pytest.approx(2 * loss, rel=1e-5)


def per_datum(data, log_prob):
    """A traced loss, summed over data as tinker sums it."""
    graph = trace_loss(per_datum_loss(OBJECTIVE), INPUT_RANKS, "session").graph
    columns = [[d.loss_fn_inputs[name].to_torch() for name in list(INPUT_RANKS)[1:]] for d in per_datum_inputs(data)]
    return sum(graph(x, *column)[0] for x, column in zip(log_prob, columns, strict=True))


@pytest.mark.parametrize(
    "run", [lambda *arguments: custom_loss(OBJECTIVE)(*arguments)[0], per_datum], ids=["closure", "traced"]
)
def test_masked_tokens_may_hold_anything(run, server):
    results = []
    for filler in (-1.0, float("nan"), float("-inf"), 1e4):
        data = batch(server)
        leaves = log_probs(server, data)
        for datum, x in zip(data, leaves, strict=True):
            hidden = datum.loss_fn_inputs["mask"].to_torch() == 0
            x[hidden] = filler
            datum.loss_fn_inputs["logprobs"].to_torch()[hidden] = filler
            datum.loss_fn_inputs["advantages"].to_torch()[hidden] = filler
        leaves = [x.requires_grad_() for x in leaves]
        loss = run(data, leaves)
        loss.backward()
        results.append(torch.cat([loss.detach()[None], *(x.grad for x in leaves)]))
    assert results[0][1:].abs().max() > 0.0
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_without_a_mask_every_token_counts(server):
    bare, full = batch(server, mask=lambda _: None), batch(server, mask=torch.ones)
    values = [custom_loss(OBJECTIVE)(data, log_probs(server, data))[0] for data in (bare, full)]
    assert torch.equal(*values)
    assert per_datum_inputs(bare)[1].loss_fn_inputs["mask"].to_torch().sum() == LENGTHS[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"logprobs": lambda _: None},
            r"datum\[0\].loss_fn_inputs\['logprobs'\]: expected log μ, got none; give the log-probs",
        ),
        ({"advantages": lambda _: None}, r"\['advantages'\]: expected it, got none"),
        (
            {"advantages": lambda _: torch.ones(1)},
            r"\['advantages'\]: expected the shape of target_tokens, \(3,\), got \(1,\)",
        ),
        ({"clip_low_threshold": torch.ones}, "got clip_low_threshold, which no objective reads"),
        (
            {"target_tokens": lambda n: torch.ones(n, 2, dtype=torch.int64)},
            r"one sampled token a position, got shape \(3, 2\)",
        ),
    ],
)
def test_refusals(changes, message, server):
    log_prob, data = log_probs(server, batch(server)), batch(server, **changes)
    with pytest.raises(ValueError, match=message):
        custom_loss(OBJECTIVE)(data, log_prob)
    with pytest.raises(ValueError, match=message):
        per_datum_inputs(data)


def test_weights_of_a_traced_loss_are_refused(server):
    with pytest.raises(ValueError, match=r"\['weights'\]: expected none"):
        per_datum_inputs(batch(server, weights=torch.ones))


def test_a_mode_is_its_objective_or_is_refused():
    summed = Mode(PPOClip(eps=0.2), reduction="token_sum")
    assert callable(per_datum_loss(summed))
    with pytest.raises(ValueError, match=r"^objective: tinker adds up tokens"):
        per_datum_loss(dataclasses.replace(summed, reduction="token_mean"))
    with pytest.raises(ValueError, match=r"^objective: expected a mode without anchor"):
        per_datum_loss(dataclasses.replace(summed, anchor=Sequence(Behavior())))


def test_a_divergence_of_ones_own_can_not_be_traced():
    with pytest.raises(TypeError, match="divergence: expected an array"):
        per_datum_loss(DPPO(delta=0.1, divergence="per_token"))


def test_the_client_reports_a_refusal(client, server):
    data = batch(server, logprobs=lambda _: None)
    with pytest.raises(ValueError, match="expected log μ, got none"):
        client.forward_backward_custom(data, custom_loss(OBJECTIVE)).result(timeout=60)


def test_log_probs_of_another_policy_warn(client, server):
    unrecorded = batch(server, logprobs=torch.zeros)
    with pytest.warns(BehaviorPolicyWarning, match="are 0 at every token"):
        per_datum_inputs(unrecorded)
    with pytest.warns(BehaviorPolicyWarning, match="are 0 at every token"):
        client.forward_backward_custom(unrecorded, custom_loss(OBJECTIVE)).result(timeout=60)
    data = batch(server)
    with pytest.warns(BehaviorPolicyWarning, match="equal the current policy's"):
        custom_loss(OBJECTIVE)(data, [datum.loss_fn_inputs["logprobs"].to_torch() for datum in data])


def test_the_page_runs(service, client, server, capsys):
    """Both of its blocks, on rollouts of tinker's type, after which the model is another."""
    page = (Path(__file__).parents[3] / "docs" / "integrations" / "tinker.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in page.split("```py\n")[1:]]
    sampled = {"tokens_np": np.array([1, 5, 2]), "logprobs_np": np.array([-0.5, -1.0, -3.0], np.float32)}
    sequence = SampledSequence(stop_reason="stop", sequence_id="one", **sampled)
    names = {
        "training_client": client,
        "service_client": service,
        "rollouts": [([3, 4], sequence, 1.0), ([6], sequence, -0.5)],
    }
    before = server.weight.detach().clone()
    for block in blocks:
        exec(block, names)  # noqa: S102 -- a page of ours
    dropped = [float(line) for line in capsys.readouterr().out.split()]
    assert len(dropped) == 2
    assert dropped == [0.0, 0.0]  # DRPO corrects instead
    assert not torch.equal(before, server.weight)
    assert [d.loss_fn_inputs["mask"].data for d in names["data"]] == [[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
