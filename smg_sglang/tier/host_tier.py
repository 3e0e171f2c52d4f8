"""One worker's view of the host tier: its parts, their common life, and how they are seen.

Everything here is SGLang-free and keyed by request id, path and device slots; the engine's cache
translates SGLang's calls. The promise towards the scheduler: no method waits longer than the lookup
timeout (flush, weights_changed and close: a few seconds), and none raises because of the memory
server: what it cannot give is a miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from smg_sglang.config import MAX_WAITING_SHARE, SmgConfig
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.arena import Arena
from smg_sglang.memory.client import Lease, MemoryConnection
from smg_sglang.memory.namespace import Namespace
from smg_sglang.metrics import Reading, TierCounters
from smg_sglang.tier.connections import Connections
from smg_sglang.tier.found import MAX_HELD, FoundLeases
from smg_sglang.tier.host_pages import HostPages
from smg_sglang.tier.load_backs import LoadBacks
from smg_sglang.tier.lookups import Lookups
from smg_sglang.tier.spills import BACKGROUND_TIMEOUT_S, Spills
from smg_sglang.transfer.copy_rates import measure_copies
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import BeforeCopy
from smg_sglang.transfer.movers import make_mover
from smg_sglang.transfer.pinning import ArenaPins


class HostTier:
    """Find prefixes in host memory, load them into device slots, spill device slots.

    All public methods are for the scheduler thread, but `read_metrics` (the metrics thread).

    Attributes:
        lookups: what host memory has beyond the device.
        load_backs: host pages on their way into device slots.
        spills: device pages on their way to host memory.
        pages: host pages that are held while they are attended.
        ahead: loads that no forward waits for; None without `--smg-prefetch`.
    """

    def __init__(
        self,
        config: SmgConfig,
        address: str,
        namespace: Namespace,
        pool: DevicePool,
        *,
        forward_streams: Sequence[object] = (),
        before_copy: BeforeCopy | None = None,
    ) -> None:
        """
        Args:
            address: directory of the memory server's sockets.
            forward_streams: CUDA streams whose work loads must come after.
            before_copy: test hook, called before each copy.
        """
        self.config = config
        self.counters = TierCounters()
        self.layout, self.device, self.before_copy = pool.layout, pool.device, before_copy
        self._ranks = namespace.tp_size
        self._timeout_s = config.lookup_timeout_ms / 1000
        self._arena: Arena | None = None
        self._host_pages = 0
        self.connections = Connections(address, namespace, self._timeout_s)
        self.release = self.connections.release
        # Memory can be page-locked once only, and the streams' ring copies the same arenas.
        self.pins = ArenaPins()
        # Before the first request, when nothing else is copied.
        self._copies = measure_copies(pool) if pool.device.type == "cuda" else None
        self._make_parts(
            partial(make_mover, pool, order_after=forward_streams, pins=self.pins),
            pool_pages=pool.num_slots // pool.layout.page_size,
        )

    def _make_parts(self, mover: Any, pool_pages: int) -> None:
        one_rank, before_copy = self._ranks == 1, self.before_copy
        self._mover = mover()
        self._found: FoundLeases[Lease] = FoundLeases(
            self.release, MAX_HELD if one_rank else 1 << 30
        )
        self.lookups = Lookups(self._connection, self._found, self.counters, self._timeout_s)
        self.load_backs = LoadBacks(
            LayerLoads(self._mover, before_copy),
            self._found,
            self.release,
            self.counters,
            page_size=self.layout.page_size,
            one_rank=one_rank,
        )
        self.pages = HostPages(
            self._connection,
            self.release,
            self._mover,
            timeout_s=self._timeout_s,
            ranks=self._ranks,
            before_copy=before_copy,
        )
        self.spills = Spills(
            self._mover,
            self.pages,
            self.connections.background,
            self.counters,
            max_waiting_pages=max(1, int(pool_pages * MAX_WAITING_SHARE)),
            before_copy=before_copy,
        )
        self.ahead: LayerLoads | None = None
        if self.config.prefetch:
            # A mover is one loading thread's; the loads that a forward waits for have the first.
            self._ahead_mover = mover()
            self.ahead = LayerLoads(self._ahead_mover, before_copy, paced=True)

    def _connection(self) -> MemoryConnection | None:
        """The scheduler's connection, or None while the server is away, slow, or owes a flush."""
        connection = self.connections.connection()
        if connection is not None:
            self._unpin_former_arena(connection.arena)
        return connection

    def _unpin_former_arena(self, arena: Arena) -> None:
        """Give back the memory of a server that died, once no copy can touch it any more."""
        if arena is self._arena:
            return
        if self._arena is not None:
            copies = self.load_backs.num_leases or self.spills.queue.waiting_slots
            if copies or self.pages.num_held:
                return
            if self.ahead is not None and self.ahead.counter.events:
                return
            self._mover.unpin(self._arena.buffer)
        self._arena = arena

    # ---- lifecycle ----

    def flush(self) -> None:
        """Empty the host level of this namespace, after all transfers have ended.

        Where the server does not answer, nothing is looked up until it has been told.
        """
        self._quiesce()
        while self.spills.queue.num_completed():
            self.spills.queue.pop_completed()
        self.connections.flush()

    def weights_changed(self) -> None:
        """From now on pages are another model's: nobody else has computed them.

        Completed spills stay to be popped: their nodes are locked until then. What requests still
        read of the former weights stays theirs until they end.
        """
        self._quiesce()
        self.connections.weights_changed()
        self._close_retired()

    def _quiesce(self) -> None:
        self._found.clear()
        self.load_backs.finish_all()
        self.spills.queue.drain()

    def _close_retired(self) -> None:
        if not self.pages.num_held:
            self.connections.close_retired()

    def host_tokens(self) -> int:
        """Tokens whose KV, of all ranks, host memory can hold if it held nothing else."""
        connection = self._connection()
        if connection is not None:
            self._close_retired()
            geometry, arena = connection.geometry, connection.arena
            slabs = arena.nbytes // geometry.slab_bytes // self._ranks
            self._host_pages = slabs * geometry.pages_per_slab
        return self._host_pages * self.layout.page_size

    def close(self) -> None:
        """End all threads and connections."""
        self._found.clear()
        self.load_backs.loads.close()
        if self.ahead is not None:
            self.ahead.close()
            self._ahead_mover.close()
        self.spills.queue.close()
        self.connections.close()
        self._mover.close()
        self.pins.close()

    # ---- to be seen ----

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows. Waits for the memory server no longer than a lookup."""
        connection = self._connection()
        return {
            "config": self.config.to_builtins(),
            "namespace": msgspec.to_builtins(self.connections.namespace),
            "memory_address": self.connections.address,
            "memory_connected": connection is not None,
            "memory": self._memory_state(connection),
            "copies": None if self._copies is None else self._copies.state(),
            "leases_held": self._found.num_leases + self.load_backs.num_leases,
            "spills_waiting": self.spills.queue.waiting_slots,
            **self.counters.snapshot(),
            "dropped_pages": dict(self.spills.dropped_pages()),
        }

    def _memory_state(self, connection: MemoryConnection | None) -> dict[str, Any] | None:
        if connection is None:
            return None
        try:
            stats = connection.stats(self._timeout_s)
        except MemoryUnavailable:
            return None
        shown = ("epoch", "arena_bytes", "pages_ready", "pages_writing", "leases", "connections")
        return {name: getattr(stats, name) for name in shown}

    def read_metrics(self) -> Reading:
        """Current values of the `smg:` series. Metrics thread; asks the memory server."""
        # Copies on the spill thread, and on the scheduler's: each counts its own.
        spills = (self.spills.queue.counters, self.pages.counters)
        loading = (self.load_backs.loads, self.ahead)
        loads = [each.counters for each in loading if each is not None]
        reading: dict[str, Any] = {
            "smg:hit_tokens": dict(self.counters.hit_tokens),
            "smg:prompt_tokens": self.counters.prompt_tokens,
            "smg:prefetched_tokens": self.counters.prefetched_tokens,
            "smg:lookups": dict(self.counters.lookups),
            "smg:dropped_pages": dict(self.spills.dropped_pages()),
            "smg:spilled_bytes": sum(counters.bytes for counters in spills),
            "smg:spill_seconds": sum(counters.seconds for counters in spills),
            "smg:loaded_bytes": sum(counters.bytes for counters in loads),
            "smg:load_seconds": sum(counters.seconds for counters in loads),
        }
        connection = self.connections.background()
        reading["smg:memory_connected"] = 0 if connection is None else 1
        if connection is None:
            return reading
        try:
            stats = connection.stats(BACKGROUND_TIMEOUT_S)
        except MemoryUnavailable:
            return reading | {"smg:memory_connected": 0}
        return reading | {
            "smg:host_pages": {"ready": stats.pages_ready, "writing": stats.pages_writing},
            "smg:host_bytes": stats.arena_bytes,
            "smg:leases": stats.leases,
            "smg:evicted_pages": stats.total.pages_evicted,
        }
