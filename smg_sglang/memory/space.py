"""The books of one namespace: its trees, its pages, its counters."""

from collections.abc import Callable

import numpy as np

from smg_sglang.config import EvictionName
from smg_sglang.memory.changes import ChangeLog, Entry
from smg_sglang.memory.namespace import Namespace
from smg_sglang.memory.slabs import PageAllocator
from smg_sglang.memory.stats import Counters, NamespaceStats
from smg_sglang.tree.eviction import make_policy
from smg_sglang.tree.page_keys import KEY_BYTES
from smg_sglang.tree.radix_tree import RadixTree


class Space:
    """One namespace's READY pages are in its tree, or in a retired tree (flushed but leased)."""

    def __init__(
        self,
        namespace: Namespace,
        pages: PageAllocator,
        clock: Callable[[], float],
        eviction: EvictionName,
    ) -> None:
        self.namespace = namespace
        self.pages = pages
        self._eviction = eviction
        self.tree = self._new_tree()
        self.counters = Counters()
        self.num_writing = 0
        self.connections = 0
        self.leases = 0
        self.reservations = 0
        self._clock = clock
        self._left_at = clock()
        self._retired: list[RadixTree] = []
        self._changes: ChangeLog | None = None

    def _new_tree(self) -> RadixTree:
        return RadixTree(make_policy(self._eviction, self.namespace.page_size))

    @property
    def num_ready(self) -> int:
        """Pages that can be read."""
        return self.tree.num_pages + sum(tree.num_pages for tree in self._retired)

    @property
    def bytes_held(self) -> int:
        """Bytes of pages, ready or being written."""
        return (self.num_ready + self.num_writing) * self.namespace.page_bytes

    @property
    def is_unused(self) -> bool:
        """No pages and nobody who could want them. (Who writes pages is connected.)"""
        return not (self.connections or self.num_ready)

    def deserted_for(self) -> float:
        """Seconds since the last connection left; 0 while there is one."""
        return 0.0 if self.connections else self._clock() - self._left_at

    def leave(self) -> None:
        """A connection is gone."""
        self.connections -= 1
        self._left_at = self._clock()

    def now(self) -> float:
        """Seconds on the clock that retained pages expire by."""
        return self._clock()

    def expire(self) -> None:
        """Nobody retains what was to be retained until now at most."""
        self.tree.expire(self.now())

    def retained_bytes(self, tenant: bytes | None = None) -> int:
        """Bytes of pages that a tenant, or all of them, retain."""
        retained = self.tree.retained
        pages = sum(retained.values()) if tenant is None else retained.get(tenant, 0)
        return pages * self.namespace.page_bytes

    def evict(self, n: int, *, spare_retained: bool) -> int:
        """Free up to `n` pages, in the order of the eviction policy; pinned ones stay, retained
        ones as long as others may go, or, where they are to be spared, too."""
        self.expire()
        gone: list[bytes] | None = None if self._changes is None else []
        freed = self.tree.evict(n, gone, spare_retained=spare_retained)
        for keys in gone or ():
            self._note(False, keys)
        self.pages.give(freed)
        self.counters.pages_evicted += len(freed)
        return len(freed)

    def flush(self) -> None:
        """Start with an empty tree; the old one lives on in what leases and reservations pin."""
        self.counters.flushes += 1
        old, self.tree = self.tree, self._new_tree()
        self.counters.drop("flushed", old.num_pages)
        self._retired.append(old)
        if self._changes is not None:
            self._changes.restart()
        self.sweep(old)

    def sweep(self, tree: RadixTree) -> None:
        """Free what nothing pins any more, if `tree` is a retired one."""
        if tree is self.tree:
            return
        self.pages.give(tree.evict(tree.num_pages))
        if not tree.num_pages:
            self._retired = [old for old in self._retired if old is not tree]

    def publish(self, path: bytes, pages: np.ndarray, start: int) -> None:
        """Put written `pages` (of path[start:]) into the tree; what it has already is freed."""
        duplicates = self.tree.insert(path, pages, start).duplicates
        self._note(True, path[KEY_BYTES * (start + len(duplicates)) :])
        self.pages.mark_ready(pages)
        self.pages.give(duplicates)
        self.counters.pages_published += len(pages) - len(duplicates)
        self.counters.drop("duplicate", len(duplicates))

    def drop(self, reason: str, pages: np.ndarray) -> None:
        """Free `pages` that were never published."""
        self.pages.give(pages)
        self.counters.drop(reason, len(pages))

    def changes(self, since: int) -> tuple[int, bool, list[Entry]]:
        """(next number, whether it is all, changes): those from number `since` on, or all pages
        that are here, parents first. Changes are noted from the first time on that somebody asks.
        """
        if self._changes is None:
            self._changes = ChangeLog()
            since = -1
        entries = self._changes.since(since)
        if entries is not None:
            return self._changes.next, False, entries
        here = [(True, node.keys[: KEY_BYTES * node.length]) for node in self.tree.nodes()]
        return self._changes.next, True, here

    def _note(self, came: bool, keys: bytes) -> None:
        if self._changes is not None:
            self._changes.add(came, keys)

    def stats(self) -> NamespaceStats:
        """Now."""
        self.expire()
        return NamespaceStats(
            namespace=self.namespace,
            pages_ready=self.num_ready,
            pages_writing=self.num_writing,
            pages_retained=sum(self.tree.retained.values()),
            connections=self.connections,
            leases=self.leases,
            reservations=self.reservations,
            counters=self.counters,
        )

    def trees(self) -> list[RadixTree]:
        """The tree and the retired ones, for checks."""
        return [self.tree, *self._retired]
