"""One worker's view of the host tier: find, load back, spill, flush.

Everything here is SGLang-free and keyed by request id, path and device slots; `linker` and `cache`
translate SGLang's calls. The promise towards the scheduler: no method waits longer than the lookup
timeout (flush, weights_changed and close: a few seconds), and none raises because of the memory
server: what it cannot give is a miss.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from smg_sglang.config import MAX_WAITING_SHARE, SmgConfig
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.arena import Arena, ArenaMappings
from smg_sglang.memory.client import Lease, MemoryConnection, Reservation
from smg_sglang.memory.link import MemoryLink
from smg_sglang.memory.namespace import Namespace
from smg_sglang.metrics import Reading, TierCounters
from smg_sglang.tier.found import MAX_HELD, FoundLeases
from smg_sglang.tier.host_pages import CopyFailed, HostPages
from smg_sglang.transfer.copy_measure import choose_copies
from smg_sglang.transfer.layer_counter import LayerCounter
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import BeforeCopy
from smg_sglang.transfer.movers import make_mover
from smg_sglang.transfer.pinning import ArenaPins
from smg_sglang.transfer.spills import Event, SpillQueue, SpillTarget
from smg_sglang.tree.page_keys import KEY_BYTES

logger = logging.getLogger(__name__)

#: Waits of the spill thread and of /flush_cache, where no request is waiting.
BACKGROUND_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class _Written:
    """What a spill hands from its reservation to its publication."""

    connection: MemoryConnection
    reservation: Reservation


class _Links:
    """Two connections to one namespace: the scheduler's never waits behind the spill thread's."""

    def __init__(self, address: str, namespace: Namespace, mappings: ArenaMappings) -> None:
        self.namespace = namespace
        self.lookups = MemoryLink(address, namespace, mappings=mappings)
        self.background = MemoryLink(address, namespace, mappings=mappings)

    def close(self) -> None:
        self.lookups.close()
        self.background.close()


class HostTier:
    """Find prefixes in host memory, load them into device slots, spill device slots.

    All public methods are for the scheduler thread, but `read_metrics` (the metrics thread).

    Attributes:
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
        self.observe_lookup: Callable[[float], None] = lambda seconds: None
        self._address = address
        self._page_size = pool.layout.page_size
        self._timeout_s = config.lookup_timeout_ms / 1000
        self._one_rank = namespace.tp_size == 1
        self._mappings = ArenaMappings()
        self._links = _Links(address, namespace, self._mappings)
        self._private = False
        self._flush_owed = False
        self._arena: Arena | None = None
        self._host_pages = 0
        self._found: FoundLeases[Lease] = FoundLeases(
            self.release, MAX_HELD if self._one_rank else 1 << 30
        )
        self._retired: list[_Links] = []
        # Memory can be page-locked once only, and the streams' ring copies the same arenas.
        self.pins = ArenaPins()
        # Before the first request, when nothing else is copied. A CPU copies in one way only.
        self._copies = choose_copies(pool) if pool.device.type == "cuda" else None
        mover = partial(
            make_mover,
            pool,
            order_after=forward_streams,
            pins=self.pins,
            methods=None if self._copies is None else self._copies.methods,
        )
        self._mover = mover()
        self.layout, self.device, self.before_copy = pool.layout, pool.device, before_copy
        self.pages = HostPages(
            self._connection,
            self.release,
            self._mover,
            timeout_s=self._timeout_s,
            ranks=namespace.tp_size,
            before_copy=before_copy,
        )
        self._loads = LayerLoads(self._mover, before_copy)
        self.ahead: LayerLoads | None = None
        if config.prefetch:
            # A mover is one loading thread's; the loads that a forward waits for have the first.
            self._ahead_mover = mover()
            self.ahead = LayerLoads(self._ahead_mover, before_copy, paced=True)
        self._queued: dict[str, Lease] = {}
        self._started: dict[int, list[Lease]] = {}
        pool_pages = pool.num_slots // self._page_size
        self._spills: SpillQueue[bytes, _Written] = SpillQueue(
            self._mover,
            reserve=self._reserve,
            publish=lambda written: written.connection.publish(written.reservation),
            abandon=lambda written: written.connection.abandon(written.reservation),
            max_waiting_pages=max(1, int(pool_pages * MAX_WAITING_SHARE)),
            before_copy=before_copy,
        )

    @property
    def layer_counter(self) -> LayerCounter:
        """What SGLang's pools wait on, layer by layer."""
        return self._loads.counter

    # ---- find: host pages beyond the device's ----

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
        """A lease on what host memory has of `path[start:]`, for the caller to `release`; None for
        a miss. `find` is for requests that are about to be admitted: it keeps the lease."""
        connection = self._connection()
        if connection is None:
            self.counters.lookups["unavailable"] += 1
            return None
        began = time.perf_counter()
        try:
            lease = connection.lookup(path, start, self._timeout_s)
        except MemoryUnavailable as error:
            self.counters.lookups["unavailable"] += 1
            logger.warning("smg: a lookup counts as a miss: %s", error)
            return None
        finally:
            self.observe_lookup(time.perf_counter() - began)
        self.counters.lookups["miss" if lease is None else "hit"] += 1
        return lease

    def _connection(self) -> MemoryConnection | None:
        """The lookup connection, or None while the server is away, slow, or owes us a flush."""
        connection = self._links.lookups.connection()
        if connection is None or connection.stalled:
            return None
        if self._flush_owed:
            try:
                connection.flush(self._timeout_s)
            except MemoryUnavailable:
                return None
            self._flush_owed = False
        self._unpin_former_arena(connection.arena)
        return connection

    def _unpin_former_arena(self, arena: Arena) -> None:
        """Give back the memory of a server that died, once no copy can touch it any more."""
        if arena is self._arena:
            return
        if self._arena is not None:
            if self._queued or self._started or self._spills.waiting_slots or self.pages.num_held:
                return
            if self.ahead is not None and self.ahead.counter.events:
                return
            self._mover.unpin(self._arena.buffer)
        self._arena = arena

    @property
    def answers(self) -> bool:
        """Whether the memory server was there and in time the last time it was asked."""
        connection = self._links.lookups.connection()
        return connection is not None and not connection.stalled

    def forget(self, rid: str) -> None:
        """The request needs nothing of what was found for it; idempotent."""
        self._found.forget(rid)

    def release(self, lease: Lease) -> None:
        """End a lease that the caller holds. A request that attends host memory may hold it longer
        than the weights stay: then it is a former connection's."""
        for links in (self._links, *self._retired):
            connection = links.lookups.connection()
            if connection is not None:
                connection.release(lease)

    # ---- load back: host pages into device slots ----

    def load(self, rid: str, slots: torch.Tensor) -> bool:
        """Queue the load of the first pages found for `rid`; False where it must be computed.

        Args:
            slots: int64 [n * page_size] device slots, owned by the request until `finish`.
        """
        lease = self._found.take(rid)
        if lease is None:
            return False
        pages = slots.numel() // self._page_size
        # With several ranks all must decide alike. The mapping outlives the server, so that the
        # bytes are right in either case; alone, we take the cautious way.
        if len(lease.pages) < pages or (self._one_rank and not lease.held):
            self.release(lease)
            return False
        offsets = lease.offsets[:pages]
        try:
            self._loads.queue(rid, slots, lease.arena.buffer, offsets, keep_alive=lease)
        except ValueError:
            # Nothing of ours may end the scheduler; two requests of one id would come here.
            logger.exception("smg: a load was refused")
            if self._one_rank or rid in self._queued:
                self.release(lease)
                return False
            # The others load: that it has failed is agreed on when they have.
            self._loads.queue_failed(rid, keep_alive=lease)
        self._queued[rid] = lease
        self.counters.hit_tokens["host"] += pages * self._page_size
        return True

    def cancel(self, rid: str) -> bool:
        """Take back a load that has not started; False where there is none."""
        if not self._loads.cancel(rid):
            return False
        self.release(self._queued.pop(rid))
        return True

    def start_loads(self) -> int:
        """Start what is queued, as one batch; its index for the layer counter, or -1."""
        index = self._loads.start()
        if index >= 0:
            self._started[index] = list(self._queued.values())
            self._queued.clear()
        return index

    def finish_loads(self, index: int) -> bool:
        """Wait until a batch has stopped writing to the device; True when all of it landed."""
        landed = self._loads.finish(index)
        for lease in self._started.pop(index, []):
            self.release(lease)
        return landed

    # ---- spill: device pages to host memory ----

    def spill(
        self, path: bytes, slots: torch.Tensor, own_slots: int, ready: Sequence[Event] = ()
    ) -> None:
        """Copy in the background what host memory lacks of `path`. Each call completes, in order.

        Args:
            path: page keys from the root.
            slots: int64, device slots of all tokens of the path; they must stay as they are until
                the completion is popped.
            own_slots: how many of them are not on the path of an earlier spill.
            ready: device events after which the slots hold the KV.
        """
        self._spills.submit(path, slots, ready, new_slots=own_slots)

    def spill_now(self, path: bytes, slots: torch.Tensor) -> bool:
        """Copy what host memory lacks of `path` before returning (write-back: the slots are next
        to be reused). Waits for the copy, and for the server no longer than a lookup."""
        pages = len(path) // KEY_BYTES
        try:
            known = self.pages.publish(path, slots)
        except CopyFailed as error:
            return self._dropped("error", error.pages)
        except MemoryUnavailable:
            return self._dropped("unavailable", pages)
        if known * self._page_size < slots.numel():
            return self._dropped("memory_full", slots.numel() // self._page_size - known)
        return True

    def _dropped_pages(self) -> Counter[str]:
        # `copy` is one call into C, so another thread cannot add a reason half-way.
        return self.counters.dropped_pages.copy() + self._spills.counters.dropped.copy()

    def _dropped(self, reason: str, pages: int) -> bool:
        self.counters.dropped_pages[reason] += pages
        return False

    def _reserve(self, path: bytes) -> SpillTarget[_Written]:
        """Runs on the spill thread."""
        connection = self._links.background.connection()
        if connection is None:
            raise MemoryUnavailable("the memory server is away")
        reservation = connection.reserve(path, BACKGROUND_TIMEOUT_S)
        return SpillTarget(
            handle=_Written(connection, reservation),
            arena=reservation.arena.buffer,
            offsets=np.asarray(reservation.offsets),
            first=reservation.have,
        )

    def num_completed_spills(self) -> int:
        """Spills that have ended and were not popped."""
        return self._spills.num_completed()

    def pop_completed_spill(self) -> bool:
        """The oldest completion: True when host memory has all of its path."""
        return self._spills.pop_completed()

    def drain_spills(self, timeout_s: float) -> bool:
        """Wait, so long at most, until all that was submitted has ended. Any thread."""
        return self._spills.drain(timeout_s)

    # ---- lifecycle ----

    def flush(self) -> None:
        """Empty the host level of this namespace, after all transfers have ended.

        Where the server does not answer, nothing is looked up until it has been told.
        """
        self._quiesce()
        while self._spills.num_completed():
            self._spills.pop_completed()
        self._flush_owed = True
        self._connection()

    def weights_changed(self) -> None:
        """From now on pages are another model's: nobody else has computed them.

        Completed spills stay to be popped: their nodes are locked until then.
        """
        self._quiesce()
        if self._private:
            # Nobody will ever find the pages of the former update again.
            self._flush_owed = True
            self._connection()
        namespace = msgspec.structs.replace(self._links.namespace, model=uuid.uuid4().hex)
        # What requests still read of the former weights stays theirs until they end.
        self._retired.append(self._links)
        self._close_retired()
        self._links = _Links(self._address, namespace, self._mappings)
        self._private = True
        self._flush_owed = False

    def _quiesce(self) -> None:
        self._found.clear()
        for rid in list(self._queued):
            self.cancel(rid)
        self._loads.reset()
        for index in list(self._started):
            self.finish_loads(index)
        self._spills.drain()

    def _close_retired(self) -> None:
        if not self.pages.num_held:
            while self._retired:
                self._retired.pop().close()

    def host_tokens(self) -> int:
        """Tokens whose KV, of all ranks, host memory can hold if it held nothing else."""
        connection = self._connection()
        if connection is not None:
            self._close_retired()
            geometry, arena = connection.geometry, connection.arena
            slabs = arena.nbytes // geometry.slab_bytes // self._links.namespace.tp_size
            self._host_pages = slabs * geometry.pages_per_slab
        return self._host_pages * self._page_size

    def close(self) -> None:
        """End all threads and connections."""
        self._found.clear()
        self._loads.close()
        if self.ahead is not None:
            self.ahead.close()
            self._ahead_mover.close()
        self._spills.close()
        self._links.close()
        while self._retired:
            self._retired.pop().close()
        self._mover.close()
        self.pins.close()

    # ---- to be seen ----

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows. Waits for the memory server no longer than a lookup."""
        connection = self._connection()
        return {
            "config": self.config.to_builtins(),
            "namespace": msgspec.to_builtins(self._links.namespace),
            "memory_address": self._address,
            "memory_connected": connection is not None,
            "memory": self._memory_state(connection),
            "copies": None if self._copies is None else self._copies.state(),
            "leases_held": self._found.num_leases + len(self._queued) + len(self._started),
            "spills_waiting": self._spills.waiting_slots,
            **self.counters.snapshot(),
            "dropped_pages": dict(self._dropped_pages()),
        }

    def _memory_state(self, connection: MemoryConnection | None) -> dict[str, Any] | None:
        if connection is None:
            return None
        try:
            stats = connection.stats(self._timeout_s)
        except MemoryUnavailable:
            return None
        return {
            "epoch": stats.epoch,
            "arena_bytes": stats.arena_bytes,
            "pages_ready": stats.pages_ready,
            "pages_writing": stats.pages_writing,
            "leases": stats.leases,
            "connections": stats.connections,
        }

    def read_metrics(self) -> Reading:
        """Current values of the `smg:` series. Metrics thread; asks the memory server."""
        # Copies on the spill thread, and on the scheduler's: each counts its own.
        spills = (self._spills.counters, self.pages.counters)
        loads = [each.counters for each in (self._loads, self.ahead) if each is not None]
        dropped = self._dropped_pages()
        reading: dict[str, Any] = {
            "smg:hit_tokens": dict(self.counters.hit_tokens),
            "smg:prompt_tokens": self.counters.prompt_tokens,
            "smg:prefetched_tokens": self.counters.prefetched_tokens,
            "smg:lookups": dict(self.counters.lookups),
            "smg:dropped_pages": dict(dropped),
            "smg:spilled_bytes": sum(counters.bytes for counters in spills),
            "smg:spill_seconds": sum(counters.seconds for counters in spills),
            "smg:loaded_bytes": sum(counters.bytes for counters in loads),
            "smg:load_seconds": sum(counters.seconds for counters in loads),
        }
        connection = self._links.background.connection()
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
