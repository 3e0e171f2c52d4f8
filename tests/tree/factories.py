"""Small worlds for the tree's tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from smg_sglang.config import EvictionName
from smg_sglang.tree.eviction import make_policy
from smg_sglang.tree.page_keys import KEY_BYTES
from smg_sglang.tree.radix_tree import Inserted, RadixTree

#: Pages so large that a few of them double the cost of computing one again.
POLICIES = {name: partial(make_policy, name, page_size=16_384) for name in EvictionName}


def to_path(names: Iterable[int]) -> bytes:
    """A path whose keys are plain numbers: they do not chain, which is harder on the tree."""
    return b"".join(name.to_bytes(KEY_BYTES, "little") for name in names)


class World:
    """A tree and a source of fresh page numbers."""

    def __init__(self, tree: RadixTree | None = None):
        self.tree = tree or RadixTree()
        self._pages = itertools.count()

    def fresh(self, count: int) -> np.ndarray:
        return np.fromiter(itertools.islice(self._pages, count), np.int64)

    def insert(self, names: Sequence[int], start: int = 0) -> Inserted:
        return self.tree.insert(to_path(names), self.fresh(len(names) - start), start)

    def known(self, names: Sequence[int]) -> int:
        return self.tree.match(to_path(names)).length
