"""A worker's view of the memory server: leases to read, reservations to write."""

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory import protocol
from smg_sglang.memory.address import Address
from smg_sglang.memory.arena import Arena, ArenaMappings, PageGeometry
from smg_sglang.memory.channel import Channel
from smg_sglang.memory.handshake import shake_hands
from smg_sglang.memory.namespace import Namespace
from smg_sglang.memory.stats import Stats

_GOODBYE_S = 0.2

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class _Pages:
    """Host pages of a connection, int64[n]. They keep their content until they are given back, or
    for as long as this object lives if the server is gone: `arena` keeps the mapping."""

    id: int
    start: int
    pages: np.ndarray
    arena: Arena
    geometry: PageGeometry
    epoch: str
    _channel: Channel = field(repr=False)

    @property
    def offsets(self) -> np.ndarray:
        """Byte offsets of the pages in `arena.buffer`, int64[n]."""
        return self.geometry.offsets(self.pages)


class Lease(_Pages):
    """The right to read `pages`, which have path[start:start + n]; ends with `release`."""

    @property
    def held(self) -> bool:
        """Whether the server that granted it is still there. Without it the bytes stay, too."""
        return self._channel.alive


class Reservation(_Pages):
    """The right and duty to write `pages` with path[have:have + n].

    Ends with `publish` or `abandon`. No pages: all is in memory already, or memory is full.
    """

    @property
    def have(self) -> int:
        """Pages of the path that memory has already."""
        return self.start


@dataclass(frozen=True, eq=False)
class Places(_Pages):
    """As `Reservation`, of single pages: `pages` are for the keys number `which`, int64[n]; for
    `short` others memory has no room."""

    which: np.ndarray
    short: int


class MemoryConnection:
    """A connection to one instance of the memory server; never comes back once it died.

    Methods with a `timeout_s` wait that long at most and raise MemoryUnavailable when the
    server does not answer or is gone; after a timeout they raise at once until the server is
    heard again. The others send and return. Any thread may call any method; questions take
    turns, so a thread that must not wait for another's question has a connection of its own.
    """

    def __init__(self, channel: Channel, arena: Arena, geometry: PageGeometry, epoch: str) -> None:
        """Use `open`."""
        self._channel = channel
        self.arena = arena
        self.geometry = geometry
        self.epoch = epoch
        self._memory = (arena, geometry, epoch, channel)

    @classmethod
    def open(
        cls,
        address: str,
        namespace: Namespace,
        timeout_s: float,
        mappings: ArenaMappings | None = None,
        let_go: Sequence[bytes] = (),
    ) -> "MemoryConnection":
        """Connect within `timeout_s`; raises MemoryUnavailable (and ConfigError for a bad address).

        `let_go`: see the method of that name. Connections that are given the same `mappings` share
        one mapping of the arena.
        """
        deadline = time.monotonic() + timeout_s
        where = Address.parse(address)
        life, welcome, arena_fd = shake_hands(where, namespace, timeout_s, let_go)
        try:
            mappings = mappings or ArenaMappings()
            arena = mappings.attach(welcome.epoch, arena_fd, welcome.arena_bytes)
        except (OSError, MemoryUnavailable) as error:
            life.close()
            raise MemoryUnavailable(f"cannot map the arena of {where}: {error}") from error
        finally:
            os.close(arena_fd)
        try:
            channel = Channel(where.control, welcome.identity, life)
        except Exception as error:
            life.close()
            raise MemoryUnavailable(f"cannot talk to {where}: {error}") from error
        connection = cls(channel, arena, welcome.geometry, welcome.epoch)
        try:
            connection.ping(max(0.0, deadline - time.monotonic()))
        except MemoryUnavailable:
            connection.close()
            raise
        return connection

    @property
    def alive(self) -> bool:
        """False once the server is gone; cheap."""
        return self._channel.alive

    @property
    def stalled(self) -> bool:
        """True while the server does not answer: questions would fail at once."""
        return self._channel.stalled

    def fileno(self) -> int:
        """The life line, for polling: readable when the server is gone."""
        return self._channel.fileno()

    def mark_dead(self) -> None:
        """Fail everything from now on (the life line ended)."""
        self._channel.mark_dead()

    def ping(self, timeout_s: float) -> None:
        """Return when the server has handled all that was sent before."""
        self._channel.ask(protocol.Ping(self._channel.next_id()), timeout_s)

    def lookup(
        self, path: bytes, start: int, timeout_s: float, *, is_use: bool = True
    ) -> Lease | None:
        """Lease what memory has of path[start:], or None if it has no page there.

        `path` is 16-byte page keys one after another, `start` counts pages. A lease whose reply
        comes after the timeout is released by itself.
        """
        id_ = self._channel.next_id()
        try:
            reply = self._channel.ask(protocol.Lookup(id_, path, start, is_use), timeout_s)
        except MemoryUnavailable:
            self._channel.tell(protocol.Release(id_))
            raise
        pages = protocol.unpack_pages(_expect(reply, protocol.Leased).pages)
        if not len(pages):
            return None
        return Lease(id_, start, pages, *self._memory)

    def lookup_last(self, path: bytes, window: int, timeout_s: float) -> Lease | None:
        """Of single pages: lease the last `window` (all, where it has fewer) of the longest prefix
        of `path` whose last ones are here; None where there is none. `start` is the first's."""
        id_ = self._channel.next_id()
        try:
            reply = self._channel.ask(protocol.LookupLast(id_, path, window), timeout_s)
        except MemoryUnavailable:
            self._channel.tell(protocol.Release(id_))
            raise
        last = _expect(reply, protocol.Last)
        pages = protocol.unpack_pages(last.pages)
        if not len(pages):
            return None
        return Lease(id_, last.length - len(pages), pages, *self._memory)

    def release(self, lease: Lease) -> None:
        """End a lease. One-way; a lease of another connection is ignored (it ended with it)."""
        if lease._channel is self._channel:
            self._channel.tell(protocol.Release(lease.id))

    def touch(self, path: bytes) -> None:
        """Keep `path` young in memory: it was hit on the device. One-way."""
        if not self._channel.stalled:
            self._channel.tell(protocol.Touch(path))

    def retain(
        self, path: bytes, seconds: float, tenant: bytes, timeout_s: float
    ) -> protocol.Hinted:
        """Let what memory has of `path` go after all that nobody retains, for so long; 0: no
        longer."""
        message = protocol.Retain(self._channel.next_id(), path, seconds, tenant)
        return _expect(self._channel.ask(message, timeout_s), protocol.Hinted)

    def demote(self, path: bytes, timeout_s: float) -> protocol.Hinted:
        """Let `path`, and all that goes on below it, go before all others."""
        message = protocol.Demote(self._channel.next_id(), path)
        return _expect(self._channel.ask(message, timeout_s), protocol.Hinted)

    def reserve(self, path: bytes, timeout_s: float) -> Reservation:
        """Reserve pages for what memory lacks of `path`; perhaps fewer when memory is full."""
        id_ = self._channel.next_id()
        try:
            reply = self._channel.ask(protocol.Reserve(id_, path), timeout_s)
        except MemoryUnavailable:
            self._channel.tell(protocol.Abandon(id_))
            raise
        reserved = _expect(reply, protocol.Reserved)
        pages = protocol.unpack_pages(reserved.pages)
        return Reservation(id_, reserved.have, pages, *self._memory)

    def reserve_each(self, path: bytes, timeout_s: float) -> Places:
        """Of single pages: reserve those of `path` that memory lacks; perhaps fewer."""
        id_ = self._channel.next_id()
        try:
            reply = self._channel.ask(protocol.ReserveEach(id_, path), timeout_s)
        except MemoryUnavailable:
            self._channel.tell(protocol.Abandon(id_))
            raise
        places = _expect(reply, protocol.Places)
        lacking, pages = map(protocol.unpack_pages, (places.lacking, places.pages))
        which, short = lacking[: len(pages)], len(lacking) - len(pages)
        return Places(id_, 0, pages, *self._memory, which, short)

    def publish(self, reservation: Reservation | Places) -> None:
        """The pages are written: readable by all from now on. One-way."""
        if reservation._channel is self._channel and len(reservation.pages):
            self._channel.tell(protocol.Publish(reservation.id))

    def abandon(self, reservation: Reservation | Places) -> None:
        """Give the pages back unwritten. One-way."""
        if reservation._channel is self._channel and len(reservation.pages):
            self._channel.tell(protocol.Abandon(reservation.id))

    def flush(self, timeout_s: float) -> None:
        """Forget all pages of this namespace, whoever published them.

        Leased pages stay readable until they are released; what is being written is dropped
        when it is published.
        """
        self._channel.ask(protocol.Flush(self._channel.next_id()), timeout_s)

    def stats(self, timeout_s: float) -> Stats:
        """The server's counters, of all namespaces."""
        reply = self._channel.ask(protocol.GetStats(self._channel.next_id()), timeout_s)
        return _expect(reply, protocol.StatsReply).stats

    def changes(self, since: int, timeout_s: float) -> protocol.Changes:
        """What came into the namespace and left it since change number `since`, or all there is
        (-1, or where so much is not known any more)."""
        reply = self._channel.ask(protocol.GetChanges(self._channel.next_id(), since), timeout_s)
        return _expect(reply, protocol.Changes)

    def let_go(self, identities: Sequence[bytes]) -> None:
        """Nothing copies to or from pages of these former connections of this process any more, so
        that the server may give them to others. One-way."""
        self._channel.tell(protocol.LetGo(list(identities)))

    def when_unused(self, call: Callable[[bytes], None]) -> None:
        """Call, once and on any thread, with this connection's identity when neither it nor any of
        its leases and reservations is left: who copies holds one of them until the copy ends."""
        ending = weakref.finalize(self._channel, call, self._channel.identity)
        ending.atexit = False

    def close(self) -> None:
        """End the connection; its leases and unpublished pages go: no copy may be under way. Waits
        0.2 s at most.

        What was sent before is handled before that, if the server is well.
        """
        if self.alive and not self.stalled:
            self._channel.tell(protocol.Goodbye())
            try:
                self.ping(_GOODBYE_S)
            except MemoryUnavailable:
                pass
        self._channel.close()


def _expect(reply: protocol.Reply, kind: type[_T]) -> _T:
    if not isinstance(reply, kind):
        raise MemoryUnavailable(f"the memory server answered {type(reply).__name__}")
    return reply
