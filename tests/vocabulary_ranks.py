"""The functions at vocabulary scale with their vocabulary divided over ranks, beside the same on one.

A case is a function of the table in vocabulary_functions.py, or a policy loss with one more option. Its outputs and gradients
are compared with those of the whole vocabulary, in units of the dtype's precision relative to the largest number, and with
each other over the ranks, to the bit.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from drpo_torch import (
    FullCentering,
    FullDivergence,
    LinearHead,
    Support,
    TopKCentering,
    TopKDivergence,
    linear_log_prob,
    linear_policy_loss,
    logits_policy_loss,
    token_log_prob,
)
from drpo_torch.distributed import global_normalizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from vocabulary_functions import FUNCTIONS, V, every_tensor, scalar_of

from drpo_core import DPPO, DRPO, token_mean
from drpo_core.anchors import Behavior, Sequence
from drpo_core.modes import Mode

UNMEASURED = DRPO(delta=0.3)
SHAPE = (3, 5)
# columns of each rank: uneven, and one rank without any
WIDTHS = {1: (V,), 2: (4, V - 4), 4: (4, 0, V - 5, 1)}
# the axis of the vocabulary
SHARDED = {"logits": -1, "behavior_logits": -1, "weight": 0, "bias": 0}
CENTRINGS = ("top-k centring", "full centring")
# the last: a sum over all logits that depends on what was learnt from all ranks; every pair on one is in test_row_map.py
RECORDS = ("top-k tv", "full kl", "full tv", *CENTRINGS, "top-k tv, full centring")
LOSSES = {"logits": (logits_policy_loss, ("logits",)), "linear": (linear_policy_loss, ("hidden", "weight", "bias"))}


class Case(NamedTuple):
    """`call(tensors, **options)` gives outputs, which are differentiated in the leaves."""

    call: object
    tensors: dict
    leaves: tuple
    options: dict

    def evaluate(self, tensors, **options):
        """Outputs, and gradients by the names of the leaves."""
        leaves = {name: tensors[name].detach().clone().requires_grad_() for name in self.leaves}
        # what may be overwritten is no leaf
        inputs = tensors | {name: leaf * 1.0 for name, leaf in leaves.items()}
        outputs = self.call(inputs, **self.options, **options)
        scalar = scalar_of([output for output in outputs if output.requires_grad])
        gradients = torch.autograd.grad(scalar, list(leaves.values()))
        return [output.detach() for output in outputs], dict(zip(leaves, gradients, strict=True))


def cases(dtype, engine):
    """Every case by its name."""
    every = {name: t.to(dtype) if t.is_floating_point() else t for name, t in every_tensor(SHAPE, 1).items()}
    for name, function in FUNCTIONS.items():
        tensors = {key: every[key] for key in (*function.differentiated, *function.constant, *function.integers)}
        options = ({"engine": engine} if len(function.engines) > 1 else {}) | (
            {"chunk_tokens": 4} if function.has_head else {}
        )
        yield name, Case(function.outputs, tensors, function.differentiated, options)
        mapped, step = _row_map(tensors, bits=function.has_head)
        yield f"{name}, row map", Case(function.outputs, mapped, function.differentiated, options | step)
        if name == "linear_log_prob":
            yield f"{name}, parts", Case(function.outputs, tensors, function.differentiated, options | {"chunk_vocabulary": 2})
            # whole numbers, whose products no dtype rounds: many are equal
            found = {key: t.round() if t.is_floating_point() else t for key, t in mapped.items() if key != "top_k_ids"}
            yield f"{name}, most probable", Case(most_probable, found, function.differentiated, options | step)
    for kind in LOSSES:
        yield from ((f"{kind}, {name}", case) for name, case in _loss_cases(kind, every, engine))


def most_probable(tensors, **options):
    """Log-probs of more tokens than some ranks have columns, and their ids, which are the same on all."""
    found = linear_log_prob(**tensors, top_k=6, chunk_vocabulary=2, **options)
    return found.top_k_log_prob, found.top_k_ids.to(found.log_prob.dtype)


def _loss_cases(kind, every, engine):
    function, leaves = LOSSES[kind]
    names = ("tokens", "behavior_log_prob", "advantages", "mask", "token_weights")
    basic = {key: every[key] for key in (*leaves, *names)}

    def case(tensors=basic, recorded=None, objective=UNMEASURED, **options):
        def call(inputs, **options):
            given = {key: inputs[key] for key in basic}
            result = function(objective, **given, **({} if recorded is None else _record(recorded, inputs, kind)), **options)
            return result.loss, result.log_prob, result.entropy

        options = {"engine": engine, "entropy": True, "temperature": 1.3} | options
        return Case(call, tensors, leaves, options | ({"chunk_tokens": 4} if kind == "linear" else {}))

    yield "entropy", case()
    yield "entropy bonus", case(entropy_coefficient=0.2)
    yield "poison", case(_poisoned(basic))
    yield "mode", case(objective=Mode(UNMEASURED, anchor=Sequence(Behavior()), reduction="sequence_mean_token_mean"))
    if kind == "linear":
        yield "parts", case(chunk_vocabulary=2)
        yield "soft-cap", case(logit_softcap=3.0)
    else:
        yield "overwritten", case(overwrite_logits=True)
    records = ("behavior_logits", "top_k_ids", "top_k_behavior_log_prob")
    for recorded in RECORDS:
        objective = UNMEASURED if recorded in CENTRINGS else DPPO(delta=0.15, divergence="per_token")
        tensors = basic | {key: every[key] for key in records}
        yield recorded, case(tensors, recorded, objective)
        if "full" in recorded:
            mapped, step = _row_map(tensors, bits=kind == "linear")
            yield f"{recorded}, row map", case(mapped, recorded, objective, entropy_coefficient=0.2, **step)


def _row_map(tensors, *, bits):
    """A temperature a token, a support and two ids of padding; and the same tensors with ids inside these."""
    generator = torch.Generator().manual_seed(5)
    tensors = tensors | {name: tensors[name].clamp(max=V - 3) for name in ("tokens", "top_k_ids") if name in tensors}
    inside = torch.rand((*SHAPE, V), generator=generator) < 0.6
    inside[..., V - 2 :] = False
    inside.scatter_(-1, tensors["tokens"][..., None] if "tokens" in tensors else torch.zeros((*SHAPE, 1), dtype=int), 1)
    support = Support.from_mask(inside)
    if not bits:
        counts = inside.reshape(-1, V).sum(-1).cumsum(0)
        support = Support(inside.reshape(-1, V).nonzero()[:, 1], torch.nn.functional.pad(counts, (1, 0)))
    temperature = 0.5 + torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    return tensors, {"temperature": temperature, "support": support, "vocabulary_size": V - 2}


def _record(names, tensors, kind):
    """Arguments that hold records of μ, made of a rank's part of the tensors."""
    found = {}
    for name in names.split(", "):
        found |= _one_record(name, tensors, kind)
    return found


def _one_record(name, tensors, kind):
    if name.startswith("top-k"):
        top = {"ids": tensors["top_k_ids"], "behavior_log_prob": tensors["top_k_behavior_log_prob"]}
        return {"centering": TopKCentering(**top)} if "centring" in name else {"divergence": TopKDivergence(kind="tv", **top)}
    behavior = tensors["behavior_logits"]
    if kind == "linear":
        behavior = LinearHead(tensors["hidden"].detach() * 0.9, tensors["weight"].detach(), tensors["bias"].detach())
    if "centring" in name:
        return {"centering": FullCentering(behavior=behavior, temperature=1.1)}
    return {"divergence": FullDivergence(kind=name[-2:], behavior=behavior, temperature=0.9)}


def _poisoned(tensors):
    """Masked tokens of NaN and id −100, and a token or a bias with −inf in all columns of the first rank of two or four."""
    mask = tensors["mask"].clone()
    mask[0, 0], mask[0, 1] = False, True
    tokens = torch.where(tensors["tokens"] < WIDTHS[4][0], V - 1, tensors["tokens"]).masked_fill(~mask, -100)
    found = tensors | {"mask": mask, "tokens": tokens}
    name = "logits" if "logits" in tensors else "hidden"
    found[name] = tensors[name].masked_fill(~mask[..., None], math.nan)
    if name == "logits":
        found[name][0, 1, : WIDTHS[4][0]] = -math.inf
    else:
        found["bias"] = tensors["bias"].clone()
        found["bias"][: WIDTHS[4][0]] = -math.inf
    return found


def part(name, tensor, columns):
    """A rank's columns of a tensor that has the vocabulary as an axis, and any other tensor."""
    if name not in SHARDED:
        return tensor
    return tensor[columns].clone() if SHARDED[name] == 0 else tensor[..., columns].clone()


def columns_of(ranks, rank):
    """The columns of a rank."""
    start = sum(WIDTHS[ranks][:rank])
    return slice(start, start + WIDTHS[ranks][rank])


def on_rank(case, rank, ranks, group):
    """Outputs and gradients of a case on one of several ranks."""
    tensors = {name: part(name, tensor, columns_of(ranks, rank)) for name, tensor in case.tensors.items()}
    return case.evaluate(tensors, vocabulary_group=group)


def differences(found, whole, columns):
    """The largest of the outputs and of the gradients of a rank from those of the whole vocabulary."""
    of_outputs = [difference(x, y, torch.ones_like(y)) for x, y in zip(found[0], whole[0], strict=True)]
    of_gradients = [difference(g, part(name, whole[1][name], columns), whole[1][name]) for name, g in found[1].items()]
    return max(of_outputs), max(of_gradients)


def difference(found, expected, of=None):
    """The largest, in units of the precision of the largest number, also of `of`; infinite if other places are not finite."""
    finite = expected.isfinite()
    same = torch.equal(finite, found.isfinite())
    if not same or not torch.equal(found.nan_to_num(7.0)[~finite], expected.nan_to_num(7.0)[~finite]):
        return math.inf
    every = torch.cat([tensor.nan_to_num(0.0, 0.0, 0.0).abs().reshape(-1) for tensor in (expected, of) if tensor is not None])
    largest = float(every.amax()) if every.numel() else 1.0
    gap = (found - expected)[finite].abs()
    return float(gap.amax() / max(largest, 1e-30)) / torch.finfo(found.dtype).eps if gap.numel() else 0.0


def replicated(found):
    """What is to be the same on all ranks: outputs, and gradients of what is not divided."""
    return [*found[0], *(gradient for name, gradient in found[1].items() if name not in SHARDED)]


def every_case(rank, groups, results):
    """Every case over 1, 2 and 4 processes in float64, over 4 in float32."""
    for name, case in (item for dtype in (torch.float64, torch.float32) for item in cases(dtype, "arrays")):
        dtype = case.tensors[case.leaves[0]].dtype
        whole = [case.evaluate(case.tensors) if rank == 0 else None]
        dist.broadcast_object_list(whole)
        for ranks, group in groups.items():
            if rank >= ranks or (dtype == torch.float32 and ranks < 4):
                continue
            found = on_rank(case, rank, ranks, group)
            gaps = torch.tensor(differences(found, whole[0], columns_of(ranks, rank)), dtype=torch.float64)
            dist.all_reduce(gaps, dist.ReduceOp.MAX, group=group)
            same = all(_identical(tensor, group) for tensor in replicated(found))
            results.append({"vocabulary": name, "ranks": ranks, "dtype": str(dtype)[6:], "gaps": gaps.tolist(), "same": same})


def _identical(tensor, group):
    """Whether all ranks have the same bits."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, tensor.contiguous(), group=group)
    return all(torch.equal(other.nan_to_num(7.0), tensor.nan_to_num(7.0)) for other in every)


def distributed_tensors(rank, results):
    """DTensors on a mesh of four, of nine columns, so that torch gives the last rank none; tokens × vocabulary on 2 × 2."""
    mesh, narrow = init_device_mesh("cpu", (4,)), slice(0, 9)
    for name, case in (item for item in cases(torch.float64, "arrays") if item[0].endswith(("policy_loss", "most probable"))):
        tensors = {key: part(key, tensor, narrow) for key, tensor in case.tensors.items()}
        tensors["tokens"] = tensors["tokens"].clamp(max=8)
        whole = case.evaluate(tensors)
        spread = {
            key: distribute_tensor(tensor, mesh, [Shard(SHARDED[key] % tensor.ndim)]) if key in SHARDED else tensor
            for key, tensor in tensors.items()
        }
        outputs, gradients = case.evaluate(spread)
        gathered = {key: g.full_tensor() if key in SHARDED else g for key, g in gradients.items()}
        results.append({"tensors": name, "gaps": differences((outputs, gathered), whole, slice(None))})
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "vocabulary"))
    case = dict(cases(torch.float64, "arrays"))["linear, entropy"]
    whole = case.evaluate(case.tensors, reduction=token_mean)
    tokens, columns = (slice(0, 2), slice(2, 5))[rank // 2], columns_of(2, rank % 2)
    mine = {key: part(key, tensor, columns) for key, tensor in case.tensors.items()}
    mine = {key: tensor if key in SHARDED else tensor[:, tokens] for key, tensor in mine.items()}
    count = global_normalizer(token_mean, mine["mask"], group=two["tokens"].get_group())
    outputs, gradients = case.evaluate(
        mine, vocabulary_group=two["vocabulary"].get_group(), reduction=token_mean, normalizer=count
    )
    for tensor in (outputs[0], gradients["weight"], gradients["bias"]):
        dist.all_reduce(tensor, group=two["tokens"].get_group())
    gaps = [difference(outputs[0], whole[0][0], torch.ones(1)), difference(gradients["hidden"], whole[1]["hidden"][:, tokens])]
    gaps += [difference(gradients[key], part(key, whole[1][key], columns), whole[1][key]) for key in ("weight", "bias")]
    gaps = torch.tensor(gaps, dtype=torch.float64)
    dist.all_reduce(gaps, dist.ReduceOp.MAX)
    results.append({"tensors": "2 × 2", "gaps": gaps.tolist()})


def errors(rank, groups, results):
    """What is wrong on all ranks is refused by all of them, before a collective that some would wait in."""
    logits, mesh = torch.zeros(2, 3), init_device_mesh("cpu", (4,))
    tokens, world = torch.tensor([0, 12]), dist.group.WORLD
    strangers = dist.new_group([2, 3])
    wrong = {
        "ids": {"logits": logits, "tokens": tokens, "vocabulary_group": world},
        "group": {"logits": logits, "tokens": tokens, "vocabulary_group": "tensor"},
        "tokens": {"logits": logits[: 1 + rank % 2], "tokens": tokens[: 1 + rank % 2], "vocabulary_group": world},
        "own tokens": {"logits": logits, "tokens": (tokens + rank % 2) % 3, "vocabulary_group": world},
        "columns": {"logits": logits[:, :0], "tokens": tokens, "vocabulary_group": world},
        "placement": {"logits": distribute_tensor(logits, mesh, [Replicate()]), "tokens": tokens},
        "two groups": {
            "logits": distribute_tensor(logits, mesh, [Shard(1)]),
            "tokens": tokens,
            "vocabulary_group": groups[2] if rank < 2 else strangers,
        },
        "stranger": {"logits": logits, "tokens": tokens, "vocabulary_group": strangers if rank < 2 else groups[2]},
    }
    for name, arguments in wrong.items():
        try:
            token_log_prob(**arguments)
            error = "none"
        except (TypeError, ValueError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, error)
        results.append({"wrong": name, "errors": every})
