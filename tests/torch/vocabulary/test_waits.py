"""On a device the host waits for nothing: all rows are taken, and those that don't count are silenced.

Tensors on the device ``meta`` have no values, so that whatever looks at one raises. That the numbers are the same is seen on
the CPU, which is taken for a device.
"""

import itertools
from pathlib import Path

import pytest
import torch
from drpo_torch import (
    FullCentering,
    FullDivergence,
    LinearHead,
    Support,
    TopKCentering,
    TopKDivergence,
    _host,
    engines,
    full_divergences,
    linear_log_prob,
    linear_policy_loss,
    logits_policy_loss,
    token_log_prob,
    top_k_divergences,
)
from drpo_torch.engines import trial
from drpo_torch.engines.triton_loop import module_of
from drpo_torch.vocabulary import (
    triton_divergence_kernels,
    triton_kernels,
    triton_most_probable_kernels,
    triton_rows,
    triton_trial,
)
from drpo_torch.vocabulary.most_probable import most_probable
from drpo_torch.vocabulary.softmax import Places, Tempering
from drpo_torch.vocabulary.support import SupportRows
from vocabulary_functions import FLOATS
from whole_modes import EVERYTHING

from drpo_core import DPPO, DRPO, SlowEngineWarning, UntraceableError
from drpo_core.anchors import Behavior, Sequence
from drpo_core.modes import Mode

N, V, PADDED, H, K = (3, 4), 19, 22, 5, 3
SEQUENCES = Mode(DRPO(delta=0.4), anchor=Sequence(Behavior()))
NAN = float("nan")


def world(dtype):
    """Tensors by name; at masked tokens, junk."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    behavior_hidden, weight, bias = normal(*N, H), normal(PADDED, H), normal(PADDED)
    hidden = behavior_hidden + 0.3 * normal(*N, H)
    mask = torch.rand(N, generator=generator) < 0.7
    mask[0, 0] = False
    behavior_logits, logits = behavior_hidden @ weight.T + bias, hidden @ weight.T + bias
    log_mu = behavior_logits[..., :V].log_softmax(-1)
    top, ids = log_mu.topk(K, dim=-1)
    tokens = ids[..., 1]
    kept = torch.rand((*N, V), generator=generator) < 0.5
    kept = kept.scatter(-1, ids, True) | ~mask[..., None]  # noqa: FBT003 -- torch's signature
    floats = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "logits": logits,
        "behavior_logits": behavior_logits,
        "behavior_hidden": behavior_hidden,
        "behavior_log_prob": log_mu.gather(-1, tokens[..., None])[..., 0],
        "advantages": normal(*N),
        "top_k_behavior_log_prob": top,
        "temperature": 0.5 + torch.rand(N, generator=generator, dtype=torch.float64),
    }
    for name, tensor in floats.items():
        if tensor.shape[:2] == N and tensor.ndim > 1 and name not in {"weight", "top_k_behavior_log_prob"}:
            floats[name] = torch.where(mask.reshape(*N, *(1,) * (tensor.ndim - 2)), tensor, NAN)
    every = {name: tensor.to(dtype) for name, tensor in floats.items()}
    every |= {"tokens": torch.where(mask, tokens, -100), "top_k_ids": torch.where(mask[..., None], ids, -100), "mask": mask}
    lists = [kept.reshape(-1, V)[i].nonzero()[:, 0] for i in range(mask.numel())]
    every["support_ids"] = torch.cat(lists)
    every["offsets"] = torch.tensor([0, *itertools.accumulate(map(len, lists))]).reshape(-1)
    every["kept"] = kept
    return every


SUPPORTS = {
    "whole": lambda _: None,
    "ids": lambda w: Support(ids=w["support_ids"], offsets=w["offsets"]),
    "mask": lambda w: Support.from_mask(w["kept"]),
}
RECORDS = {
    "none": lambda _: None,
    "top-k": lambda w: TopKDivergence(kind="tv", ids=w["top_k_ids"], behavior_log_prob=w["top_k_behavior_log_prob"]),
    "full": lambda w: FullDivergence(kind="kl", behavior=w["behavior_logits"]),
    "head": lambda w: FullDivergence(kind="tv", behavior=LinearHead(w["behavior_hidden"], w["weight"], w["bias"])),
}
CENTERINGS = {
    "none": lambda _: None,
    "top-k": lambda w: TopKCentering(ids=w["top_k_ids"], behavior_log_prob=w["top_k_behavior_log_prob"]),
    "full": lambda w: FullCentering(behavior=w["behavior_logits"]),
}
TEMPERATURES = {"one": lambda _: 1.0, "per token": lambda w: w["temperature"]}
HEAD, LOGITS = ("hidden", "weight", "bias"), ("logits",)


def log_probs(function, names, **options):
    def outputs(w, leaves, **more):
        found = function(**leaves, tokens=w["tokens"], mask=w["mask"], entropy=True, **options, **more)
        return (
            found.log_prob,
            found.entropy,
            found.log_normalizer,
            *([] if found.top_k_log_prob is None else [found.top_k_log_prob]),
        )

    return names, outputs


def losses(function, names, record, centering, **options):
    def outputs(w, leaves, **more):
        objective = DPPO(delta=0.3, divergence="per_token") if record != "none" else DRPO(delta=0.4)
        given = {name: w[name] for name in ("tokens", "behavior_log_prob", "advantages", "mask")}
        parts = {"divergence": RECORDS[record](w), "centering": CENTERINGS[centering](w)}
        found = function(options.get("objective", objective), **leaves, **given, **parts, entropy=True, **(rest | more))
        statistics = [field for statistic in (found.diagnostics or {}).values() for field in statistic]
        return found.loss, found.log_prob.detach(), found.entropy, *statistics

    rest = {name: value for name, value in options.items() if name != "objective"}
    return names, outputs


def of_modes(function, names, mode):
    def outputs(w, leaves, **more):
        others = {"proximal_log_prob": w["behavior_log_prob"], "reference_log_prob": w["behavior_log_prob"]}
        given = {name: w[name] for name in ("tokens", "behavior_log_prob", "advantages", "mask")}
        found = function(mode, **leaves, **given, **{n: others[n] for n in mode.arguments if n in others}, **more)
        return (found.loss,)

    return names, outputs


def divergences(function, names):
    def outputs(w, leaves, **more):
        if isinstance(more["temperature"], torch.Tensor):
            more["temperature"] = torch.where(w["mask"], more["temperature"], 1.0)
        valid, safe = w["mask"], {n: torch.where(w["mask"][..., None], t, 0.0) for n, t in leaves.items()}
        if function is full_divergences:
            found = function(**safe, behavior_logits=torch.where(valid[..., None], w["behavior_logits"], 0.0), **more)
        else:
            tokens, ids = (torch.where(m, t, 0) for m, t in ((valid, w["tokens"]), (valid[..., None], w["top_k_ids"])))
            ids = torch.where(valid[..., None], ids, torch.arange(K, device=ids.device))
            recorded = {"behavior_log_prob": torch.where(valid, w["behavior_log_prob"], -9.0)}
            recorded["top_k_behavior_log_prob"] = w["top_k_behavior_log_prob"]
            del more["engine"]
            recorded["log_normalizer"] = safe["logits"][..., :V].logsumexp(-1) + 1.0
            found = function(**safe, tokens=tokens, top_k_ids=ids, **recorded, **more)
        return tuple(torch.where(valid, each, 0.0) for each in found)

    return names, outputs


CALLS = {
    "token_log_prob": log_probs(token_log_prob, LOGITS),
    "token_log_prob ids": log_probs(token_log_prob, LOGITS, top_k=K),
    "linear_log_prob": log_probs(linear_log_prob, HEAD, logit_softcap=9.0),
    "linear_log_prob chunks": log_probs(linear_log_prob, HEAD, chunk_tokens=5, chunk_vocabulary=7, top_k=K),
    "full_divergences": divergences(full_divergences, LOGITS),
    "top_k_divergences": divergences(top_k_divergences, LOGITS),
    "logits_policy_loss mode": of_modes(logits_policy_loss, LOGITS, SEQUENCES),
    "linear_policy_loss mode": of_modes(linear_policy_loss, HEAD, EVERYTHING),
    "linear_policy_loss chunks": losses(linear_policy_loss, HEAD, "top-k", "top-k", chunk_tokens=5, chunk_vocabulary=7),
} | {
    f"{function.__name__} {record} {centering} {bonus}": losses(
        function,
        names,
        record,
        centering,
        entropy_coefficient=bonus,
        **({} if function is logits_policy_loss else {"chunk_tokens": 5}),
    )
    for (function, names), record, centering, bonus in itertools.product(
        ((logits_policy_loss, LOGITS), (linear_policy_loss, HEAD)), RECORDS, CENTERINGS, (0.0, 0.1)
    )
}


def ran(call, w, temperature, support, engine="arrays"):
    names, outputs = call
    leaves = {name: w[name].detach().clone().requires_grad_() for name in names}
    more = {"temperature": TEMPERATURES[temperature](w), "support": SUPPORTS[support](w), "vocabulary_size": V}
    found = outputs(w, leaves, **more, engine=engine)
    smooth = [each for each in found if each.requires_grad]
    cotangents = [
        torch.ones_like(each)
        if each.ndim == 0
        else torch.arange(each.numel(), dtype=each.dtype, device=each.device).reshape(each.shape)
        for each in smooth
    ]
    return found, torch.autograd.grad(smooth, [leaves[name] for name in names], cotangents)


MAPS = [("one", "whole"), ("per token", "ids"), ("one", "mask")]
each_map = pytest.mark.parametrize(("temperature", "support"), MAPS)
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
# every call, and every map a third of the times
each_call_once = pytest.mark.parametrize(
    ("call", "temperature", "support"), [(call, *MAPS[i % 3]) for i, call in enumerate(CALLS.values())], ids=CALLS
)


@each_call_once
def test_nothing_looks_at_a_value(call, temperature, support):
    w = {name: tensor.to("meta") for name, tensor in world(torch.float32).items()}
    found, gradients = ran(call, w, temperature, support, "auto")
    assert all(each.device.type == "meta" for each in (*found, *gradients))


@each_map
@each_call
def test_the_numbers_are_those_of_the_host(call, temperature, support, as_on_a_gpu):
    assert_those_of_the_host(call, temperature, support, "arrays", as_on_a_gpu)


@each_call_once
# NumPy says of the operations of Triton's interpreter what is no error in IEEE arithmetic
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_the_numbers_of_triton_are_those_of_the_host(call, temperature, support, as_on_a_gpu):
    assert_those_of_the_host(call, temperature, support, "compiled", as_on_a_gpu)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A function after which the CPU is taken for a device, whose kernels have been tried.

    In the deterministic mode, in which memory that is not written to holds NaN.
    """

    def take():
        torch.use_deterministic_algorithms(True)  # noqa: FBT003 -- torch's signature
        monkeypatch.setattr(_host, "HOST_DEVICES", set())
        monkeypatch.setattr(engines, "TRITON_DEVICES", {"cpu"})
        # what the trial would find is seen here
        monkeypatch.setattr(trial, "_finding", lambda *_, **__: None)
        kinds = itertools.product([torch.device("cpu")], FLOATS)
        monkeypatch.setattr(triton_trial, "_findings", dict.fromkeys(kinds))

    yield take
    torch.use_deterministic_algorithms(False)  # noqa: FBT003


def assert_those_of_the_host(call, temperature, support, engine, as_on_a_gpu):
    w = world(torch.float64)
    expected, expected_gradients = ran(call, w, temperature, support)
    as_on_a_gpu()
    found, gradients = ran(call, w, temperature, support, engine)
    for each, other in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-11, equal_nan=True)
    for gradient, name in zip(gradients, call[0], strict=True):
        assert gradient.isfinite().all(), name


# --- the most probable tokens, which the kernel does not take in float64 ---


@pytest.mark.parametrize(("dtype", "cap", "kept"), [(torch.float32, None, 0.3), (torch.bfloat16, 5.0, 1.0)], ids=str)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_the_most_probable_tokens_are_those_of_arrays(dtype, cap, kept):
    """With ties, zeros of both signs, −inf, a NaN, strides, supports; more columns than a step has."""
    vocabulary, count = 1061, 3
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, vocabulary, generator=generator).mul_(3.0).round_().to(dtype)
    z[0, 5:] = -torch.inf
    z[1], z[1, ::2], z[2, 1030] = 0.0, -0.0, NAN
    bits = Support.from_mask(torch.rand(5, vocabulary, generator=generator) < kept)
    support = SupportRows.of(bits, vocabulary, torch.ones(5, dtype=torch.bool))
    support.whole[3] = True
    valid = torch.arange(5) != 4
    places, step = Places.first(5, z.device, valid), Tempering(0.7, cap, support, vocabulary)
    z = z.T.contiguous().T
    found, expected = (most_probable(module, z, places, step, count, 7) for module in (triton_rows, None))
    assert torch.equal(found.ids[valid], expected.ids[valid])
    torch.testing.assert_close(found.z[valid], expected.z[valid], rtol=0.0, atol=0.0, equal_nan=True)
    assert not found.z[4].any()


# --- kernels that do not hold ---


FAULTS = {
    "a maximum": (triton_kernels, "softmaxes", "maximum = tl.max(most, 0)", "maximum = tl.min(most, 0)", "another .*maximum"),
    "an entropy": (
        triton_kernels,
        "softmaxes",
        "log_sum - weighted / total",
        "log_sum + weighted / total",
        "another plain entropy",
    ),
    "the sampled token": (
        triton_kernels,
        "gradients",
        "narrowed(of_some, out_at)",
        "narrowed(y_some, out_at)",
        "another plain gradient",
    ),
    "no program": (triton_kernels, "softmaxes", "tl.program_id(0)", "tl.no_such_thing(0)", "fails with"),
    "a divergence": (
        triton_divergence_kernels,
        "divergences",
        "(e - ell) * floored",
        "(e + ell) * floored",
        "another plain KL",
    ),
    "its gradient": (
        triton_divergence_kernels,
        "divergence_gradients",
        "(sign - signed)",
        "sign",
        "another plain gradient of divergences",
    ),
    "the most probable": (
        triton_most_probable_kernels,
        "most_probable",
        "tl.maximum(best, ",
        "tl.minimum(best, ",
        "another plain .*most probable",
    ),
}


@pytest.mark.parametrize(("module", "kernel", "old", "new", "finding"), FAULTS.values(), ids=FAULTS)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_rows_of_a_kernel_that_does_not_hold_are_done_by_arrays(module, kernel, old, new, finding, monkeypatch):
    source = Path(module.__file__).read_text()
    assert old in source
    monkeypatch.setattr(module, kernel, module_of(source.replace(old, new))[kernel])
    monkeypatch.setattr(triton_trial, "_findings", {})
    monkeypatch.setattr(engines, "TRITON_DEVICES", {"cpu"})
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 1, 2])
    with pytest.warns(SlowEngineWarning, match=f"Triton kernels over rows of logits .* {finding}.*report"):
        found = token_log_prob(logits=logits, tokens=tokens)
    torch.testing.assert_close(found.log_prob, logits.log_softmax(-1)[torch.arange(3), tokens])
    with pytest.raises(UntraceableError, match=finding):
        token_log_prob(logits=logits, tokens=tokens, engine="compiled")


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_kernels_hold(dtype):
    assert triton_trial._compared(torch.device("cpu"), dtype) is None  # noqa: SLF001 -- what it finds is the test
