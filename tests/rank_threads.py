"""Ranks that are threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

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
