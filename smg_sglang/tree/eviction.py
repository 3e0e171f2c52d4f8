"""Who goes first: eviction policies, and the queue that keeps leaves in their order."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Protocol

from smg_sglang.tree.node import Node

Rank = Any
"""What a policy sorts by: numbers or tuples of them; the lowest rank goes first."""

_SMALL = 64


class EvictionPolicy(Protocol):
    """Ranks a node by `used_at` and `born_at` (logical clock) and `uses` (count).

    A rank must never fall while the node is a leaf: the queue keeps old ranks and looks again
    only when a node comes up.
    """

    def rank(self, node: Node) -> Rank:
        """The node's place in the order; the lowest goes first."""


class LRU:
    """Least recently used first."""

    def rank(self, node: Node) -> Rank:
        return node.used_at


class LFU:
    """Least often used first; among equals, least recently."""

    def rank(self, node: Node) -> Rank:
        return node.uses, node.used_at


class FIFO:
    """Oldest first, however often used."""

    def rank(self, node: Node) -> Rank:
        return node.born_at


class SLRU:
    """Segmented LRU: what was used fewer than `protect_at` times goes before what has proved
    itself, so that a scan of one-off prompts does not empty the tree."""

    def __init__(self, protect_at: int = 2):
        self.protect_at = protect_at

    def rank(self, node: Node) -> Rank:
        return node.uses >= self.protect_at, node.used_at


class EvictionQueue:
    """A heap of leaves by rank, invalidated lazily: uses, pins and new children leave it alone.

    An entry is put right when it comes up, which works because ranks never fall. Each node has
    at most one entry, so the heap is never larger than the tree and a use costs it nothing;
    whoever makes a node evictable `offer`s it. When a sixteenth of the entries come up stale in
    one search, all are ranked anew at once, which is several times cheaper than one by one.
    That is the worst search there is: O(n), after that many uses without an eviction.
    """

    def __init__(self, policy: EvictionPolicy):
        self.policy = policy
        self._entries: list[tuple[Rank, int, Node]] = []
        self._offers = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Rank, int, Node]]:
        return iter(self._entries)

    def offer(self, node: Node) -> None:
        """Enter a node that may be evictable now; one that is not, or is in, is left out."""
        if node.evictable and not node.queued:
            node.queued = True
            self._offers += 1
            heappush(self._entries, (self.policy.rank(node), self._offers, node))

    def first(self) -> Node | None:
        """The evictable node of the lowest rank; it stays in. Amortised O(log n)."""
        entries, stale = self._entries, 0
        while entries:
            rank, offer, node = entries[0]
            if not node.evictable:
                heappop(entries)
                node.queued = False
            elif (current := self.policy.rank(node)) != rank:
                heapreplace(entries, (current, offer, node))
                stale += 1
                if stale > _SMALL and stale * 16 > len(entries):
                    self._rebuild()
                    stale = 0
            else:
                return node
        return None

    def drop_first(self) -> None:
        """Take the node that `first` gave out of the queue."""
        heappop(self._entries)[2].queued = False

    def clear(self) -> None:
        for _, _, node in self._entries:
            node.queued = False
        self._entries.clear()

    def _rebuild(self) -> None:
        rank = self.policy.rank
        kept = []
        for _, offer, node in self._entries:
            if node.evictable:
                kept.append((rank(node), offer, node))
            else:
                node.queued = False
        heapify(kept)
        self._entries[:] = kept
