"""Copies between a CUDA pool and the arena, on side streams.

The arena is page-locked piece by piece in the background. A move whose pages are locked goes
directly: a Triton kernel reads or writes host memory itself. Any other goes through a small pinned
ring, with a CPU copy. A spill is one launch for all pages and layers, a load one for some layers;
two of each where rows of K and V differ in length (`launches`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch

from smg_sglang.transfer.launches import BufferTable, LockedPages, buffer_tables, layer_groups
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import Mark, Mover, PageMove
from smg_sglang.transfer.pinning import ArenaPins
from smg_sglang.transfer.staging import RING_BYTES, StagingRing


class EventMark(Mark):
    """A CUDA event."""

    def __init__(self, stream: Any) -> None:
        # blocking: a thread that waits for it sleeps instead of spinning.
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()

    def reached(self) -> bool:
        return bool(self._event.query())


@dataclass(frozen=True, eq=False)
class CudaMove(PageMove):
    """A move as it is carried out: directly or through the ring, decided once for all layers.

    Attributes:
        direct: where the pages are, unless they go through the ring.
    """

    direct: LockedPages | None = None


class CudaMover(Mover):
    """`Mover` for CUDA pools. One thread may load while others spill, one after another.

    Arenas that are copied are pinned, and stay so until `unpin`: call it for the arena of a
    server that is gone, or its memory is not given back. Movers that copy the same arenas share
    their pins.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        order_after: Sequence[Any] = (),
        shared_pins: ArenaPins | None = None,
        beside: CudaMover | None = None,
        pins: bool = True,
        programs: int = 16,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        """``order_after``: streams that copies come after, with `fence`. ``shared_pins``: closed by
        who made them. ``beside``: another pool's mover, whose loads and these come one by one.
        ``pins``: False copies all through the ring. ``programs``: blocks of a kernel launch."""
        super().__init__(pool)
        self._order_after = order_after
        self._pins = pins
        self._programs = programs
        self._load_stream: Any = torch.cuda.Stream(pool.device)
        if beside is not None:
            self._load_stream = beside._load_stream
        self._spill_stream = torch.cuda.Stream(pool.device)
        ring_bytes = max(ring_bytes, 2 * self.layout.page_bytes)
        self._load_ring, self._spill_ring = StagingRing(ring_bytes), StagingRing(ring_bytes)
        self._owns_pins = shared_pins is None
        self._pinned = shared_pins or ArenaPins()
        self._spilling = threading.Lock()
        self._tables = buffer_tables(pool)
        self._compile()

    def _compile(self) -> None:
        """Compile the kernels (cached on disk) now and not when a request waits."""
        nothing = torch.empty(0, dtype=torch.int64, device=self.pool.device)
        for to_arena in (False, True):
            for table in self._tables:
                self._launch(table, range(1), nothing, nothing, table.unit, to_arena=to_arena)

    def prepare(self, slots: torch.Tensor, arena: np.ndarray, offsets: np.ndarray) -> PageMove:
        move = super().prepare(slots, arena, offsets)
        self.pin(arena)
        return move

    def pin(self, arena: np.ndarray) -> None:
        if self._pins:
            self._pinned.pin(arena, self.pool.device)

    def unpin(self, arena: np.ndarray) -> None:
        self._pinned.unpin(arena)

    def wait_pinned(self, arena: np.ndarray) -> bool:
        """Block until no more of the arena will be pinned; whether all of it is."""
        return self._pinned.wait(arena)

    def close(self) -> None:
        if self._owns_pins:
            self._pinned.close()

    def fence(self) -> list[Mark]:
        streams = [torch.cuda.current_stream(self.pool.device), *self._order_after]
        return [EventMark(stream) for stream in streams]

    def enqueues(self, moves: Sequence[PageMove]) -> bool:
        return all(self._is_pinned(move) for move in moves)

    @contextmanager
    def loading(
        self, moves: Sequence[PageMove], after: Sequence[Mark]
    ) -> Iterator[Sequence[PageMove]]:
        with torch.cuda.stream(self._load_stream):
            for mark in after:
                mark.wait()
            yield [self._begin(move, self._load_stream) for move in moves]

    def mark(self) -> Mark:
        return EventMark(self._load_stream)

    def load_groups(self, moves: Sequence[PageMove]) -> list[range]:
        locked = all(isinstance(move, CudaMove) and move.direct for move in moves)
        if not locked:
            return super().load_groups(moves)
        pages = sum(move.num_pages for move in moves)
        return layer_groups(self.layout.num_layers, pages * self.layout.layer_bytes)

    def load_layers(self, layers: range, move: PageMove) -> None:
        assert isinstance(move, CudaMove), "layers are loaded inside `loading`"
        if move.direct is not None:
            self._move(layers, move, move.direct, to_arena=False)
            return
        for layer in layers:
            self._load_through_ring(layer, move)

    def _load_through_ring(self, layer: int, move: CudaMove) -> None:
        start, size = self.layout.part_offset(layer, 0), self.layout.layer_bytes
        ring = self._load_ring
        for first, end, places in ring.chunks(move.num_pages, size):
            sources = move.offsets[first:end] + start
            _copy_blocks(ring.buffer, places, move.arena, sources, size)
            pages = self._locked(ring.buffer, places - start)
            self._move(
                range(layer, layer + 1), self._slice(move, first, end), pages, to_arena=False
            )

    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        with self._spilling, torch.cuda.stream(self._spill_stream):
            for mark in after:
                mark.wait()
            started = self._begin(move, self._spill_stream)
            if started.direct is not None:
                self._move(self._all_layers, started, started.direct, to_arena=True)
                EventMark(self._spill_stream).synchronize()
                return
            size, ring = self.layout.page_bytes, self._spill_ring
            for first, end, places in ring.chunks(move.num_pages, size):
                pages = self._locked(ring.buffer, places)
                chunk = self._slice(started, first, end)
                self._move(self._all_layers, chunk, pages, to_arena=True)
                EventMark(self._spill_stream).synchronize()
                _copy_blocks(move.arena, move.offsets[first:end], ring.buffer, places, size)

    def time_copy(self, move: PageMove, *, to_arena: bool) -> float:
        """Copy all layers of page-locked pages, and wait: seconds from the beginning of the first
        copy's enqueueing to the end of the last copy. To measure, while nothing else is copied."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = self._spill_stream if to_arena else self._load_stream
        with torch.cuda.stream(stream):
            begin.record()
            started = self._begin(move, stream)
            assert started.direct is not None, "its pages are locked"
            self._move(self._all_layers, started, started.direct, to_arena=to_arena)
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    @property
    def _all_layers(self) -> range:
        return range(self.layout.num_layers)

    def _begin(self, move: PageMove, stream: Any) -> CudaMove:
        # The caller may drop the slots while the stream still reads them.
        move.slots.record_stream(stream)
        direct = self._locked(move.arena, move.offsets) if self._is_pinned(move) else None
        return CudaMove(move.slots, move.arena, move.offsets, direct, pool=move.pool)

    def _is_pinned(self, move: PageMove) -> bool:
        if not self._pins or not move.num_pages:
            return False
        end = int(move.offsets.max()) + self.layout.page_bytes
        return end <= self._pinned.pinned_bytes(move.arena)

    def _locked(self, host: np.ndarray, starts: np.ndarray) -> LockedPages:
        return LockedPages.at(host, starts, self.pool.device)

    def _slice(self, move: CudaMove, first: int, end: int) -> CudaMove:
        """Some pages of a move that goes through the ring."""
        size = self.layout.page_size
        return CudaMove(move.slots[first * size : end * size], move.arena, move.offsets[first:end])

    def _move(self, layers: range, move: CudaMove, pages: LockedPages, *, to_arena: bool) -> None:
        """Enqueue copies of some layers between the move's slots and page-locked memory."""
        for table in self._tables:
            unit = gcd(table.unit, pages.unit)
            self._launch(table, layers, move.slots, pages.addresses, unit, to_arena=to_arena)

    def _launch(
        self,
        table: BufferTable,
        layers: range,
        slots: torch.Tensor,
        pages: torch.Tensor,
        unit: int,
        *,
        to_arena: bool,
        **tile: int,
    ) -> None:
        """tile: of `move_rows`, where it is not the usual one (`bench/copy_candidates.py`)."""
        from smg_sglang.transfer.triton_rows import move_rows

        move_rows(
            table.of(layers),
            slots,
            pages,
            row_bytes=table.row_bytes,
            page_size=self.layout.page_size,
            unit=unit,
            programs=self._programs,
            to_arena=to_arena,
            **tile,
        )


def _copy_blocks(
    target: np.ndarray, to: np.ndarray, source: np.ndarray, at: np.ndarray, size: int
) -> None:
    for start, origin in zip(to.tolist(), at.tolist(), strict=True):
        target[start : start + size] = source[origin : origin + size]
