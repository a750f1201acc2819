"""Score centring in torch: the losses from logits and from the head against plain formulas and autograd, in float64."""

import pytest
import torch
from drpo_torch import (
    FullCentering,
    LinearHead,
    TopKCentering,
    TopKDivergence,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    score_centering,
)
from vocabulary_batches import Largest, assert_close, budget, small_steps

from drpo_core import CISPO, DPPO, DRPO, sequence_mean_token_mean, top_k_tv
from drpo_core.anchors import Proximal
from drpo_core.corrections import ImportanceWeight, OutwardMask, RatioMask, Veto
from drpo_core.modes import Mode
from drpo_core.objectives import IPO, Reinforce
from drpo_core.penalties import Penalty

N, V, K, H, T = (2, 5), 37, 5, 6, 0.7
DECOUPLED = Mode(
    DRPO(delta=0.5),
    anchor=Proximal(),
    corrections=(ImportanceWeight(high=1.5), RatioMask(low=0.6, high=1.6)),
    penalties=(Penalty(coefficient=0.1, estimator="k2", to="behavior"),),
    reduction="sequence_mean_token_mean",
)
OUTWARD = Mode(Reinforce(), corrections=(OutwardMask(edge="policy/behavior", eps_low=0.3, eps_high=0.3),))
PER_TOKEN = DPPO(delta=0.1, divergence="per_token")


def every(seed=0):
    """Everything in float64, NaN and wild ids where the mask is False, and an id that comes twice."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(*N, H), normal(V, H)
    behavior_weight = weight + 0.2 * normal(V, H)
    behavior = (hidden @ behavior_weight.T).log_softmax(-1)
    old = (behavior + 0.2 * normal(*N, V)).log_softmax(-1)
    tokens, mask = torch.randint(V, N, generator=generator), torch.rand(N, generator=generator) < 0.8
    ids = behavior.topk(K, -1).indices
    ids[0, 0, 4] = ids[0, 0, 2]
    recorded = {"behavior_log_prob": behavior.gather(-1, ids), "proximal_log_prob": old.gather(-1, ids)}
    hidden = hidden.masked_fill(~mask[..., None], torch.nan)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    weights[0, 1] = 0.0
    data = {
        "tokens": tokens.masked_fill(~mask, -100),
        "behavior_log_prob": at(behavior, tokens).masked_fill(~mask, torch.nan),
        "advantages": normal(*N).masked_fill(~mask, torch.nan),
        "mask": mask,
        "token_weights": weights,
    }
    return data, hidden, weight, behavior_weight, ids.masked_fill(~mask[..., None], -1), recorded, at(old, tokens)


def at(log_probs, tokens):
    return log_probs.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]


def options_of(objective, recorded, old, divergence):
    needs_old = isinstance(objective, Mode) and "proximal_log_prob" in objective.arguments
    of_tokens = {"proximal_log_prob": old} if needs_old else {}
    of_outcomes = {name: x for name, x in recorded.items() if needs_old or name == "behavior_log_prob"}
    return of_tokens | ({} if divergence is None else {"divergence": divergence}), of_outcomes


def plain(objective, kind, *, reduction=None, divergence=None):
    """Loss and gradients by log-softmax, gather and `score_centering` on log-probs."""
    data, hidden, weight, behavior_weight, ids, recorded, old = every()
    hidden, weight = torch.where(data["mask"][..., None], hidden, 0.0).requires_grad_(), weight.requires_grad_()
    log_prob = (hidden @ weight.T / T).log_softmax(-1)
    of_tokens, of_outcomes = options_of(objective, recorded, old, divergence)
    arguments = {name: array for name, array in data.items() if name != "tokens"} | of_tokens
    own = objective.reduction == "sequence_mean_token_mean" if isinstance(objective, Mode) else False
    loss, _ = policy_loss(objective, log_prob=at(log_prob, data["tokens"]), **arguments, reduction=reduction, engine="arrays")
    per_token = {} if divergence is None else {"divergence": divergence}
    shared = {"advantages": data["advantages"], "mask": data["mask"], **per_token}
    if kind == "top_k":
        twice = torch.zeros_like(ids, dtype=torch.bool)
        twice[0, 0, 4] = True
        of_outcomes = {name: x.masked_fill(twice, -torch.inf) for name, x in of_outcomes.items()}
        x = log_prob.gather(-1, ids.clamp(min=0)).masked_fill(twice, -torch.inf)
        term = score_centering(objective, log_prob=x, **of_outcomes, **shared)
    else:
        behavior = (hidden.detach() @ behavior_weight.T).log_softmax(-1)
        term = score_centering(objective, log_prob=log_prob, behavior_log_prob=behavior, **shared, tail=False)
    # the mean over sequences of the means over their tokens, or the mean over tokens
    mask = data["mask"].double()
    share = mask / mask.sum(-1, keepdim=True) / len(mask) if own or reduction is not None else mask / mask.sum()
    weighted = torch.where(data["mask"], share * data["token_weights"] * term, 0.0).sum()
    (loss + weighted).backward()
    return (loss + weighted).detach(), hidden.grad, weight.grad


def fused(function, objective, kind, dtype=torch.float64, *, head=False, divergence=None, engine="arrays", **options):
    data, hidden, weight, behavior_weight, ids, recorded, old = every()

    def cast(tensors):
        return {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in tensors.items()}

    of_tokens, of_outcomes = options_of(objective, recorded, old, divergence)
    if kind == "top_k":
        centering = TopKCentering(ids=ids, **cast(of_outcomes))
    elif head:
        centering = FullCentering(behavior=LinearHead(hidden.to(dtype), behavior_weight.to(dtype)))
    else:
        centering = FullCentering(behavior=(hidden @ behavior_weight.T).to(dtype))
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    arguments = cast(data | of_tokens) | {"centering": centering, "temperature": T, "engine": engine} | options
    if function is linear_policy_loss:
        result = linear_policy_loss(objective, hidden=hidden, weight=weight, chunk_tokens=3, **arguments)
    else:
        logits = torch.where(data["mask"][..., None], hidden, 0.0) @ weight.mT
        result = logits_policy_loss(objective, logits=logits, **arguments)
    result.loss.backward()
    return result.loss.detach(), hidden.grad, weight.grad


each_kind = pytest.mark.parametrize("kind", ["top_k", "full"])
each_function = pytest.mark.parametrize("function", [logits_policy_loss, linear_policy_loss])


@each_function
@each_kind
def test_the_loss_and_its_gradients(function, kind, monkeypatch):
    small_steps(monkeypatch)
    for objective in (DRPO(delta=0.5), Reinforce(), IPO(delta=0.1), OUTWARD, DECOUPLED):
        if kind == "full" and objective is DECOUPLED:
            continue
        # each objective is compiled for a second
        for engine in ("arrays", "compiled") if objective == DRPO(delta=0.5) else ("arrays",):
            actual = fused(function, objective, kind, engine=engine)
            for one, other in zip(actual, plain(objective, kind), strict=True):
                assert_close(one, other, 1e-12)


@each_function
@each_kind
def test_reductions_divergences_heads_and_parts_of_the_vocabulary(function, kind, monkeypatch):
    small_steps(monkeypatch)
    mean = {"reduction": sequence_mean_token_mean}
    for actual, expected in zip(
        fused(function, DRPO(delta=0.5), kind, **mean), plain(DRPO(delta=0.5), kind, **mean), strict=True
    ):
        assert_close(actual, expected, 1e-12)
    divergence = torch.linspace(0.0, 0.2, 10, dtype=torch.float64).reshape(N)
    measured = {"divergence": divergence}
    for actual, expected in zip(fused(function, PER_TOKEN, kind, **measured), plain(PER_TOKEN, kind, **measured), strict=True):
        assert_close(actual, expected, 1e-12)
    choices = [{"overwrite_logits": True}] if function is logits_policy_loss else []
    choices += [{"chunk_vocabulary": 10}] if function is linear_policy_loss and kind == "top_k" else []
    choices += [{"head": True}] if kind == "full" else []
    for choice in choices:
        for actual, expected in zip(
            fused(function, CISPO(max_ratio=1.2), kind, **choice), plain(CISPO(max_ratio=1.2), kind), strict=True
        ):
            assert_close(actual, expected, 1e-12)


@each_function
@each_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_gradients_in_other_dtypes(function, kind, dtype, tolerance):
    for one, other in zip(fused(function, DRPO(delta=0.5), kind, dtype)[1:], plain(DRPO(delta=0.5), kind)[1:], strict=True):
        assert one.dtype == dtype
        assert_close(one, other, tolerance)


@each_function
@each_kind
def test_beside_a_measured_divergence(function, kind, monkeypatch):
    """A `TopKDivergence` of other ids than the centring's; a mode, which is given all chunks at once, is the same."""
    small_steps(monkeypatch)
    data, hidden, weight, behavior_weight, *_ = every()
    tokens, valid = data["tokens"].clamp(min=0), data["mask"][..., None]
    policy = (torch.where(valid, hidden, 0.0) @ weight.T / T).log_softmax(-1)
    behavior = (torch.where(valid, hidden, 0.0) @ behavior_weight.T).log_softmax(-1)
    log_mu, ids = behavior.topk(3, -1)
    measured = top_k_tv(
        at(policy, tokens),
        at(behavior, tokens),
        top_k_log_prob=policy.gather(-1, ids),
        top_k_behavior_log_prob=log_mu,
        sampled_in_top_k=(ids == tokens[..., None]).any(-1),
    )
    divergence = TopKDivergence(kind="tv", ids=ids, behavior_log_prob=log_mu)
    # a threshold between the tokens' divergences
    per_token = DPPO(delta=0.17, divergence="per_token")
    expected = plain(per_token, kind, divergence=measured)
    for objective in (per_token, Mode(per_token)):
        for one, other in zip(fused(function, objective, kind, divergence=divergence), expected, strict=True):
            assert_close(one, other, 1e-12)


def test_the_expected_gradient_is_zero():
    """Over every outcome of one token, with its chance under μ."""
    generator = torch.Generator().manual_seed(3)
    x, b = torch.randn((2, 9), generator=generator, dtype=torch.float64)
    log_mu, total = b.log_softmax(-1), torch.zeros(9, dtype=torch.float64)
    for y in range(9):
        logits = x[None].clone().requires_grad_()
        logits_policy_loss(
            DRPO(delta=0.3),
            logits=logits,
            tokens=torch.tensor([y]),
            behavior_log_prob=log_mu[[y]],
            advantages=torch.tensor([1.3], dtype=torch.float64),
            mask=torch.tensor([True]),
            centering=FullCentering(behavior=b[None]),
            engine="arrays",
        ).loss.backward()
        total += log_mu[y].exp() * logits.grad[0]
    assert total.abs().max() < 1e-15


def test_a_dropped_token_is_centred_and_a_masked_one_is_not():
    """IPO drops the sampled token; its position still gets the term, which must not depend on what was sampled."""
    logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]], requires_grad=True)
    behavior = torch.tensor([[0.2, 0.5, 0.3]] * 2).log()
    logits_policy_loss(
        IPO(delta=0.1),
        logits=logits,
        tokens=torch.tensor([0, 0]),
        behavior_log_prob=behavior[:, 0],
        advantages=torch.ones(2),
        mask=torch.tensor([True, False]),
        centering=TopKCentering(ids=torch.tensor([[0, 1]] * 2), behavior_log_prob=behavior[:, :2]),
        engine="arrays",
    ).loss.backward()
    assert (logits.grad[0].abs() > 1e-3).all()
    assert (logits.grad[1] == 0.0).all()


def test_memory(monkeypatch):
    """Over K recorded tokens nothing of the size of the logits is made but their gradient; over all, a few rows at a time."""
    rows, vocabulary = 64, 500
    budget(monkeypatch, 4 * vocabulary * 4)
    logits = torch.randn(rows, vocabulary, requires_grad=True)
    behavior = torch.randn(rows, vocabulary)
    data = {"tokens": torch.arange(rows), "behavior_log_prob": -torch.ones(rows), "advantages": torch.ones(rows)}
    data["mask"] = torch.ones(rows, dtype=torch.bool)
    top = behavior.log_softmax(-1).topk(20, -1)
    for centering in (TopKCentering(ids=top.indices, behavior_log_prob=top.values), FullCentering(behavior=behavior)):
        with Largest() as largest:
            logits_policy_loss(
                DRPO(delta=0.3), logits=logits.clone(), **data, centering=centering, overwrite_logits=True, engine="arrays"
            )
        assert largest.elements == rows * vocabulary  # the clone
        with Largest() as largest, torch.no_grad():
            logits_policy_loss(DRPO(delta=0.3), logits=logits, **data, centering=centering, engine="arrays")
        # two buffers of four rows
        assert largest.elements <= 8 * vocabulary


def test_score_centering_under_transforms():
    generator = torch.Generator().manual_seed(0)
    x, b = torch.randn((2, 3, 4), generator=generator, dtype=torch.float64).log_softmax(-1)
    a = torch.randn(3, generator=generator, dtype=torch.float64)

    def term(x, b, a):
        return score_centering(DRPO(delta=0.3), log_prob=x, behavior_log_prob=b, advantages=a)

    leaf = x.clone().requires_grad_()
    total = term(leaf, b, a).sum()
    (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(term))(x, b, a), gradient)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(total, leaf, create_graph=True)[0].sum(), leaf)
    torch._dynamo.reset()  # noqa: SLF001 -- the documented way
    compiled = torch.compile(lambda x: term(x, b, a).sum(), fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaf)[0], gradient)
    half = x.bfloat16().requires_grad_()
    term(half, b, a).sum().backward()
    assert half.grad.dtype == torch.bfloat16


TOP_K = {"ids": torch.zeros((1, 2), dtype=torch.int64), "behavior_log_prob": torch.zeros(1, 2)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopKCentering(**TOP_K | {"ids": torch.zeros(1, 2)}), TypeError, "ids: expected an integral dtype"),
        (
            lambda: TopKCentering(**TOP_K | {"behavior_log_prob": torch.zeros(1, 3)}),
            ValueError,
            "behavior_log_prob: expected the",
        ),
        (
            lambda: TopKCentering(**TOP_K, proximal_log_prob=torch.zeros(1, 3)),
            ValueError,
            "proximal_log_prob: expected the shape",
        ),
        (lambda: TopKCentering(ids=TOP_K["ids"][:, :0], behavior_log_prob=torch.zeros(1, 0)), ValueError, r"K of 1 or more"),
        (
            lambda: FullCentering(behavior=torch.zeros(1, 3), temperature=0.0),
            ValueError,
            "temperature: expected a finite number",
        ),
    ],
)
def test_bad_records(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "centering", "error", "message"),
    [
        (DRPO(delta=0.3), "full", TypeError, "centering: expected a TopKCentering or a FullCentering, got str"),
        (
            DRPO(delta=0.3),
            TopKCentering(**TOP_K | {"ids": TOP_K["ids"] + 3}),
            ValueError,
            r"centering\.ids: expected ids in \[0, 3\)",
        ),
        (
            DRPO(delta=0.3),
            FullCentering(behavior=torch.zeros(1, 4)),
            ValueError,
            r"centering\.behavior: expected the shape of the tok",
        ),
        (
            DRPO(delta=0.3),
            FullCentering(behavior=torch.zeros(2, 3)),
            ValueError,
            r"centering\.behavior: expected the shape of the tok",
        ),
        (
            Mode(DRPO(delta=0.3), corrections=(Veto(),)),
            TopKCentering(**TOP_K, proximal_log_prob=torch.zeros(1, 2)),
            ValueError,
            r"Veto\(",
        ),
        (
            Mode(DRPO(delta=0.3), anchor=Proximal()),
            TopKCentering(**TOP_K),
            ValueError,
            r"centering\.proximal_log_prob: expected log-probs",
        ),
        (
            Mode(DRPO(delta=0.3), corrections=(RatioMask(edge="policy/behavior", high=2.0),), count_masked=False),
            TopKCentering(**TOP_K),
            ValueError,
            "centering: expected a mode with count_masked=True",
        ),
    ],
)
def test_bad_arguments(objective, centering, error, message):
    needs = {"proximal_log_prob": torch.zeros(1)} if isinstance(objective, Mode) and objective.arguments else {}
    with pytest.raises(error, match=message):
        logits_policy_loss(
            objective,
            logits=torch.zeros(1, 3),
            tokens=torch.tensor([0]),
            behavior_log_prob=torch.zeros(1),
            advantages=torch.ones(1),
            mask=torch.tensor([True]),
            centering=centering,
            engine="arrays",
            **needs,
        )


def test_parts_of_the_vocabulary_have_no_full_centring():
    data, hidden, weight, behavior_weight, *_ = every()
    with pytest.raises(ValueError, match="chunk_vocabulary: expected None with a FullCentering"):
        linear_policy_loss(
            DRPO(delta=0.3),
            hidden=hidden,
            weight=weight,
            **data,
            centering=FullCentering(behavior=hidden @ behavior_weight.T),
            chunk_vocabulary=10,
        )
