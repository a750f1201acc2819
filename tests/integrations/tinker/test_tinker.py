"""tinker's own client, data types and tracer on our losses; only the server is a small model in this process."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

pytest.importorskip("tinker", reason="runs in the environment of `nox -s integration-tinker`")

import torch
from drpo_torch import policy_loss
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.integrations.tinker import INPUT_RANKS, custom_loss, per_datum_inputs, per_datum_loss, summarize_metrics
from tinker import Datum, ModelInput, TensorData, types
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss
from tinker.lib.public_interfaces.training_client import TrainingClient
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    sequence_mean_token_mean,
    summarize,
    token_mean,
)

OBJECTIVES = [
    PolicyGradient(),
    PolicyGradient(max_ratio=1.2),
    PPOClip(eps_low=0.1, eps_high=0.2, dual_clip=3.0),
    CISPO(max_ratio=1.2),
    SPO(eps_low=0.2, eps_high=0.4),
    DPPO(delta=0.05),
    DPPO(delta_low=0.02, delta_high=0.05, divergence="binary_kl", max_ratio=1.5),
    DRPO(delta_low=0.05, delta_high=0.15),
    MaskDRPO(delta=0.05),
]
VOCABULARY, LENGTHS, SESSION = 7, (3, 6, 1, 4), "session"


class Client(TrainingClient):
    """tinker's training client, whose requests are answered by a bigram model: log-probs, or a cross-entropy's gradient."""

    def __init__(self, chunk=2):
        config = types.ClientConfigResponse(fwdbwd_max_chunk_len=chunk)
        holder = SimpleNamespace(_client_config=config, get_session_id=lambda: SESSION, run_coroutine_threadsafe=failed)
        super().__init__(holder, 0, "model", info=None)
        torch.manual_seed(0)
        self.model = nn.Embedding(VOCABULARY, VOCABULARY)
        self.sent = []

    def log_prob(self, datum):
        """Of the target tokens."""
        logits = self.model(torch.tensor(datum.model_input.to_ints()))
        return logits.log_softmax(-1).gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0]

    def _run_fwd_bwd(self, requests, loss_fn, loss_fn_config, *, forward_only):
        assert (loss_fn, loss_fn_config) == ("cross_entropy", None)
        self.sent.append([len(request.data) for request in requests])
        outputs, total = [], torch.zeros(())
        for datum in (datum for request in requests for datum in request.data):
            log_prob = self.log_prob(datum)
            total = total - (log_prob * datum.loss_fn_inputs["weights"].to_torch()).sum()
            outputs.append({"logprobs": TensorData.from_torch(log_prob.detach())})
        if not forward_only:
            total.backward()
        answer = types.ForwardBackwardOutput(
            loss_fn_output_type="ArrayRecord", loss_fn_outputs=outputs, metrics={"loss:sum": float(total.detach())}
        )

        async def result():
            return answer

        return SimpleNamespace(result_async=result)


def failed(coroutine):
    """What the client does on its holder's event loop when a custom loss raises."""
    coroutine.close()

    async def result():
        pass

    return SimpleNamespace(result_async=result, future=Future)


def batch(client, **changes):
    """Sampled sequences, one token of them masked, as a user assembles them."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for n in LENGTHS:
        tokens = torch.randint(VOCABULARY, (n + 1,), generator=generator)
        datum = Datum(ModelInput.from_ints(tokens[:-1].tolist()), {"target_tokens": tokens[1:]})
        drift = torch.empty(n).uniform_(-0.8, 0.8, generator=generator)
        inputs = {
            "logprobs": (client.log_prob(datum).detach() + drift).clamp(max=-1e-3),
            "advantages": torch.randn(n, generator=generator),
            "mask": (torch.arange(n) != 2).float(),
        }
        inputs = {**datum.loss_fn_inputs, **inputs, **{name: change(n) for name, change in changes.items()}}
        data.append(Datum(datum.model_input, {name: value for name, value in inputs.items() if value is not None}))
    return data


def expected(client, data, objective, **options):
    """Loss, gradient of the parameters and diagnostics of the library, on the padded batch."""
    columns = ("logprobs", "advantages", "mask")
    padded = {name: pad_sequence([d.loss_fn_inputs[name].to_torch() for d in data], batch_first=True) for name in columns}
    loss, statistics = policy_loss(
        objective,
        log_prob=pad_sequence([client.log_prob(datum) for datum in data], batch_first=True),
        behavior_log_prob=padded["logprobs"],
        advantages=padded["advantages"],
        mask=padded["mask"] != 0,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, client.model.weight)
    return float(loss.detach()), gradient, summarize(statistics)


def assert_same(client, result, data, objective, **options):
    loss, gradient, figures = expected(client, data, objective, **options)
    assert gradient.abs().max() > 0.0
    torch.testing.assert_close(client.model.weight.grad, gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    return figures


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_closure_through_the_client_is_the_library(objective):
    client = Client()
    data = batch(client)
    result = client.forward_backward_custom(data, custom_loss(objective)).result(timeout=60)
    assert client.sent == [[2, 2], [2, 2]]  # a forward and a backward pass, in the client's own chunks
    figures = assert_same(client, result, data, objective, normalizer=1.0)
    for name, figure in figures.items():
        assert result.metrics[f"trust_region/{name}"] == pytest.approx(figure, rel=1e-5, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_traced_loss_through_the_client_is_the_library(objective):
    client = Client()
    data = batch(client)
    handle = trace_loss(per_datum_loss(objective), INPUT_RANKS, SESSION)
    result = client.forward_backward_custom(per_datum_inputs(data), handle).result(timeout=60)
    figures = assert_same(client, result, data, objective, normalizer=1.0)
    summary = summarize_metrics(result.metrics)
    extremes = {"ratio_max", "binary_tv_max", "weight_min", "weight_max"}
    assert summary.keys() == {f"trust_region/{name}" for name in figures.keys() - extremes}
    for name, figure in summary.items():
        assert figure == pytest.approx(figures[name.removeprefix("trust_region/")], rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_traced_loss_can_be_sent(objective):
    """As the client uploads it: plain data, of which every target is torch's, an operator or a tensor method."""
    handle = trace_loss(per_datum_loss(objective), INPUT_RANKS, SESSION)
    graph = types.CustomLossGraph.model_validate_json(encode_graph(handle).model_dump_json())
    kinds = {(node.op, node.target.split(".")[0]) for node in graph.nodes}
    names = {("placeholder", name) for name in INPUT_RANKS}
    assert kinds == {
        *names,
        ("call_method", "detach"),
        ("call_function", "torch"),
        ("call_function", "operator"),
        ("output", "output"),
    }


def test_thresholds_matter():
    client = Client()
    data = batch(client)
    gradients = []
    for delta in (0.05, 0.5):
        client.model.zero_grad()
        client.forward_backward_custom(data, custom_loss(DRPO(delta=delta))).result(timeout=60)
        gradients.append(client.model.weight.grad.clone())
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("normalizer", [None, 5.0])
@pytest.mark.parametrize("reduction", [token_mean, sequence_mean_token_mean])
def test_means_over_the_call(reduction, normalizer):
    client = Client()
    data = batch(client)
    loss = custom_loss(DRPO(delta=0.1), reduction=reduction, normalizer=normalizer)
    result = client.forward_backward_custom(data, loss).result(timeout=60)
    assert_same(client, result, data, DRPO(delta=0.1), reduction=reduction, normalizer=normalizer)


def test_weights_multiply_losses():
    client = Client()
    weighted, plain = batch(client, weights=lambda n: torch.full((n,), 2.0)), batch(client)
    result = client.forward_backward_custom(weighted, custom_loss(DRPO(delta=0.1))).result(timeout=60)
    loss, gradient, _ = expected(client, plain, DRPO(delta=0.1), normalizer=1.0)
    torch.testing.assert_close(client.model.weight.grad, 2 * gradient)
    assert result.metrics["loss:sum"] == pytest.approx(2 * loss, rel=1e-5)


def test_masked_tokens_may_hold_anything():
    client = Client()
    data = batch(client)
    log_prob = [client.log_prob(datum).detach() for datum in data]
    poisoned = batch(client, logprobs=lambda n: data[LENGTHS.index(n)].loss_fn_inputs["logprobs"].to_torch().clone())
    spoilt = [x.clone() for x in log_prob]
    for datum, x in zip(poisoned, spoilt, strict=True):
        hidden = datum.loss_fn_inputs["mask"].to_torch() == 0
        datum.loss_fn_inputs["logprobs"].to_torch()[hidden] = float("nan")
        x[hidden] = float("nan")
    handle = trace_loss(per_datum_loss(DRPO(delta=0.1)), INPUT_RANKS, SESSION).graph
    for run in (custom_loss(DRPO(delta=0.1)), lambda data, xs: (total(handle, data, xs), None)):
        gradients = []
        for given, xs in ((data, log_prob), (poisoned, spoilt)):
            leaves = [x.clone().requires_grad_() for x in xs]
            run(given, leaves)[0].backward()
            gradients.append(torch.cat([x.grad for x in leaves]))
        assert torch.equal(*gradients)


def total(graph, data, log_prob):
    """What `run_loss_handle` of the client sums, without its metrics."""
    columns = [[d.loss_fn_inputs[name].to_torch() for name in list(INPUT_RANKS)[1:]] for d in per_datum_inputs(data)]
    return sum(graph(x, *column)[0] for x, column in zip(log_prob, columns, strict=True))


def test_without_a_mask_every_token_counts():
    client = Client()
    bare, full = batch(client, mask=lambda _: None), batch(client, mask=torch.ones)
    log_prob = [client.log_prob(datum).detach() for datum in bare]
    values = [custom_loss(DRPO(delta=0.1))(data, log_prob) for data in (bare, full)]
    assert torch.equal(values[0][0], values[1][0])
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
def test_refusals(changes, message):
    client = Client()
    log_prob = [client.log_prob(datum).detach() for datum in batch(client)]
    data = batch(client, **changes)
    with pytest.raises(ValueError, match=message):
        custom_loss(DRPO(delta=0.1))(data, log_prob)
    with pytest.raises(ValueError, match=message):
        per_datum_inputs(data)


def test_weights_of_a_traced_loss_are_refused():
    with pytest.raises(ValueError, match=r"\['weights'\]: expected none"):
        per_datum_inputs(batch(Client(), weights=torch.ones))


def test_the_client_reports_a_refusal():
    client = Client()
    with pytest.raises(ValueError, match="expected log μ, got none"):
        client.forward_backward_custom(batch(client, logprobs=lambda _: None), custom_loss(DRPO(delta=0.1))).result(timeout=60)


def test_log_probs_of_another_policy_warn():
    client = Client()
    unrecorded = batch(client, logprobs=torch.zeros)
    with pytest.warns(BehaviorPolicyWarning, match="are 0 at every token"):
        per_datum_inputs(unrecorded)
    with pytest.warns(BehaviorPolicyWarning, match="are 0 at every token"):
        client.forward_backward_custom(unrecorded, custom_loss(DRPO(delta=0.1))).result(timeout=60)
    data = batch(client)
    with pytest.warns(BehaviorPolicyWarning, match="equal the current policy's"):
        custom_loss(DRPO(delta=0.1))(data, [datum.loss_fn_inputs["logprobs"].to_torch() for datum in data])
