"""The storage process's connections to the memory server, a namespace each."""

import time
from collections.abc import Callable

from smg_sglang.memory.arena import ArenaMappings
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.namespace import Namespace

#: For answers of the memory server; no request of a user waits for them.
ANSWER_S = 2.0
#: A connection that is not used for so long is closed: a namespace that nobody else is connected to
#: is to count as deserted.
IDLE_S = 30.0


class Host:
    """For one thread: connections are opened when they are needed, and closed when they are not."""

    def __init__(
        self, address: str, mappings: ArenaMappings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = address
        self._mappings = mappings
        self._clock = clock
        self._connections: dict[Namespace, tuple[MemoryConnection, float]] = {}

    def connection(self, namespace: Namespace) -> MemoryConnection:
        """Raises MemoryUnavailable."""
        found, _ = self._connections.get(namespace, (None, 0.0))
        if found is None or not found.alive:
            if found is not None:
                found.close()
                del self._connections[namespace]
            found = MemoryConnection.open(self._address, namespace, ANSWER_S, self._mappings)
        self._connections[namespace] = (found, self._clock())
        return found

    def close_idle(self, idle_s: float = IDLE_S) -> None:
        """Close what was not used for so long."""
        now = self._clock()
        for namespace, (connection, used_at) in list(self._connections.items()):
            if now - used_at >= idle_s:
                connection.close()
                del self._connections[namespace]
