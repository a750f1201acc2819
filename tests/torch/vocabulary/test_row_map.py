"""Temperature a token, supports and padded vocabularies, against a log-softmax over the ids that are left, token by token."""

import functools
import itertools

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
from vocabulary_batches import assert_close, each_engine, small_steps

from drpo_core import CISPO, DPPO, DRPO, sampled_in_top_k, sequence_mean_token_mean

INF, NAN = float("inf"), float("nan")
N, V, PADDED, H, K, CAP = (2, 7), 37, 41, 6, 5, 4.0
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
    return torch.stack(rows)


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


def top_k_of(data, x, y, *, normalizer=None):
    """Top-K TV and KL, by the core on log-probs that are −inf outside."""
    import array_api_compat.torch as xp  # noqa: PLC0415

    from drpo_core import top_k_kl, top_k_tv  # noqa: PLC0415

    tokens, ids = (data[name][data["mask"]] for name in ("tokens", "top_k"))
    among = {"sampled_in_top_k": sampled_in_top_k(tokens, ids, xp=xp)}
    of = {"top_k_log_prob": at(x, ids), "top_k_behavior_log_prob": at(y, ids)}
    return tuple(f(at(x, tokens), at(y, tokens), **of, **among, xp=xp) for f in (top_k_tv, top_k_kl))


def spread(values, mask, shape=N, fill=0.0):
    """Values of the valid tokens at their places, `fill` at the others."""
    found = torch.full((*mask.shape, *values.shape[1:]), fill, dtype=values.dtype)
    found[mask] = values
    return found.reshape(*shape, *values.shape[1:])


def given(data, *, shape=N, masked=True):
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


def same_gradients(data, actual, leaves, expected, exact, tolerance):
    """Compare gradients, which are exactly 0 in the padding, and in logits at masked tokens and outside the support."""
    ours = torch.autograd.grad(actual, list(leaves.values()), retain_graph=True)
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
        ours = (torch.where(actual == -INF, 0.0, actual) * cotangent).sum()
        theirs = (finite(values) * cotangent.reshape(len(mask), *values.shape[1:])[mask]).sum()
        same_gradients(data, ours, leaves, theirs, exact, 1e-10)


def loss_of(data, record, centering, **options):
    """Loss, entropies, and leaves, by log-softmax, the core's divergences and its centring term."""
    leaves, x, y, _ = plain(data, **options)
    mask = data["mask"]
    tokens, advantages = data["tokens"][mask], data["advantages"][mask]
    objective = CISPO(max_ratio=1.2) if centering != "none" else DRPO(delta=0.5)
    options = {}
    if record != "none":
        how, kind = record.split()
        options["divergence"] = (top_k_of(data, x, y) if how == "top-k" else full(x, y))[kind == "kl"].detach()
        objective = DPPO(delta=0.05, divergence="per_token")
    of_tokens = {"log_prob": at(x, tokens), "behavior_log_prob": at(y, tokens), "advantages": advantages}
    every_token = {name: spread(tensor, mask) for name, tensor in (of_tokens | options).items()}
    reduction = {"mask": mask.reshape(N), "reduction": sequence_mean_token_mean}
    loss, _ = policy_loss(objective, **every_token, **reduction)
    if centering != "none":
        terms = []
        for row, behavior, a, ids, top in zip(x, y, advantages, valid_ones(data), data["top_k"][mask], strict=True):
            some = top if centering == "top-k" else torch.tensor(ids or range(V))
            known = {"log_prob": row[some], "behavior_log_prob": behavior[some], "advantages": a}
            terms.append(score_centering(objective, **known, tail=centering == "top-k"))
        loss = loss + (spread(torch.stack(terms), mask).sum(-1) / mask.reshape(N).sum(-1)).mean()
    return objective, loss, -(x.exp() * finite(x)).sum(-1), leaves


LOSSES = [(logits_policy_loss, {}), (linear_policy_loss, {"chunk_tokens": 3})]
CASES = [(record, "none") for record in RECORDS] + [("none", centering) for centering in CENTERINGS[1:]]


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
    if record != "none":
        options["divergence"] = recorded(data, *record.split())
    if centering != "none":
        options["centering"] = recorded(data, centering, None)
    objective, expected, entropy, exact = loss_of(data, record, centering, head=head, cap=cap.get("logit_softcap"))
    leaves = leaves_of(function, data)
    result = function(
        objective,
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
