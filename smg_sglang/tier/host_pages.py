"""Pages that stay in host memory while a request uses them: found or written, then held.

A held page keeps its bytes until it is released, whatever becomes of the memory server: a lease
keeps it while the server lives, the mapping afterwards. What the server cannot take (it is away,
or full of what others hold) goes into memory of our own, which nobody else finds.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from smg_sglang.attention.host import HostRun
from smg_sglang.box import box_memory
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.client import Lease, MemoryConnection, Reservation
from smg_sglang.tier.ranks import ALONE, Ranks
from smg_sglang.transfer.mover import BeforeCopy, Mover
from smg_sglang.transfer.spills import SpillCounters
from smg_sglang.tree.page_keys import KEY_BYTES

logger = logging.getLogger(__name__)

#: Bytes of the box's memory that pages of our own leave free.
SPARE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Held:
    """Consecutive pages of a path, held; `lease` is None for memory of our own."""

    run: HostRun
    lease: Lease | None

    @property
    def num_pages(self) -> int:
        return len(self.run.offsets)

    def first(self, pages: int) -> Held:
        """The first so many of them, under the same lease."""
        if pages == self.num_pages:
            return self
        return Held(replace(self.run, offsets=self.run.offsets[:pages]), self.lease)


def pages_of(held: Iterable[Held]) -> int:
    """How many pages are held."""
    return sum(part.num_pages for part in held)


class CopyFailed(MemoryUnavailable):
    """The bytes of `pages` pages could not be copied; host memory has none of them."""

    def __init__(self, pages: int) -> None:
        super().__init__(f"{pages} pages could not be copied to host memory")
        self.pages = pages


class HostPages:
    """Scheduler thread only. No call waits longer than the lookup timeout, beside the copy."""

    def __init__(
        self,
        connection: Callable[[], MemoryConnection | None],
        release: Callable[[Lease], None],
        mover: Mover,
        *,
        timeout_s: float,
        ranks: Ranks = ALONE,
        before_copy: BeforeCopy | None = None,
    ) -> None:
        """
        Args:
            connection: the scheduler's, or None while the server is away.
            ranks: who does the same at the same time.
        """
        self._connection = connection
        self._release = release
        self._mover = mover
        self._page_size = mover.layout.page_size
        self._timeout_s = timeout_s
        self._ranks = ranks
        self._before_copy = before_copy
        self.counters = SpillCounters()
        """Of copies on this thread; those of the spill thread have theirs."""
        self.wait_for_ranks: Callable[[], object] = lambda: None
        """Returns once every rank has called it."""
        self.num_held = 0
        """Runs that are held."""

    def find(self, path: bytes) -> list[Held]:
        """Hold what host memory has of `path`, from its first page on; [] for a miss."""

        def ask() -> list[Held]:
            try:
                return self._leased(path, 0)
            except MemoryUnavailable as error:
                logger.warning("smg: a lookup counts as a miss: %s", error)
                return []

        return self._in_turn(ask)

    def keep(self, path: bytes, first: int, slots: torch.Tensor, shared: bool = True) -> list[Held]:
        """Copy pages `path[first:]` to host memory and hold them; the bytes are there on return.

        Args:
            first: pages of the path that the caller holds already.
            slots: int64 [pages * page_size] device slots of those from `first` on.
            shared: False keeps them to this worker.

        Raises:
            MemoryUnavailable: neither the server nor the box has memory for them; nothing is held.
        """

        def share() -> list[Held]:
            try:
                self.publish(path, slots, first)
                return self._leased(path, first)
            except MemoryUnavailable as error:
                logger.warning("smg: pages of a long context stay with this worker: %s", error)
                return []

        held = self._in_turn(share) if shared else []
        done = pages_of(held)
        try:
            rest = slots[done * self._page_size :]
            return [*held, self._own(rest)] if rest.numel() else held
        except MemoryUnavailable:
            self.release(held)
            raise

    def first(self, held: list[Held], pages: int) -> list[Held]:
        """Hold the first so many of these pages, and let go of the others."""
        kept: list[Held] = []
        rest: list[Held] = []
        for part in held:
            wanted = min(part.num_pages, pages)
            (kept if wanted else rest).append(part.first(wanted))
            pages -= wanted
        self.release(rest)
        return kept

    def release(self, held: list[Held]) -> None:
        """End the holds; the list is empty afterwards."""
        for part in held:
            if part.lease is not None:
                self._release(part.lease)
            else:
                self._mover.unpin(part.run.arena)
        self.num_held -= len(held)
        held.clear()

    def _in_turn(self, ask: Callable[[], list[Held]]) -> list[Held]:
        """Ask once host memory has all that the first rank writes: its own answer says so. (What a
        rank misses all the same, it keeps to itself.)"""
        if not self._ranks.take_turns:
            return ask()
        mine = ask() if self._ranks.writes else None
        self.wait_for_ranks()
        return ask() if mine is None else mine

    def _leased(self, path: bytes, first: int) -> list[Held]:
        connection = self._connection()
        if connection is None or len(path) <= first * KEY_BYTES:
            return []
        lease = connection.lookup(path, first, self._timeout_s)
        if lease is None:
            return []
        return [self._held(lease.arena.buffer, lease.offsets, lease)]

    def publish(
        self,
        path: bytes,
        slots: torch.Tensor,
        first: int = 0,
        published: Callable[[MemoryConnection, bytes], None] = lambda connection, path: None,
    ) -> int:
        """Copy what host memory lacks of `path` and publish it, before returning; the number of
        pages of the path that it has then, fewer than all where it is full. Where another rank
        writes the same bytes, that is its business.

        Args:
            slots: int64, device slots of pages `first` and on; host memory has what is before.
            published: told what was published.

        Raises:
            MemoryUnavailable: the server is away or slow, or it lacks pages before `first`.
            CopyFailed: the copy failed.
        """
        if not self._ranks.writes:
            return len(path) // KEY_BYTES
        connection = self._connection()
        if connection is None:
            raise MemoryUnavailable("the memory server is away")
        reservation = connection.reserve(path, self._timeout_s)
        if reservation.have < first:
            # Another server's memory: what comes before is in the former one's.
            connection.abandon(reservation)
            raise MemoryUnavailable("its memory lacks what comes before")
        begin = (reservation.have - first) * self._page_size
        mine = slots[begin : begin + len(reservation.pages) * self._page_size]
        if mine.numel():
            self._write(connection, reservation, mine)
            published(connection, path[: KEY_BYTES * (reservation.have + len(reservation.pages))])
        return reservation.have + len(reservation.pages)

    def _write(
        self, connection: MemoryConnection, reservation: Reservation, slots: torch.Tensor
    ) -> None:
        try:
            self._copy(slots, reservation.arena.buffer, reservation.offsets)
        except CopyFailed:
            connection.abandon(reservation)
            raise
        connection.publish(reservation)

    def _own(self, slots: torch.Tensor) -> Held:
        pages = slots.numel() // self._page_size
        size = pages * self._mover.layout.page_bytes
        # All ranks look before any of them takes.
        if box_memory().available < size * self._ranks.size + SPARE_BYTES:
            raise MemoryUnavailable(
                f"host memory has no room for {pages * self._page_size} tokens "
                f"({size / 2**20:.0f} MiB) more of a long context"
            )
        try:
            # Whole pages of the operating system: the driver page-locks no others side by side.
            arena = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        except OSError as error:
            raise CopyFailed(pages) from error
        offsets = np.arange(pages, dtype=np.int64) * self._mover.layout.page_bytes
        self._copy(slots, arena, offsets)
        return self._held(arena, offsets, None)

    def _copy(self, slots: torch.Tensor, arena: np.ndarray, offsets: np.ndarray) -> None:
        """Raises CopyFailed, whatever went wrong: nothing of ours may end the scheduler."""
        try:
            if self._before_copy is not None:
                self._before_copy()
            began = time.perf_counter()
            move = self._mover.prepare(slots, arena, offsets)
            # On a GPU the forward that wrote the slots may still run: the copy comes after it.
            self._mover.spill(move, after=self._mover.fence())
        except Exception as error:
            logger.exception("smg: a spill failed")
            raise CopyFailed(len(offsets)) from error
        self.counters.pages += move.num_pages
        self.counters.bytes += move.num_pages * self._mover.layout.page_bytes
        self.counters.seconds += time.perf_counter() - began

    def _held(self, arena: np.ndarray, offsets: np.ndarray, lease: Lease | None) -> Held:
        self.num_held += 1
        return Held(HostRun(arena, np.asarray(offsets), self._page_size), lease)
