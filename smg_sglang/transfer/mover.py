"""The interface of what copies pages between the device pool and the arena."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from smg_sglang.transfer.layout import DevicePool

BeforeCopy = Callable[[], None]
"""Test hook: called on the copying thread before each copy."""


def random_delay(max_seconds: float, seed: int = 0) -> BeforeCopy:
    """A hook that sleeps a random time before each copy, to bring out missing waits."""
    rng = random.Random(seed)

    def delay() -> None:
        time.sleep(rng.random() * max_seconds)

    return delay


@dataclass(frozen=True, eq=False)
class PageMove:
    """Which slots belong to which host pages. Built by `Mover.prepare`, which checks it.

    Attributes:
        slots: int64 [num_pages * page_size]; token t of page p is in ``slots[p*page_size + t]``.
        arena: uint8, the whole mapping of the arena.
        offsets: int64 [num_pages], byte offset of each page in the arena.
        pool: which of several pools the slots are of (`joint`).
    """

    slots: torch.Tensor
    arena: np.ndarray
    offsets: np.ndarray
    pool: int = field(default=0, kw_only=True)

    @property
    def num_pages(self) -> int:
        return len(self.offsets)

    @staticmethod
    def joined(moves: Sequence[PageMove]) -> list[PageMove]:
        """The same copies with as few moves as arenas and pools, in order of first appearance."""
        by_arena: dict[tuple[int, int], list[PageMove]] = {}
        for move in moves:
            by_arena.setdefault((id(move.arena), move.pool), []).append(move)
        return [
            PageMove(
                torch.cat([m.slots for m in group]),
                group[0].arena,
                np.concatenate([m.offsets for m in group]),
                pool=group[0].pool,
            )
            if len(group) > 1
            else group[0]
            for group in by_arena.values()
        ]


def slots_within(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The slots, in one piece. Raises ValueError for one that a CPU pool of so many has not."""
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        raise ValueError(
            f"slots {int(slots.min())}..{int(slots.max())} are not in a pool of {num_slots}"
        )
    return slots.contiguous()


class Mark:
    """A point in the order of copies. On a CPU copies are done when they return: nothing to do."""

    def wait(self) -> None:
        """Let the caller's current stream wait for the point; the CPU does not wait."""

    def synchronize(self) -> None:
        """Let the CPU wait for the point."""

    def reached(self) -> bool:
        """Whether `synchronize` would not wait."""
        return True


REACHED = Mark()


class Mover(ABC):
    """Copies pages of one pool. One thread may load while others spill."""

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        self.layout = pool.layout

    @property
    def num_layers(self) -> int:
        """Layers that loads bring, one after another."""
        return self.layout.num_layers

    def bytes_of(self, moves: Sequence[PageMove]) -> int:
        """What all layers of their pages have."""
        return sum(move.num_pages for move in moves) * self.layout.page_bytes

    def prepare(self, slots: torch.Tensor, arena: np.ndarray, offsets: np.ndarray) -> PageMove:
        """Check what is to be copied; no bytes move. Any thread.

        Args:
            slots: int64 [n * page_size] on the pool's device.
            arena: uint8 [size of the mapping], C-contiguous.
            offsets: int64 [n], byte offset of each host page in ``arena``.

        Raises:
            ValueError: lengths do not fit, or a slot or a page lies outside its memory.
        """
        offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        if slots.dtype != torch.int64 or slots.dim() != 1:
            raise ValueError(f"slots are {slots.dtype} {tuple(slots.shape)}; need int64 [n]")
        if slots.numel() != len(offsets) * self.layout.page_size:
            raise ValueError(
                f"{slots.numel()} slots for {len(offsets)} pages of {self.layout.page_size} tokens"
            )
        if arena.dtype != np.uint8 or arena.ndim != 1 or not arena.flags.c_contiguous:
            raise ValueError("the arena must be one contiguous uint8 array")
        last = len(arena) - self.layout.page_bytes
        if len(offsets) and not 0 <= int(offsets.min()) <= int(offsets.max()) <= last:
            raise ValueError(
                f"pages at {int(offsets.min())}..{int(offsets.max())} do not fit an arena of "
                f"{len(arena)} bytes (a page has {self.layout.page_bytes})"
            )
        return PageMove(self._checked_slots(slots), arena, offsets)

    def prepare_in(
        self, pool: int, slots: torch.Tensor, arena: np.ndarray, offsets: np.ndarray
    ) -> PageMove:
        """As `prepare`, for one of several pools (`joint`)."""
        if pool != 0:
            raise ValueError(f"there is no pool {pool}")
        return self.prepare(slots, arena, offsets)

    def _checked_slots(self, slots: torch.Tensor) -> torch.Tensor:
        return slots.contiguous()

    @abstractmethod
    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        """Copy all layers of the slots into the pages; the bytes are there when it returns.

        Args:
            after: points the copy must come after; those of `fence`, where the caller has not
                waited for the forward that wrote the slots.
        """

    @abstractmethod
    def load_layers(self, layers: range, move: PageMove) -> None:
        """Copy some layers, one after another, of the pages into the slots: done (CPU) or enqueued
        (CUDA) on return."""

    def load_groups(self, moves: Sequence[PageMove]) -> list[range]:
        """All layers, in order, in groups that are loaded at once. A layer each, unless it takes
        less time to enqueue several together (CUDA)."""
        return [range(layer, layer + 1) for layer in range(self.layout.num_layers)]

    def fence(self) -> list[Mark]:
        """What copies started now must come after. Called on the scheduler thread."""
        return []

    def loading(
        self, moves: Sequence[PageMove], after: Sequence[Mark]
    ) -> AbstractContextManager[Sequence[PageMove]]:
        """Context in which one batch is loaded; it gives the moves to pass to `load_layers`."""
        return nullcontext(moves)

    def mark(self) -> Mark:
        """The point after all that was asked for so far in this context."""
        return REACHED

    def enqueues(self, moves: Sequence[PageMove]) -> bool:
        """Whether loading these only enqueues, so that no other thread is needed."""
        return False

    def pin(self, arena: np.ndarray) -> None:  # noqa: B027 (a CPU needs none)
        """Begin to page-lock an arena in the background. The first `prepare` does it, too."""

    def unpin(self, arena: np.ndarray) -> None:  # noqa: B027
        """Undo `pin`, and let go of the mapping. No copy of the arena may run."""

    def close(self) -> None:  # noqa: B027 (a CPU mover holds nothing)
        """Release what the mover holds. No copy may run."""
