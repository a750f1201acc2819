"""Temperature a token, supports and padded vocabularies, against a log-softmax over the ids that are left, token by token."""

import functools
import inspect
import itertools

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from drpo_torch import (
    FullCentering,
    FullDivergence,
    LinearHead,
    Support,
    TopKCentering,
    TopKDivergence,
    full_divergences,
    linear_log_prob,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    score_centering,
    token_log_prob,
    top_k_divergences,
)
from vocabulary_batches import Largest, assert_close, each_engine, small_steps

from drpo_core import DPPO, DRPO, sampled_in_top_k, sequence_mean_token_mean, top_k_kl, top_k_tv
from drpo_core.anchors import Behavior, Sequence
from drpo_core.modes import Mode

INF, NAN = float("inf"), float("nan")
N, V, PADDED, H, K, CAP = (2, 7), 37, 41, 6, 5, 4.0
OBJECTIVE = DPPO(delta=0.05, divergence="per_token")
FORMS = ("ids", "bits", "mask")
RECORDS = ("none", "top-k tv", "top-k kl", "full tv", "full kl", "head kl")
CENTERINGS = ("none", "top-k", "full", "head")


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    small_steps(monkeypatch)


# truncated sampling


def truncated(mu, how):
    """The ids that a sampler keeps, from probabilities, in plain loops."""
    order = sorted(range(len(mu)), key=lambda v: -mu[v])
    if how == "top-k":
        return order[:3]
    if how == "min-p":
        return [v for v in order if mu[v] >= 0.3 * mu[order[0]]]
    kept, mass = [], 0.0
    for v in order:
        kept.append(v)
        mass += mu[v]
        if mass >= 0.7:
            return kept
    return kept


@pytest.mark.parametrize("how", ["top-k", "top-p", "min-p"])
@each_engine
def test_the_expected_ratio_is_one_over_the_support_and_the_kept_mass_without_it(how, engine):
    rng = np.random.default_rng(0)
    for _ in range(5):
        pi, mu = rng.dirichlet(np.ones(9), 2)
        kept = truncated(mu, how)
        mu_kept = np.array([mu[v] / sum(mu[u] for u in kept) for v in kept])
        logits = torch.tensor(np.log(pi)).expand(len(kept), -1).contiguous()
        support = Support(torch.tensor(kept * len(kept)), torch.arange(len(kept) + 1) * len(kept))
        call = functools.partial(token_log_prob, logits=logits, tokens=torch.tensor(kept), engine=engine)
        ratios, without = (call(**options).log_prob.exp().numpy() / mu_kept for options in ({"support": support}, {}))
        assert (mu_kept * ratios).sum() == pytest.approx(1.0, abs=1e-12)
        assert (mu_kept * without).sum() == pytest.approx(sum(pi[v] for v in kept), abs=1e-12)


# every function against a log-softmax over the ids


def every(seed=0, dtype=torch.float64, shape=N):
    """Tokens with supports of one id, of some, of all and of none recorded; anything at masked ones and in the padding."""
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(count, H), normal(V, H), normal(V)
    behavior_weight = weight + 0.3 * normal(V, H)
    mask = torch.rand(count, generator=generator) < 0.8
    mask[:4] = True
    sizes = [[1, V, 0, 12, 3][i % 5] for i in range(count)]
    supports = [torch.randperm(V, generator=generator)[:size].tolist() for size in sizes]
    tokens = torch.tensor([ids[-1] if ids else 5 for ids in supports], dtype=torch.int64)
    temperature = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    behavior_temperature = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    top_k = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(count)] or [torch.empty(0, K).long()])
    data = {
        "hidden": hidden,
        "weight": torch.cat((weight, torch.full((PADDED - V, H), NAN))),
        "bias": torch.cat((bias, torch.full((PADDED - V,), NAN))),
        "behavior_weight": torch.cat((behavior_weight, torch.full((PADDED - V, H), NAN))),
        "temperature": temperature.masked_fill(~mask, 0.0),
        "behavior_temperature": behavior_temperature.masked_fill(~mask, NAN),
        "advantages": normal(count),
        "old": -normal(count).abs(),
    }
    for name in ("hidden", "weight", "bias", "behavior_weight"):
        # values that every dtype has
        data[name] = data[name].to(dtype)
    return data | {"tokens": tokens, "top_k": top_k, "supports": supports, "mask": mask}


def support_of(data, form, shape=N):
    """The supports, with an id twice; of masked tokens anything."""
    supports = [
        ids + ids[:1] if valid else [-100, V] for ids, valid in zip(data["supports"], data["mask"].tolist(), strict=True)
    ]
    if form == "ids":
        offsets = torch.tensor([0, *itertools.accumulate(len(ids) for ids in supports)])
        return Support(torch.tensor([v for ids in supports for v in ids], dtype=torch.int32), offsets)
    mask = torch.zeros(len(supports), V, dtype=torch.bool)
    for row, ids, valid in zip(mask, supports, data["mask"].tolist(), strict=True):
        row[ids if valid else []] = True
    mask = mask.reshape(*shape, V)
    if form == "mask":
        return Support.from_mask(mask)
    bits = np.zeros((*shape, -(-V // 32) * 32), bool)
    bits[..., :V] = mask.numpy()
    # the layout itself, by NumPy; bits past the vocabulary are anything
    bits[..., V:] = True
    return Support.from_bits(torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little").view(np.int32)))


def log_probs_of(x, supports):
    """Log-probs (N, V) by a log-softmax over the ids of each token, −inf elsewhere."""
    rows = []
    for row, ids in zip(x, supports, strict=True):
        ids = sorted(set(ids)) or list(range(V))  # noqa: PLW2901
        rows.append(torch.full_like(row, -INF).index_put((torch.tensor(ids),), row[ids].log_softmax(-1)))
    return torch.stack(rows) if rows else x


def valid_ones(data):
    """The supports of the tokens that count."""
    return [ids for ids, valid in zip(data["supports"], data["mask"].tolist(), strict=True) if valid]


def plain(data, *, head=True, cap=None):
    """Float64 leaves, the head or the logits; and of valid tokens, (M, V): log π, log μ, and log π's logits."""
    leaves = [data[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    mask = data["mask"]
    z = leaves[0] @ leaves[1][:V].T + leaves[2][:V]
    if not head:
        z = z.detach().requires_grad_()
        leaves = [z]
    z = z[mask] if cap is None else cap * torch.tanh(z[mask] / cap)
    y = data["hidden"][mask].double() @ data["behavior_weight"].double()[:V].T
    z, y = z / data["temperature"][mask, None], y / data["behavior_temperature"][mask, None]
    supports = valid_ones(data)
    return leaves, log_probs_of(z, supports), log_probs_of(y, supports), z


def at(log_probs, ids):
    return log_probs.gather(-1, ids if ids.ndim == 2 else ids[:, None]).reshape(ids.shape)


def finite(x):
    return torch.where(x == -INF, 0.0, x)


def full(x, y):
    """TV and KL(μ‖π) of rows over the ids that both have."""
    return 0.5 * (x.exp() - y.exp()).abs().sum(-1), (y.exp() * (finite(y) - finite(x))).sum(-1)


def top_k_of(data, x, y):
    """Top-K TV and KL, by the core on log-probs that are −inf outside."""
    tokens, ids = (data[name][data["mask"]] for name in ("tokens", "top_k"))
    among = {"sampled_in_top_k": sampled_in_top_k(tokens, ids, xp=xp)}
    of = {"top_k_log_prob": at(x, ids), "top_k_behavior_log_prob": at(y, ids)}
    return tuple(f(at(x, tokens), at(y, tokens), **of, **among, xp=xp) for f in (top_k_tv, top_k_kl))


def spread(values, mask, shape=N, fill=0.0):
    """Values of the valid tokens at their places, `fill` at the others."""
    found = torch.full((*mask.shape, *values.shape[1:]), fill, dtype=values.dtype)
    found[mask] = values
    return found.reshape((*shape, *values.shape[1:]))


def given(data, shape=N):
    """Arguments of tokens, with anything at masked ones."""
    _, _, y, _ = plain(data)
    mask = data["mask"]
    tokens = data["tokens"].masked_fill(~mask, -100).reshape(shape)
    return {
        "tokens": tokens,
        "behavior_log_prob": spread(at(y, data["tokens"][mask]), mask, shape, NAN),
        "advantages": data["advantages"].masked_fill(~mask, NAN).reshape(shape),
        "mask": mask.reshape(shape),
    }


def recorded(data, record, kind, shape=N):
    """A record of μ, with an id outside the support recorded as if nothing had been truncated."""
    mask, (_, _, y, _) = data["mask"], plain(data)
    if record == "top-k":
        ids = data["top_k"].masked_fill(~mask[:, None], -100).reshape(*shape, K)
        log_mu = at(y, data["top_k"][mask])
        known = {"ids": ids, "behavior_log_prob": spread(torch.where(log_mu == -INF, -3.0, log_mu), mask, shape, NAN)}
        return TopKDivergence(kind=kind, **known) if kind else TopKCentering(**known)
    hidden = data["hidden"].masked_fill(~mask[:, None], NAN).reshape(*shape, H)
    behavior = LinearHead(hidden, data["behavior_weight"]) if record == "head" else hidden @ data["behavior_weight"].T
    known = {"behavior": behavior, "temperature": data["behavior_temperature"].reshape(shape)}
    return FullDivergence(kind=kind, **known) if kind else FullCentering(**known)


HEADS = (linear_log_prob, linear_policy_loss)


def leaves_of(function, data, shape=N):
    """What a function is differentiated in, by name: a head or logits, NaN at masked tokens and in the padding."""
    hidden = data["hidden"].masked_fill(~data["mask"][:, None], NAN).reshape(*shape, H)
    if function in HEADS:
        leaves = {"hidden": hidden, "weight": data["weight"], "bias": data["bias"]}
    else:
        leaves = {"logits": hidden @ data["weight"].T + data["bias"]}
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}


def same_gradients(data, actual, leaves, expected, exact, tolerance, cotangent=None):
    """Compare gradients, which are exactly 0 in the padding, and in logits at masked tokens and outside the support."""
    ours = torch.autograd.grad(actual, list(leaves.values()), cotangent, retain_graph=True)
    theirs = torch.autograd.grad(expected, exact, retain_graph=True)
    for name, found, plainly in zip(leaves, ours, theirs, strict=True):
        if name == "logits":
            found = found.reshape(-1, PADDED)  # noqa: PLW2901
            assert (found[:, V:] == 0.0).all()
            for row, ids, valid in zip(found[:, :V], data["supports"], data["mask"].tolist(), strict=True):
                out = set(range(V)) - set(ids or range(V)) if valid else set(range(V))
                assert all(row[v] == 0.0 for v in out)
            found = found[:, :V]  # noqa: PLW2901
        elif name != "hidden":
            assert (found[V:] == 0.0).all()
        assert_close(found.reshape(plainly.shape), plainly, tolerance)


ROWS = [
    (token_log_prob, {}),
    (linear_log_prob, {"chunk_tokens": 3}),
    (linear_log_prob, {"chunk_tokens": 3, "chunk_vocabulary": 8, "logit_softcap": CAP}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("function", "options"), ROWS, ids=["logits", "head", "parts"])
@each_engine
def test_log_probs(function, options, form, engine):
    data = every()
    leaves, mask, tokens = leaves_of(function, data), data["mask"], data["tokens"][data["mask"]]
    found = function(
        **leaves,
        **options,
        tokens=given(data)["tokens"],
        mask=mask.reshape(N),
        top_k_ids=data["top_k"].masked_fill(~mask[:, None], -100).reshape(*N, K),
        temperature=data["temperature"].reshape(N),
        support=support_of(data, form),
        vocabulary_size=V,
        entropy=True,
        engine=engine,
    )
    exact, x, _, z = plain(data, head=function in HEADS, cap=options.get("logit_softcap"))
    expected = {
        "log_prob": at(x, tokens),
        "entropy": -(x.exp() * finite(x)).sum(-1),
        "log_normalizer": torch.where(x == -INF, -INF, z).logsumexp(-1),
        "top_k_log_prob": at(x, data["top_k"][mask]),
    }
    for name, values in expected.items():
        actual = getattr(found, name)
        torch.testing.assert_close(actual, spread(values, mask))
        cotangent = torch.rand(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        theirs = (finite(values) * cotangent.reshape(len(mask), *values.shape[1:])[mask]).sum()
        same_gradients(data, actual, leaves, theirs, exact, 1e-10, cotangent)


def loss_of(data, record, centering, **options):
    """Loss, entropies, and leaves, by log-softmax, the core's divergences and its centring term."""
    leaves, x, y, _ = plain(data, **options)
    mask = data["mask"]
    tokens, advantages = data["tokens"][mask], data["advantages"][mask]
    how, _, kind = record.partition(" ")
    divergence = (top_k_of(data, x, y) if how == "top-k" else full(x, y))[kind == "kl"].detach()
    of_tokens = {"log_prob": at(x, tokens), "behavior_log_prob": at(y, tokens)}
    of_tokens |= {"advantages": advantages, "divergence": divergence}
    every_token = {name: spread(tensor, mask) for name, tensor in of_tokens.items()}
    loss, _ = policy_loss(OBJECTIVE, **every_token, mask=mask.reshape(N), reduction=sequence_mean_token_mean)
    if centering != "none":
        terms = []
        rows = zip(x, y, advantages, divergence, valid_ones(data), data["top_k"][mask], strict=True)
        for row, behavior, a, d, ids, top in rows:
            some = top if centering == "top-k" else torch.tensor(ids or range(V))
            known = {"log_prob": row[some], "behavior_log_prob": behavior[some], "advantages": a, "divergence": d}
            terms.append(score_centering(OBJECTIVE, **known, tail=centering == "top-k"))
        loss = loss + (spread(torch.stack(terms), mask).sum(-1) / mask.reshape(N).sum(-1)).mean()
    return loss, divergence, -(x.exp() * finite(x)).sum(-1), leaves


LOSSES = [(logits_policy_loss, {}), (linear_policy_loss, {"chunk_tokens": 3})]
# the centring is of the objective at the divergence that was measured, so that each record is beside each
CASES = list(itertools.product(RECORDS, CENTERINGS))


@pytest.mark.parametrize("form", ["ids", "bits"])
@pytest.mark.parametrize(("record", "centering"), CASES)
@pytest.mark.parametrize(("function", "options"), LOSSES, ids=["logits", "head"])
@each_engine
def test_losses_with_their_records(function, options, record, centering, form, engine):
    data = every()
    head = function in HEADS
    cap = {"logit_softcap": CAP} if head else {}
    options = options | cap
    if head and not {record.split()[0], centering} & {"full", "head"}:
        options["chunk_vocabulary"] = 8
    if centering != "none":
        options["centering"] = recorded(data, centering, None)
    expected, divergence, entropy, exact = loss_of(data, record, centering, head=head, cap=cap.get("logit_softcap"))
    if form == "bits":
        options["entropy_coefficient"] = 0.2
        means = spread(entropy, data["mask"]).sum(-1) / data["mask"].reshape(N).sum(-1)
        expected = expected - 0.2 * means.mean()
    options["divergence"] = spread(divergence, data["mask"]) if record == "none" else recorded(data, *record.split())
    leaves = leaves_of(function, data)
    result = function(
        OBJECTIVE,
        **leaves,
        **options,
        **given(data),
        temperature=data["temperature"].reshape(N),
        support=support_of(data, form),
        vocabulary_size=V,
        reduction=sequence_mean_token_mean,
        entropy=True,
        engine=engine,
    )
    torch.testing.assert_close(result.entropy, spread(entropy.detach(), data["mask"]))
    torch.testing.assert_close(result.loss, expected)
    same_gradients(data, result.loss, leaves, expected, exact, 1e-9)


# divergences, which have no mask


def all_valid(data):
    """The same tokens, each of which counts."""
    fill = {"temperature": 0.7, "behavior_temperature": 1.3}
    tensors = {name: data[name].masked_fill(~data["mask"], value) for name, value in fill.items()}
    return data | tensors | {"mask": torch.ones_like(data["mask"])}


@pytest.mark.parametrize("form", ["ids", "bits"])
@each_engine
def test_full_divergences(form, engine):
    data = all_valid(every())
    leaves = leaves_of(full_divergences, data)
    found = full_divergences(
        **leaves,
        behavior_logits=(data["hidden"] @ data["behavior_weight"].T).reshape(*N, PADDED),
        temperature=data["temperature"].reshape(N),
        behavior_temperature=data["behavior_temperature"].reshape(N),
        support=support_of(data, form),
        vocabulary_size=V,
        engine=engine,
    )
    exact, x, y, _ = plain(data, head=False)
    for actual, values in zip(found, full(x, y), strict=True):
        torch.testing.assert_close(actual, values.reshape(N))
        cotangent = torch.arange(1.0, 1.0 + values.numel(), dtype=torch.float64)
        same_gradients(data, (actual * cotangent.reshape(N)).sum(), leaves, (values * cotangent).sum(), exact, 1e-10)


@pytest.mark.parametrize("form", ["ids", "bits"])
def test_top_k_divergences(form):
    data = all_valid(every())
    leaves, support = leaves_of(top_k_divergences, data), support_of(data, form)
    record, tokens = recorded(data, "top-k", "tv"), given(data)
    known = {"temperature": data["temperature"].reshape(N), "support": support, "vocabulary_size": V}
    normalizer = token_log_prob(**leaves, tokens=tokens["tokens"], **known).log_normalizer
    found = top_k_divergences(
        **leaves,
        log_normalizer=normalizer,
        tokens=tokens["tokens"],
        behavior_log_prob=tokens["behavior_log_prob"],
        top_k_ids=record.ids,
        top_k_behavior_log_prob=record.behavior_log_prob,
        **known,
    )
    exact, x, y, _ = plain(data, head=False)
    for actual, values in zip(found, top_k_of(data, x, y), strict=True):
        torch.testing.assert_close(actual, values.reshape(N))
        same_gradients(data, actual.sum(), leaves, values.sum(), exact, 1e-9)


# padding, dtypes, shapes


def call(function, data, leaves, shape=N, engine="auto", dtype=None, **options):
    """Something to differentiate, from a function that takes what is `given`."""
    tokens = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in given(data, shape).items()}
    known = options | {"temperature": data["temperature"].reshape(shape), "engine": engine}
    if function in (logits_policy_loss, linear_policy_loss):
        return function(DRPO(delta=0.5), **leaves, **tokens, **known).loss
    if function is full_divergences:
        width = leaves["logits"].shape[-1]
        behavior = (data["hidden"] @ data["behavior_weight"].T)[:, :width].reshape(*shape, width)
        return sum(t.sum() for t in full_divergences(**leaves, behavior_logits=behavior, **known))
    found = function(**leaves, tokens=tokens["tokens"], mask=tokens["mask"], **known)
    return (found.log_prob - found.log_normalizer).sum()


FUNCTIONS = [token_log_prob, linear_log_prob, logits_policy_loss, linear_policy_loss, full_divergences]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


@each_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_engine
def test_padding_is_as_if_it_were_not_there(function, dtype, engine):
    if dtype == torch.float16 and engine == "compiled":
        pytest.skip("not compiled for float16")
    data = all_valid(every(dtype=dtype))
    results = []
    for options in ({"vocabulary_size": V}, {}):
        leaves = leaves_of(function, data)
        if not options:
            rows = {name: t.detach()[..., :V] if name == "logits" else t.detach()[:V] for name, t in leaves.items()}
            leaves |= {name: t.requires_grad_() for name, t in rows.items() if name != "hidden"}
        result = call(function, data, leaves, engine=engine, support=support_of(data, "bits"), **options)
        results.append((result, torch.autograd.grad(result, list(leaves.values()))))
    (padded, ours), (expected, theirs) = results
    assert torch.equal(padded, expected)
    for found, same in zip(ours, theirs, strict=True):
        columns = found.movedim(-1, 0) if "logits" in leaves else found
        wanted = same.movedim(-1, 0) if "logits" in leaves else same
        assert torch.equal(columns[: len(wanted)], wanted)
        assert (columns[len(wanted) :] == 0.0).all()


@each_function
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2), (torch.float16, 8e-3)], ids=str
)
@each_engine
def test_lower_precision(function, dtype, tolerance, engine):
    if dtype == torch.float16 and engine == "compiled":
        pytest.skip("not compiled for float16")
    # what is stored is exact in float64
    data = all_valid(every(dtype=dtype))
    exact = {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in data.items()}
    known = {"support": support_of(data, "ids"), "vocabulary_size": V}
    leaves = leaves_of(function, data)
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    result = call(function, data, leaves, engine=engine, **known)
    expected = call(function, exact | ({} if function in HEADS else {"weight": data["weight"].double()}), wide, **known)
    ours, theirs = (torch.autograd.grad(r, list(t.values())) for r, t in ((result, leaves), (expected, wide)))
    for found, wanted in zip((result, *ours), (expected, *theirs), strict=True):
        assert_close(found, wanted.detach(), tolerance)


@each_function
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (2, 1, 2), (0,), (2, 0)], ids=str)
def test_shapes(function, shape):
    data = every(shape=shape)
    data = all_valid(data) if function is full_divergences or shape == () else data
    leaves, flat = leaves_of(function, data, shape), leaves_of(function, data, (len(data["mask"]),))
    known = {"vocabulary_size": V}
    support = [support_of(data, "ids", shape), support_of(data, "mask", shape)]
    every_one = [call(function, data, leaves, shape, support=s, **known) for s in support]
    expected = call(function, data, flat, (len(data["mask"]),), support=support[0], **known)
    for result in every_one:
        torch.testing.assert_close(result, expected)
        ours, theirs = (
            torch.autograd.grad(r, list(t.values()), retain_graph=True) for r, t in ((result, leaves), (expected, flat))
        )
        for found, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found.reshape(wanted.shape), wanted)


@each_function
def test_all_masked(function):
    if function is full_divergences:
        pytest.skip("it has no mask")
    data = every() | {"mask": torch.zeros(14, dtype=torch.bool)}
    data["temperature"] = torch.full((14,), NAN, dtype=torch.float64)
    leaves = leaves_of(function, data)
    result = call(function, data, leaves, support=support_of(data, "ids"), vocabulary_size=V)
    assert result == 0.0
    assert all((g == 0.0).all() for g in torch.autograd.grad(result, list(leaves.values())))


def test_a_sequences_mode_and_gradients_in_the_place_of_logits():
    """Of a mode that looks at whole sequences the head's chunks come twice; `overwrite_logits` changes no number."""
    data = every()
    mode = Mode(DRPO(delta=0.5), anchor=Sequence(Behavior()))
    known = {"temperature": data["temperature"].reshape(N), "support": support_of(data, "ids"), "vocabulary_size": V}
    gradients = []
    for options in ({}, {"overwrite_logits": True}):
        leaves = leaves_of(logits_policy_loss, data)
        logits = leaves["logits"].clone()
        loss = logits_policy_loss(mode, logits=logits, **given(data), **known, **options).loss
        gradients.append(torch.autograd.grad(loss, leaves["logits"])[0])
    assert torch.equal(*gradients)
    leaves = leaves_of(linear_policy_loss, data)
    result = linear_policy_loss(mode, **leaves, **given(data), **known, chunk_tokens=4)
    torch.testing.assert_close(result.loss, loss)
    (of_bias,) = torch.autograd.grad(result.loss, leaves["bias"])
    torch.testing.assert_close(of_bias, gradients[0].reshape(-1, PADDED).sum(0))


@each_engine
def test_logits_of_minus_infinity_in_a_support(engine):
    logits = torch.tensor([[0.0, -INF, 1.0, NAN], [2.0, 0.0, -INF, -INF]], dtype=torch.float64, requires_grad=True)
    support = Support(torch.tensor([2, 0, 1, 0, 1]), torch.tensor([0, 3, 5]))
    known = {"support": support, "engine": engine}
    found = token_log_prob(logits=logits, tokens=torch.tensor([0, 1]), entropy=True, **known)
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(found.log_prob.detach(), torch.stack((x[0, 0], x[1, 1])))
    torch.testing.assert_close(found.entropy.detach(), -(x.exp() * x).sum(-1))
    (gradient,) = torch.autograd.grad(found.log_prob.sum() + found.entropy.sum(), logits)
    assert (gradient.isfinite()).all()
    assert gradient[0, 1] == gradient[0, 3] == gradient[1, 2] == 0.0
    tv, kl = full_divergences(logits=logits, behavior_logits=logits.detach(), **known)
    assert tv.abs().max() < 1e-15
    assert kl.abs().max() < 1e-15


@each_engine
def test_a_head_may_hold_anything_at_ids_that_no_support_has(engine):
    data = all_valid(every())
    ids = torch.arange(V)[torch.arange(V) % 3 == 0]
    without = ~torch.isin(torch.arange(PADDED), ids)
    weight = data["weight"].masked_fill(without[:, None], NAN).requires_grad_()
    found = linear_log_prob(
        hidden=data["hidden"],
        weight=weight,
        tokens=torch.zeros(14, dtype=torch.int64),
        support=Support(ids.repeat(14), torch.arange(15) * len(ids)),
        logit_softcap=CAP,
        entropy=True,
        engine=engine,
    )
    (gradient,) = torch.autograd.grad(found.log_prob.sum() + found.entropy.sum(), weight)
    assert (gradient[without] == 0.0).all()
    assert gradient[~without].abs().min() > 0.0


@each_engine
def test_a_small_kl_over_a_support_keeps_its_digits_in_float32(engine, monkeypatch):
    # which subtracts normalisers, a row at a time
    monkeypatch.setitem(inspect.unwrap(full_divergences).__globals__, "_distant", None)
    generator = torch.Generator().manual_seed(0)
    # more ids than are taken through a loop's buffer at a time
    behavior = 3.0 * torch.randn(4, 6000, generator=generator)
    logits = behavior + 5e-4 * torch.randn(4, 6000, generator=generator)
    kept = torch.rand(4, 6000, generator=generator) < 0.5
    known = {"support": Support.from_mask(kept), "engine": engine}
    found = full_divergences(logits=logits, behavior_logits=behavior, **known)
    x, y = (t.double().masked_fill(~kept, -INF).log_softmax(-1) for t in (logits, behavior))
    _, exact = full(x, y)
    assert float(((found.kl - exact) / exact).abs().max()) < 1e-4
    tokens = kept.nonzero()[:, 1][kept.sum(-1).cumsum(-1) - 1]
    policy = token_log_prob(logits=logits.requires_grad_(), tokens=tokens, **known)
    assert_close(policy.log_prob, at(x, tokens), 1e-6)
    (gradient,) = torch.autograd.grad(policy.log_prob.sum(), logits)
    assert_close(gradient, torch.nn.functional.one_hot(tokens, 6000) - x.exp(), 1e-6)


@pytest.mark.parametrize("form", ["ids", "bits"])
def test_nothing_of_the_size_of_the_logits_exists(form):
    tokens, vocabulary = 64, 4096
    hidden, weight = torch.randn(tokens, 2, requires_grad=True), torch.randn(vocabulary, 2, requires_grad=True)
    sampled = torch.randint(vocabulary, (tokens,))
    support = Support(sampled, torch.arange(tokens + 1))
    if form == "bits":
        support = Support.from_mask(torch.nn.functional.one_hot(sampled, vocabulary).bool())
    known = {"tokens": sampled, "mask": torch.ones(tokens, dtype=torch.bool), "support": support}
    behavior = {"behavior_log_prob": torch.zeros(tokens), "advantages": torch.ones(tokens)}
    with Largest() as largest:
        head = {"hidden": hidden, "weight": weight, "chunk_tokens": 8, "engine": "arrays"}
        linear_policy_loss(DRPO(delta=0.5), **head, **known, **behavior).loss.backward()
    assert largest.elements <= 8 * vocabulary


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Support, r"ids: expected a torch\.Tensor"),
        (lambda: Support(torch.tensor([1.0]), torch.tensor([0, 1])), "ids: expected an integral dtype"),
        (lambda: Support(torch.tensor([[1]]), torch.tensor([0, 1])), "ids: expected the shape of a flat list"),
        (lambda: Support(torch.tensor([1]), torch.tensor([[0, 1]])), "offsets: expected the shape of a flat list"),
        (lambda: Support(torch.tensor([1]), torch.tensor([], dtype=torch.int64)), r"offsets: expected shape \(N \+ 1,\)"),
        (lambda: Support(torch.tensor([1]), torch.tensor([0, 2])), "offsets: expected to go from 0 to 1, .* got 0 to 2"),
        (lambda: Support(torch.tensor([1]), torch.tensor([1, 1])), "offsets: expected to go from 0 to 1, .* got 1 to 1"),
        (
            lambda: Support(torch.tensor([1, 2]), torch.tensor([0, 2, 1, 2])),
            r"offsets: .* never decrease, got 2 and then 1 at",
        ),
        (lambda: Support.from_bits(torch.tensor([1])), r"bits: expected int32, got torch\.int64"),
        (lambda: Support.from_bits(torch.tensor(1, dtype=torch.int32)), "bits: expected shape"),
        (lambda: Support.from_mask(torch.tensor([1])), "mask: expected a bool dtype"),
        (lambda: Support.from_mask(torch.empty(2, 0, dtype=torch.bool)), "mask: expected shape"),
        (lambda: Support(torch.tensor([1]), torch.tensor([0, 1]), bits=torch.tensor([1])), "bits: expected None"),
    ],
)
def test_a_wrong_support_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()


WRONG = {
    "a list": ({"support": [[0]]}, r"support: expected a drpo_torch\.Support or None, got list"),
    "number of tokens": (
        {"support": Support(torch.tensor([1]), torch.tensor([0, 1]))},
        r"support\.offsets: expected the shape of the tokens",
    ),
    "words": (
        {"support": Support.from_bits(torch.zeros(5, 2, dtype=torch.int32))},
        r"support\.bits: expected the shape of the tokens",
    ),
    "an id": (
        {"support": Support(torch.tensor([0, 1, 9, 0, 1]), torch.tensor([0, 1, 2, 4, 5, 5]))},
        r"support\.ids: expected ids in \[0, 9\) at valid tokens, got 9 at index \(2,\), of token 2 \(1 such\)",
    ),
    "a sampled token": (
        {"support": Support(torch.tensor([0, 1, 8, 1, 0]), torch.tensor([0, 1, 2, 3, 5, 5]))},
        r"tokens: expected ids in the support of their token at valid positions, got 0 at index \(1,\) \(2 such\)",
    ),
    "temperatures": ({"temperature": torch.ones(4)}, r"temperature: expected the shape of the tokens, \(5,\), got \(4,\)"),
    "a temperature": (
        {"temperature": torch.tensor([1.0, 1.0, 0.0, NAN, 1.0])},
        r"temperature: expected finite numbers greater than 0 at valid positions, got 0 at index \(2,\)",
    ),
    "integers": ({"temperature": torch.ones(5, dtype=torch.int64)}, "temperature: expected a real floating dtype"),
    "size": ({"vocabulary_size": 11}, r"vocabulary_size: expected 10 .* or less, got 11"),
    "size 0": ({"vocabulary_size": 0}, "vocabulary_size: expected a finite number, 1 or more, got 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("function", FUNCTIONS[:4], ids=lambda f: f.__name__)
def test_wrong_arguments_are_refused_by_name(function, wrong):
    changes, message = WRONG[wrong]
    leaves = {"hidden": torch.ones(5, 2), "weight": torch.ones(10, 2)} if function in HEADS else {"logits": torch.ones(5, 10)}
    known = {"tokens": torch.zeros(5, dtype=torch.int64), "mask": torch.tensor([True, True, True, False, True])}
    if function in (logits_policy_loss, linear_policy_loss):
        known |= {"behavior_log_prob": -torch.ones(5), "advantages": torch.ones(5)}
        function = functools.partial(function, DRPO(delta=0.5))
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        function(**leaves, **known, **{"vocabulary_size": 9} | changes)
