"""Copies between a pool in host memory and the arena: one thread, no GIL, near memcpy speed.

Kernels are compiled by numba in the background when the first mover is made (and cached on disk),
so no request waits for the compiler; until then, and where numba is missing, torch index
operations do the same. Both, and a plain memcpy beside them: bench/transfer.py.

Also measured and left: a loop of ctypes or numpy copies is as fast as torch, but takes the GIL
once a page, and a busy scheduler thread gives it back after 5 ms each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from smg_sglang.transfer.compiling import copy_kernels
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import Mark, Mover, PageMove, slots_within
from smg_sglang.transfer.torch_rows import copy_rows as torch_copy_rows


class CpuMover(Mover):
    """`Mover` for a pool of CPU tensors. Any number of threads may copy at once.

    Args:
        compiled: False keeps to the torch operations (tests, machines without numba).
    """

    def __init__(self, pool: DevicePool, compiled: bool = True) -> None:
        super().__init__(pool)
        layout = pool.layout
        segments = [(la, pa) for la in range(layout.num_layers) for pa in range(len(layout.parts))]
        self._bases = np.array([pool.rows[la][pa].data_ptr() for la, pa in segments], np.int64)
        self._row_bytes = np.array([layout.parts[pa].row_bytes for _, pa in segments], np.int64)
        self._offsets = np.array([layout.part_offset(la, pa) for la, pa in segments], np.int64)
        self._segments = segments
        self._compiled = compiled
        if compiled:
            copy_kernels.start()

    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        # The forward is synchronous: what it wrote is there.
        self._copy(0, len(self._segments), move, to_arena=True)

    def load_layers(self, layers: range, move: PageMove) -> None:
        num_parts = len(self.layout.parts)
        self._copy(layers.start * num_parts, layers.stop * num_parts, move, to_arena=False)

    def _checked_slots(self, slots: torch.Tensor) -> torch.Tensor:
        # The kernels write through raw addresses: a wrong slot must not get there.
        return slots_within(slots, self.pool.num_slots)

    def _copy(self, first: int, end: int, move: PageMove, *, to_arena: bool) -> None:
        compiled = copy_kernels.ready() if self._compiled else None
        if compiled is None:
            self._copy_with_torch(first, end, move, to_arena)
            return
        kernel = compiled.spill_rows if to_arena else compiled.load_rows
        kernel(
            self._bases[first:end],
            self._row_bytes[first:end],
            self._offsets[first:end],
            move.arena.ctypes.data,
            move.slots.numpy(),
            move.offsets,
            self.layout.page_size,
        )

    def _copy_with_torch(self, first: int, end: int, move: PageMove, to_arena: bool) -> None:
        for segment in range(first, end):
            layer, part = self._segments[segment]
            offsets = move.offsets + self._offsets[segment]
            torch_copy_rows(self.pool.rows[layer][part], move, offsets, to_arena=to_arena)
