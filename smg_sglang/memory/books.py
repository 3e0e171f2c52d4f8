"""The state machine of the memory server: who may read and write which page. No sockets."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from smg_sglang.config import DEFAULT_EVICTION, DEFAULT_HINT_SHARE, EvictionName
from smg_sglang.errors import SmgError
from smg_sglang.memory.arena import PageGeometry
from smg_sglang.memory.changes import Entry
from smg_sglang.memory.hinting import Hinting
from smg_sglang.memory.namespace import Namespace
from smg_sglang.memory.room import make_room
from smg_sglang.memory.slabs import READY, WRITING, PageAllocator, SlabPool, grow_freely
from smg_sglang.memory.space import Space
from smg_sglang.memory.stats import Counters, Stats
from smg_sglang.tree.node import Node
from smg_sglang.tree.page_keys import KEY_BYTES
from smg_sglang.tree.radix_tree import Heeded, RadixTree

_MAX_PAGES_LOG2 = 28  # one byte of books each


class PageSizeRefused(SmgError):
    """Not even one page of this size fits in the arena, or more than books can be kept of."""


@dataclass(slots=True)
class _Pin:
    """Pinned paths in a tree of `space`: one, none for the empty path, or many single pages."""

    space: Space
    tree: RadixTree
    nodes: tuple[Node, ...]
    pages: int = 0
    """Of a lease: how many it is for."""

    def end(self) -> None:
        for node in self.nodes:
            self.tree.unpin(node)
        if self.nodes:
            self.space.sweep(self.tree)


@dataclass(slots=True)
class _Writing:
    """A reservation: `pages` for path[have:], whose parents are pinned; or, `single`, each for a
    path of one key."""

    parents: _Pin
    path: bytes
    have: int
    pages: np.ndarray
    single: bool = False


@dataclass(slots=True)
class _Connection:
    space: Space
    leases: dict[int, _Pin] = field(default_factory=dict)
    reservations: dict[int, _Writing] = field(default_factory=dict)


class Books:
    """Pages are FREE, WRITING (in one reservation) or READY (in one tree); see `slabs`.

    Most namespaces are trees of prefixes. Where only the end of a prefix has pages (windows), the
    paths are one key long: `lookup_last` and `reserve_each` treat the keys one by one.

    Connections are named by bytes of the caller's choice; leases and reservations by the
    connection and an id that the client chose. One thread at a time; nothing here blocks.
    """

    def __init__(
        self,
        arena_bytes: int,
        slab_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        may_grow: Callable[[int], bool] = grow_freely,
        eviction: EvictionName = DEFAULT_EVICTION,
        *,
        hint_share: float = DEFAULT_HINT_SHARE,
    ) -> None:
        """`may_grow`: see `SlabPool`; `hint_share`: see `Hinting`."""
        self._pool = SlabPool(arena_bytes, slab_bytes, may_grow)
        self._arena_bytes = arena_bytes
        self._clock = clock
        self._eviction = eviction
        self._hinting = Hinting(arena_bytes, hint_share)
        self._allocators: dict[int, PageAllocator] = {}  # by page_bytes
        self._spaces: dict[Namespace, Space] = {}
        self._connections: dict[bytes, _Connection] = {}
        self._departed = Counters()

    @property
    def slab_bytes(self) -> int:
        """Bytes of the arena's smallest slab."""
        return self._pool.slab_bytes

    @property
    def high_water_bytes(self) -> int:
        """The arena has been given out up to here at some time."""
        return self._pool.high_water * self._pool.slab_bytes

    def connect(self, name: bytes, namespace: Namespace) -> PageGeometry:
        """A client of `namespace` is here. Raises PageSizeRefused."""
        allocator = self._allocator_for(namespace.page_bytes)
        space = self._spaces.get(namespace)
        if space is None:
            space = Space(namespace, allocator, self._clock, self._eviction)
            self._spaces[namespace] = space
        space.connections += 1
        self._connections[name] = _Connection(space)
        return allocator.geometry

    def _allocator_for(self, page_bytes: int) -> PageAllocator:
        allocator = self._allocators.get(page_bytes)
        if allocator is not None:
            return allocator
        if page_bytes < self._arena_bytes >> _MAX_PAGES_LOG2:
            raise PageSizeRefused(f"pages of {page_bytes} bytes are too small for this memory")
        geometry = self._pool.geometry_for(page_bytes)
        if geometry is None:
            raise PageSizeRefused(
                f"a page of {page_bytes} bytes does not fit in host memory of "
                f"{self._arena_bytes} bytes: raise --host-gb or use smaller pages"
            )
        allocator = self._allocators[page_bytes] = PageAllocator(geometry, self._pool)
        return allocator

    def connection_lost(self, name: bytes) -> None:
        """End what the client held: its leases, and its pages that are not published."""
        connection = self._connections.pop(name)
        for lease in list(connection.leases):
            self._end_lease(connection, lease)
        for reservation in list(connection.reservations):
            self._drop(connection, reservation, "connection_lost")
        connection.space.leave()
        self._forget_unused()

    def held_pages(self, name: bytes) -> int:
        """Pages that the client may read or write: of its leases and its reservations."""
        connection = self._connections[name]
        leased = sum(pin.pages for pin in connection.leases.values())
        return leased + sum(len(w.pages) for w in connection.reservations.values())

    def held_bytes(self, name: bytes) -> int:
        """The same in bytes."""
        return self.held_pages(name) * self._connections[name].space.namespace.page_bytes

    def lookup(
        self, name: bytes, lease: int, path: bytes, start: int, is_use: bool = True
    ) -> np.ndarray:
        """Pin path[:n] and return the pages (int64) of path[start:n]; none: nothing is pinned.

        A use of the path, whether or not it has pages beyond `start`; unless it `is_use` of nobody,
        which keeps the path young and is not counted.
        """
        connection = self._connections[name]
        space = connection.space
        _check_new(connection.leases, lease)
        match = space.tree.match(path)
        space.counters.lookups += is_use
        note = space.tree.touch if is_use else space.tree.renew
        node = note(match) if match.length else None
        pages = match.pages[start:]
        if len(pages):
            self._lease(connection, lease, _pin(space, node, len(pages)), is_use)
        return pages

    def lookup_last(
        self, name: bytes, lease: int, path: bytes, window: int
    ) -> tuple[int, np.ndarray]:
        """(n, pages): the longest path[:n] whose last `window` keys (all, where it has fewer) have
        pages here, single ones; these are pinned and counted as used. (0, none): a miss."""
        connection = self._connections[name]
        space = connection.space
        _check_new(connection.leases, lease)
        keys = _keys(path)
        length = _last_complete([space.tree.begins(key) for key in keys], window)
        space.counters.lookups += 1
        matches = [space.tree.match(key) for key in keys[max(0, length - window) : length]]
        if not matches:
            return 0, np.empty(0, np.int64)
        nodes = tuple(space.tree.touch(match) for match in matches)
        for node in nodes:
            space.tree.pin(node)
        self._lease(connection, lease, _Pin(space, space.tree, nodes, len(nodes)))
        return length, np.concatenate([match.pages for match in matches])

    def _lease(self, connection: _Connection, lease: int, pin: _Pin, is_use: bool = True) -> None:
        connection.leases[lease] = pin
        pin.space.leases += 1
        pin.space.counters.hits += is_use
        pin.space.counters.hit_pages += pin.pages * is_use

    def release(self, name: bytes, lease: int) -> None:
        """Unpin; unknown leases (a miss whose reply came late) are ignored."""
        connection = self._connections[name]
        if lease in connection.leases:
            self._end_lease(connection, lease)

    def touch(self, name: bytes, path: bytes) -> None:
        """A use of `path`."""
        tree = self._connections[name].space.tree
        match = tree.match(path)
        if match.length:
            tree.touch(match)

    def retain(self, name: bytes, path: bytes, seconds: float, tenant: bytes) -> Heeded:
        """Let what is here of `path` go after all that nobody retains, for so long: see `Hinting`.
        No use of it."""
        space = self._connections[name].space
        return self._hinting.retain(space, list(self._spaces.values()), path, seconds, tenant)

    def demote(self, name: bytes, path: bytes) -> Heeded:
        """Let `path` and what goes on below it go before all others, until it is used again."""
        return self._connections[name].space.tree.demote(path)

    def reserve(self, name: bytes, reservation: int, path: bytes) -> tuple[int, np.ndarray]:
        """(have, pages): pages (int64, WRITING now) for path[have:], fewer when memory is full.

        Evicts to make room, never what is pinned. path[:have] stays pinned until the end of the
        reservation, so its parents cannot vanish. No pages: nothing is reserved.
        """
        connection = self._connections[name]
        space = connection.space
        _check_new(connection.reservations, reservation)
        match = space.tree.match(path)
        # Who writes has been counted as a use when it looked for the path.
        parents = _pin(space, space.tree.renew(match) if match.length else None)
        pages = self._take(space, len(path) // KEY_BYTES - match.length)
        end = (match.length + len(pages)) * KEY_BYTES
        writing = _Writing(parents, path[:end], match.length, pages)
        self._begin_reservation(connection, reservation, writing)
        return match.length, pages

    def reserve_each(
        self, name: bytes, reservation: int, path: bytes
    ) -> tuple[np.ndarray, np.ndarray]:
        """(lacking, pages): the numbers of the keys of `path` that have no page here, and pages
        (int64, WRITING now) for the first of them: fewer when memory is full. No pages: nothing is
        reserved."""
        connection = self._connections[name]
        space = connection.space
        _check_new(connection.reservations, reservation)
        keys = _keys(path)
        for key in keys:
            if space.tree.begins(key):
                space.tree.renew(space.tree.match(key))
        lacking = [i for i, key in enumerate(keys) if not space.tree.begins(key)]
        pages = self._take(space, len(lacking))
        # Making room may have taken others of them, which the next time are written again.
        mine = b"".join(keys[i] for i in lacking[: len(pages)])
        nobody = _Pin(space, space.tree, ())
        self._begin_reservation(connection, reservation, _Writing(nobody, mine, 0, pages, True))
        return np.array(lacking, np.int64), pages

    def _take(self, space: Space, wanted: int) -> np.ndarray:
        pages = make_room(space, wanted, list(self._spaces.values()), self._pool)
        space.counters.reservations += 1
        space.counters.pages_reserved += len(pages)
        space.counters.pages_short += wanted - len(pages)
        return pages

    def _begin_reservation(
        self, connection: _Connection, reservation: int, writing: _Writing
    ) -> None:
        if not len(writing.pages):
            writing.parents.end()
            return
        connection.reservations[reservation] = writing
        connection.space.reservations += 1
        connection.space.num_writing += len(writing.pages)

    def publish(self, name: bytes, reservation: int) -> None:
        """The pages are written: WRITING -> READY. Unknown reservations are ignored."""
        connection = self._connections[name]
        writing = connection.reservations.get(reservation)
        if writing is None:
            return
        if writing.parents.tree is not connection.space.tree:
            self._drop(connection, reservation, "flushed")
            return
        self._end_reservation(connection, reservation)
        if writing.single:
            for i, key in enumerate(_keys(writing.path)):
                connection.space.publish(key, writing.pages[i : i + 1], 0)
        else:
            connection.space.publish(writing.path, writing.pages, writing.have)
        writing.parents.end()

    def abandon(self, name: bytes, reservation: int) -> None:
        """The pages will not be written. Unknown reservations are ignored."""
        connection = self._connections[name]
        if reservation in connection.reservations:
            self._drop(connection, reservation, "abandoned")

    def flush(self, name: bytes) -> None:
        """Forget all pages of the client's namespace."""
        self._connections[name].space.flush()

    def changes(self, name: bytes, since: int) -> tuple[int, bool, list[Entry]]:
        """What came into the client's namespace and left it: see `Space.changes`."""
        return self._connections[name].space.changes(since)

    def stats(
        self,
        *,
        epoch: str,
        uptime_s: float,
        malformed: int,
        strays: int,
        refused: int,
        quarantined: int = 0,
    ) -> Stats:
        """What is held now and what was counted; the arguments are the server's own."""
        total = Counters()
        total.add(self._departed)
        for space in self._spaces.values():
            total.add(space.counters)
        return Stats(
            epoch=epoch,
            uptime_s=uptime_s,
            arena_bytes=self._arena_bytes,
            slab_bytes=self._pool.slab_bytes,
            slabs=self._pool.num_slabs,
            slabs_free=self._pool.num_free,
            namespaces=[space.stats() for space in self._spaces.values()],
            total=total,
            malformed=malformed,
            strays=strays,
            refused=refused,
            quarantined_pages=quarantined,
        )

    def _end_lease(self, connection: _Connection, lease: int) -> None:
        connection.space.leases -= 1
        connection.leases.pop(lease).end()

    def _end_reservation(self, connection: _Connection, reservation: int) -> _Writing:
        writing = connection.reservations.pop(reservation)
        connection.space.reservations -= 1
        connection.space.num_writing -= len(writing.pages)
        return writing

    def _drop(self, connection: _Connection, reservation: int, reason: str) -> None:
        writing = self._end_reservation(connection, reservation)
        connection.space.drop(reason, writing.pages)
        writing.parents.end()

    def _forget_unused(self) -> None:
        for namespace in [n for n, space in self._spaces.items() if space.is_unused]:
            self._departed.add(self._spaces.pop(namespace).counters)
        used = {namespace.page_bytes for namespace in self._spaces}
        for page_bytes in self._allocators.keys() - used:
            del self._allocators[page_bytes]

    def check_invariants(self) -> None:
        """Raise AssertionError if a page is in no state or two, or a count is off. Slow."""
        spaces = self._spaces.values()
        for page_bytes, allocator in self._allocators.items():
            allocator.check_invariants()
            here = [space for space in spaces if space.namespace.page_bytes == page_bytes]
            ready = sum(space.num_ready for space in here)
            assert ready == np.count_nonzero(allocator.states == READY), "ready pages miscounted"
            writing = sum(space.num_writing for space in here)
            assert writing == np.count_nonzero(allocator.states == WRITING), "writing miscounted"
        self._check_slabs()
        self._check_holdings()

    def _check_slabs(self) -> None:
        widths = [
            a.num_slabs * (a.geometry.slab_bytes // self._pool.slab_bytes)
            for a in self._allocators.values()
        ]
        assert sum(widths) + self._pool.num_free == self._pool.num_slabs, "a slab was lost"

    def _check_holdings(self) -> None:
        connections = self._connections.values()
        for space in self._spaces.values():
            mine = [c for c in connections if c.space is space]
            assert space.connections == len(mine)
            assert space.leases == sum(len(c.leases) for c in mine)
            writings = [w for c in mine for w in c.reservations.values()]
            assert space.reservations == len(writings)
            assert space.num_writing == sum(len(w.pages) for w in writings)
            for tree in space.trees():
                tree.check_invariants()
                assert tree is space.tree or tree.num_pages, "an empty tree was kept"
                held = [p for c in mine for p in c.leases.values() if p.tree is tree]
                held += [w.parents for w in writings if w.parents.tree is tree]
                pins = sum(node.pins for node in tree.nodes())
                assert pins == sum(len(pin.nodes) for pin in held), "a pin leaked"


def _pin(space: Space, node: Node | None, pages: int = 0) -> _Pin:
    if node is not None:
        space.tree.pin(node)
    return _Pin(space, space.tree, () if node is None else (node,), pages)


def _keys(path: bytes) -> list[bytes]:
    if len(path) % KEY_BYTES:
        raise ValueError(f"a path is keys of {KEY_BYTES} bytes, got {len(path)} bytes")
    return [path[at : at + KEY_BYTES] for at in range(0, len(path), KEY_BYTES)]


def _last_complete(here: list[bool], window: int) -> int:
    """The largest n so that the last `window` (all, where there are fewer) of the first n are."""
    run = length = 0
    for n, is_here in enumerate(here, 1):
        run = run + 1 if is_here else 0
        if run >= min(window, n):
            length = n
    return length


def _check_new(held: dict[int, _Pin] | dict[int, _Writing], id_: int) -> None:
    if id_ in held:
        raise ValueError(f"id {id_} is in use on this connection")
