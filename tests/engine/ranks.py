"""Ranks of one worker in a test: they do the same at the same time, each on a thread of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch


class Ranks:
    """`members` do what they are told together, and agree as SGLang's ranks do."""

    def __init__(self, members) -> None:
        self.members = members
        self._together = threading.Barrier(len(members), timeout=10)
        self._given = [torch.empty(0)] * len(members)
        self._threads = ThreadPoolExecutor(len(members))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._threads.shutdown()

    def join(self, rank, cache) -> None:
        """Make a cache that of a rank."""
        cache.tp_world_size = len(self.members)
        cache._all_reduce_attn_groups = partial(self._reduce, rank)

    def _reduce(self, rank, tensor, op) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        self._given[rank] = tensor.clone()
        self._together.wait()
        least = torch.stack(self._given).amin(0)
        self._together.wait()
        tensor.copy_(least)

    def each(self, what, *args) -> list:
        """What each returns."""
        calls = [self._threads.submit(what, member, *args) for member in self.members]
        return [call.result() for call in calls]

    def all(self, what, *args):
        """What all of them return, who must agree."""
        results = self.each(what, *args)
        assert results == results[:1] * len(results)
        return results[0]
