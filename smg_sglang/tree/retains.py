"""Who goes last: nodes that somebody has asked to retain, until when, and how much that is."""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush

from smg_sglang.tree.eviction import EvictionQueue
from smg_sglang.tree.node import Node


class Retains:
    """The retained nodes of one tree. Times are seconds on a clock of the caller's.

    Attributes:
        pages: retained ones by tenant; those who retain none are left out.
    """

    def __init__(self, queue: EvictionQueue) -> None:
        self._queue = queue
        self._due: list[tuple[float, int, Node]] = []
        self._numbers = 0
        self.pages: Counter[bytes] = Counter()

    def keep(self, node: Node, until: float, tenant: bytes) -> None:
        """Retain a node, or retain it longer; its end comes with `expire`. O(log n)."""
        if not node.kept_until:
            node.tenant = tenant
            self.pages[tenant] += node.length
        node.kept_until = max(node.kept_until, until)
        self._note(node)

    def end(self, node: Node) -> None:
        """Nobody retains the node any more. O(log n)."""
        self.gone(node, node.length)
        node.kept_until, node.due = 0.0, 0
        self._queue.lowered(node)

    def gone(self, node: Node, pages: int) -> None:
        """So many pages of a retained node leave the tree."""
        self.pages[node.tenant] -= pages
        if not self.pages[node.tenant]:
            del self.pages[node.tenant]

    def split(self, upper: Node, lower: Node) -> None:
        """`upper` has taken over the first pages of `lower`."""
        upper.demoted_at = lower.demoted_at
        if lower.kept_until:
            upper.kept_until, upper.tenant = lower.kept_until, lower.tenant
            self._note(upper)

    def expire(self, now: float) -> None:
        """End what was to be retained until `now` at most. O(log n) each."""
        while self._due and self._due[0][0] <= now:
            _, number, node = heappop(self._due)
            if node.due != number:
                continue
            node.due = 0
            if not node.attached:
                continue
            if node.kept_until <= now:
                self.end(node)
            else:
                self._note(node)

    def clear(self) -> None:
        """The tree is empty."""
        for _, _, node in self._due:
            node.due = 0
        self._due.clear()
        self.pages.clear()

    def _note(self, node: Node) -> None:
        if not node.due:
            self._numbers += 1
            node.due = self._numbers
            heappush(self._due, (node.kept_until, node.due, node))
