"""Copies between a CUDA pool and the arena, on side streams.

The arena is page-locked piece by piece in the background. A move whose pages are locked goes
directly, by one of two methods; any other goes through a small pinned ring, with a CPU copy.
By kernel a spill is one launch for all pages and layers, and a load one for a layer, or for some
where pages are few; two of each where rows of K and V differ in length (`launches`).
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

from smg_sglang.transfer.copy_choice import CopyMethods, Method
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
        host_slots: copy of ``slots``, for the method that needs it.
    """

    direct: LockedPages | None = None
    host_slots: torch.Tensor | None = None


class CudaMover(Mover):
    """`Mover` for CUDA pools. One thread may load while others spill, one after another.

    Arenas that are copied are pinned, and stay so until `unpin`: call it for the arena of a
    server that is gone, or its memory is not given back. Movers that copy the same arenas share
    their pins.

    ``kernel``: a Triton kernel reads or writes host memory itself; nothing waits on the CPU, and
    slots never leave the device. ``copies``: one cudaMemcpyAsync for each run of slots, which
    leaves the SMs alone but needs the slots on the host, so a thread enqueues them, after what the
    copies come after. `copy_measure` chooses.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        order_after: Sequence[Any] = (),
        shared_pins: ArenaPins | None = None,
        methods: CopyMethods | None = None,
        pins: bool = True,
        programs: int = 16,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        """``order_after``: streams that copies come after, with `fence`. ``shared_pins``: closed by
        who made them. ``pins``: False copies all through the ring. ``programs``: blocks of a kernel
        launch."""
        super().__init__(pool)
        self._order_after = order_after
        self._methods = methods or CopyMethods()
        self._pins = pins
        self._programs = programs
        self._load_stream = torch.cuda.Stream(pool.device)
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
            if self._method(to_arena) == "kernel":
                for table in self._tables:
                    self._launch(table, range(1), nothing, nothing, table.unit, to_arena=to_arena)

    def _method(self, to_arena: bool) -> Method:
        return self._methods.spill if to_arena else self._methods.load

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
        return self._methods.load == "kernel" and all(self._is_pinned(move) for move in moves)

    @contextmanager
    def loading(
        self, moves: Sequence[PageMove], after: Sequence[Mark]
    ) -> Iterator[Sequence[PageMove]]:
        with torch.cuda.stream(self._load_stream):
            for mark in after:
                mark.wait()
            yield [self._begin(move, to_arena=False) for move in moves]

    def mark(self) -> Mark:
        return EventMark(self._load_stream)

    def load_groups(self, moves: Sequence[PageMove]) -> list[range]:
        locked = all(isinstance(move, CudaMove) and move.direct for move in moves)
        if self._methods.load != "kernel" or not locked:
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
            pages = self._locked(ring.buffer, places - start, to_arena=False)
            self._move(
                range(layer, layer + 1), self._slice(move, first, end), pages, to_arena=False
            )

    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        with self._spilling, torch.cuda.stream(self._spill_stream):
            for mark in after:
                mark.wait()
            started = self._begin(move, to_arena=True)
            if started.direct is not None:
                self._move(self._all_layers, started, started.direct, to_arena=True)
                EventMark(self._spill_stream).synchronize()
                return
            size, ring = self.layout.page_bytes, self._spill_ring
            for first, end, places in ring.chunks(move.num_pages, size):
                pages = self._locked(ring.buffer, places, to_arena=True)
                chunk = self._slice(started, first, end)
                self._move(self._all_layers, chunk, pages, to_arena=True)
                EventMark(self._spill_stream).synchronize()
                _copy_blocks(move.arena, move.offsets[first:end], ring.buffer, places, size)

    def time_copy(self, move: PageMove, *, to_arena: bool) -> float:
        """Copy all layers of page-locked pages, and wait: seconds from the beginning of the first
        copy's enqueueing to the end of the last copy. To measure, while nothing else is copied."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream(to_arena)):
            begin.record()
            started = self._begin(move, to_arena=to_arena)
            assert started.direct is not None, "its pages are locked"
            self._move(self._all_layers, started, started.direct, to_arena=to_arena)
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    @property
    def _all_layers(self) -> range:
        return range(self.layout.num_layers)

    def _stream(self, to_arena: bool) -> Any:
        return self._spill_stream if to_arena else self._load_stream

    def _begin(self, move: PageMove, *, to_arena: bool) -> CudaMove:
        # The caller may drop the slots while the stream still reads them.
        move.slots.record_stream(self._stream(to_arena))
        host_slots = move.slots.cpu() if self._method(to_arena) == "copies" else None
        direct = (
            self._locked(move.arena, move.offsets, to_arena=to_arena)
            if self._is_pinned(move)
            else None
        )
        return CudaMove(move.slots, move.arena, move.offsets, direct, host_slots)

    def _is_pinned(self, move: PageMove) -> bool:
        if not self._pins or not move.num_pages:
            return False
        end = int(move.offsets.max()) + self.layout.page_bytes
        return end <= self._pinned.pinned_bytes(move.arena)

    def _locked(self, host: np.ndarray, starts: np.ndarray, *, to_arena: bool) -> LockedPages:
        kernel = self._method(to_arena) == "kernel"
        return LockedPages.at(host, starts, self.pool.device if kernel else None)

    def _slice(self, move: CudaMove, first: int, end: int) -> CudaMove:
        """Some pages of a move that goes through the ring."""
        size = self.layout.page_size
        part = slice(first * size, end * size)
        host_slots = None if move.host_slots is None else move.host_slots[part]
        return CudaMove(move.slots[part], move.arena, move.offsets[first:end], None, host_slots)

    def _move(self, layers: range, move: CudaMove, pages: LockedPages, *, to_arena: bool) -> None:
        """Enqueue copies of some layers between the move's slots and page-locked memory."""
        if pages.on_device is not None:
            for table in self._tables:
                unit = gcd(table.unit, pages.unit)
                self._launch(table, layers, move.slots, pages.on_device, unit, to_arena=to_arena)
            return
        for layer in layers:
            for part, rows in enumerate(self.pool.rows[layer]):
                starts = pages.starts + self.layout.part_offset(layer, part)
                self._copy_runs(rows, pages.host, move, starts, to_arena=to_arena)

    def _launch(
        self,
        table: BufferTable,
        layers: range,
        slots: torch.Tensor,
        pages: torch.Tensor,
        unit: int,
        *,
        to_arena: bool,
    ) -> None:
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
        )

    def _copy_runs(
        self,
        rows: torch.Tensor,
        host: np.ndarray,
        move: CudaMove,
        starts: np.ndarray,
        *,
        to_arena: bool,
    ) -> None:
        assert move.host_slots is not None
        memory = torch.from_numpy(host)
        row_bytes = rows.shape[1]
        for first, length, page, token in _runs(move.host_slots.numpy(), self.layout.page_size):
            device = rows[first : first + length].view(-1)
            start = int(starts[page]) + token * row_bytes
            block = memory[start : start + length * row_bytes]
            if to_arena:
                block.copy_(device, non_blocking=True)
            else:
                device.copy_(block, non_blocking=True)


def _runs(slots: np.ndarray, page_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first slot, length, page, token in page) of each run of following slots in a page."""
    at = np.arange(len(slots))
    breaks = (np.diff(slots, prepend=slots[:1] - 2) != 1) | (at % page_size == 0)
    heads = np.flatnonzero(breaks)
    lengths = np.diff(heads, append=len(slots))
    for head, length in zip(heads.tolist(), lengths.tolist(), strict=True):
        yield int(slots[head]), length, head // page_size, head % page_size


def _copy_blocks(
    target: np.ndarray, to: np.ndarray, source: np.ndarray, at: np.ndarray, size: int
) -> None:
    for start, origin in zip(to.tolist(), at.tolist(), strict=True):
        target[start : start + size] = source[origin : origin + size]
