"""Copies between a CUDA pool and the arena, on side streams. Has not run on a GPU yet.

The arena is page-locked piece by piece in the background. A move whose pages are locked goes
directly, by one of two methods; any other goes through a small pinned ring, with a CPU copy.
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
        host_slots: copy of ``slots``, for the method that needs it.
    """

    direct: bool = True
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
        self._word = gcd(8, *(part.row_bytes for part in self.layout.parts))
        self._compile()

    def _compile(self) -> None:
        """Compile the kernels (cached on disk) now and not when a request waits."""
        nothing = torch.empty(0, dtype=torch.int64, device=self.pool.device)
        for to_arena in (False, True):
            if self._method(to_arena) == "kernel":
                for rows in self.pool.rows[0]:
                    self._launch(
                        rows, rows.data_ptr(), nothing, nothing, self._word, to_arena=to_arena
                    )

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

    def load_layer(self, layer: int, move: PageMove) -> None:
        assert isinstance(move, CudaMove), "load_layer is called inside `loading`"
        parts = range(layer * len(self.layout.parts), (layer + 1) * len(self.layout.parts))
        if move.direct:
            self._move(parts, move, move.arena, move.offsets, to_arena=False)
            return
        start, size = self.layout.part_offset(layer, 0), self.layout.layer_bytes
        ring = self._load_ring
        for first, end, places in ring.chunks(move.num_pages, size):
            sources = move.offsets[first:end] + start
            _copy_blocks(ring.buffer, places, move.arena, sources, size)
            chunk = self._slice(move, first, end)
            self._move(parts, chunk, ring.buffer, places - start, to_arena=False)

    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        with self._spilling, torch.cuda.stream(self._spill_stream):
            for mark in after:
                mark.wait()
            started, segments = self._begin(move, to_arena=True), self._all_segments
            if started.direct:
                self._move(segments, started, started.arena, started.offsets, to_arena=True)
                EventMark(self._spill_stream).synchronize()
                return
            size, ring = self.layout.page_bytes, self._spill_ring
            for first, end, places in ring.chunks(move.num_pages, size):
                self._move(
                    segments, self._slice(started, first, end), ring.buffer, places, to_arena=True
                )
                EventMark(self._spill_stream).synchronize()
                _copy_blocks(move.arena, move.offsets[first:end], ring.buffer, places, size)

    def time_copy(self, move: PageMove, *, to_arena: bool) -> float:
        """Copy all layers of page-locked pages, and wait: seconds from the beginning of the first
        copy's enqueueing to the end of the last copy. To measure, while nothing else is copied."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream(to_arena)):
            begin.record()
            started = self._begin(move, to_arena=to_arena)
            self._move(self._all_segments, started, move.arena, move.offsets, to_arena=to_arena)
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    @property
    def _all_segments(self) -> range:
        return range(self.layout.num_layers * len(self.layout.parts))

    def _stream(self, to_arena: bool) -> Any:
        return self._spill_stream if to_arena else self._load_stream

    def _begin(self, move: PageMove, *, to_arena: bool) -> CudaMove:
        # The caller may drop the slots while the stream still reads them.
        move.slots.record_stream(self._stream(to_arena))
        host_slots = move.slots.cpu() if self._method(to_arena) == "copies" else None
        return CudaMove(move.slots, move.arena, move.offsets, self._is_pinned(move), host_slots)

    def _is_pinned(self, move: PageMove) -> bool:
        if not self._pins or not move.num_pages:
            return False
        end = int(move.offsets.max()) + self.layout.page_bytes
        return end <= self._pinned.pinned_bytes(move.arena)

    def _slice(self, move: CudaMove, first: int, end: int) -> CudaMove:
        size = self.layout.page_size
        part = slice(first * size, end * size)
        host_slots = None if move.host_slots is None else move.host_slots[part]
        return CudaMove(
            move.slots[part], move.arena, move.offsets[first:end], move.direct, host_slots
        )

    def _move(
        self,
        segments: range,
        move: CudaMove,
        host: np.ndarray,
        page_starts: np.ndarray,
        *,
        to_arena: bool,
    ) -> None:
        """Enqueue copies of parts of layers between the slots and page-locked memory.

        ``page_starts``: int64 [n], where each page starts in ``host``; may lie outside of it
        where ``host`` holds one layer of the pages only.
        """
        if not move.num_pages:
            return
        word = gcd(self._word, host.ctypes.data, int(np.gcd.reduce(page_starts)))
        on_device = self._method(to_arena) == "kernel"
        page_words = _upload(page_starts // word, self.pool.device) if on_device else None
        for segment in segments:
            layer, part = divmod(segment, len(self.layout.parts))
            rows = self.pool.rows[layer][part]
            offset = self.layout.part_offset(layer, part)
            if page_words is not None:
                address = host.ctypes.data + offset
                self._launch(rows, address, move.slots, page_words, word, to_arena=to_arena)
            else:
                self._copy_runs(rows, host, move, page_starts + offset, to_arena=to_arena)

    def _launch(
        self,
        rows: torch.Tensor,
        address: int,
        slots: torch.Tensor,
        page_words: torch.Tensor,
        word: int,
        *,
        to_arena: bool,
    ) -> None:
        from smg_sglang.transfer.triton_rows import move_rows

        move_rows(
            rows,
            address,
            slots,
            page_words,
            page_size=self.layout.page_size,
            word=word,
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


def _upload(offsets: np.ndarray, device: torch.device) -> torch.Tensor:
    """To the device without the CPU waiting (a pageable source would make it wait)."""
    return torch.from_numpy(offsets).pin_memory().to(device, non_blocking=True)


def _copy_blocks(
    target: np.ndarray, to: np.ndarray, source: np.ndarray, at: np.ndarray, size: int
) -> None:
    for start, origin in zip(to.tolist(), at.tolist(), strict=True):
        target[start : start + size] = source[origin : origin + size]
