"""One worker's view of the host tier: its parts, their common life, and how they are seen.

Everything here is SGLang-free and keyed by request id, path and device slots; the engine's cache
translates SGLang's calls. The promise towards the scheduler: no method waits longer than the lookup
timeout (flush, weights_changed and close: a few seconds), and none raises because of the memory
server: what it cannot give is a miss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import torch

from smg_sglang.config import MAX_WAITING_SHARE, HostDtype, SmgConfig
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.arena import Arena
from smg_sglang.memory.client import Lease, MemoryConnection
from smg_sglang.memory.namespace import Namespace
from smg_sglang.metrics import (
    DROP_REASONS,
    HIT_TIERS,
    LOOKUP_RESULTS,
    Reading,
    TierCounters,
    with_zeros,
)
from smg_sglang.tier.connections import BACKGROUND_TIMEOUT_S, Connections
from smg_sglang.tier.ends import EndLayers
from smg_sglang.tier.found import MAX_HELD, FoundLeases
from smg_sglang.tier.hint_actions import KINDS
from smg_sglang.tier.hints import OUTCOMES, HostHints
from smg_sglang.tier.host_pages import HostPages
from smg_sglang.tier.load_backs import LoadBacks, Part
from smg_sglang.tier.lookups import Lookups
from smg_sglang.tier.ranks import ALONE, Ranks
from smg_sglang.tier.spills import Spills
from smg_sglang.tier.stored import Stored, stored_reading
from smg_sglang.tier.trail import Trail
from smg_sglang.transfer.copy_rates import measure_copies
from smg_sglang.transfer.joint import JointMover
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.layout import DevicePool, PageLayout
from smg_sglang.transfer.mover import BeforeCopy, Mover
from smg_sglang.transfer.movers import make_mover
from smg_sglang.transfer.pinning import ArenaPins
from smg_sglang.tree.page_keys import KEY_BYTES
from smg_sglang.tree.waits import Waits

#: Label values of `smg:hints` that are there from the start.
HINTS = tuple(f"{kind} {outcome}" for kind in KINDS for outcome in OUTCOMES)


class HostTier:
    """Find prefixes in host memory, load them into device slots, spill device slots.

    All public methods are for the scheduler thread, but `read_metrics` (the metrics thread).

    Attributes:
        lookups: what host memory has beyond the device.
        load_backs: host pages on their way into device slots.
        spills: device pages on their way to host memory.
        pages: host pages that are held while they are attended.
        ahead: loads that no forward waits for; None without `--smg-prefetch`.
        stored: what lies in storage; None where the memory server has none.
        hints: what host memory was told of prefixes.
        waits: requests that wait for a prefix that others compute.
    """

    def __init__(
        self,
        config: SmgConfig,
        address: str,
        namespace: Namespace,
        pool: DevicePool,
        *,
        layers: Sequence[int] = (),
        ends: Sequence[EndLayers] = (),
        ranks: Ranks = ALONE,
        forward_streams: Sequence[object] = (),
        before_copy: BeforeCopy | None = None,
    ) -> None:
        """
        Args:
            address: directory of the memory server's sockets.
            layers: the model's numbers of the pool's layers, where others have a pool of their own:
                `ends`.
            forward_streams: CUDA streams whose work loads must come after.
            before_copy: test hook, called before each copy.
        """
        self.config = config
        self.counters = TierCounters()
        self._timeout_s = config.lookup_timeout_ms / 1000
        self.waits = Waits(config.wait_steps)
        self.hints = HostHints(self._connection, self._timeout_s, here=ranks.writes)
        self.device, self.before_copy = pool.device, before_copy
        self._ranks = ranks
        self._arena: Arena | None = None
        self._host_pages = 0
        self.connections = Connections(address, namespace, self._timeout_s)
        self.stored = None if ends else Stored.of(self.connections, config)
        self.trails: list[Trail] = []
        # Memory can be page-locked once only, and the streams' ring copies the same arenas.
        self.pins = ArenaPins()
        # Before the first request, when nothing else is copied.
        self._copies = measure_copies(pool) if pool.device.type == "cuda" else None
        narrow = config.host_dtype is HostDtype.FP8
        mover = partial(make_mover, order_after=forward_streams, pins=self.pins, narrow=narrow)
        self._mover = mover(pool)
        self.layout = self._mover.layout
        self._make_trails(mover, ends)
        movers = [self._mover, *(trail.mover for trail in self.trails)]
        numbers = [layers, *(end.layers for end in ends)]
        self._make_parts(JointMover(movers, numbers) if ends else self._mover)
        self.ahead: LayerLoads | None = None
        if config.prefetch:
            # A mover is one loading thread's; the loads that a forward waits for have the first.
            self._ahead_mover = mover(pool)
            self.ahead = LayerLoads(self._ahead_mover, before_copy, paced=True)

    def _make_trails(self, mover: Any, ends: Sequence[EndLayers]) -> None:
        full = self.connections.namespace
        for number, end in enumerate(ends, 1):
            # A rounded state would be a wrong one at every token that comes after it.
            exact: dict[str, Any] = {"narrow": False} if end.kind == "state" else {}
            end_mover = mover(end.pool, beside=self._mover, **exact)
            layout = end_mover.layout
            mine = msgspec.structs.replace(
                full, layout=f"{end.kind}:{layout.describe()}", page_bytes=layout.page_bytes
            )
            if end.kind == "state":  # each rank has its own, also where KV is alike
                mine = msgspec.structs.replace(
                    mine, dtype="state", tp_rank=self._ranks.rank, tp_size=self._ranks.size
                )
            trail = Trail(
                end_mover,
                mine,
                self.connections.address,
                self.connections.mappings,
                pool=number,
                kind=end.kind,
                window=end.pages,
                timeout_s=self._timeout_s,
                before_copy=self.before_copy,
            )
            self.trails.append(trail)

    def _make_parts(self, loader: Mover) -> None:
        one_rank, before_copy = self._ranks.size == 1, self.before_copy
        pool_pages = self._mover.pool.num_slots // self.layout.page_size
        self._found: FoundLeases[Lease] = FoundLeases(
            self.release, MAX_HELD if one_rank else 1 << 30
        )
        self.lookups = Lookups(self._connection, self._found, self.counters, self._timeout_s)
        self.load_backs = LoadBacks(
            LayerLoads(loader, before_copy),
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
            writes=self._ranks.writes,
            max_waiting_pages=max(1, int(pool_pages * MAX_WAITING_SHARE)),
            trails=self.trails,
            before_copy=before_copy,
            published=self._published,
        )

    def _published(self, connection: MemoryConnection, path: bytes) -> None:
        behind = connection is self.connections.background()
        timeout_s = BACKGROUND_TIMEOUT_S if behind else self._timeout_s
        self.hints.published(connection, path, timeout_s)
        if self.stored is not None:
            self.stored.offer(connection, path, timeout_s)

    def release(self, lease: Lease) -> None:
        """End a lease that the caller holds, whichever layers' it is."""
        for connections in self._all_connections:
            connections.release(lease)

    @property
    def _all_connections(self) -> list[Connections]:
        return [self.connections, *(trail.connections for trail in self.trails)]

    def fitting(self, rid: str, tail: bytes, pages: int) -> int:
        """How many pages a hit may have, at most `pages` of a path's tail that the other layers
        have: as far as all layers with windows, and states, have their end of it. Leased for
        `rid`."""
        while pages:
            path = tail[: pages * KEY_BYTES]
            least = min((trail.find(rid, path) for trail in self.trails), default=pages)
            if least == pages:
                break
            pages = least
        return pages

    def load(self, rid: str, slots: torch.Tensor, ends: Mapping[int, torch.Tensor]) -> bool:
        """Queue the load of what was found; False where it must be computed.

        Args:
            slots, ends: device slots of the first pages found, and by pool those of the layers
                with windows or states, of the last of these.
        """
        parts = [
            Part(trail.found.take(rid), ends[trail.pool], trail.mover.layout.page_size, trail.pool)
            for trail in self.trails
        ]
        stored = self.stored.tokens_of(rid) if self.stored is not None else 0
        return self.load_backs.load(rid, slots, parts, stored)

    def forget(self, rid: str) -> None:
        """The request needs nothing of what was found for it, and waits for nothing; idempotent."""
        self.waits.forget(rid)
        self.lookups.forget(rid)
        for trail in self.trails:
            trail.found.forget(rid)
        if self.stored is not None:
            self.stored.forget(rid)

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
            copies = self.load_backs.num_leases or self.spills.waiting_slots
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
        self.hints.clear()
        while self.spills.num_completed():
            self.spills.pop_completed()
        for connections in self._all_connections:
            connections.flush()

    def weights_changed(self, model: str) -> None:
        """From now on pages are those of `model`, a name that only the ranks of this worker know.

        Completed spills stay to be popped: their nodes are locked until then. What requests still
        read of the former weights stays theirs until they end.
        """
        self._quiesce()
        self.hints.clear()
        for connections in self._all_connections:
            connections.weights_changed(model)
        if self.stored is not None:
            # Nobody will ever look for pages of the new weights under the name they have here.
            self.stored.close()
        self._close_retired()

    def _quiesce(self) -> None:
        self._found.clear()
        for trail in self.trails:
            trail.found.clear()
        self.load_backs.finish_all()
        self.spills.drain()

    def _close_retired(self) -> None:
        if not self.pages.num_held:
            for connections in self._all_connections:
                connections.close_retired()

    def host_tokens(self) -> int:
        """Tokens whose KV, of all ranks, host memory can hold if it held nothing else."""
        connection = self._connection()
        if connection is not None:
            self._close_retired()
            geometry, arena = connection.geometry, connection.arena
            slabs = arena.nbytes // geometry.slab_bytes // self._ranks.shards
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
        for trail in self.trails:
            trail.close()
        if self.stored is not None:
            self.stored.close()
        self.connections.close()
        for mover in (self._mover, *(trail.mover for trail in self.trails)):
            mover.close()
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
            "storage": None if self.stored is None else self.stored.state(),
            "leases_held": self._num_leases,
            "spills_waiting": self.spills.waiting_slots,
            "layers": self._layer_kinds(),
            "hints": {"waiting": len(self.hints), **self.hints.outcomes.copy()},
            **self.counters.snapshot(),
            "dropped_pages": dict(self.spills.dropped_pages()),
        }

    @property
    def _num_leases(self) -> int:
        found = [self._found, *(trail.found for trail in self.trails)]
        return sum(each.num_leases for each in found) + self.load_backs.num_leases

    def _layer_kinds(self) -> dict[str, Any]:
        """By kind: how many layers, and the bytes of host memory that a token of theirs takes."""
        page = self.layout.page_size
        kinds: dict[str, Any] = {}
        for kind, layout in self._kinds():
            kinds[kind] = {
                "layers": layout.num_layers, "bytes_a_token": layout.page_bytes // page
            }  # fmt: skip
        for trail in self.trails:
            if trail.kind == "state":
                # One for all the tokens before it.
                del kinds["state"]["bytes_a_token"]
                kinds["state"]["bytes_a_checkpoint"] = trail.mover.layout.page_bytes
            else:
                kinds["window"]["window_tokens"] = trail.window * page
        return kinds

    def _kinds(self) -> list[tuple[str, PageLayout]]:
        return [("full", self.layout), *((t.kind, t.mover.layout) for t in self.trails)]

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
        spills = [self.spills.queue.counters, self.pages.counters]
        spills += [trail.spills.counters for trail in self.trails]
        loading = (self.load_backs.loads, self.ahead)
        loads = [each.counters for each in loading if each is not None]
        reading: dict[str, Any] = {
            "smg:hit_tokens": with_zeros(HIT_TIERS, self.counters.hit_tokens),
            "smg:prompt_tokens": self.counters.prompt_tokens,
            "smg:prefetched_tokens": self.counters.prefetched_tokens,
            "smg:waited_requests": self.waits.requests,
            "smg:waited_steps": self.waits.steps,
            "smg:wait_saved_tokens": self.waits.saved_tokens,
            "smg:lookups": with_zeros(LOOKUP_RESULTS, self.counters.lookups),
            "smg:hints": with_zeros(HINTS, self.hints.outcomes.copy()),
            "smg:dropped_pages": with_zeros(DROP_REASONS, self.spills.dropped_pages()),
            "smg:waiting_spill_slots": self.spills.waiting_slots,
            "smg:spilled_bytes": sum(counters.bytes for counters in spills),
            "smg:spill_seconds": sum(counters.seconds for counters in spills),
            "smg:loaded_bytes": sum(counters.bytes for counters in loads),
            "smg:load_seconds": sum(counters.seconds for counters in loads),
            "smg:load_wait_seconds": self.load_backs.loads.counter.blocked_seconds,
            "smg:failed_loads": sum(counters.failed for counters in loads),
            **stored_reading(self.stored),
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
            "smg:retained_pages": stats.pages_retained,
            "smg:host_bytes": stats.arena_bytes,
            "smg:leases": stats.leases,
            "smg:evicted_pages": stats.total.pages_evicted,
            "smg:short_pages": stats.total.pages_short,
            "smg:quarantined_pages": stats.quarantined_pages,
            "smg:refused_messages": {
                "malformed": stats.malformed,
                "stray": stats.strays,
                "connection": stats.refused,
            },
        }
