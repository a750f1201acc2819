"""The row map z → x of every function: a temperature a token, a support, a padded vocabulary."""

import functools

import drpo_jax
import drpo_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drpo_jax import FullCentering, FullDivergence, LinearHead, Support, TopKCentering, TopKDivergence
from drpo_jax.vocabulary import support as support_module

from drpo_core import CISPO
from drpo_core.centering import score_centering
from drpo_core.objectives import Reinforce

N, H, V, WIDTH, K = 7, 3, 37, 40, 3
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MASK = np.array([True, True, False, True, True, False, True])


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Of the ids of a chunk of two tokens."""
    monkeypatch.setattr(support_module, "_IDS", 4)


def sets():
    """The support of each token: one id, some in any order, one that was not recorded, and all."""
    rng = np.random.default_rng(0)
    return [np.array([V - 1]), *(rng.choice(V, size=size, replace=False) for size in (5, 9, 0, V, 3, 20))]


def inside():
    """Booleans (N, V); all for a support that was not recorded."""
    rows = np.zeros((N, V), dtype=bool)
    for row, ids in zip(rows, sets(), strict=True):
        row[ids if len(ids) else slice(None)] = True
    return rows


def support_of(kind, spoilt=None):
    """The sets as a `Support`, with an id that comes twice, with junk at masked tokens and beyond the vocabulary."""
    if kind == "ids":
        lists = [np.append(ids, ids[:1]) if m else np.full_like(ids, -7) for ids, m in zip(sets(), MASK, strict=True)]
        offsets = np.cumsum([0, *map(len, lists)])
        ids = np.concatenate(lists)
        if spoilt is not None:
            ids[offsets[spoilt]] = V
        return Support(jnp.asarray(ids), jnp.asarray(offsets))
    rows = np.zeros((N, WIDTH), dtype=bool)
    for row, ids in zip(rows, sets(), strict=True):
        row[ids] = True
    rows[:, V:] = True
    words = np.packbits(np.pad(rows, [(0, 0), (0, 64 - WIDTH)]), axis=-1, bitorder="little").view(np.int32)
    return Support.from_bits(jnp.asarray(words))


def batch():
    """A head with NaN in its padding, and tokens of the supports; masked ones hold anything."""
    rng = np.random.default_rng(1)
    data = {"hidden": rng.normal(size=(N, H)), "weight": rng.normal(size=(WIDTH, H)), "bias": rng.normal(size=WIDTH)}
    data["behavior_hidden"] = data["hidden"] + 0.3 * rng.normal(size=(N, H))
    data["behavior_weight"] = data["weight"] + 0.1 * rng.normal(size=(WIDTH, H))
    ids = np.stack([rng.choice(V, size=K, replace=False) for _ in range(N)])
    tokens = np.array([rng.choice(np.flatnonzero(row)) for row in inside()])
    data["logits"] = data["hidden"] @ data["weight"].T + data["bias"]
    data["behavior"] = data["behavior_hidden"] @ data["behavior_weight"].T
    data |= {name: rng.uniform(0.5, 2.0, size=N) for name in ("temperature", "behavior_temperature")}
    log_mu = log_softmax_over_ids(*(torch.from_numpy(data[name]) for name in ("behavior", "behavior_temperature"))).numpy()
    data["behavior_log_prob"] = log_mu[np.arange(N), tokens]
    data["top_k_behavior_log_prob"] = np.nan_to_num(np.take_along_axis(log_mu, ids, -1), neginf=-3.0)
    data["advantages"] = rng.normal(size=N)
    for name in ("hidden", "behavior_log_prob", "advantages"):
        data[name][~MASK] = np.nan
    for name in ("weight", "bias", "behavior_weight"):
        data[name][V:] = np.nan
    for name in ("logits", "behavior"):
        data[name][:, V:] = np.nan
    for name in ("temperature", "behavior_temperature"):
        data[name][~MASK] = 0.0
    data |= {"tokens": np.where(MASK, tokens, -100), "top_k_ids": np.where(MASK[:, None], ids, WIDTH), "mask": MASK}
    return jax.tree.map(jnp.asarray, data)


def log_softmax_over_ids(z, temperature):
    """Of (N, V): a softmax over each token's ids alone, −∞ elsewhere."""
    rows = []
    for row, t, allowed in zip(z, temperature, inside(), strict=True):
        ids = torch.from_numpy(np.flatnonzero(allowed))
        rows.append(torch.full((V,), -torch.inf, dtype=torch.float64).scatter(0, ids, (row[ids] / t).log_softmax(-1)))
    return torch.stack(rows)


# --- what every function should give, by torch's autograd of plain formulas -------------------------------------------------


class Plain:
    """Of a batch as tensors: x = log π of (N, V), at the tokens and at the K ids; b = log μ of (N, V)."""

    def __init__(self, data):
        valid, self.mask, self.data = data["mask"][:, None], data["mask"], data
        if "logits" in data:
            z = data["logits"][:, :V]
        else:
            z = torch.where(valid, data["hidden"], 0.0) @ data["weight"][:V].T + data["bias"][:V]
        t = torch.where(self.mask, data["temperature"], 1.0)
        z = torch.where(valid, z, 0.0)
        self.x = log_softmax_over_ids(z, t)
        self.b = log_softmax_over_ids(data["behavior"], torch.where(self.mask, data["behavior_temperature"], 1.0))
        ids = torch.where(valid, torch.cat((data["tokens"][:, None], data["top_k_ids"]), -1), 0)
        chosen = self.x.gather(-1, ids)
        self.log_prob, self.top_k = chosen[:, 0], chosen[:, 1:]
        # what is recorded outside the support is not looked at
        self.top_k_mu = torch.where(self.top_k > -torch.inf, data["top_k_behavior_log_prob"], -torch.inf)
        self.log_z = torch.where(torch.from_numpy(inside()), z / t[:, None], -torch.inf).logsumexp(-1)

    def valid(self, *found):
        """With 0 at masked tokens."""
        return tuple(torch.where(self.mask.reshape(N, *(1,) * (a.ndim - 1)), a, 0.0) for a in found)

    def log_probs(self):
        """As `token_log_prob` gives them."""
        x = torch.where(self.x > -torch.inf, self.x, 0.0)
        return self.valid(self.log_prob, -(self.x.exp() * x).sum(-1), self.log_z, self.top_k)

    def divergences(self):
        """TV and KL of the whole vocabulary."""
        return self.valid(*tv_and_kl(self.x.exp(), self.b.exp()))

    def top_k_divergences(self):
        """The same over the K ids, the sampled one and the rest."""
        data = self.data
        again = (data["top_k_ids"] == data["tokens"][:, None]).any(-1)

        def outcomes(top_k, sampled):
            m = torch.cat((top_k.exp(), torch.where(again, 0.0, sampled.exp())[:, None]), -1)
            return torch.cat((m, 1.0 - m.sum(-1, keepdim=True)), -1)

        mu = outcomes(self.top_k_mu, torch.where(self.mask, data["behavior_log_prob"], 0.0))
        return self.valid(*tv_and_kl(outcomes(self.top_k, self.log_prob), mu))

    def loss(self, divergence, centred):
        """A loss with a measured divergence, and with the score-centring term by its definition."""
        rest = {name: self.data[name] for name in ("behavior_log_prob", "advantages", "mask")}
        measured = divergence(self)[0].detach()
        found = drpo_torch.policy_loss(OBJECTIVE, log_prob=self.log_prob, **rest, divergence=measured, engine="arrays")[0]
        for i in np.flatnonzero(MASK):
            x, b = (self.x[i], self.b[i]) if centred == "full" else (self.top_k[i], self.top_k_mu[i])
            some = x > -torch.inf
            # over the ids alone, if they are all of the support
            keep = some if centred == "full" else torch.ones_like(some)
            figures = (a.detach().numpy() for a in (x[keep], b[keep], rest["advantages"][i]))
            term = score_centering(OBJECTIVE, *figures, divergence=measured[i].numpy(), tail=centred == "top_k")
            c = torch.from_numpy(term.gradient)
            found = found + torch.where(some[keep], c * torch.where(some, x, 0.0)[keep], 0.0).sum() / MASK.sum()
        return (found,)


def tv_and_kl(p, q):
    some = q > 1e-12
    p_some, q_some = torch.where(some, p, 1.0), torch.where(some, q, 1.0)
    return 0.5 * (p - q).abs().sum(-1), torch.where(some, q * (q_some / p_some).log(), 0.0).sum(-1)


# --- the functions --------------------------------------------------------------------------------------------------------

HEAD = ("hidden", "weight", "bias")


def of_log_probs(name, inputs):
    def outputs(data, options):
        chunk = {"chunk_tokens": 2} if inputs == HEAD else {}
        arrays = {key: data[key] for key in (*inputs, "tokens", "top_k_ids", "mask")}
        return getattr(drpo_jax, name)(**arrays, **options, **chunk, entropy=True)[:4]

    return outputs


def of_loss(name, inputs, **record):
    def outputs(data, options):
        made = {key: make(data) for key, make in record.items()}
        chunk = {"chunk_tokens": 2} if inputs == HEAD else {}
        arrays = {key: data[key] for key in (*inputs, "tokens", "behavior_log_prob", "advantages", "mask")}
        return (getattr(drpo_jax, name)(OBJECTIVE, **arrays, **options, **made, **chunk, diagnostics=False).loss,)

    return outputs


def of_full(data, options):
    arrays = {
        "logits": data["logits"],
        "behavior_logits": data["behavior"],
        "behavior_temperature": data["behavior_temperature"],
    }
    return tuple(jnp.where(MASK, a, 0.0) for a in drpo_jax.full_divergences(**arrays, **options))


def of_top_k(data, options):
    names = ("logits", "tokens", "behavior_log_prob", "top_k_ids", "top_k_behavior_log_prob")
    t = jnp.where(data["mask"], data["temperature"], 1.0)[:, None]
    log_z = jax.scipy.special.logsumexp(jnp.where(~outside("logits"), data["logits"], -jnp.inf) / t, axis=-1)
    arrays = {name: data[name] for name in names} | {"log_normalizer": log_z}
    return tuple(jnp.where(MASK, a, 0.0) for a in drpo_jax.top_k_divergences(**arrays, **options))


def head_of(data):
    return LinearHead(data["behavior_hidden"], data["behavior_weight"])


def recorded(data):
    return {"ids": data["top_k_ids"], "behavior_log_prob": data["top_k_behavior_log_prob"]}


class ByDivergence:
    """−A D in the place of −A r w, so that every divergence shows; a NaN drops its token, as DPPO does."""

    def times(self, tokens, method):
        """D times what REINFORCE has."""
        return tokens.xp.where(tokens.divergence >= 0.0, tokens.divergence, 0.0) * method(Reinforce(), tokens)

    def loss(self, tokens):
        """−A D log π."""
        return self.times(tokens, Reinforce.loss)

    def weight(self, tokens):
        """D/r."""
        return self.times(tokens, Reinforce.weight)

    def ratio_weight(self, tokens):
        """D."""
        return self.times(tokens, Reinforce.ratio_weight)


OBJECTIVE = ByDivergence()
# name → (our outputs, those by formulas)
FUNCTIONS = {
    "token_log_prob": (of_log_probs("token_log_prob", ("logits",)), Plain.log_probs),
    "linear_log_prob": (of_log_probs("linear_log_prob", HEAD), Plain.log_probs),
    "full_divergences": (of_full, Plain.divergences),
    "top_k_divergences": (of_top_k, Plain.top_k_divergences),
    "logits_policy_loss": (
        of_loss(
            "logits_policy_loss",
            ("logits",),
            divergence=lambda d: TopKDivergence(kind="tv", **recorded(d)),
            centering=lambda d: FullCentering(behavior=d["behavior"], temperature=d["behavior_temperature"]),
        ),
        lambda plain: plain.loss(Plain.top_k_divergences, "full"),
    ),
    "linear_policy_loss": (
        of_loss(
            "linear_policy_loss",
            HEAD,
            divergence=lambda d: FullDivergence(kind="tv", behavior=head_of(d), temperature=d["behavior_temperature"]),
            centering=lambda d: TopKCentering(**recorded(d)),
        ),
        lambda plain: plain.loss(Plain.divergences, "top_k"),
    ),
}
CASES = [
    *((name, "ids") for name in FUNCTIONS),
    # of a head with bits: test_linear.py, on several devices
    ("token_log_prob", "bits"),
]


def inputs_of(name, data):
    return {key: data[key] for key in (HEAD if name.startswith("linear") else ("logits",))}


def data_of(name):
    data = batch()
    if name.startswith("linear"):
        del data["logits"]
    elif "divergences" not in name:  # which has no mask, and so no rows that may hold anything
        data["logits"] = jnp.where(data["mask"][:, None], data["logits"], jnp.nan)
    return data


def cotangents(values):
    """Which are 0 nowhere, not at a log-prob of −∞ either."""
    rng = np.random.default_rng(2)
    return [rng.uniform(0.5, 1.0, size=value.shape) for value in values]


@functools.cache
def ours(name):
    """Compiled once for every kind of support and every change of an array."""

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(data, support):
        options = {"temperature": data["temperature"], "support": support, "vocabulary_size": V}
        values, pull = jax.vjp(lambda inputs: FUNCTIONS[name][0](data | inputs, options), inputs_of(name, data))
        return values, pull(tuple(map(jnp.asarray, cotangents(values))))[0]

    return run


@functools.cache
def expected(name):
    tensors = jax.tree.map(lambda a: torch.tensor(np.asarray(a)), data_of(name))
    inputs = {key: tensors[key].requires_grad_() for key in inputs_of(name, tensors)}
    values = FUNCTIONS[name][1](Plain(tensors))
    sum(
        (value * torch.from_numpy(c))[value > -torch.inf].sum() for value, c in zip(values, cotangents(values), strict=True)
    ).backward()
    return [value.detach().numpy() for value in values], {key: tensor.grad.numpy() for key, tensor in inputs.items()}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_values_and_gradients_are_those_of_a_softmax_over_the_ids(name, kind):
    values, gradients = ours(name)(data_of(name), support_of(kind))
    wanted, wanted_gradients = expected(name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    jax.tree.map(close, list(values), wanted)
    for key, gradient in gradients.items():
        close(gradient, wanted_gradients[key], err_msg=key)
    assert not any(np.asarray(gradient)[outside(key)].any() for key, gradient in gradients.items()), "no exact 0"


def outside(key):
    """Where a gradient is an exact 0: in the padding, and of logits beyond the support."""
    if key == "logits":
        return np.pad(~inside(), [(0, 0), (0, WIDTH - V)], constant_values=True)
    return ~MASK if key == "hidden" else np.arange(WIDTH) >= V


# --- what is not valid at one token ------------------------------------------------------------------------------------------

BROKEN = 1
"""A token whose support has some ids."""


def spoilt(name, how):
    """Data and support with something wrong at one valid token."""
    data, support = data_of(name), support_of("ids", BROKEN if how == "an id outside the vocabulary" else None)
    if how == "a token outside its support":
        data["tokens"] = data["tokens"].at[BROKEN].set(int(np.flatnonzero(~inside()[BROKEN])[0]))
    if how == "a temperature of the record":
        data["behavior_temperature"] = data["behavior_temperature"].at[BROKEN].set(0.0)
    if isinstance(how, float):
        data["temperature"] = data["temperature"].at[BROKEN].set(how)
    return data, support


OF_FULL_RECORDS = {"full_divergences", "logits_policy_loss", "linear_policy_loss"}
NOT_GIVEN = {
    ("full_divergences", "a token outside its support"),
    *((name, "a temperature of the record") for name in FUNCTIONS if name not in OF_FULL_RECORDS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "how",
    ["a token outside its support", "an id outside the vocabulary", "a temperature of the record", 0.0, -1.0, np.nan, np.inf],
    ids=str,
)
def test_what_is_not_valid_is_nan_at_its_token_alone(name, how):
    if (name, how) in NOT_GIVEN:
        return
    values, gradients = ours(name)(*spoilt(name, how))
    (right, right_gradients), others = expected(name), np.arange(N) != BROKEN
    for value, wanted in zip(values, right, strict=True):
        per_token = isinstance(how, float) or value is values[0]  # of a row whose token alone is wrong, the rest is right
        assert not per_token or np.isnan(value[BROKEN] if value.ndim else value).all()
        if value.ndim:
            np.testing.assert_allclose(value[others], wanted[others], rtol=1e-9, atol=1e-11)
    for key, gradient in gradients.items():
        array = np.asarray(gradient)
        assert not array[outside(key)].any(), "an exact 0 even so"
        if key in {"hidden", "logits"}:
            assert np.isnan(array[BROKEN][~outside(key)[BROKEN]]).all()
            np.testing.assert_allclose(array[others], right_gradients[key][others], rtol=1e-9, atol=1e-11)
        else:
            assert np.isnan(array[:V]).any()


ERRORS = [
    (
        {"support": Support(jnp.zeros(3, int), jnp.zeros(N, int))},
        ValueError,
        r"^support\.offsets: expected one more than the 7",
    ),
    ({"support": Support(jnp.zeros((3, 1), int), jnp.zeros(N + 1, int))}, ValueError, r"^support\.ids: expected one axis"),
    ({"support": Support(jnp.zeros(3), jnp.zeros(N + 1, int))}, TypeError, r"^support\.ids: expected an integral dtype"),
    ({"support": Support(None, jnp.zeros(N + 1, int))}, TypeError, r"^support\.ids: expected"),
    ({"support": Support(np.zeros(3, int), jnp.zeros(N + 1, int))}, TypeError, r"^support\.ids: expected a jax\.Array"),
    ({"support": Support.from_mask(jnp.ones((N, 32), bool))}, ValueError, r"^support\.bits: expected 2 words a token"),
    ({"support": Support.from_bits(jnp.ones((N, 1), jnp.int32))}, ValueError, r"^support\.bits: expected 2 words a token"),
    ({"support": Support.from_bits(jnp.ones((N + 1, 2), jnp.int32))}, ValueError, r"^support\.bits: expected the shape of"),
    ({"support": jnp.ones((N, V), bool)}, TypeError, "^support: expected a Support, got"),
    ({"temperature": jnp.ones(N + 1)}, ValueError, "^temperature: expected the shape of .*, or a number"),
    ({"temperature": jnp.ones(N, int)}, TypeError, "^temperature: expected a real floating dtype"),
    ({"vocabulary_size": WIDTH + 1}, ValueError, "^vocabulary_size: expected a finite number, 1 or more and at most 40"),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_arguments(name):
    data = data_of(name)
    for change, error, message in ERRORS:
        options = {"temperature": data["temperature"], "support": None, "vocabulary_size": V} | change
        with pytest.raises(error, match=message):
            FUNCTIONS[name][0](data, options)


def test_a_mask_is_packed_into_bits():
    rows = np.random.default_rng(0).random((2, 3, V)) < 0.5
    words = np.packbits(np.pad(rows, [(0, 0), (0, 0), (0, 64 - V)]), axis=-1, bitorder="little").view(np.int32)
    np.testing.assert_array_equal(Support.from_mask(jnp.asarray(rows)).bits, words)


def test_bits_and_masks_are_not_taken_for_each_other():
    with pytest.raises(TypeError, match=r"^bits: expected an int32 dtype, got bool"):
        Support.from_bits(jnp.ones((N, V), bool))
    with pytest.raises(TypeError, match=r"^mask: expected a bool dtype, got int32"):
        Support.from_mask(jnp.ones((N, 2), jnp.int32))


# --- what it is for -------------------------------------------------------------------------------------------------------


def truncated(mu, kind):
    """The ids that truncated sampling of a policy keeps."""
    order = np.argsort(-mu)
    if kind == "top-k":
        return np.sort(order[:4])
    if kind == "top-p":
        return np.sort(order[: int(np.searchsorted(np.cumsum(mu[order]), 0.7)) + 1])
    return np.flatnonzero(mu >= 0.3 * mu.max())


def test_truncated_sampling_enumerated():
    """Over every token that could be sampled: E_μ[π/μ] = 1, and the centred gradient of a constant advantage is 0.

    Without the support, E_μ[π/μ] is the mass that π has in it.
    """
    rng = np.random.default_rng(0)
    mu, pi = np.exp(rng.normal(size=(2, 9)))
    mu, pi = mu / mu.sum(), pi / pi.sum()
    of_token, rows, kept, weights, starts = [], [], [], [], [0]
    for kind in ("top-k", "top-p", "min-p"):
        ids = truncated(mu, kind)
        of_token += [*ids]
        rows += [ids] * len(ids)
        kept += [pi[ids].sum()]
        weights += [*(mu[ids] / mu[ids].sum())]
        starts += [len(of_token)]
    assert len(set(map(tuple, rows))) == 3
    tokens, weights = jnp.asarray(of_token), jnp.asarray(weights)
    logits = jnp.broadcast_to(jnp.log(pi), (len(of_token), 9))
    support = Support(jnp.asarray(np.concatenate(rows)), jnp.asarray(np.cumsum([0, *map(len, rows)])))

    @functools.partial(jax.jit, compiler_options=FAST)
    def every(logits, centering):
        options = {"behavior_log_prob": jnp.log(weights), "advantages": jnp.ones(len(weights)), "token_weights": weights}

        def total(logits, support, centering):
            found = drpo_jax.logits_policy_loss(
                CISPO(max_ratio=1.1),
                logits=logits,
                tokens=tokens,
                **options,
                mask=jnp.ones(len(weights), bool),
                normalizer=1.0,
                support=support,
                centering=centering,
                diagnostics=False,
            )
            return found.loss, weights * jnp.exp(found.log_prob - jnp.log(weights))

        whole = drpo_jax.token_log_prob(logits=logits, tokens=tokens).log_prob
        return *jax.grad(total, has_aux=True)(logits, support, centering), jnp.exp(whole)

    behavior = FullCentering(behavior=jnp.broadcast_to(jnp.log(mu), logits.shape))
    centred, replayed, whole = every(logits, behavior)
    for start, end, mass in zip(starts, starts[1:], kept, strict=False):
        np.testing.assert_allclose(replayed[start:end].sum(), 1.0, rtol=1e-14)
        np.testing.assert_allclose(whole[start:end].sum(), mass, rtol=1e-14)
        np.testing.assert_allclose(centred[start:end].sum(axis=0), 0.0, atol=1e-15)
        assert np.abs(centred[start:end]).max() > 0.01


def test_the_matrix_of_tokens_by_vocabulary_never_exists():
    n, vocabulary, chunk, total = 512, 4099, 16, 3000
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 8), (vocabulary, 8))]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((n,), (total,), (n + 1,))]

    def of(hidden, weight, tokens, ids, offsets):
        how = {"support": Support(ids, offsets), "chunk_tokens": chunk}
        return jnp.sum(drpo_jax.linear_log_prob(hidden=hidden, weight=weight, tokens=tokens, **how).log_prob)

    program = str(jax.make_jaxpr(jax.grad(of, (0, 1)))(*shapes, *integers))
    assert f"[{n},{vocabulary}]" not in program
    assert f"bool[{chunk},{vocabulary}]" in program


@pytest.mark.parametrize(
    "make", [Support.from_mask, lambda mask: Support.from_bits(jnp.zeros((*mask.shape[:-1], 2), jnp.int32))]
)
def test_a_batch_without_tokens_has_supports(make):
    support = make(jnp.ones((2, 0, 40), dtype=bool))
    found = drpo_jax.token_log_prob(logits=jnp.zeros((2, 0, 40)), tokens=jnp.zeros((2, 0), jnp.int32), support=support)
    assert found.log_prob.shape == (2, 0)
