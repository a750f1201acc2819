"""Loss and gradient of one batch, whole and in every way of spreading it over processes; run by test_distributed.py.

Four gloo processes on loopback; those of one and of two ranks are subgroups. Prints one line of JSON.
"""

import json
import os
import socket
import sys
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import vocabulary_ranks
from drpo_torch import policy_loss
from drpo_torch.distributed import across, all_reduce_diagnostics, global_coefficients, global_normalizer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from drpo_core import (
    DRPO,
    PPOClip,
    merge_diagnostics,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    summarize,
    token_mean,
)
from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, LengthScale, Veto
from drpo_core.modes import Mode

OBJECTIVE = DRPO(delta=0.05)
REDUCTIONS = {
    "token_mean": token_mean,
    "sequence_mean_token_mean": sequence_mean_token_mean,
    "sequence_mean_token_sum": partial(sequence_mean_token_sum, horizon=16),
}
LENGTHS = (7, 16, 1, 12, 3, 9, 16, 5, 2, 11, 14)
VOCABULARY, WIDTH = 13, 8
RANKS = 4
# micro-batches of each rank, by sequence: uneven in number of sequences and of tokens, one of them empty of valid tokens
SPLITS = {
    1: [[[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10]]],
    2: [[[0, 1], [2], [3, 4]], [[5], [6, 7, 8, 9], [10]]],
    4: [[[0], [1]], [[2], [3, 4]], [[5, 6], [7, 8, 9]], [[10], [2]]],
}


class Policy(nn.Module):
    """Log-probs of tokens, each from the token before it alone, so that shards of the token axis need no communication."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.hidden = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)

    def forward(self, previous, token):
        """Log-probs of `token`."""
        logits = self.head(torch.tanh(self.hidden(self.embedding(previous))))
        return torch.log_softmax(logits, -1).gather(-1, token[..., None])[..., 0]


def sequences(dtype):
    """The batch: one dict a sequence, of 1-D tensors."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i, n in enumerate(LENGTHS):
        token = torch.randint(VOCABULARY, (n + 1,), generator=generator)
        noise = 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        rows.append(
            {
                "previous": token[:-1],
                "token": token[1:],
                # the tensors of both dtypes hold the same numbers
                "behavior_log_prob": (-2.5 + noise).to(torch.float32).to(dtype),
                "advantages": torch.randn(n, generator=generator).to(dtype),
                "mask": torch.rand(n, generator=generator) < 0.8 if n > 1 else torch.ones(n, dtype=torch.bool),
                "segment_ids": torch.full((n,), 100 - 3 * i),
            }
        )
    return rows


def padded(rows, width=None):
    fields = {k: pad_sequence([row[k] for row in rows], batch_first=True) for k in rows[0] if k != "segment_ids"}
    extra = 0 if width is None else width - fields["mask"].shape[1]
    return {k: nn.functional.pad(v, (0, extra)) for k, v in fields.items()}


def packed(rows, multiple=1):
    fields = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
    return {k: nn.functional.pad(v, (0, -v.shape[0] % multiple)) for k, v in fields.items()}


def step(model, batch, reduction, scale, **how):
    """Backward of a micro-batch's share; returns the share and the diagnostics."""
    tokens = {k: batch[k] for k in ("behavior_log_prob", "advantages", "mask")}
    loss, diagnostics = policy_loss(
        OBJECTIVE, log_prob=model(batch["previous"], batch["token"]), reduction=reduction, **tokens, **how
    )
    (loss * scale).backward()
    return loss.detach(), diagnostics


def by_sequence(model, rows, reduction, layout, group):
    """Every rank has some of the sequences, in micro-batches."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    split = SPLITS[ranks][rank]
    parts = [layout([rows[i] for i in sequences]) for sequences in split]
    if ranks == RANKS and rank == RANKS - 1:
        parts[-1]["mask"] = torch.zeros_like(parts[-1]["mask"])  # sequence 2 once more, as filler
    masks, ids = [p["mask"] for p in parts], [p.get("segment_ids") for p in parts]
    normalizer = global_normalizer(reduction, masks, segment_ids=ids if ids[0] is not None else None, group=group)
    done = [step(model, p, reduction, ranks, normalizer=normalizer, segment_ids=i) for p, i in zip(parts, ids, strict=True)]
    return sum(loss for loss, _ in done), merge_diagnostics(*(d for _, d in done))


def by_token(model, rows, reduction, layout, group, shard_group):
    """Every rank has a part of the token axis of some of the sequences: all of them where the two groups are one."""
    shards, rank = dist.get_world_size(shard_group), dist.get_rank(shard_group)
    ranks = dist.get_world_size(group)
    if shards < ranks:
        rows = rows[:6] if dist.get_rank(group) < shards else rows[6:]
    whole = layout(rows, 16) if layout is padded else layout(rows, shards)
    mine = {k: v.tensor_split(shards, dim=-1)[rank] for k, v in whole.items()}
    how = {"segment_ids": mine.get("segment_ids"), "shard_group": shard_group}
    normalizer = global_normalizer(reduction, mine["mask"], group=group, **how)
    coefficients = global_coefficients(reduction, mine["mask"], normalizer=normalizer, dtype=mine["advantages"].dtype, **how)
    return step(model, mine, token_mean, ranks, normalizer=1, token_weights=coefficients)


def local_means(model, rows, reduction, layout, group):
    """What goes wrong without the helper: every rank divides by its own count, and DDP averages the means."""
    part = layout([rows[i] for sequences in SPLITS[dist.get_world_size(group)][dist.get_rank(group)] for i in sequences])
    loss, diagnostics = step(model, part, reduction, 1, segment_ids=part.get("segment_ids"))
    return loss / dist.get_world_size(group), diagnostics


def idle_rank(rank, results):
    """The last rank has no micro-batch, and so no mask; its collectives must still meet those of the others."""
    rows = sequences(torch.float64)
    masks = [] if rank == RANKS - 1 else [padded(rows[rank::3])["mask"]]
    for name, reduction in REDUCTIONS.items():
        total = global_normalizer(reduction, masks)
        expected = sum(int(row["mask"].sum()) if name == "token_mean" else bool(row["mask"].any()) for row in rows)
        results.append({"idle": name, "normalizer": float(total), "expected": expected, "dtype": str(total.dtype)})


def diagnostics_of_ranks(rank, results):
    """Names in another order on each rank, and one without tokens: as of all tokens at once."""
    rows = sequences(torch.float64)
    model = Policy(torch.float64)

    def statistics(some):
        batch = padded(some) if some else {k: v[:, :0] for k, v in padded(rows).items()}
        return step(model, batch, token_mean, 1)[1]

    mine = statistics([] if rank == RANKS - 1 else rows[rank::3])
    names = list(mine)[rank:] + list(mine)[:rank]
    merged = all_reduce_diagnostics({name: mine[name] for name in names})
    expected = statistics(rows)
    results.append(
        {
            "order": list(merged) == names,
            "classes": all(type(merged[name]) is type(expected[name]) for name in expected),
            "diagnostics": [[summarize(merged)[name], value] for name, value in summarize(expected).items()],
            "none": [all_reduce_diagnostics({}), all_reduce_diagnostics(None)],
        }
    )


MODE = Mode(
    PPOClip(eps=0.2),
    anchor=Sequence(Proximal()),
    corrections=(ImportanceWeight(level="sequence", high=2.0, normalize=True), Veto(low=0.1, high=9.0), LengthScale()),
)
"""It needs sums, maxima and lengths of sequences, and a mean over them."""


def sequences_over_ranks(rank, results):
    """A mode on rows whose tokens are divided over all ranks, the last of which has none."""
    generator = torch.Generator().manual_seed(5)
    shape = (4, 12)
    mask = torch.rand(shape, generator=generator) < 0.8
    whole = {"behavior_log_prob": -3.0 * torch.rand(shape, generator=generator, dtype=torch.float64)}
    for name in ("log_prob", "proximal_log_prob"):
        noise = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        whole[name] = (whole["behavior_log_prob"] + noise).clamp(max=0.0)
    whole |= {"advantages": torch.randn(shape, generator=generator, dtype=torch.float64), "mask": mask}

    def run(tensors, **options):
        x = tensors["log_prob"].clone().requires_grad_()
        loss, _ = policy_loss(MODE, **tensors | {"log_prob": x}, normalizer=int(mask.sum()), **options)
        loss.backward()
        return loss.detach(), x.grad

    columns = slice(*((0, 5), (5, 6), (6, 12), (12, 12))[rank])
    loss, gradient = run({name: tensor[:, columns] for name, tensor in whole.items()}, across=across())
    dist.all_reduce(loss)
    expected_loss, expected = run(whole)
    difference = (gradient - expected[:, columns]).abs().max() if gradient.numel() else torch.tensor(0.0, dtype=torch.float64)
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    case = {
        "loss": float(abs(loss - expected_loss) / abs(expected_loss)),
        "gradient": float(difference / expected.abs().max()),
    }
    results.append({"mode": case})


def wrapped(kind, dtype, group):
    model = Policy(dtype)
    if kind == "DDP":
        return DistributedDataParallel(model, process_group=group)
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in (model.hidden, model.head):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model):
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads])


def compare(name, run, *, kind, group, dtype, reduction_name, results):
    rows, reduction = sequences(dtype), REDUCTIONS[reduction_name]
    alone = Policy(dtype)
    loss, diagnostics = step(alone, padded(rows), reduction, 1)
    expected = gradients(alone)
    model = wrapped(kind, dtype, group)
    share, merged = run(model, rows, reduction)
    total = share.clone()
    dist.all_reduce(total, group=group)
    merged = summarize(all_reduce_diagnostics(merged, group=group))
    unit = torch.finfo(dtype).eps
    results.append(
        {
            "layout": name,
            "wrapper": kind,
            "ranks": dist.get_world_size(group),
            "reduction": reduction_name,
            "dtype": str(dtype).removeprefix("torch."),
            "loss": float(abs(total - loss) / abs(loss)) / unit,
            "gradient": float((gradients(model) - expected).abs().max() / expected.abs().max()) / unit,
            "diagnostics": max(abs(merged[k] - v) / max(1.0, abs(v)) for k, v in summarize(diagnostics).items()) / unit,
        }
    )


def work(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2)} | {RANKS: dist.group.WORLD}
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    results = []
    for dtype, reduction_name, ranks, layout in product((torch.float64, torch.float32), REDUCTIONS, groups, (padded, packed)):
        if rank >= ranks:
            continue
        group = groups[ranks]
        how, title = {"layout": layout, "group": group}, layout.__name__
        runs = {
            f"{title}, sequences": partial(by_sequence, **how),
            f"{title}, tokens": partial(by_token, **how, shard_group=group),
        }
        if ranks == 2:
            runs[f"{title}, local means"] = partial(local_means, **how)
        if ranks == RANKS:
            runs[f"{title}, sequences × tokens"] = partial(by_token, **how, shard_group=pair)
        for (name, run), kind in product(runs.items(), ("DDP", "FSDP2")):
            compare(name, run, kind=kind, group=group, dtype=dtype, reduction_name=reduction_name, results=results)
    idle_rank(rank, results)
    diagnostics_of_ranks(rank, results)
    sequences_over_ranks(rank, results)
    vocabulary_ranks.every_case(rank, groups, results)
    vocabulary_ranks.distributed_tensors(rank, results)
    vocabulary_ranks.errors(rank, groups, results)
    if rank == 0:
        with open(path, "w") as file:  # noqa: PTH123
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, sys.argv[1]), nprocs=RANKS)
