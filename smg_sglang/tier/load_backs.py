"""Host pages that were found for a request, on their way into its device slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from smg_sglang.memory.client import Lease
from smg_sglang.metrics import TierCounters
from smg_sglang.tier.found import FoundLeases
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.mover import PageMove

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Part:
    """What one pool needs for a hit: device slots, int64 [n * page_slots], and a lease on the host
    pages for them; None where there are none."""

    lease: Lease | None
    slots: torch.Tensor
    page_slots: int
    pool: int = 0

    @property
    def pages(self) -> int:
        return int(self.slots.numel()) // self.page_slots


class LoadBacks:
    """Scheduler thread only; no method but `finish` and `finish_all` waits. A lease is released
    after its load."""

    def __init__(
        self,
        loads: LayerLoads,
        found: FoundLeases[Lease],
        release: Callable[[Lease], None],
        counters: TierCounters,
        *,
        page_size: int,
        one_rank: bool,
    ) -> None:
        """
        Args:
            found: what lookups have leased for requests.
            one_rank: whether this worker decides alone.
        """
        self.loads = loads
        self._found = found
        self._release = release
        self._counters = counters
        self._page_size = page_size
        self._one_rank = one_rank
        self._queued: dict[str, list[Lease]] = {}
        self._started: dict[int, list[Lease]] = {}

    def load(
        self, rid: str, slots: torch.Tensor, ends: Sequence[Part] = (), from_storage: int = 0
    ) -> bool:
        """Queue the load of the first pages found for `rid`; False where it must be computed.

        Args:
            slots: int64 [n * page_size] device slots, owned by the request until `finish`.
            ends: what layers with windows, and states, need of the end of it.
            from_storage: tokens that storage brought to host memory for this request.
        """
        parts = [Part(self._found.take(rid), slots, self._page_size), *ends]
        leases = [part.lease for part in parts if part.lease is not None]
        if not all(self._is_there(part) for part in parts):
            self._release_all(leases)
            return False
        try:
            self.loads.queue_moves(rid, [self._move(part) for part in parts], leases)
        except ValueError:
            # Nothing of ours may end the scheduler; two requests of one id would come here.
            logger.exception("smg: a load was refused")
            if self._one_rank or rid in self._queued:
                self._release_all(leases)
                return False
            # The others load: that it has failed is agreed on when they have.
            self.loads.queue_failed(rid, keep_alive=leases)
        self._queued[rid] = leases
        stored = min(from_storage, slots.numel())
        self._counters.hit_tokens["host"] += slots.numel() - stored
        self._counters.hit_tokens["storage"] += stored
        return True

    def _is_there(self, part: Part) -> bool:
        """With several ranks all must decide alike. The mapping outlives the server, so that the
        bytes are right in either case; alone, we take the cautious way."""
        if part.lease is None or len(part.lease.pages) < part.pages:
            return False
        return part.lease.held or not self._one_rank

    def _move(self, part: Part) -> PageMove:
        assert part.lease is not None
        offsets = part.lease.offsets[: part.pages]
        return self.loads.mover.prepare_in(part.pool, part.slots, part.lease.arena.buffer, offsets)

    def _release_all(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._release(lease)

    def cancel(self, rid: str) -> bool:
        """Take back a load that has not started; False where there is none."""
        if not self.loads.cancel(rid):
            return False
        self._release_all(self._queued.pop(rid))
        return True

    def start(self) -> int:
        """Start what is queued, as one batch; its index for the layer counter, or -1."""
        index = self.loads.start()
        if index >= 0:
            self._started[index] = [lease for leases in self._queued.values() for lease in leases]
            self._queued.clear()
        return index

    def finish(self, index: int) -> bool:
        """Wait until a batch has stopped writing to the device; True when all of it landed."""
        landed = self.loads.finish(index)
        self._release_all(self._started.pop(index, ()))
        return landed

    def finish_all(self) -> None:
        """Take back what has not started, and wait for what has."""
        for rid in list(self._queued):
            self.cancel(rid)
        self.loads.reset()
        for index in list(self._started):
            self.finish(index)

    @property
    def num_leases(self) -> int:
        """Leases held by loads, by batch where they have started."""
        return len(self._queued) + len(self._started)
