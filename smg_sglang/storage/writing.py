"""From host memory to storage: written ahead of eviction, as soon as pages are published.

So eviction never waits for storage, and a crash loses little. A page is leased only while its bytes
are copied to staging memory; no lease is held while the backend writes.
"""

import time
from collections import OrderedDict

import numpy as np

from smg_sglang.memory.client import Lease, MemoryConnection
from smg_sglang.memory.namespace import Namespace
from smg_sglang.storage.backend import Backend
from smg_sglang.storage.host import ANSWER_S, Host
from smg_sglang.storage.lane import Lane, StorageUnavailable
from smg_sglang.storage.protocol import Counters
from smg_sglang.storage.sealed import object_names, object_suffix, seal
from smg_sglang.storage.staging import Staging
from smg_sglang.tree.page_keys import KEY_BYTES

_MOST_KNOWN = 1 << 20


class Known:
    """The objects that were written or found lately: they are not offered to the backend again.

    Only a hint. What the backend has evicted meanwhile is told by `forget`, when it was missed.
    One call into C each: any thread.
    """

    def __init__(self, most: int = _MOST_KNOWN) -> None:
        self._most = most
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """The backend has it."""
        self._names[name] = None
        if len(self._names) > self._most:
            self._names.popitem(last=False)

    def forget(self, name: str) -> None:
        """The backend lacks it."""
        self._names.pop(name, None)


class Writer:
    """For one thread."""

    def __init__(
        self, backend: Backend, lane: Lane, host: Host, counters: Counters, known: Known
    ) -> None:
        self._backend = backend
        self._lane = lane
        self._host = host
        self._counters = counters
        self._known = known
        self._staging = Staging()

    def write(self, namespace: Namespace, path: bytes) -> None:
        """Write what storage lacks of a path. Raises MemoryUnavailable and StorageUnavailable,
        with the pages that were not written counted."""
        names = object_names(path, object_suffix(namespace))
        batch = self._staging.batch(namespace.page_bytes)
        start = next((i for i, name in enumerate(names) if name not in self._known), len(names))
        while start < len(names):
            end = min(len(names), start + batch)
            try:
                kept = self._write_batch(namespace, path, names[start:end], start, end)
            except Exception:
                self._counters.count("unavailable", len(names) - start)
                raise
            if not kept:
                self._counters.count("evicted", len(names) - start)
                return
            start += kept

    def _write_batch(
        self, namespace: Namespace, path: bytes, names: list[str], start: int, end: int
    ) -> int:
        """How many pages from `start` on are done with; 0 where host memory has lost them."""
        if not self._lane.is_open:
            # A call that is late still reads the staging memory.
            raise StorageUnavailable("storage is given a pause")
        connection = self._host.connection(namespace)
        lease = connection.lookup(path[: end * KEY_BYTES], start, ANSWER_S, is_use=False)
        if lease is None:
            return 0
        try:
            rows = self._copy(connection, lease, names)
        finally:
            connection.release(lease)
        self._put(names[: len(rows)], rows)
        return len(rows)

    def _copy(self, connection: MemoryConnection, lease: Lease, names: list[str]) -> np.ndarray:
        size = connection.geometry.page_bytes
        rows = self._staging.rows(len(lease.pages), size)
        for name, offset, row in zip(names, lease.offsets, rows, strict=False):
            seal(name, lease.arena.buffer[offset : offset + size], row)
        return rows

    def _put(self, names: list[str], rows: np.ndarray) -> None:
        began = time.perf_counter()
        # Deepest first, as in `reading`.
        done = self._lane.call(lambda: self._backend.put(names[::-1], rows[::-1]))[::-1]
        self._counters.write_seconds += time.perf_counter() - began
        for name, is_kept in zip(names, done, strict=True):
            if is_kept:
                self._known.add(name)
        self._counters.count("written", sum(done))
        self._counters.written_bytes += rows.shape[1] * sum(done)
        if not all(done):
            self._counters.count("refused", len(done) - sum(done))
            self._lane.failed()
