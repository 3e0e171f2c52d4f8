"""Device pages on their way to host memory: behind the scheduler's back, or before it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.client import MemoryConnection, Reservation
from smg_sglang.metrics import TierCounters
from smg_sglang.tier.connections import BACKGROUND_TIMEOUT_S
from smg_sglang.tier.host_pages import CopyFailed, HostPages
from smg_sglang.tier.trail import Trail
from smg_sglang.transfer.mover import BeforeCopy, Mover
from smg_sglang.transfer.spills import Event, SpillQueue, SpillTarget
from smg_sglang.tree.page_keys import KEY_BYTES

Ends = Mapping[int, tuple[bytes, torch.Tensor]]


@dataclass(frozen=True)
class _Written:
    """What a spill hands from its reservation to its publication."""

    connection: MemoryConnection
    reservation: Reservation
    path: bytes

    def publish(self) -> None:
        self.connection.publish(self.reservation)

    def abandon(self) -> None:
        self.connection.abandon(self.reservation)


@dataclass(frozen=True)
class _WrittenElsewhere:
    """Another rank writes the same bytes."""

    def publish(self) -> None:
        """It does that, too."""

    def abandon(self) -> None:
        """Nothing was reserved."""


class Spills:
    """Scheduler thread only, but `queue.drain` and `dropped_pages`. None raises: what host memory
    cannot take is counted."""

    def __init__(
        self,
        mover: Mover,
        pages: HostPages,
        background: Callable[[], MemoryConnection | None],
        counters: TierCounters,
        *,
        writes: bool,
        max_waiting_pages: int,
        trails: Sequence[Trail] = (),
        before_copy: BeforeCopy | None = None,
        published: Callable[[MemoryConnection, bytes], None] = lambda connection, path: None,
    ) -> None:
        """
        Args:
            background: the connection of the spill thread.
            writes: False where another rank writes the same bytes: nothing is copied here.
            max_waiting_pages: whose slots may be locked until they are copied.
            trails: layers with windows or states, whose pages go with those of the others.
            published: told of each path that was published, on the spill or the scheduler thread.
        """
        self._published = published
        self._trails = trails
        self._pages = pages
        self._background = background
        self._counters = counters
        self.queue: SpillQueue[bytes, _Written | _WrittenElsewhere] = SpillQueue(
            mover,
            reserve=self._reserve if writes else _nothing_to_write,
            publish=self._publish,
            abandon=lambda written: written.abandon(),
            max_waiting_pages=max_waiting_pages,
            before_copy=before_copy,
        )

    def submit(
        self,
        path: bytes,
        slots: torch.Tensor,
        own_slots: int,
        ready: Sequence[Event] = (),
        ends: Ends = MappingProxyType({}),
    ) -> None:
        """Copy in the background what host memory lacks of `path`. Each call completes, in order.

        Args:
            path: page keys from the root.
            slots: int64, device slots of all tokens of the path; they must stay as they are until
                the completion is popped.
            own_slots: how many of them are not on the path of an earlier spill.
            ready: device events after which the slots hold the KV.
            ends: by pool, what layers with windows or states have: page keys, and their slots.
        """
        self.queue.submit(path, slots, ready, new_slots=own_slots)
        for trail in self._trails:
            trail.spills.submit(*ends.get(trail.pool, (b"", slots[:0])), ready)

    def num_completed(self) -> int:
        """Calls that have ended and were not popped."""
        return min(queue.num_completed() for queue in self._queues)

    def pop_completed(self) -> bool:
        """The oldest completion: True when host memory has all of its pages."""
        return all([queue.pop_completed() for queue in self._queues])

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait, for each pool so long at most, until what was submitted has ended. Any thread."""
        return all([queue.drain(timeout_s) for queue in self._queues])

    @property
    def waiting_slots(self) -> int:
        """Slots that are locked until they are copied."""
        return sum(queue.waiting_slots for queue in self._queues)

    @property
    def _queues(self) -> list[SpillQueue[bytes, Any]]:
        return [self.queue, *(trail.spills for trail in self._trails)]

    def spill_now(self, path: bytes, slots: torch.Tensor) -> bool:
        """Copy what host memory lacks of `path` before returning (write-back: the slots are next
        to be reused). Waits for the copy, and for the server no longer than a lookup."""
        pages = len(path) // KEY_BYTES
        try:
            known = self._pages.publish(path, slots, published=self._published)
        except CopyFailed as error:
            return self._drop("error", error.pages)
        except MemoryUnavailable:
            return self._drop("unavailable", pages)
        return known == pages or self._drop("memory_full", pages - known)

    def dropped_pages(self) -> Counter[str]:
        """By reason. Any thread: `copy` is one call into C, so no other can add one half-way."""
        dropped = [queue.counters.dropped.copy() for queue in self._queues]
        return sum(dropped, self._counters.dropped_pages.copy())

    def _drop(self, reason: str, pages: int) -> bool:
        self._counters.dropped_pages[reason] += pages
        return False

    def _publish(self, written: _Written | _WrittenElsewhere) -> None:
        """Runs on the spill thread."""
        written.publish()
        if isinstance(written, _Written):
            self._published(written.connection, written.path)

    def _reserve(self, path: bytes) -> SpillTarget[_Written | _WrittenElsewhere]:
        """Runs on the spill thread."""
        connection = self._background()
        if connection is None:
            raise MemoryUnavailable("the memory server is away")
        reservation = connection.reserve(path, BACKGROUND_TIMEOUT_S)
        end = reservation.have + len(reservation.pages)
        return SpillTarget(
            handle=_Written(connection, reservation, path[: end * KEY_BYTES]),
            arena=reservation.arena.buffer,
            offsets=np.asarray(reservation.offsets),
            first=reservation.have,
        )


def _nothing_to_write(path: bytes) -> SpillTarget[_Written | _WrittenElsewhere]:
    return SpillTarget(
        handle=_WrittenElsewhere(),
        arena=np.empty(0, np.uint8),
        offsets=np.empty(0, np.int64),
        first=len(path) // KEY_BYTES,
    )
