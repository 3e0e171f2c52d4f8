"""Pages that hold fp8 while the device computes with more: half the bytes of bfloat16 or less.

Copies go through a small pool of narrow rows on the device, so that pages are moved as ever: a
spill rounds the slots' rows into it and copies these, a load copies a layer of pages into it and
widens the rows where they belong. On CUDA all of that is enqueued, in the order of the copies'
streams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from smg_sglang.errors import ConfigError
from smg_sglang.transfer.compiling import fp8_kernels
from smg_sglang.transfer.fp8_rows import FP8, narrow_rows, widen_rows
from smg_sglang.transfer.layout import DTYPES, DevicePool, PageLayout, Part
from smg_sglang.transfer.mover import Mark, Mover, PageMove, slots_within

WIDE = ("bfloat16", "float16", "float32")
STAGED_BYTES = 16 << 20
"""Of the device's memory, for spills and for loads each: some pages, or a layer of more."""


def host_layout(layout: PageLayout, *, narrow: bool) -> PageLayout:
    """How pages of a pool lie in host memory; narrow ones have fp8 in a row, and behind all rows
    of a layer their scales, one a head.

    Raises:
        ConfigError: there is nothing to round.
    """
    if not narrow:
        return layout
    if layout.dtype not in WIDE:
        raise ConfigError(
            f"--smg-host-dtype fp8 rounds {', '.join(WIDE)}, but the KV of this model is stored as "
            f"{layout.dtype}; leave it out."
        )
    values = [Part(part.name, part.heads, part.dim, 1) for part in layout.parts]
    scales = [Part(f"{part.name}_scale", part.heads, 1, 1) for part in layout.parts]
    return PageLayout((*values, *scales), layout.num_layers, layout.page_size, DTYPES[FP8])


class _Staging:
    """Narrow rows of some pages: of all layers, or of one after another in the same place."""

    def __init__(
        self, layout: PageLayout, device: torch.device, make: Callable[[DevicePool], Mover],
        *, layers: int,
    ) -> None:  # fmt: skip
        self.pages = max(1, STAGED_BYTES // (layers * layout.layer_bytes))
        slots = self.pages * layout.page_size
        self.layers = [
            [
                torch.empty(slots, part.heads, part.dim, dtype=torch.uint8, device=device)
                for part in layout.parts
            ]
            for _ in range(layers)
        ]
        columns = {
            part.name: [self.layers[layer % layers][at] for layer in range(layout.num_layers)]
            for at, part in enumerate(layout.parts)
        }
        self.slots = torch.arange(slots, device=device)
        self.mover = make(DevicePool(columns, layout.page_size, FP8))

    def rows(self, layer: int, part: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, scales) of the first tokens of a part."""
        parts = self.layers[layer % len(self.layers)]
        return parts[part][:tokens], parts[len(parts) // 2 + part][:tokens]


@dataclass(frozen=True, eq=False)
class _Staged(PageMove):
    """A load as it is carried out, in pieces of the staging rows.

    Attributes:
        pieces: for each the slots they end in, and the copy to the staging rows before.
    """

    pieces: Sequence[tuple[torch.Tensor, PageMove]] = ()


class NarrowMover(Mover):
    """`Mover` of a float pool, with pages of fp8. One thread may load while others spill.

    Args:
        make: makes the mover of a staging pool; of loads first, then of spills.
    """

    def __init__(self, pool: DevicePool, make: Callable[[DevicePool], Mover]) -> None:
        super().__init__(pool)
        self.layout = host_layout(pool.layout, narrow=True)
        dtype = next(dtype for dtype, name in DTYPES.items() if name == pool.layout.dtype)
        self._rows = [
            [
                rows.view(dtype).view(pool.num_slots, part.heads, part.dim)
                for rows, part in zip(layer, pool.layout.parts, strict=True)
            ]
            for layer in pool.rows
        ]
        self._loads = _Staging(self.layout, pool.device, make, layers=1)
        self._spills = _Staging(self.layout, pool.device, make, layers=self.layout.num_layers)
        self._spilling = threading.Lock()
        if pool.device.type == "cpu":
            fp8_kernels.start()

    @property
    def loads(self) -> Mover:
        """What copies loads to their staging rows: a mover of another pool can be beside it."""
        return self._loads.mover

    def prepare(self, slots: torch.Tensor, arena: np.ndarray, offsets: np.ndarray) -> PageMove:
        move = super().prepare(slots, arena, offsets)
        self.pin(arena)
        return move

    def _checked_slots(self, slots: torch.Tensor) -> torch.Tensor:
        if self.pool.device.type == "cpu":
            return slots_within(slots, self.pool.num_slots)
        return slots.contiguous()

    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        with self._spilling:
            mover = self._spills.mover
            for slots, piece in self._pieces(move, self._spills):
                with mover.loading([], after):  # its stream, where it has one
                    self._narrow(slots)
                    rounded = mover.mark()
                mover.spill(piece, [rounded])

    def _narrow(self, slots: torch.Tensor) -> None:
        _keep(slots)
        for layer, parts in enumerate(self._rows):
            for part, rows in enumerate(parts):
                narrow_rows(rows, slots, *self._spills.rows(layer, part, len(slots)))

    @contextmanager
    def loading(
        self, moves: Sequence[PageMove], after: Sequence[Mark]
    ) -> Iterator[Sequence[PageMove]]:
        pieces = [list(self._pieces(move, self._loads)) for move in moves]
        copies = [piece for mine in pieces for _, piece in mine]
        with self._loads.mover.loading(copies, after) as begun:
            left = iter(begun)
            yield [
                _Staged(
                    move.slots,
                    move.arena,
                    move.offsets,
                    pool=move.pool,
                    pieces=[(slots, next(left)) for slots, _ in mine],
                )
                for move, mine in zip(moves, pieces, strict=True)
            ]

    def load_layers(self, layers: range, move: PageMove) -> None:
        assert isinstance(move, _Staged), "layers are loaded inside `loading`"
        for layer in layers:
            for slots, piece in move.pieces:
                self._loads.mover.load_layers(range(layer, layer + 1), piece)
                _keep(slots)
                for part, rows in enumerate(self._rows[layer]):
                    widen_rows(*self._loads.rows(layer, part, len(slots)), rows, slots)

    def _pieces(self, move: PageMove, staging: _Staging) -> Iterator[tuple[torch.Tensor, PageMove]]:
        """(slots of the pool, the copy of their staging rows), as many pages at once as fit."""
        size = self.layout.page_size
        for first in range(0, move.num_pages, staging.pages):
            offsets = move.offsets[first : first + staging.pages]
            slots = move.slots[first * size : (first + len(offsets)) * size]
            staged = staging.slots[: len(slots)]
            yield slots, PageMove(staged, move.arena, offsets)

    def fence(self) -> list[Mark]:
        return self._loads.mover.fence()

    def mark(self) -> Mark:
        return self._loads.mover.mark()

    def enqueues(self, moves: Sequence[PageMove]) -> bool:
        return self._loads.mover.enqueues(moves)

    def pin(self, arena: np.ndarray) -> None:
        self._loads.mover.pin(arena)

    def unpin(self, arena: np.ndarray) -> None:
        self._loads.mover.unpin(arena)

    def close(self) -> None:
        self._loads.mover.close()
        self._spills.mover.close()


def _keep(slots: torch.Tensor) -> None:
    """The caller may drop the slots while the stream still reads them."""
    if slots.is_cuda:
        slots.record_stream(torch.cuda.current_stream())
