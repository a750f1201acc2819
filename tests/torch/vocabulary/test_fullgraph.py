"""Under `torch.compile` a model, the softmaxes over its vocabulary and the loss are one graph, with eager numbers."""

import pytest
import torch
from drpo_torch import (
    FullCentering,
    FullDivergence,
    Support,
    TopKDivergence,
    full_divergences,
    linear_log_prob,
    linear_policy_loss,
    logits_policy_loss,
    token_log_prob,
)
from drpo_torch.vocabulary import operators

from drpo_core import DPPO, DRPO, modes

N, V, H, K = (3, 4), 19, 5, 3
GENERATOR = torch.Generator().manual_seed(0)


def normal(*size):
    return torch.randn(size, generator=GENERATOR, dtype=torch.float64)


HEAD = {"hidden": normal(*N, H), "weight": normal(V, H), "bias": normal(V)}
LOGITS = {"logits": normal(*N, V)}
MASK = torch.rand(N, generator=GENERATOR) < 0.7
IDS = normal(*N, V).topk(K).indices
TOKENS = IDS[..., 0].masked_fill(~MASK, -100)
BEHAVIOR = normal(*N, V)
TEMPERATURE = 0.5 + torch.rand(N, generator=GENERATOR, dtype=torch.float64)
KEPT = torch.rand((*N, V), generator=GENERATOR) < 0.5
SUPPORT = Support.from_mask(KEPT.scatter(-1, IDS, True))  # noqa: FBT003 -- torch's signature
TOP_K = TopKDivergence(kind="tv", ids=IDS, behavior_log_prob=normal(*N, V).log_softmax(-1).gather(-1, IDS))
BATCH = {"tokens": TOKENS, "mask": MASK, "behavior_log_prob": -3.0 * torch.rand(N, generator=GENERATOR, dtype=torch.float64)}
BATCH["advantages"] = normal(*N)

LOG_PROBS = {
    "all": {"entropy": True, "top_k": K, "temperature": TEMPERATURE, "support": SUPPORT},
    "ids": {"top_k_ids": IDS, "vocabulary_size": V - 1, "temperature": 0.7},
}
CHUNKS = {"chunk_tokens": 5, "chunk_vocabulary": 7, "logit_softcap": 9.0}
LOSSES = {
    "DRPO": (DRPO(delta=0.15), {"temperature": 0.7, "entropy": True, "entropy_coefficient": 0.1}),
    "top-k": (DPPO(delta=0.15, divergence="per_token"), {"divergence": TOP_K, "diagnostics": False}),
    "mode": (modes.verl("gspo"), {"proximal_log_prob": BATCH["behavior_log_prob"], "support": SUPPORT}),
}
CALLS = {
    f"token_log_prob {name}": (token_log_prob, (), LOGITS, {"tokens": TOKENS, "mask": MASK, **given})
    for name, given in LOG_PROBS.items()
}
CALLS["linear_log_prob all"] = linear_log_prob, (), HEAD, {"tokens": TOKENS, "mask": MASK, **LOG_PROBS["all"], **CHUNKS}
CALLS["linear_log_prob whole"] = linear_log_prob, (), HEAD, {"tokens": TOKENS.clamp(min=0)}
CALLS["logits_policy_loss full"] = (
    logits_policy_loss,
    (DPPO(delta=0.15, divergence="per_token"),),
    LOGITS,
    BATCH | {"divergence": FullDivergence(kind="kl", behavior=BEHAVIOR, temperature=TEMPERATURE), "support": SUPPORT},
)
CALLS["full_divergences"] = full_divergences, (), LOGITS, {"behavior_logits": BEHAVIOR, "temperature": TEMPERATURE}
CALLS |= {
    f"{function.__name__} {name}": (function, (objective,), leaves, BATCH | given)
    for function, leaves in ((logits_policy_loss, LOGITS), (linear_policy_loss, HEAD))
    for name, (objective, given) in LOSSES.items()
}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    """How often one function may be compiled anew is limited."""
    torch._dynamo.reset()  # noqa: SLF001


def flat(found):
    """The tensors among results, those of diagnostics too."""
    fields = []
    for field in found:
        fields += [number for statistic in field.values() for number in statistic] if isinstance(field, dict) else [field]
    return [field for field in fields if field is not None]


@pytest.mark.parametrize(("function", "objectives", "leaves", "given"), CALLS.values(), ids=CALLS)
def test_one_graph_gives_the_numbers_of_the_eager_call(function, objectives, leaves, given):
    def model(leaves):
        # something before it that a compiler fuses
        return flat(function(*objectives, **{name: 1.5 * torch.tanh(leaf) for name, leaf in leaves.items()}, **given))

    def ran(model):
        mine = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
        found = model(mine)
        smooth = [each for each in found if each.requires_grad]
        cotangents = [torch.linspace(-1.0, 2.0, each.numel(), dtype=each.dtype).reshape(each.shape) for each in smooth]
        return found, torch.autograd.grad(smooth, [*mine.values()], cotangents)

    for ours, theirs in zip(ran(torch.compile(model, fullgraph=True, backend="aot_eager")), ran(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_no_gradient_is_formed_for_what_needs_none(monkeypatch):
    hidden = HEAD["hidden"].clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden):
        return linear_log_prob(hidden=hidden, weight=HEAD["weight"], tokens=TOKENS, mask=MASK).log_prob.sum()

    needed, backward = [], operators.OfHead.backward

    def watched(ctx, *cotangents):
        needed.append([tensor is not None and tensor.requires_grad for tensor in ctx.saved_tensors[:3]])
        return backward(ctx, *cotangents)

    monkeypatch.setattr(operators.OfHead, "backward", staticmethod(watched))
    loss(hidden).backward()
    assert needed == [[True, False, False]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": TOKENS[0]}, "tokens: expected the shape"),
        ({"mask": MASK.double()}, "mask: expected"),
        ({"vocabulary_size": V + 1}, "vocabulary_size: expected"),
        ({"temperature": -1.0}, "temperature: expected"),
    ],
    ids=str,
)
def test_errors_name_the_argument(given, message):
    compiled = torch.compile(token_log_prob, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=message):
        compiled(**LOGITS, **({"tokens": TOKENS, "mask": MASK} | given))


def test_what_no_graph_holds_breaks_it():
    behavior = LOGITS["logits"].log_softmax(-1)

    def loss():
        return logits_policy_loss(DRPO(delta=0.15), **LOGITS, **BATCH, centering=FullCentering(behavior=behavior)).loss

    with pytest.raises(torch._dynamo.exc.Unsupported):  # noqa: SLF001 -- torch has no public name
        torch.compile(loss, backend="eager", fullgraph=True)()
    torch.testing.assert_close(torch.compile(loss, backend="eager")(), loss())
