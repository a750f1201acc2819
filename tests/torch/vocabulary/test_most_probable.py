"""`top_k`: the ids against a sort of plain numbers, a row at a time, and all that follows against the same ids, given.

Hidden states and weights are small whole numbers, so that many logits are equal, and exact in every dtype and order of sums.
"""

import functools
import itertools
import math

import pytest
import torch
from drpo_torch import Support, linear_log_prob, token_log_prob
from drpo_torch.vocabulary import shards
from rank_threads import RANKS, Threads
from vocabulary_batches import Largest, small_steps

N, V, PADDED, H = 9, 13, 16, 4
INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# columns of each rank: uneven, fewer than K, and none
WIDTHS = ((5, PADDED - 5), (2, PADDED - 2), (0, PADDED), (PADDED, 0))
# tokens and columns of a chunk, and K
CHUNKS = ((99, None, 1), (2, None, 4), (4, 5, V), (4, 5, 4), (5, 1, 4))
STEPS = ("none", "ids", "bits", "temperature", "cap")


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    small_steps(monkeypatch)


@functools.cache
def data(dtype, step):
    """A head with NaN in its padding and −inf in its bias, tokens of which some are masked and hold NaN, and options."""
    generator = torch.Generator().manual_seed(0)

    def whole(*size):
        return torch.randint(-1, 2, size, generator=generator).to(dtype)

    mask = torch.tensor([True] * 7 + [False, True])
    hidden, weight, bias = whole(N, H), whole(PADDED, H), torch.zeros(PADDED, dtype=dtype)
    hidden[0] = 0.0  # all columns are equal
    hidden[1] = -1.0
    bias[[2, 7]] = -INF
    weight[V:], hidden[7] = NAN, NAN
    supports = [[0], [12, 3, 5], [2], [], [*range(V)], [1, 2, 9], [4, 4, 7, 0], [], [6, 8, 10, 11, 12, 0, 1]]
    if step != "cap":
        supports[2] = [2, 6]  # without a cap, −inf alone is no policy
    options = {"vocabulary_size": V}
    if step == "temperature":
        options["temperature"] = torch.rand(N, generator=generator, dtype=torch.float64) + 0.5
    if step in ("bits", "cap"):
        kept = torch.zeros(N, PADDED, dtype=torch.bool)
        for row, ids in zip(kept, supports, strict=True):
            row[ids] = True
        options["support"] = Support.from_mask(kept)
    elif step == "ids":
        offsets = torch.tensor([0, *itertools.accumulate(map(len, supports))])
        options["support"] = Support(torch.tensor([v for ids in supports for v in ids]), offsets)
    else:
        supports = [[]] * N
    allowed = [set(ids) or set(range(V)) for ids in supports]
    tokens = torch.tensor([min(ids - {2, 7}, default=2) for ids in allowed]).masked_fill(~mask, -100)
    return {"hidden": hidden, "weight": weight, "bias": bias}, {"tokens": tokens, "mask": mask} | options, allowed


def first(z, allowed, k, *, capped):
    """By plain comparisons: ids with a probability by decreasing z, then the others, the lower id first."""
    lowest = -1e30 if capped else -INF  # −inf is −cap to a soft-cap
    value = [max(x, lowest) if v in allowed else -INF for v, x in enumerate(z)]
    return sorted(range(len(z)), key=lambda v: (-value[v], v))[:k]


@functools.cache
def expected_ids(step, k):
    """As nested lists; exact numbers are the same in every dtype."""
    head, tokens, allowed = data(torch.float64, step)
    z = (head["hidden"].nan_to_num() @ head["weight"][:V].T + head["bias"][:V]).tolist()
    rows = [first(row, ids, k, capped=step == "cap") for row, ids in zip(z, allowed, strict=True)]
    return [row if valid else [0] * k for row, valid in zip(rows, tokens["mask"].tolist(), strict=True)]


def evaluate(function, inputs, options, **k):
    """Results, and the gradients of the log-probs that are finite."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    found = function(**leaves, **options, **k)
    cotangent = torch.linspace(0.5, 2.0, found.top_k_log_prob.numel()).reshape(found.top_k_log_prob.shape)
    loss = (found.top_k_log_prob * cotangent)[found.top_k_log_prob > -INF].sum() + found.log_prob.sum()
    return found, torch.autograd.grad(loss, list(leaves.values()))


def compared(function, inputs, options, step, k):
    found, gradients = evaluate(function, inputs, options, top_k=k)
    assert found.top_k_ids.dtype == torch.int64
    assert found.top_k_ids.tolist() == expected_ids(step, k)
    assert (found.top_k_log_prob[~options["mask"]] == 0.0).all()
    same, same_gradients = evaluate(function, inputs, options, top_k_ids=found.top_k_ids)
    for ours, theirs in zip((*found, *gradients), (*same, *same_gradients), strict=True):
        if ours is not None:
            # an id given is found in its part of the vocabulary, one of the most probable after these are joined; and two
            # tanh of one argument may differ in their last bit
            roundings = 0.0 if not ours.is_floating_point() else 8.0 * torch.finfo(ours.dtype).eps
            tolerance = {"rtol": 1e-2 if step == "cap" else roundings, "atol": 0.0}
            torch.testing.assert_close(ours, theirs, **tolerance, equal_nan=True)


def logits_of(inputs):
    return {"logits": inputs["hidden"] @ inputs["weight"].T + inputs["bias"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_ids_are_those_of_a_sort_and_the_rest_is_as_of_ids_that_were_given(step, dtype):
    inputs, options, _ = data(dtype, step)
    known = options | {"engine": "arrays"}  # the ids are found alike; vocabulary_functions.py has each engine
    if step == "cap":
        known["logit_softcap"] = 0.01  # at which all are equal in float16
    else:
        for k in (1, 4, V):
            compared(token_log_prob, logits_of(inputs), known, step, k)
    for tokens, columns, k in CHUNKS:
        compared(linear_log_prob, inputs, known | {"chunk_tokens": tokens, "chunk_vocabulary": columns}, step, k)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_ranks_find_the_same_ids(monkeypatch, widths, step):
    group = Threads()
    monkeypatch.setattr(shards, "dist", group)
    inputs, options, _ = data(torch.float32, step)
    known = options | {"engine": "arrays"}
    cap = {"logit_softcap": 0.01} if step == "cap" else {}

    def both(columns, **of_rank):
        """From hidden states, and from logits, which no function caps."""
        mine = {"hidden": inputs["hidden"], "weight": inputs["weight"][columns], "bias": inputs["bias"][columns]}
        found = [evaluate(linear_log_prob, mine, known | cap | {"chunk_tokens": 4}, top_k=4, **of_rank)]
        if not cap:
            logits = {"logits": logits_of(inputs)["logits"][:, columns]}
            del of_rank["chunk_vocabulary"]
            found.append(evaluate(token_log_prob, logits, known, top_k=4, **of_rank))
        return found

    whole = both(slice(None), chunk_vocabulary=None)
    ends = list(itertools.accumulate(widths, initial=0))
    ranks = group.run(lambda rank: both(slice(ends[rank], ends[rank + 1]), chunk_vocabulary=3, vocabulary_group=group))
    assert len(ranks) == RANKS
    for (found, _), (other, _), (wanted, _) in zip(*ranks, whole, strict=True):
        assert torch.equal(found.top_k_ids, wanted.top_k_ids)
        assert torch.equal(found.top_k_ids, other.top_k_ids)
        assert torch.equal(found.top_k_log_prob, other.top_k_log_prob)
        torch.testing.assert_close(found.top_k_log_prob, wanted.top_k_log_prob)
    assert whole[0][0].top_k_ids.tolist() == expected_ids(step, 4)
    of_rows = [torch.cat(parts) for parts in zip(ranks[0][0][1][1:], ranks[1][0][1][1:], strict=True)]
    for ours, theirs in zip((ranks[0][0][1][0], *of_rows), whole[0][1], strict=True):
        torch.testing.assert_close(ours, theirs)
    if not cap:
        of_logits = torch.cat([gradients[0] for _, (_, gradients) in ranks], -1)
        torch.testing.assert_close(of_logits, whole[1][1][0])


def test_what_has_no_probability_is_a_constant():
    """Also where the cotangent is NaN, as that of π log π at 0 is; given ids have the derivative of a logit of −inf."""
    logits = torch.tensor([[0.0, -INF, 1.0, -INF]], requires_grad=True)
    found = token_log_prob(logits=logits, tokens=torch.tensor([0]), top_k=4, engine="arrays")
    assert found.top_k_ids.tolist() == [[2, 0, 1, 3]]
    assert found.top_k_log_prob[0, 2:].tolist() == [-INF, -INF]
    (gradient,) = torch.autograd.grad((found.top_k_log_prob.exp() * found.top_k_log_prob).sum(), logits)
    x = torch.tensor([0.0, 1.0]).requires_grad_()
    log_p = x.log_softmax(-1)
    (expected,) = torch.autograd.grad((log_p.exp() * log_p).sum(), x)
    torch.testing.assert_close(gradient[0, [0, 2]], expected)
    assert (gradient[0, [1, 3]] == 0.0).all()


def test_a_row_of_nan_is_nan_and_no_other():
    logits = torch.tensor([[0.0, NAN, 1.0], [0.0, 1.0, 2.0]])
    found = token_log_prob(logits=logits, tokens=torch.tensor([0, 0]), top_k=2, engine="arrays")
    assert found.top_k_log_prob[0].isnan().all()
    assert found.top_k_log_prob[1].isfinite().all()
    assert found.top_k_ids[1].tolist() == [2, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_either_sign_are_equal(dtype):
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]], dtype=dtype)
    found = token_log_prob(logits=logits, tokens=torch.tensor([0]), top_k=3, engine="arrays")
    assert found.top_k_ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)], ids=str)
def test_shapes(shape):
    hidden, weight = torch.randn(*shape, H), torch.randn(V, H)
    tokens = torch.zeros(shape, dtype=torch.int64)
    logits = hidden @ weight.T
    expected = logits.log_softmax(-1).topk(3, -1)
    for found in (
        token_log_prob(logits=logits, tokens=tokens, top_k=3, engine="arrays"),
        linear_log_prob(hidden=hidden, weight=weight, tokens=tokens, top_k=3, engine="arrays"),
    ):
        assert torch.equal(found.top_k_ids, expected.indices)
        torch.testing.assert_close(found.top_k_log_prob, expected.values)


def test_no_more_than_a_chunk_of_logits_exists():
    hidden, weight = torch.ones(64, 2, requires_grad=True), torch.ones(512, 2, requires_grad=True)
    known = {"tokens": torch.zeros(64, dtype=torch.int64), "chunk_tokens": 8, "chunk_vocabulary": 128, "engine": "arrays"}
    with Largest() as largest:
        linear_log_prob(hidden=hidden, weight=weight, **known, top_k=20).top_k_log_prob.sum().backward()
    assert largest.elements <= max(8 * 128, 512 * 2, 64 * 21)


@pytest.mark.parametrize("function", [token_log_prob, linear_log_prob], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 2, "top_k_ids": torch.zeros(N, 2, dtype=torch.int64)}, ValueError, "^top_k: .* beside top_k_ids, got 2"),
        ({"top_k": 0}, ValueError, "^top_k: expected a finite number, 1 or more and at most 13, got 0"),
        ({"top_k": V + 1}, ValueError, "^top_k: expected a finite number, 1 or more and at most 13, got 14"),
        ({"top_k": 2.0}, TypeError, "^top_k: expected a whole number"),
        ({"top_k": math.nan}, TypeError, "^top_k: expected a whole number"),
    ],
    ids=["both", "none", "too many", "a fraction", "nan"],
)
def test_errors(function, options, error, message):
    inputs, known, _ = data(torch.float64, "none")
    with pytest.raises(error, match=message):
        function(**(inputs if function is linear_log_prob else logits_of(inputs)), **known, **options)
