"""Who goes first: eviction policies, and the queue that keeps leaves in their order."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Protocol

from smg_sglang.config import EvictionName
from smg_sglang.tree.node import Node

Rank = Any
"""What a policy sorts by: numbers or tuples of them; the lowest rank goes first."""

_SMALL = 64


class EvictionPolicy(Protocol):
    """Ranks a node by `used_at` and `born_at` (logical clock), `uses` (count), `credit`, and where
    it lies (`start`, `length`). An object serves one tree.

    A rank must never fall while the node is a leaf, but when the node is trimmed: the queue keeps
    old ranks and looks again only when a node comes up or was trimmed.
    """

    def rank(self, node: Node) -> Rank:
        """The node's place in the order; the lowest goes first."""

    def used(self, node: Node) -> None:
        """`node` has just become the most recent; its `credit` is the policy's to raise."""

    def evicted(self, node: Node) -> None:
        """All of `node`, or a tail of it, is about to go."""


class _Stateless:
    """All that the policy needs is in the node anyway."""

    def used(self, node: Node) -> None:
        """Nothing to note."""

    def evicted(self, node: Node) -> None:
        """Nothing to note."""


class LRU(_Stateless):
    """Least recently used first."""

    def rank(self, node: Node) -> Rank:
        return node.used_at


class LFU(_Stateless):
    """Least often used first; among equals, least recently."""

    def rank(self, node: Node) -> Rank:
        return node.uses, node.used_at


class FIFO(_Stateless):
    """Oldest first, however often used."""

    def rank(self, node: Node) -> Rank:
        return node.born_at


class SLRU(_Stateless):
    """Segmented LRU: what was used fewer than `protect_at` times since it came goes before what
    has proved itself, so that a scan of one-off prompts does not empty the tree."""

    def __init__(self, protect_at: int = 1):
        self.protect_at = protect_at

    def rank(self, node: Node) -> Rank:
        return node.uses >= self.protect_at, node.used_at


class CostAware(_Stateless):
    """What is cheap to compute again goes first, after Marconi (MLSys'25), which weighs recency
    with the FLOPs that a byte of a node saves; combined here as in GreedyDual-Size (Cao and Irani,
    1997), which needs no tuning and keeps ranks from falling.

    To compute a token costs the same everywhere but for attention, which grows with its depth:
    `doubling_depth` pages down it costs twice as much. A node ranks by its cost plus the age of
    the tree at its last use; the age is the rank of whatever went last. So a node whose cost is
    twice another's may stay unused for twice as long. What was used again after it came counts
    double.
    """

    def __init__(self, doubling_depth: float):
        self.doubling_depth = doubling_depth
        self._age = 0.0

    def rank(self, node: Node) -> Rank:
        return self._worth(node), node.used_at

    def used(self, node: Node) -> None:
        node.credit = self._age

    def evicted(self, node: Node) -> None:
        self._age = max(self._age, self._worth(node))

    def _worth(self, node: Node) -> float:
        cost = 1 + (node.start + node.length) / self.doubling_depth
        return node.credit + (2 * cost if node.uses else cost)


#: Tokens from the root at which attention costs as much as everything else of a token:
#: 2 x parameters / (4 x layers x heads x head_dim). Llama-3.1-8B has 27k, Qwen2.5-7B 33k.
DOUBLING_TOKENS = 32_768


def make_policy(name: EvictionName, page_size: int) -> EvictionPolicy:
    """A new policy for one tree of pages of `page_size` tokens."""
    match name:
        case EvictionName.LRU:
            return LRU()
        case EvictionName.LFU:
            return LFU()
        case EvictionName.FIFO:
            return FIFO()
        case EvictionName.SLRU:
            return SLRU()
        case EvictionName.COST:
            return CostAware(DOUBLING_TOKENS / page_size)


class EvictionQueue:
    """A heap of leaves by rank, invalidated lazily: uses, pins and new children leave it alone.

    An entry is put right when it comes up, which works because ranks never fall, or `lowered` or
    `renew_first` is told. Each node has
    at most one entry that counts, and of the others there are never more than of these, so the heap
    is no larger than two trees and a use costs it nothing;
    whoever makes a node evictable `offer`s it. When a sixteenth of the entries come up stale in
    one search, all are ranked anew at once, which is several times cheaper than one by one.
    That is the worst search there is: O(n), after that many uses without an eviction.
    """

    def __init__(self, policy: EvictionPolicy):
        self.policy = policy
        self._entries: list[tuple[Rank, int, Node]] = []
        self._offers = 0
        self._dead = 0
        """Entries of nodes that have another one."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Rank, int, Node]]:
        return iter(self._entries)

    def rank(self, node: Node) -> Rank:
        """The node's place: demoted ones first (0), retained ones last (2), and only then as the
        policy says."""
        grade = 2 if node.kept_until else 1 if node.demoted_at < node.used_at else 0
        return grade, self.policy.rank(node)

    def offer(self, node: Node) -> None:
        """Enter a node that may be evictable now; one that is not, or is in, is left out."""
        if node.evictable and not node.entry:
            self._push(node)

    def lowered(self, node: Node) -> None:
        """The node's rank has fallen: it may have to go before others that it stood behind."""
        if node.entry:
            self._dead += 1
            self._push(node)
            self._bury()

    def first(self) -> Node | None:
        """The evictable node of the lowest rank; it stays in. Amortised O(log n)."""
        entries, stale = self._entries, 0
        while entries:
            rank, offer, node = entries[0]
            if node.entry != offer:
                heappop(entries)
                self._dead -= 1
            elif not node.evictable:
                heappop(entries)
                node.entry = 0
            elif (current := self.rank(node)) != rank:
                heapreplace(entries, (current, offer, node))
                stale += 1
                if stale > _SMALL and stale * 16 > len(entries):
                    self._rebuild()
                    stale = 0
            else:
                return node
        return None

    def renew_first(self) -> None:
        """Rank the first node anew, whose rank may have fallen: it was trimmed."""
        _, offer, node = self._entries[0]
        heapreplace(self._entries, (self.rank(node), offer, node))

    def drop_first(self) -> None:
        """Take the node that `first` gave out of the queue."""
        heappop(self._entries)[2].entry = 0
        self._bury()

    def clear(self) -> None:
        for _, _, node in self._entries:
            node.entry = 0
        self._entries.clear()
        self._dead = 0

    def _push(self, node: Node) -> None:
        self._offers += 1
        node.entry = self._offers
        heappush(self._entries, (self.rank(node), self._offers, node))

    def _bury(self) -> None:
        if self._dead > _SMALL and self._dead * 2 > len(self._entries):
            self._rebuild()

    def _rebuild(self) -> None:
        rank = self.rank
        kept = []
        for _, offer, node in self._entries:
            if node.entry != offer:
                continue
            if node.evictable:
                kept.append((rank(node), offer, node))
            else:
                node.entry = 0
        heapify(kept)
        self._entries[:] = kept
        self._dead = 0
