"""The prefix tree of one level: which pages hold which prefixes, and which of them go first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smg_sglang.tree.eviction import LRU, EvictionPolicy, EvictionQueue
from smg_sglang.tree.invariants import check_tree
from smg_sglang.tree.node import Node
from smg_sglang.tree.page_keys import KEY_BYTES
from smg_sglang.tree.retains import Retains

Pages = NDArray[np.int64]

_NO_PAGES: Pages = np.empty(0, np.int64)
_NO_PAGES.setflags(write=False)


class Match(NamedTuple):
    """The longest known prefix of a path. Holds until the next command on the tree; pin `node`
    to make it hold longer."""

    pages: Pages
    """int64[length], read-only."""
    node: Node
    """The node the prefix ends in, perhaps not at its end; the root if `length` is 0."""
    length: int
    """In pages."""


class Inserted(NamedTuple):
    """What became of inserted pages."""

    node: Node
    """The node the path ends in: pin it to protect the whole path."""
    duplicates: Pages
    """int64, read-only: the caller's pages that were not taken, as the tree has others there."""


class Heeded(NamedTuple):
    """What became of a hint about a path, in pages."""

    known: int
    """Of the path, here."""
    done: int
    """The hint holds for so many."""
    refused: int = 0
    """Beyond what might be retained."""


class RadixTree:
    """A path-compressed radix tree of page numbers under *paths* (page keys, joined).

    It keeps books only: the pages that `evict` and `clear` return are the caller's to free, and
    a page given to `insert` is the tree's until then. A page goes only after all that follow it.
    A pin on a node protects its whole path, because nothing above a leaf can go before it.
    Keys compare byte by byte, so nothing here relies on their being digests.

    One thread at a time. Paths that are no whole number of keys raise ValueError.
    """

    def __init__(self, policy: EvictionPolicy | None = None):
        self._queue = EvictionQueue(policy or LRU())
        self._retains = Retains(self._queue)
        self._root = Node(b"", _NO_PAGES, None, 0, 0)
        self._clock = 0
        self._num_pages = 0
        self._num_pinned = 0

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_pinned(self) -> int:
        """Nodes with at least one pin. `pinned_pages` counts what they protect."""
        return self._num_pinned

    def match(self, path: bytes) -> Match:
        """The longest prefix of `path` that is here. A query: not even recency changes.

        O(bytes compared + nodes passed); pages are copied only if they lie in several nodes.
        """
        node, length, within, pages = self._descend(path)
        if within < node.length:
            pages[-1] = pages[-1][:within]
        return Match(_joined(pages), node, length)

    def begins(self, key: bytes) -> bool:
        """Whether any path here begins with this key. O(1)."""
        return key in self._root.children

    def touch(self, match: Match) -> Node:
        """Count a use of the matched prefix, now, and return the node that it ends in: the one to
        pin. Of no effect if the prefix has left.

        A prefix that ends inside a node splits it, because what follows was not used: otherwise a
        prompt that shares the beginning of a long one would keep all of that. O(nodes above).
        """
        node = self.renew(match)
        node.uses += 1
        return node

    def renew(self, match: Match) -> Node:
        """As `touch`, but no use: whoever put pages in comes back to them."""
        node = self._end_of(match)
        self._make_recent(node)
        return node

    def insert(self, path: bytes, pages: Pages, start: int = 0) -> Inserted:
        """Put `pages` (int64[n], copied) under the last n keys of `path`, which is recent then,
        though not used.

        `path[:start]` must be here already: KeyError if not. Pages that are here stay, and the
        caller gets its own ones for the same keys back as duplicates; so never insert a page
        number that the tree holds. ValueError unless n is the length of the path less `start`.
        """
        given = _checked_pages(path, pages, start)
        node, known, within, _ = self._descend(path)
        if known < start:
            raise KeyError(f"pages for {start} pages onward, but only {known} of those are here")
        taken = max(known - start, 0)
        if 0 < within < node.length:
            node = self._split(node, within)
        if taken < len(given):
            node = self._grow(node, path[KEY_BYTES * known :], given[taken:])
        self._make_recent(node)
        # Only now: offered before that, every entry would be stale from the start.
        self._queue.offer(node)
        return Inserted(node, given[:taken])

    def pin(self, node: Node) -> None:
        """Protect the path that ends in `node` from eviction; pins add up. O(1).

        A match that ends inside a node pins all of that node. KeyError if the node has left.
        """
        if not node.attached:
            raise KeyError("this node has left the tree: match again, then pin")
        if node.pins == 0:
            self._num_pinned += 1
        node.pins += 1

    def unpin(self, node: Node) -> None:
        """Take back one pin; allowed after `clear`, too. ValueError without a pin. O(log n)."""
        if node.pins == 0:
            raise ValueError("this node has no pin to take back")
        node.pins -= 1
        if node.pins == 0 and node.attached:
            self._num_pinned -= 1
            self._queue.offer(node)

    def retain(self, path: bytes, until: float, tenant: bytes, most: int) -> Heeded:
        """Let pages of `path` go after all others until then, from its beginning on, as far as it
        is here and no more than `most` of them were not retained before. Not a use of it.

        until: on the clock that `expire` is told. tenant: counted in `retained`.
        """
        match = self.match(path)
        done = 0
        for node in reversed(list(self._end_of(match).ancestry())):
            if not node.kept_until:
                if node.length > most:
                    done += self._retain_part(node, until, tenant, most)
                    break
                most -= node.length
            self._retains.keep(node, until, tenant)
            done += node.length
        return Heeded(match.length, done, match.length - done)

    def _retain_part(self, node: Node, until: float, tenant: bytes, most: int) -> int:
        if most > 0:
            self._retains.keep(self._split(node, most), until, tenant)
        return max(0, most)

    def end_retain(self, path: bytes) -> Heeded:
        """Retain `path` no longer, but for what other paths share of it."""
        match = self.match(path)
        nodes = self._alone(match, len(path) // KEY_BYTES)
        for node in nodes:
            if node.kept_until:
                self._retains.end(node)
        return Heeded(match.length, sum(node.length for node in nodes))

    def demote(self, path: bytes) -> Heeded:
        """Let `path`, and what goes on below it, go before all others, until it is used again; not
        what other paths share of it. It is retained no longer."""
        match = self.match(path)
        nodes = self._alone(match, len(path) // KEY_BYTES)
        if nodes and match.length == len(path) // KEY_BYTES:
            below = list(nodes[0].children.values())
            for node in below:
                below.extend(node.children.values())
            nodes += below
        for node in nodes:
            node.demoted_at = self._clock
            if node.kept_until:
                self._retains.end(node)
            else:
                self._queue.lowered(node)
        return Heeded(match.length, sum(node.length for node in nodes))

    def expire(self, now: float) -> None:
        """End what was to be retained until `now` at most."""
        self._retains.expire(now)

    @property
    def retained(self) -> Mapping[bytes, int]:
        """Pages that are retained, by tenant, as of the last `expire`."""
        return self._retains.pages

    def _alone(self, match: Match, length: int) -> list[Node]:
        """The nodes of a path of so many pages that no other path shares, from its end upwards."""
        if not match.length:
            return []
        if match.length < length and (match.node.children or match.length < _end(match.node)):
            return []  # the path's own end has gone, and what is left belongs to others too
        node = self._end_of(match)
        nodes = [node]
        while (above := node.parent) is not None and above.parent and len(above.children) == 1:
            nodes.append(above)
            node = above
        return nodes

    def evict(
        self, n: int, gone_keys: list[bytes] | None = None, *, spare_retained: bool = False
    ) -> Pages:
        """Take out up to `n` pages and return them, int64: fewer only when all else is pinned, or
        retained and to be spared.

        Leaves go in the policy's order, demoted ones before it and retained ones after; the last
        one loses its tail only. O(log nodes) each,
        amortised over the uses before. The array may be read-only. gone_keys: the page keys are
        added to it, in runs.
        """
        freed: list[Pages] = []
        missing = n
        while missing > 0 and (leaf := self._queue.first()) is not None:
            if spare_retained and leaf.kept_until:
                break
            self._queue.policy.evicted(leaf)
            if gone_keys is not None:
                first = max(0, leaf.length - missing)
                gone_keys.append(leaf.keys[KEY_BYTES * first : KEY_BYTES * leaf.length])
            if leaf.length <= missing:
                freed.append(leaf.pages)
                missing -= leaf.length
                self._remove(leaf)
            else:
                freed.append(leaf.trim(missing))
                if leaf.kept_until:
                    self._retains.gone(leaf, missing)
                self._queue.renew_first()
                missing = 0
        gone = _joined(freed)
        self._num_pages -= len(gone)
        return gone

    def first_leaf(self) -> Node | None:
        """The leaf that would go first; None when all is pinned. O(log nodes), amortised."""
        return self._queue.first()

    def path_to(self, node: Node) -> bytes:
        """The path of all pages down to the end of `node`."""
        above = [n.keys[: KEY_BYTES * n.length] for n in node.ancestry()]
        return b"".join(reversed(above))

    def evict_leaf(self) -> Pages:
        """Take out the whole leaf that is first in the policy's order and return its pages, int64:
        none when all is pinned. This is how SGLang's device level evicts. O(log nodes), amortised.
        """
        leaf = self._queue.first()
        if leaf is None:
            return _NO_PAGES
        self._queue.policy.evicted(leaf)
        self._remove(leaf)
        self._num_pages -= leaf.length
        return leaf.pages

    def clear(self) -> Pages:
        """Take out everything, pinned or not, and return all pages, int64. Handles go stale."""
        nodes = self.nodes()
        for node in nodes:
            node.attached = False
        self._queue.clear()
        self._retains.clear()
        self._root.children.clear()
        self._num_pages = 0
        self._num_pinned = int(self._root.pins > 0)
        return _joined([node.pages for node in nodes])

    def pinned_pages(self) -> int:
        """Pages that pins protect now. Walks the tree: for metrics and tests."""
        protected = {above for node in self.nodes() if node.pins for above in node.ancestry()}
        return sum(node.length for node in protected)

    def nodes(self) -> list[Node]:
        """All nodes but the root, parents first. Walks the tree: for metrics and tests."""
        found = list(self._root.children.values())
        for node in found:
            found.extend(node.children.values())
        return found

    def check_invariants(self) -> None:
        """Raise AssertionError that says what is wrong if the books are. Walks the tree."""
        counted = self._num_pages, self._num_pinned
        check_tree(self._root, self.nodes(), self._queue, *counted, kept=self.retained)

    def _descend(self, path: bytes) -> tuple[Node, int, int, list[Pages]]:
        """Follow `path` as far as it is known: the last node, the pages known in all and within
        that node, and the page arrays passed (the last of them whole)."""
        if len(path) % KEY_BYTES:
            raise ValueError(f"a path is keys of {KEY_BYTES} bytes, got {len(path)} bytes")
        node, at, end, within = self._root, 0, len(path), 0
        passed: list[Pages] = []
        while at < end:
            child = node.children.get(path[at : at + KEY_BYTES])
            if child is None:
                break
            node = child
            passed.append(child.pages)
            # startswith compares in place: a slice would copy what may be a megabyte.
            within = child.length if path.startswith(child.keys, at) else _shared(child, path, at)
            at += KEY_BYTES * within
            if within < child.length:
                break
        return node, at // KEY_BYTES, within, passed

    def _end_of(self, match: Match) -> Node:
        """The node that a match ends at the end of, cut there if need be."""
        node = match.node
        while node.parent is not None and node.start >= match.length:
            node = node.parent
        if node.attached and 0 < match.length - node.start < node.length:
            node = self._split(node, match.length - node.start)
        return node

    def _make_recent(self, node: Node) -> None:
        self._clock += 1
        node.used_at = self._clock
        self._queue.policy.used(node)

    def _grow(self, parent: Node, keys: bytes, pages: Pages) -> Node:
        self._clock += 1
        node = Node(keys, pages, parent, parent.start + parent.length, self._clock)
        parent.children[node.first_key()] = node
        self._num_pages += len(pages)
        return node

    def _split(self, lower: Node, at: int) -> Node:
        """Put a new node over the first `at` pages of `lower`, which keeps its handle and pins.

        The new one starts without uses: it takes over those of `lower` when that leaves.
        """
        parent = lower.parent
        assert parent is not None
        cut = KEY_BYTES * at
        upper = Node(lower.keys[:cut], lower.pages[:at], parent, lower.start, lower.born_at)
        parent.children[upper.first_key()] = upper
        lower.keys = lower.keys[cut : KEY_BYTES * lower.length]
        lower.pages = lower.pages[at:]
        lower.length -= at
        lower.start += at
        lower.parent = upper
        upper.children[lower.first_key()] = lower
        self._retains.split(upper, lower)
        return upper

    def _remove(self, leaf: Node) -> None:
        """Take the queue's first node out of the tree."""
        parent = leaf.parent
        assert parent is not None
        self._queue.drop_first()
        if leaf.kept_until:
            self._retains.gone(leaf, leaf.length)
        leaf.attached = False
        del parent.children[leaf.first_key()]
        parent.absorb(leaf)
        self._queue.offer(parent)


def _end(node: Node) -> int:
    """Pages from the root to the node's end."""
    return node.start + node.length


def _shared(node: Node, path: bytes, at: int) -> int:
    """How many pages of `node` the path shares from byte `at` on: halving, each byte compared
    about once, so that it is right for keys that do not chain, too."""
    keys = node.keys
    low, high = 1, min(node.length, (len(path) - at) // KEY_BYTES)
    if path.startswith(keys[: KEY_BYTES * high], at):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if path.startswith(keys[KEY_BYTES * low : KEY_BYTES * middle], at + KEY_BYTES * low):
            low = middle
        else:
            high = middle
    return low


def _joined(parts: list[Pages]) -> Pages:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else _NO_PAGES


def _checked_pages(path: bytes, pages: Pages, start: int) -> Pages:
    """A read-only copy of the pages, one for each key of `path` from `start` on."""
    own = np.array(pages, dtype=np.int64)
    expected = len(path) // KEY_BYTES - start
    if own.shape != (expected,) or start < 0:
        raise ValueError(
            f"{len(path) // KEY_BYTES} keys from {start} on take {expected} pages, "
            f"got an array of shape {own.shape}"
        )
    own.setflags(write=False)
    return own
