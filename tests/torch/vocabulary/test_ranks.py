"""A vocabulary divided over ranks that are threads of this process: with the compiled loops, and in half precision.

Compiled once here instead of once a process. In test_distributed.py the ranks are processes, with torch's operations.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drpo_torch.vocabulary import shards
from vocabulary_ranks import cases, columns_of, differences, on_rank, replicated

RANKS = 2


class Threads:
    """What the functions use of `torch.distributed`, among threads; the group is this object."""

    def __init__(self):
        self._rank, self._barrier, self._tensors = threading.local(), threading.Barrier(RANKS, timeout=60), [None] * RANKS
        self.GroupMember = torch.distributed.GroupMember
        self.ProcessGroup = Threads

    def run(self, function):
        """The results of a function of the rank."""

        def work(rank):
            self._rank.value = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(work, range(RANKS)))

    def get_rank(self, _=None):
        """See torch.distributed, as of the others."""
        return self._rank.value

    def get_world_size(self, _=None):
        """Two."""
        return RANKS

    def all_gather(self, into, mine, group):
        """All threads' tensors."""
        assert group is self
        self._tensors[self._rank.value] = mine
        self._barrier.wait()
        for to, of in zip(into, self._tensors, strict=True):
            to.copy_(of)
        self._barrier.wait()

    def all_reduce(self, mine, group):
        """Their sum."""
        every = [torch.empty_like(mine) for _ in range(RANKS)]
        self.all_gather(every, mine, group)
        mine.copy_(torch.stack(every).sum(0))


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
