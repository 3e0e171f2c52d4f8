"""What only the end of a prefix needs: the pages of a sliding window, or the one page of a state,
found by their own keys.

Layers with a window read the newest tokens only, and a state (Mamba, linear attention) is that of
one place: of a prompt of any length only what its end needs is kept, and at other places where some
request ended or was cut. They are no tree, as their parents are not there: host memory has them as
single pages.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.arena import ArenaMappings
from smg_sglang.memory.client import Lease, MemoryConnection, Places
from smg_sglang.memory.namespace import Namespace
from smg_sglang.tier.connections import BACKGROUND_TIMEOUT_S, Connections
from smg_sglang.tier.found import FoundLeases
from smg_sglang.transfer.mover import BeforeCopy, Mover
from smg_sglang.transfer.spills import SpillQueue, SpillTarget
from smg_sglang.tree.page_keys import KEY_BYTES

logger = logging.getLogger(__name__)

_Written = tuple[MemoryConnection, Places]


class Trail:
    """The window layers of one worker, or those with states. Scheduler thread only.

    Attributes:
        pool: which of the joint mover's pools these layers are.
        kind: `window` or `state`.
        window: pages before the end of a prefix that they need.
        found: what was found for requests that wait.
        spills: pages on their way to host memory, by their keys.
    """

    def __init__(
        self,
        mover: Mover,
        namespace: Namespace,
        address: str,
        mappings: ArenaMappings,
        *,
        pool: int,
        kind: str,
        window: int,
        timeout_s: float,
        before_copy: BeforeCopy | None = None,
    ) -> None:
        """
        Args:
            namespace: of these layers' pages.
        """
        self.pool = pool
        self.kind = kind
        self.window = window
        self.mover = mover
        self.connections = Connections(address, namespace, timeout_s, mappings)
        self._timeout_s = timeout_s
        self.found: FoundLeases[Lease] = FoundLeases(self.connections.release, 1 << 30)
        # Without a limit of its own: the slots are locked together with those of the other layers.
        self.spills: SpillQueue[bytes, _Written] = SpillQueue(
            mover,
            reserve=self._reserve,
            publish=lambda written: written[0].publish(written[1]),
            abandon=lambda written: written[0].abandon(written[1]),
            before_copy=before_copy,
        )

    def find(self, rid: str, path: bytes) -> int:
        """The most pages of `path` that a hit may have as far as these layers know; the last
        `window` of these are leased for `rid`, in place of what was before.

        Args:
            path: page keys of what the device lacks, all of which the other layers have.
        """
        question = (0, len(path) // KEY_BYTES, path[-KEY_BYTES:])
        found = self.found.get(rid, question)
        if found is None:
            self.found.put(rid, question, self._lookup(path))
            found = self.found.get(rid, question)
        lease = None if found is None else found.lease
        return 0 if lease is None else lease.start + len(lease.pages)

    def _lookup(self, path: bytes) -> Lease | None:
        connection = self.connections.connection()
        if connection is None or not path:
            return None
        try:
            return connection.lookup_last(path, self.window, self._timeout_s)
        except MemoryUnavailable as error:
            logger.warning("smg: a lookup counts as a miss: %s", error)
            return None

    def spill_now(self, keys: bytes, slots: torch.Tensor) -> None:
        """Copy them before returning; what cannot be is left out, and shortens later hits."""
        connection = self.connections.connection()
        if connection is None or not keys:
            return
        try:
            places = connection.reserve_each(keys, self._timeout_s)
        except MemoryUnavailable as error:
            logger.warning("smg: a window is not kept: %s", error)
            return
        target = _target(connection, places)
        try:
            chosen = target.of(slots, self.mover.layout.page_size)
            move = self.mover.prepare(chosen, target.arena, target.offsets)
            self.mover.spill(move, after=self.mover.fence())
        except Exception:
            logger.exception("smg: a spill failed")
            connection.abandon(places)
        else:
            connection.publish(places)

    def close(self) -> None:
        """End threads and connections."""
        self.found.clear()
        self.spills.close()
        self.connections.close()

    def _reserve(self, keys: bytes) -> SpillTarget[_Written]:
        """Runs on the spill thread."""
        connection = self.connections.background()
        if connection is None:
            raise MemoryUnavailable("the memory server is away")
        return _target(connection, connection.reserve_each(keys, BACKGROUND_TIMEOUT_S))


def _target(connection: MemoryConnection, places: Places) -> SpillTarget[_Written]:
    return SpillTarget(
        handle=(connection, places),
        arena=places.arena.buffer,
        offsets=np.asarray(places.offsets),
        which=places.which,
        missing=places.short,
    )
