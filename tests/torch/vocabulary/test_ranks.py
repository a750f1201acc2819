"""A vocabulary divided over ranks that are threads of this process: with the compiled loops, and in half precision.

Compiled once here instead of once a process. In test_distributed.py the ranks are processes, with torch's operations.
"""

import pytest
import torch
from drpo_torch.vocabulary import shards
from rank_threads import RANKS, Threads
from vocabulary_ranks import cases, columns_of, differences, on_rank, replicated


@pytest.fixture
def group(monkeypatch):
    threads = Threads()
    monkeypatch.setattr(shards, "dist", threads)
    return threads


KINDS = [(torch.float64, "compiled"), (torch.float16, "arrays"), (torch.bfloat16, "arrays")]
CASES = [(str(dtype)[6:], engine, name) for dtype, engine in KINDS for name, _ in cases(dtype, engine)]


@pytest.mark.parametrize(("dtype", "engine", "name"), CASES)
def test_ranks_have_the_whole_result(group, dtype, engine, name):
    case = dict(cases(getattr(torch, dtype), engine))[name]
    whole = case.evaluate(case.tensors)
    found = group.run(lambda rank: on_rank(case, rank, RANKS, group))
    for rank, one in enumerate(found):
        assert max(differences(one, whole, columns_of(RANKS, rank))) <= 16
    for first, second in zip(replicated(found[0]), replicated(found[1]), strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
