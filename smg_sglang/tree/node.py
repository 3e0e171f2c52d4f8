"""A run of pages in the tree, and what the eviction policies may know of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from smg_sglang.tree.page_keys import KEY_BYTES


class Node:
    """A run of pages without a branch. To callers an opaque handle: for `pin` and `unpin` only.

    `uses` and `used_at` count what *ended* in this node; uses of a path that goes on below are
    folded in when the child goes (`absorb`). A node is a candidate only once it has no children,
    and by then the sums are those of every path through it: exact, and a use costs O(1).
    """

    __slots__ = (
        "attached",
        "born_at",
        "children",
        "credit",
        "demoted_at",
        "due",
        "entry",
        "kept_until",
        "keys",
        "length",
        "pages",
        "parent",
        "pins",
        "start",
        "tenant",
        "used_at",
        "uses",
    )

    def __init__(
        self, keys: bytes, pages: NDArray[np.int64], parent: Node | None, start: int, now: int
    ):
        self.keys = keys
        """At least `length` keys: a trimmed tail stays until it is half of them (see `trim`)."""
        self.pages = pages
        """Page numbers, int64[length], read-only: matches hand out views of it."""
        self.length = len(pages)
        self.parent = parent
        self.start = start
        """Pages above it."""
        self.children: dict[bytes, Node] = {}
        """By the first key of the child's run."""
        self.pins = 0
        self.attached = True
        """False once the node left the tree; handles to it may still be around."""
        self.entry = 0
        """The number of its entry in the eviction queue; 0: it has none."""
        self.born_at = now
        self.used_at = 0
        self.uses = 0
        self.credit = 0.0
        """What a policy noted at the last use (`EvictionPolicy.used`); never falls."""
        self.demoted_at = -1
        """When it was said not to come back, on the clock of `used_at`; a later use says it did."""
        self.kept_until = 0.0
        """Until when it goes after all that nobody retains, on the clock of who asked for it; 0: it
        is not retained."""
        self.due = 0
        """The number of its entry among those that expire; 0: it has none."""
        self.tenant = b""
        """For whom it is retained."""

    @property
    def evictable(self) -> bool:
        """Whether pages may be taken off its end now."""
        return not (self.pins or self.children) and self.attached and self.parent is not None

    def absorb(self, child: Node) -> None:
        """Take over the uses of a child that leaves."""
        self.uses += child.uses
        self.used_at = max(self.used_at, child.used_at)
        self.credit = max(self.credit, child.credit)

    def trim(self, count: int) -> NDArray[np.int64]:
        """Take `count` < `length` pages off the end. Keys are cut only when half are dead, so
        that taking a long leaf off page by page is not quadratic."""
        self.length -= count
        freed = self.pages[self.length :]
        self.pages = self.pages[: self.length]
        if len(self.keys) > 2 * KEY_BYTES * self.length:
            self.keys = self.keys[: KEY_BYTES * self.length]
        return freed

    def first_key(self) -> bytes:
        return self.keys[:KEY_BYTES]

    def ancestry(self) -> Iterator[Node]:
        """This node and its ancestors, without the root."""
        node: Node | None = self
        while node is not None and node.parent is not None:
            yield node
            node = node.parent
