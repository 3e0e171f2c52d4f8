"""From storage to host memory: pages are read, checked, and only then given DRAM."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from smg_sglang.memory.client import Lease, MemoryConnection
from smg_sglang.memory.namespace import Namespace
from smg_sglang.storage.backend import Backend
from smg_sglang.storage.host import ANSWER_S, Host
from smg_sglang.storage.lane import Lane
from smg_sglang.storage.protocol import Counters
from smg_sglang.storage.sealed import SEAL_BYTES, object_names, object_suffix, unseal
from smg_sglang.storage.staging import Staging
from smg_sglang.tree.page_keys import KEY_BYTES


@dataclass
class Wanted:
    """A prefix that a worker waits for.

    Attributes:
        end: pages of the path that are worth asking storage for.
        tell: called with the pages of the path that host memory has, after each batch.
        forgotten: nobody waits any more.
    """

    namespace: Namespace
    path: bytes
    end: int
    tell: Callable[[int], None]
    forgotten: bool = field(default=False)


class Reader:
    """For one thread. What the backend fills is staging memory of this process, never the arena:
    a read that is given up and comes back late touches nobody's page."""

    def __init__(self, backend: Backend, lane: Lane, host: Host, counters: Counters) -> None:
        self._backend = backend
        self._lane = lane
        self._host = host
        self._counters = counters
        self._staging = Staging()

    def bring(self, wanted: Wanted) -> None:
        """Raises MemoryUnavailable and StorageUnavailable; what was brought before that stays."""
        connection = self._host.connection(wanted.namespace)
        # Held, so that what lies above the pages that come cannot go meanwhile.
        above = connection.lookup(wanted.path, 0, ANSWER_S, is_use=False)
        try:
            self._bring_batches(wanted, connection, 0 if above is None else len(above.pages))
        finally:
            if above is not None:
                connection.release(above)

    def _bring_batches(self, wanted: Wanted, connection: MemoryConnection, have: int) -> None:
        held: list[Lease] = []
        wanted.tell(have)  # more than the worker knew of, where another waited for the same
        try:
            while have < wanted.end and not wanted.forgotten:
                batch = self._staging.batch(wanted.namespace.page_bytes)
                end = min(wanted.end, have + batch)
                good = self._read(wanted, have, end)
                have = self._publish(connection, wanted.path, have, good, held)
                wanted.tell(have)
                if have < end:
                    return
        finally:
            for lease in held:
                connection.release(lease)

    def _read(self, wanted: Wanted, start: int, end: int) -> np.ndarray:
        """The pages of path[start:end] up to the first that is missing or bad, uint8[n, bytes]."""
        suffix = object_suffix(wanted.namespace)
        names = object_names(wanted.path[start * KEY_BYTES : end * KEY_BYTES], suffix)
        rows = self._staging.rows(len(names), wanted.namespace.page_bytes)
        began = time.perf_counter()
        there = self._lane.call(lambda: self._get(names, rows))
        self._counters.read_seconds += time.perf_counter() - began
        self._counters.read_bytes += rows.shape[1] * sum(there)
        count = 0
        for name, row, is_there in zip(names, rows, there, strict=True):
            if not is_there or unseal(name, row) is None:
                # It was said to be there: its bytes are not what was written.
                self._counters.count("corrupt", 1)
                self._lane.call(lambda name=name: self._backend.discard(name))  # type: ignore[misc]
                break
            count += 1
        return rows[:count, :-SEAL_BYTES]

    def _get(self, names: list[str], rows: np.ndarray) -> list[bool]:
        # Deepest first: where the backend evicts the least recently used, a prefix goes from its
        # end, not from its beginning, which others share.
        return self._backend.get(names[::-1], rows[::-1])[::-1]

    def _publish(
        self,
        connection: MemoryConnection,
        path: bytes,
        start: int,
        pages: np.ndarray,
        held: list[Lease],
    ) -> int:
        """Pages of the path that host memory has now, which stay until `held` is released."""
        end = start + len(pages)
        if end == start:
            return start
        reservation = connection.reserve(path[: end * KEY_BYTES], ANSWER_S)
        first = reservation.have
        if first < start:
            connection.abandon(reservation)  # a flush has taken what lay above
            return start
        size = connection.geometry.page_bytes
        for page, offset in zip(pages[first - start :], reservation.offsets, strict=False):
            connection.arena.buffer[offset : offset + size] = page
        connection.publish(reservation)
        self._counters.count("fetched", len(reservation.pages))
        # Its answer comes after the publication, and keeps what was brought until all is.
        lease = connection.lookup(path[: end * KEY_BYTES], start, ANSWER_S, is_use=False)
        if lease is None:
            return start
        held.append(lease)
        return start + len(lease.pages)
