"""Other ways to copy pages on CUDA than `CudaMover`'s, to be measured beside it.

    python bench/transfer.py --device cuda --candidates

None has been measured yet; what is expected of each stands beside it (44 to 46 of 54.7 GB/s is what
the mover had on an H100: docs/gpu.md). A page of an 8B model has 2 MiB, 32 KiB of a layer's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from smg_sglang.transfer.cuda import CudaMove, CudaMover, EventMark
from smg_sglang.transfer.launches import LockedPages
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import Mark, PageMove
from smg_sglang.transfer.pinning import ArenaPins

STAGED_BYTES = 64 << 20


class TiledMover(CudaMover):
    """The mover's kernel with other tiles."""

    def __init__(self, pool: DevicePool, *, tile_words: int, warps: int, **options: Any) -> None:
        self._tile = {"tile_words": tile_words, "warps": warps}
        super().__init__(pool, **options)

    def _launch(self, *args: Any, **more: Any) -> None:
        super()._launch(*args, **more, **self._tile)


class StagedMover(CudaMover):
    """Pages whole and by the copy engines, between host memory and a buffer on the device; a kernel
    moves them between that and the slots at the speed of the device's memory.

    A page is one range of host memory, so that each is one plain copy. Loads bring all layers of
    some pages before the next pages, so that a forward waits for all of them at its first layer.
    """

    def __init__(
        self, pool: DevicePool, *, staged_bytes: int = STAGED_BYTES, **options: Any
    ) -> None:
        super().__init__(pool, **options)
        pages = max(1, staged_bytes // self.layout.page_bytes)
        shape = (pages, self.layout.page_bytes)
        self._staged = torch.empty(shape, dtype=torch.uint8, device=pool.device)
        addresses = self._staged.data_ptr() + self.layout.page_bytes * np.arange(pages)
        self._places = LockedPages(
            torch.tensor(addresses, dtype=torch.int64, device=pool.device),
            int(np.gcd.reduce(addresses)),
        )

    def load_groups(self, moves: Sequence[PageMove]) -> list[range]:
        return [self._all_layers]

    def load_layers(self, layers: range, move: PageMove) -> None:
        assert isinstance(move, CudaMove)
        for chunk, pages in self._chunks(move):
            for place, page in enumerate(pages):
                self._staged[place].copy_(page, non_blocking=True)
            self._move(layers, chunk, self._of(len(pages)), to_arena=False)

    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        with self._spilling, torch.cuda.stream(self._spill_stream):
            for mark in after:
                mark.wait()
            for chunk, pages in self._chunks(self._begin(move, self._spill_stream)):
                self._move(self._all_layers, chunk, self._of(len(pages)), to_arena=True)
                for place, page in enumerate(pages):
                    page.copy_(self._staged[place], non_blocking=True)
            EventMark(self._spill_stream).synchronize()

    def _of(self, pages: int) -> LockedPages:
        return LockedPages(self._places.addresses[:pages], self._places.unit)

    def _chunks(self, move: CudaMove) -> list[tuple[CudaMove, list[torch.Tensor]]]:
        arena, size, most = torch.from_numpy(move.arena), self.layout.page_bytes, len(self._staged)
        chunks = []
        for first in range(0, move.num_pages, most):
            chunk = self._slice(move, first, min(first + most, move.num_pages))
            chunks.append((chunk, [arena[at : at + size] for at in chunk.offsets.tolist()]))
        return chunks


def candidates(pool: DevicePool, pins: ArenaPins) -> dict[str, Callable[[], CudaMover]]:
    """What makes each mover, by what it is called."""
    more = {"shared_pins": pins}
    return {
        # If 256 KiB in flight do not cover the link's latency, 32 programs are faster and 8 slower;
        # if they do, all are alike, and the gap lies between a tile's loads and its stores.
        **{
            f"{programs} programs": lambda programs=programs: CudaMover(
                pool, programs=programs, **more
            )
            for programs in (8, 32, 64)
        },
        # As many bytes in flight in other tiles: longer ones have fewer gaps, and smaller ones let
        # an SM's other program fill them.
        "32 programs of 8 KiB": lambda: TiledMover(
            pool, tile_words=1024, warps=4, programs=32, **more
        ),
        "16 programs of 32 KiB": lambda: TiledMover(pool, tile_words=4096, warps=8, **more),
        # 95 % of the link and more for pages of 2 MiB, less for those of small models.
        "staged on the device": lambda: StagedMover(pool, **more),
    }
