"""Host pages streamed through a ring of staging buffers, in the order in which they are read.

What is ahead of the reader is copied while it computes: with a ring of three, one segment is in
use and two are on their way.

On CUDA nothing here makes the CPU wait for the device. A fill goes to
the mover's side stream behind an event on the reader's stream, recorded when the buffer was given
back: all that used it had been enqueued by then. The reader's stream waits for the event behind the
fill before the segment is given. Fills come one after another on the side stream, so a new reader's
never overtakes what a former one left behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from smg_sglang.transfer.layout import DTYPES, DevicePool, PageLayout
from smg_sglang.transfer.mover import BeforeCopy, Mark, PageMove
from smg_sglang.transfer.movers import make_mover
from smg_sglang.transfer.pinning import ArenaPins

DEPTH = 3


@dataclass(frozen=True, eq=False)
class Segment:
    """One layer of some host pages.

    Attributes:
        arena: uint8, the mapping the pages lie in.
        offsets: int64 [pages], byte offset of each page; at most the ring's `segment_pages`.
    """

    layer: int
    arena: np.ndarray
    offsets: np.ndarray


class SegmentRing:
    """A few staging buffers, and the thread that fills them. One reader at a time."""

    def __init__(
        self,
        layout: PageLayout,
        device: torch.device,
        segment_pages: int,
        *,
        depth: int = DEPTH,
        before_copy: BeforeCopy | None = None,
        pins: ArenaPins | None = None,
    ) -> None:
        """Memory: `depth * segment_pages` pages of one layer. before_copy: test hook. pins: shared
        with who else copies the arenas."""
        dtype = next(dtype for dtype, name in DTYPES.items() if name == layout.dtype)
        self.segment_pages, self.depth = segment_pages, depth
        self._page_size = layout.page_size
        slots = depth * segment_pages * layout.page_size
        self.parts = [
            torch.empty(slots, part.heads, part.dim, dtype=dtype, device=device)
            for part in layout.parts
        ]
        # To the mover each layer is the same memory: only where it reads differs.
        pool = DevicePool(
            {
                part.name: [staging] * layout.num_layers
                for part, staging in zip(layout.parts, self.parts, strict=True)
            },
            layout.page_size,
            dtype,
        )
        self._mover = make_mover(pool, pins=pins)
        self._slots = torch.arange(slots, device=device)
        self._before_copy = before_copy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="smg-segments")

    def read(self, segments: Iterator[Segment]) -> SegmentReader:
        """Begin to stream. A former reader must not be used any more."""
        return SegmentReader(self, segments)

    def fill(self, buffer: int, segment: Segment) -> Future[Mark]:
        """Copy a segment into a buffer after what was done so far; its mark when that is done
        (CPU) or enqueued (CUDA). Raises ValueError where the segment does not fit."""
        tokens = len(segment.offsets) * self._page_size
        first = buffer * self.segment_pages * self._page_size
        if len(segment.offsets) > self.segment_pages:
            raise ValueError(
                f"{len(segment.offsets)} pages in a ring of {self.segment_pages} a segment"
            )
        slots = self._slots[first : first + tokens]
        move = self._mover.prepare(slots, segment.arena, segment.offsets)
        after = self._mover.fence()
        if self._before_copy is None and self._mover.enqueues([move]):
            return _done(self._copy(segment.layer, move, after))
        return self._thread.submit(self._copy, segment.layer, move, after)

    def _copy(self, layer: int, move: PageMove, after: list[Mark]) -> Mark:
        if self._before_copy is not None:
            self._before_copy()
        with self._mover.loading([move], after) as moves:
            for ready in moves:
                self._mover.load_layers(range(layer, layer + 1), ready)
            return self._mover.mark()

    def views(self, buffer: int, pages: int) -> tuple[torch.Tensor, ...]:
        """The parts of a buffer, each [pages * page_size, heads, dim]."""
        first = buffer * self.segment_pages * self._page_size
        return tuple(part[first : first + pages * self._page_size] for part in self.parts)

    def close(self) -> None:
        """End the thread. No reader may be in use."""
        self._thread.shutdown()
        self._mover.close()


def _done(mark: Mark) -> Future[Mark]:
    future: Future[Mark] = Future()
    future.set_result(mark)
    return future


class SegmentReader:
    """Gives the segments one after another. Reader's thread only."""

    def __init__(self, ring: SegmentRing, segments: Iterator[Segment]) -> None:
        self._ring = ring
        self._segments = segments
        self._ahead: deque[tuple[int, int, Future[Mark]]] = deque()
        for buffer in range(ring.depth - 1):
            self._submit(buffer)
        self._free = ring.depth - 1

    def next(self) -> tuple[torch.Tensor, ...]:
        """The next segment's parts, each [tokens, heads, dim], valid until the next call.

        Raises IndexError after the last.
        """
        self._submit(self._free)
        buffer, pages, filled = self._ahead.popleft()
        filled.result().wait()
        self._free = buffer
        return self._ring.views(buffer, pages)

    def close(self) -> None:
        """Wait for the copies on their way; nothing is read any more."""
        while self._ahead:
            self._ahead.popleft()[2].result()

    def _submit(self, buffer: int) -> None:
        segment = next(self._segments, None)
        if segment is not None:
            self._ahead.append((buffer, len(segment.offsets), self._ring.fill(buffer, segment)))
