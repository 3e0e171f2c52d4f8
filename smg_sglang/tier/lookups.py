"""What host memory has beyond the device, asked for requests that wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.client import Lease, MemoryConnection
from smg_sglang.metrics import TierCounters
from smg_sglang.tier.found import FoundLeases
from smg_sglang.tree.page_keys import KEY_BYTES

logger = logging.getLogger(__name__)


class Lookups:
    """Scheduler thread only. No call waits longer than the lookup timeout, none raises: what the
    memory server cannot tell in time is a miss.

    Attributes:
        observe: told how many seconds each question took.
    """

    def __init__(
        self,
        connection: Callable[[], MemoryConnection | None],
        found: FoundLeases[Lease],
        counters: TierCounters,
        timeout_s: float,
    ) -> None:
        """
        Args:
            connection: the scheduler's, or None while the server is away.
            found: where what was found for a request is kept until it is loaded or forgotten.
        """
        self.observe: Callable[[float], None] = lambda seconds: None
        self._connection = connection
        self._found = found
        self._counters = counters
        self._timeout_s = timeout_s

    def find(self, rid: str, path: bytes, start: int) -> int:
        """How many pages of `path[start:]` host memory has; they are leased for `rid`.

        Args:
            path: page keys of the whole prompt from the root, 16 bytes each.
            start: pages of it that the device has.
        """
        question = (start, len(path) // KEY_BYTES, path[-KEY_BYTES:])
        found = self._found.get(rid, question)
        if found is not None:
            return len(found.lease.pages) if found.lease is not None else 0
        lease = self.lookup(path, start)
        self._found.put(rid, question, lease)
        return len(lease.pages) if lease is not None else 0

    def touch(self, rid: str, path: bytes) -> None:
        """All of the prompt is on the device: keep the host's copy as young as the device's."""
        question = (len(path) // KEY_BYTES, len(path) // KEY_BYTES, path[-KEY_BYTES:])
        if not path or self._found.get(rid, question) is not None:
            return
        self._found.put(rid, question, None)
        connection = self._connection()
        if connection is not None:
            connection.touch(path)

    def lookup(self, path: bytes, start: int) -> Lease | None:
        """A lease on what host memory has of `path[start:]`, for the caller to release; None for
        a miss. `find` is for requests that are about to be admitted: it keeps the lease."""
        connection = self._connection()
        if connection is None:
            self._counters.lookups["unavailable"] += 1
            return None
        began = time.perf_counter()
        try:
            lease = connection.lookup(path, start, self._timeout_s)
        except MemoryUnavailable as error:
            self._counters.lookups["unavailable"] += 1
            logger.warning("smg: a lookup counts as a miss: %s", error)
            return None
        finally:
            self.observe(time.perf_counter() - began)
        self._counters.lookups["miss" if lease is None else "hit"] += 1
        return lease

    def forget(self, rid: str) -> None:
        """The request needs nothing of what was found for it; idempotent."""
        self._found.forget(rid)
