"""Keys and values that stay in host memory: where they are, and how a layer gets at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from smg_sglang.attention.decode import Piece
from smg_sglang.attention.pages import Memory, PageRun, page_memory, page_run
from smg_sglang.transfer.layout import PageLayout
from smg_sglang.transfer.segments import Segment, SegmentReader, SegmentRing


@dataclass(frozen=True, eq=False)
class HostRun:
    """Consecutive pages of a request in one mapping.

    Attributes:
        arena: uint8, the mapping.
        offsets: int64 [pages], byte offset of each page in it.
        page_size: tokens a page.
    """

    arena: np.ndarray
    offsets: npt.NDArray[np.int64]
    page_size: int

    @property
    def tokens(self) -> int:
        return len(self.offsets) * self.page_size

    @cached_property
    def keys(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """For each token the offset of its page, and its row in it."""
        rows = np.tile(np.arange(self.page_size, dtype=np.int32), len(self.offsets))
        return np.repeat(self.offsets, self.page_size), rows


class HostReader:
    """Gives the layers of a forward pass the host pages of its requests, in two ways: addresses,
    for kernels that read host memory in place, and segments, streamed ahead of their use.

    One forward pass at a time: `begin` comes before its first layer.
    """

    def __init__(self, layout: PageLayout, ring: SegmentRing) -> None:
        self.layout = layout
        self._ring = ring
        self._arenas: list[np.ndarray] = []
        self._streamed: list[Sequence[HostRun]] = []
        self._reader: SegmentReader | None = None
        self._next_layer = 0

    def begin(self) -> None:
        """A new forward pass: nothing of the former one is read any more."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._arenas.clear()
        self._streamed.clear()

    # ---- in place ----

    def pieces(self, runs: Sequence[HostRun]) -> list[Piece]:
        """A request's host keys for `decode.plan_pieces`; memory n is the nth arena met."""
        return [Piece(self._memory(run.arena), *run.keys) for run in runs]

    def memories(self, layer: int) -> list[tuple[int, int]]:
        """Addresses of a layer's K and V in a page at offset 0, for each memory from 1 on.

        MLA's values are the front of its keys, so both are where the latent is.
        """
        k = self.layout.part_offset(layer, 0)
        v = self.layout.part_offset(layer, len(self.layout.parts) - 1)
        return [(arena.ctypes.data + k, arena.ctypes.data + v) for arena in self._arenas]

    def page_runs(self, runs: Sequence[HostRun]) -> list[PageRun]:
        """A request's host pages for `pages.plan_pages`, numbered as in `pieces`."""
        return [page_run(self._memory(run.arena), run.offsets, run.page_size) for run in runs]

    def page_memories(self, layer: int) -> list[Memory]:
        """Where a layer is in each memory from 1 on."""
        return [page_memory(arena, self.layout, layer) for arena in self._arenas]

    def _memory(self, arena: np.ndarray) -> int:
        for number, known in enumerate(self._arenas):
            if known is arena:
                return number + 1
        self._arenas.append(arena)
        return len(self._arenas)

    # ---- segment by segment ----

    def stream(self, requests: Sequence[Sequence[HostRun]]) -> None:
        """Which requests' runs each layer will ask for with `segments`, in this order."""
        self._streamed = list(requests)

    def start_layer(self, layer: int) -> None:
        """The layers come in order, once each; one out of order begins a new stream."""
        if self._reader is None or layer != self._next_layer:
            if self._reader is not None:
                self._reader.close()
            self._reader = self._ring.read(self._schedule(layer))
        self._next_layer = layer + 1

    def segments(self, runs: Sequence[HostRun]) -> Iterator[tuple[torch.Tensor, ...]]:
        """The parts of the next request's host pages, each valid until the next one."""
        assert self._reader is not None, "start_layer comes before segments"
        for _ in self._cuts(runs):
            yield self._reader.next()

    def _schedule(self, first_layer: int) -> Iterator[Segment]:
        for layer in range(first_layer, self.layout.num_layers):
            for runs in self._streamed:
                for run, begin, end in self._cuts(runs):
                    yield Segment(layer, run.arena, run.offsets[begin:end])

    def _cuts(self, runs: Sequence[HostRun]) -> Iterator[tuple[HostRun, int, int]]:
        size = self._ring.segment_pages
        for run in runs:
            for begin in range(0, len(run.offsets), size):
                yield run, begin, min(begin + size, len(run.offsets))
