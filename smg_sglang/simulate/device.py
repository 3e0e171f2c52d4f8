"""The device level: SGLang's cache, kept by our own tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from smg_sglang.tree.eviction import LRU
from smg_sglang.tree.node import Node
from smg_sglang.tree.radix_tree import Match, RadixTree

Pages = NDArray[np.int64]

NONE, WAITING, STORED = 0, 1, 2
"""Whether a device page has a copy below, as SGLang's node believes: it does not hear of evictions
in the host level."""


class DeviceLevel:
    """A pool of pages and the prefix tree over those that no request owns alone.

    SGLang 0.5.23's `UnifiedRadixCache` with `--radix-eviction-policy lru`: least recently used
    leaves go first, and each as a whole.
    """

    def __init__(self, pages: int, before_eviction: Callable[[Node], None] | None = None) -> None:
        """`before_eviction` is told of each leaf that is about to go."""
        self.tree = RadixTree(LRU())
        self.inserts = np.zeros(pages, np.int32)
        """How many requests have inserted each page (SGLang's `hit_count`)."""
        self.copies = np.zeros(pages, np.uint8)
        self.evicted_pages = 0
        self._free = np.arange(pages - 1, -1, -1, dtype=np.int64)
        self._num_free = pages
        self._locks: Counter[Node] = Counter()
        self._before_eviction = before_eviction

    @property
    def num_free(self) -> int:
        return self._num_free

    def touch(self, match: Match) -> Node:
        """Count a use; the node that the match ends in, or the root.

        SGLang 0.5.23 makes what follows in a node that a match splits recent, too
        (`UnifiedTreeCore._split_node`).
        """
        if not match.length:
            return match.node
        node = self.tree.touch(match)
        if node is not match.node:
            rest = match.node
            self.tree.renew(Match(rest.pages, rest, rest.start + rest.length))
        return node

    def lock(self, node: Node) -> None:
        """Keep the path that ends in `node`."""
        self.tree.pin(node)
        self._locks[node] += 1

    def unlock(self, node: Node) -> None:
        """Take back one lock."""
        self.tree.unpin(node)
        self._locks[node] -= 1
        if not self._locks[node]:
            del self._locks[node]

    def available(self) -> int:
        """Pages that are free or could be made so."""
        kept = {above for node in self._locks for above in node.ancestry()}
        return self._num_free + self.tree.num_pages - sum(node.length for node in kept)

    def make_free(self, pages: int) -> bool:
        """Evict until so many pages are free; False where locks keep too many."""
        while self._num_free < pages:
            leaf = self.tree.first_leaf()
            if leaf is None:
                return False
            if self._before_eviction is not None:
                self._before_eviction(leaf)
            freed = self.tree.evict_leaf()
            self.evicted_pages += len(freed)
            self.give(freed)
        return True

    def take(self, pages: int) -> Pages:
        """Free pages, the caller's now; there must be as many."""
        assert pages <= self._num_free, "more pages taken than were made free"
        self._num_free -= pages
        return self._free[self._num_free : self._num_free + pages].copy()

    def give(self, pages: Pages) -> None:
        """Take pages back."""
        self.inserts[pages] = 0
        self.copies[pages] = NONE
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)
