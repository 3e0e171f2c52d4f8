"""A worker's two connections to one namespace of the memory server, and those before them."""

from __future__ import annotations

import msgspec

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.arena import ArenaMappings
from smg_sglang.memory.client import Lease, MemoryConnection
from smg_sglang.memory.link import MemoryLink
from smg_sglang.memory.namespace import Namespace

#: Waits of the spill thread and of metrics, where no request is waiting.
BACKGROUND_TIMEOUT_S = 2.0


def _keep_silent(level: int, text: str) -> None:
    """The other link of the pair says it."""


class _Pair:
    """The scheduler's link never waits behind the spill thread's, and tells for both."""

    def __init__(self, address: str, namespace: Namespace, mappings: ArenaMappings) -> None:
        self.scheduler = MemoryLink(address, namespace, mappings=mappings)
        self.background = MemoryLink(address, namespace, mappings=mappings, tell=_keep_silent)

    def close(self) -> None:
        self.scheduler.close()
        self.background.close()


class Connections:
    """Scheduler thread only, but `background` (the spill and the metrics thread).

    After a change of weights pages are another model's, which nobody else has computed: a
    namespace of this worker's own. The former connections stay as long as requests hold pages of
    theirs.
    """

    def __init__(
        self,
        address: str,
        namespace: Namespace,
        timeout_s: float,
        mappings: ArenaMappings | None = None,
    ) -> None:
        self.address = address
        self.namespace = namespace
        self._timeout_s = timeout_s
        self.mappings = mappings or ArenaMappings()
        self._pair = _Pair(address, namespace, self.mappings)
        self._retired: list[_Pair] = []
        self._private = False
        self._flush_owed = False

    def connection(self) -> MemoryConnection | None:
        """The scheduler's, or None while the server is away, slow, or owes us a flush."""
        connection = self._pair.scheduler.connection()
        if connection is None or connection.stalled:
            return None
        if self._flush_owed:
            try:
                connection.flush(self._timeout_s)
            except MemoryUnavailable:
                return None
            self._flush_owed = False
        return connection

    def background(self) -> MemoryConnection | None:
        """The one that may wait; None while the server is away."""
        return self._pair.background.connection()

    @property
    def answers(self) -> bool:
        """Whether the memory server was there and in time the last time it was asked."""
        connection = self._pair.scheduler.connection()
        return connection is not None and not connection.stalled

    def release(self, lease: Lease) -> None:
        """End a lease that the caller holds. A request that attends host memory may hold it longer
        than the weights stay: then it is a former connection's."""
        for pair in (self._pair, *self._retired):
            connection = pair.scheduler.connection()
            if connection is not None:
                connection.release(lease)

    def flush(self) -> None:
        """Empty the namespace. Until the server has answered, `connection` is None."""
        self._flush_owed = True
        self.connection()

    def weights_changed(self, model: str) -> None:
        """Take the namespace of `model`, which nobody else knows."""
        if self._private:
            # Nobody will ever find the pages of the former update again.
            self.flush()
        self.namespace = msgspec.structs.replace(self.namespace, model=model)
        self._retired.append(self._pair)
        self._pair = _Pair(self.address, self.namespace, self.mappings)
        self._private, self._flush_owed = True, False

    def close_retired(self) -> None:
        """Nobody holds pages of former namespaces any more."""
        while self._retired:
            self._retired.pop().close()

    def close(self) -> None:
        self.close_retired()
        self._pair.close()
