"""Which pages of the arena are free: slabs for page sizes, pages within slabs. Books only."""

import heapq
from collections.abc import Callable

import numpy as np

from smg_sglang.memory.arena import PageGeometry

DEFAULT_SLAB_BYTES = 64 << 20
_GRAIN = 4096  # slabs start on memory pages
_MAX_WIDTH = 16
_WASTE_SHARE = 16  # a slab may waste 1/16 of its bytes at its end

FREE, WRITING, READY = 0, 1, 2


def grow_freely(end_bytes: int) -> bool:
    """Any part of the arena may be used for the first time."""
    return True


def choose_slab_bytes(arena_bytes: int) -> int:
    """64 MiB, or an eighth of a small arena."""
    eighth = arena_bytes // 8 // _GRAIN * _GRAIN
    return max(_GRAIN, min(DEFAULT_SLAB_BYTES, eighth))


class SlabPool:
    """The arena cut into equal slabs, given out lowest first in aligned runs of `width`."""

    def __init__(
        self,
        arena_bytes: int,
        slab_bytes: int | None,
        may_grow: Callable[[int], bool] = grow_freely,
    ) -> None:
        """`slab_bytes`: None for a size that suits the arena.

        `may_grow` is asked before the arena is used up to a byte beyond what ever was.
        """
        self.slab_bytes = slab_bytes = slab_bytes or choose_slab_bytes(arena_bytes)
        self._may_grow = may_grow
        self._free = np.ones(arena_bytes // slab_bytes, dtype=bool)
        self.high_water = 0
        """Slabs below this number have been given out at some time."""

    @property
    def num_slabs(self) -> int:
        """Slabs in all."""
        return len(self._free)

    @property
    def num_free(self) -> int:
        """Slabs that belong to no page size."""
        return int(np.count_nonzero(self._free))

    def take(self, width: int) -> int | None:
        """The number, in units of `width` slabs, of a run that is the caller's now.

        None if there is none, or none that was used before while the arena may not grow.
        """
        whole = len(self._free) // width * width
        runs = self._free[:whole].reshape(-1, width).all(axis=1)
        if not runs.any():
            return None
        run = int(runs.argmax())  # the lowest: if it is new, so are all others
        end = (run + 1) * width
        if end > self.high_water:
            if not self._may_grow(end * self.slab_bytes):
                return None
            self.high_water = end
        self._free[run * width : end] = False
        return run

    def give(self, run: int, width: int) -> None:
        """Take a run back."""
        self._free[run * width : (run + 1) * width] = True

    def geometry_for(self, page_bytes: int) -> PageGeometry | None:
        """How pages of this size lie in slabs; None if not even one fits.

        The narrowest run of slabs that wastes little; the one that wastes least if none does.
        """
        widths = range(1, min(_MAX_WIDTH, self.num_slabs) + 1)
        fitting = [w for w in widths if w * self.slab_bytes >= page_bytes]
        if not fitting:
            # One page alone is wider than that: as many as it takes.
            width = -(-page_bytes // self.slab_bytes)
            fitting = [width] if width <= self.num_slabs else []
        if not fitting:
            return None

        def waste(width: int) -> float:
            return (width * self.slab_bytes) % page_bytes / (width * self.slab_bytes)

        good = [w for w in fitting if waste(w) <= 1 / _WASTE_SHARE]
        slab_bytes = (good[0] if good else min(fitting, key=waste)) * self.slab_bytes
        return PageGeometry(slab_bytes, slab_bytes // page_bytes, page_bytes)


class PageAllocator:
    """The pages of one size: takes slabs from the pool, returns those that are all free.

    Lowest numbers first, so that high slabs run empty and can change their page size.
    """

    def __init__(self, geometry: PageGeometry, pool: SlabPool) -> None:
        self.geometry = geometry
        self._pool = pool
        self._width = geometry.slab_bytes // pool.slab_bytes
        slots = pool.num_slabs // self._width * geometry.pages_per_slab
        self.states = np.zeros(slots, dtype=np.uint8)
        self._free: dict[int, list[np.ndarray]] = {}  # slab -> stacks of ascending free pages
        self._counts: dict[int, int] = {}  # slab -> free pages in it
        self._open: list[int] = []  # heap of slabs with free pages; may hold stale entries
        self.num_free = 0

    @property
    def num_pages(self) -> int:
        """Pages in the slabs held, in any state."""
        return len(self._counts) * self.geometry.pages_per_slab

    @property
    def num_slabs(self) -> int:
        """Slabs held."""
        return len(self._counts)

    def take(self, n: int) -> np.ndarray:
        """Up to `n` pages (int64), WRITING now; fewer when slabs have run out. Never evicts."""
        parts = []
        while n > 0:
            slab = self._lowest_open()
            if slab is None:
                break
            part = self._take_from(slab, n)
            n -= len(part)
            parts.append(part)
        pages = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self.states[pages] = WRITING
        return pages

    def mark_ready(self, pages: np.ndarray) -> None:
        """WRITING -> READY."""
        if not (self.states[pages] == WRITING).all():
            raise ValueError("only a page that is being written can become ready")
        self.states[pages] = READY

    def give(self, pages: np.ndarray) -> None:
        """Free `pages` (int64[n], WRITING or READY)."""
        if not len(pages):
            return
        if (self.states[pages] == FREE).any():
            raise ValueError("a free page was freed again")
        self.states[pages] = FREE
        pages = np.sort(pages)
        slabs = pages // self.geometry.pages_per_slab
        for part in np.split(pages, np.flatnonzero(np.diff(slabs)) + 1):
            self._give_to(int(part[0]) // self.geometry.pages_per_slab, part)

    def _take_from(self, slab: int, n: int) -> np.ndarray:
        stack = self._free[slab][-1]
        part, rest = stack[:n], stack[n:]
        if len(rest):
            self._free[slab][-1] = rest
        else:
            self._free[slab].pop()
        self._counts[slab] -= len(part)
        self.num_free -= len(part)
        return part

    def _give_to(self, slab: int, part: np.ndarray) -> None:
        if not self._counts[slab]:
            heapq.heappush(self._open, slab)
        self._free[slab].append(part)
        self._counts[slab] += len(part)
        self.num_free += len(part)
        if self._counts[slab] == self.geometry.pages_per_slab:
            del self._counts[slab], self._free[slab]
            self.num_free -= self.geometry.pages_per_slab
            self._pool.give(slab, self._width)

    def _lowest_open(self) -> int | None:
        while self._open:
            if self._counts.get(self._open[0], 0):
                return self._open[0]
            heapq.heappop(self._open)
        slab = self._pool.take(self._width)
        if slab is not None:
            self._open_slab(slab)
        return slab

    def _open_slab(self, slab: int) -> None:
        per_slab = self.geometry.pages_per_slab
        self._free[slab] = [np.arange(slab * per_slab, (slab + 1) * per_slab, dtype=np.int64)]
        self._counts[slab] = per_slab
        self.num_free += per_slab
        heapq.heappush(self._open, slab)

    def check_invariants(self) -> None:
        """Raise AssertionError if a page is in two states or none."""
        free = [np.concatenate(stacks) for stacks in self._free.values() if stacks]
        pages = np.concatenate(free) if free else np.empty(0, np.int64)
        assert len(pages) == len(np.unique(pages)) == self.num_free, "a page is free twice"
        assert (self.states[pages] == FREE).all(), "a free page is in use"
        used = np.count_nonzero(self.states)
        assert used + self.num_free == self.num_pages, "a page was lost"
        assert set(self._counts) == set(self._free), "a slab without books"
        for slab, count in self._counts.items():
            assert count == sum(map(len, self._free[slab])), f"slab {slab} miscounts"
            assert not count or slab in self._open, f"slab {slab} has free pages but is not open"
