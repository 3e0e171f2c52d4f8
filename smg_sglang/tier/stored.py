"""One worker's view of the storage tier: a prefix that storage has is brought to host memory while
its request waits; then it is a host hit like any other."""

from __future__ import annotations

from typing import Any

from smg_sglang.config import SmgConfig
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.metrics import Reading, with_zeros
from smg_sglang.storage.client import StorageClient, ask_counters, has_storage
from smg_sglang.storage.protocol import EVENTS, Counters
from smg_sglang.tier.connections import BACKGROUND_TIMEOUT_S, Connections


class Stored:
    """Scheduler thread only, but `offer` (the spill thread's, too) and `counters`. None raises."""

    def __init__(self, client: StorageClient, address: str, page_size: int) -> None:
        """Use `of`."""
        self._client = client
        self._address = address
        self._page_size = page_size
        self._taken_in: set[str] = set()

    @classmethod
    def of(cls, connections: Connections, config: SmgConfig) -> Stored | None:
        """That of the memory server which is connected to; None where it has no storage."""
        if not has_storage(connections.address):
            return None
        namespace = connections.namespace
        client = StorageClient(
            connections.address,
            namespace,
            wait_s=config.storage_wait_ms / 1000,
            word_s=config.lookup_timeout_ms / 1000,
        )
        return cls(client, connections.address, namespace.page_size)

    def waits(self, rid: str, path: bytes, have: int) -> bool:
        """Whether the request should go on waiting for storage, which is asked when this is first
        called for it.

        Args:
            path: page keys of the whole prompt from the root.
            have: pages of it that device and host memory have.
        """
        return not self._client.fetch(rid, path, have).done

    def bring(self, rid: str, path: bytes, have: int) -> None:
        """Ask storage for what host memory lacks of `path`, though no request waits for it."""
        self._client.fetch(rid, path, have)

    def brought(self, rid: str) -> bool:
        """Whether no more comes of what `bring` asked for."""
        self._client.poll()
        fetch = self._client.fetched(rid)
        return fetch is None or fetch.done

    def has_come(self, rid: str) -> bool:
        """True once, when the request's fetch has ended with pages in host memory: it is to look
        for them."""
        self._client.poll()
        fetch = self._client.fetched(rid)
        if fetch is None or not fetch.done or fetch.end <= fetch.start or rid in self._taken_in:
            return False
        self._taken_in.add(rid)
        return True

    def span(self, rid: str) -> tuple[int, int]:
        """(first, tokens): which tokens of its prompt storage has brought for the request."""
        fetch = self._client.fetched(rid)
        if fetch is None:
            return 0, 0
        return fetch.start * self._page_size, (fetch.end - fetch.start) * self._page_size

    def tokens_of(self, rid: str) -> int:
        """How many tokens storage has brought for the request."""
        return self.span(rid)[1]

    def forget(self, rid: str) -> None:
        """The request waits no more; idempotent."""
        self._client.forget(rid)
        self._taken_in.discard(rid)

    def offer(self, connection: MemoryConnection, path: bytes, timeout_s: float) -> None:
        """`path` was published on this connection. Waits so long at most."""
        try:
            # The storage process asks the memory server, which is to know of it by then.
            connection.ping(timeout_s)
        except MemoryUnavailable:
            return
        self._client.offer(path)

    def counters(self) -> Counters | None:
        """What the storage process has counted; None where it does not answer. Waits."""
        return ask_counters(self._address, BACKGROUND_TIMEOUT_S / 4)

    @property
    def late(self) -> int:
        """Requests that would not wait longer."""
        return self._client.late

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows."""
        counters = self.counters()
        pages = None if counters is None else with_zeros(EVENTS, counters.pages)
        return {"connected": counters is not None, "late_fetches": self.late, "pages": pages}

    def close(self) -> None:
        """Nothing is asked or offered any more; idempotent."""
        self._client.close()


def stored_reading(stored: Stored | None) -> Reading:
    """Current values of the series of storage, zeros where there is none. Metrics thread; waits."""
    counters = stored.counters() if stored is not None else None
    known = counters or Counters()
    return {
        "smg:storage_connected": 0 if counters is None else 1,
        "smg:stored_pages": with_zeros(EVENTS, known.pages),
        "smg:storage_failures": known.failures,
        "smg:storage_seconds": {"read": known.read_seconds, "write": known.write_seconds},
        "smg:storage_bytes": {"read": known.read_bytes, "write": known.written_bytes},
        "smg:late_fetches": 0 if stored is None else stored.late,
    }
