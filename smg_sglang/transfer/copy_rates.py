"""How fast a worker on CUDA moves pages, measured when it starts.

On memory of its own, so that no KV is touched; before there are requests, so that no copies are in
its way.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.layout import DevicePool, PageLayout
from smg_sglang.transfer.mover import PageMove
from smg_sglang.transfer.pinning import ArenaPins

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 64 << 20
"""Of host memory; twice that on the device. Some 16,000 tokens of one layer of an 8B model."""
SMALL_SHARE = 8
"""A move of so many times fewer pages is taken off: what a launch costs, whatever it moves. With a
few MiB and nothing taken off, half of the rate of large moves was seen on an H100."""
ROUNDS = 5
BUDGET_S = 0.1
"""No round begins after it. (Kernels that are not in Triton's cache are compiled before: a mover
does that in any case.)"""


@dataclass(frozen=True)
class CopyRates:
    """Of large moves on an idle device, in 10^9 bytes/s; `why_not` in words where nothing was
    measured."""

    load_gbps: float | None = None
    spill_gbps: float | None = None
    why_not: str | None = None

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows."""
        return asdict(self)

    def __str__(self) -> str:
        return self.why_not or f"loads {self.load_gbps:.1f} GB/s, spills {self.spill_gbps:.1f} GB/s"


def measure_copies(pool: DevicePool) -> CopyRates:
    """As measured with the pool's pages. Raises nothing: on any error the log says so."""
    began = time.perf_counter()
    try:
        rates = _measure(pool)
    except Exception as error:
        first_line = str(error).partition("\n")[0]  # CUDA's errors go on
        rates = CopyRates(why_not=f"not measured: {type(error).__name__}: {first_line}")
        logger.warning("smg: the rates of copies were %s", rates)
        return rates
    logger.info("smg: %s, measured in %.0f ms", rates, 1e3 * (time.perf_counter() - began))
    return rates


def _measure(pool: DevicePool) -> CopyRates:
    """One layer of many pages at random places, medians. Raises RuntimeError: CUDA's, or that it
    page-locks no memory."""
    scratch = _one_layer(pool)
    pages = num_pages(pool.layout)
    arena = np.frombuffer(mmap.mmap(-1, pages * scratch.layout.page_bytes), np.uint8)
    pins = ArenaPins()
    try:
        pins.pin(arena, pool.device)
        if not pins.wait(arena):
            raise RuntimeError("the driver does not page-lock memory")
        seconds = _rounds(scratch, arena, pages, pins)
    finally:
        pins.close()
    return CopyRates(_rate(seconds, arena, False), _rate(seconds, arena, True))


def _rate(seconds: dict[tuple[bool, bool], list[float]], arena: np.ndarray, spills: bool) -> float:
    small, large = (float(np.median(seconds[spills, is_large])) for is_large in (False, True))
    return arena.nbytes * (1 - 1 / SMALL_SHARE) / max(large - small, 1e-9) / 1e9


def _one_layer(pool: DevicePool) -> DevicePool:
    """Rows of the pool's lengths for twice as many pages as are copied, so that they lie apart."""
    layout = pool.layout
    slots = 2 * num_pages(layout) * layout.page_size
    parts = {
        part.name: [torch.zeros(slots, 1, part.row_bytes, dtype=torch.uint8, device=pool.device)]
        for part in layout.parts
    }
    return DevicePool(parts, layout.page_size)


def num_pages(layout: PageLayout) -> int:
    """How many pages are copied to measure."""
    return max(1, SCRATCH_BYTES // layout.layer_bytes // SMALL_SHARE) * SMALL_SHARE


def _rounds(
    scratch: DevicePool, arena: np.ndarray, pages: int, pins: ArenaPins
) -> dict[tuple[bool, bool], list[float]]:
    """Seconds of each round, by whether to the arena and whether all pages. A first round, which
    is not counted, warms up."""
    mover = CudaMover(scratch, shared_pins=pins, ring_bytes=0)
    moves = [_random_move(mover, arena, count) for count in (pages // SMALL_SHARE, pages)]
    seconds: dict[tuple[bool, bool], list[float]] = defaultdict(list)
    began = time.perf_counter()
    for number in range(ROUNDS + 1):
        if number > 1 and time.perf_counter() - began > BUDGET_S:
            break
        for is_large, move in enumerate(moves):
            for to_arena in (False, True):
                taken = mover.time_copy(move, to_arena=to_arena)
                if number:
                    seconds[to_arena, bool(is_large)].append(taken)
    return seconds


def _random_move(mover: CudaMover, arena: np.ndarray, pages: int) -> PageMove:
    page_size, rng = mover.layout.page_size, np.random.default_rng(0)
    firsts = rng.permutation(mover.pool.num_slots // page_size)[:pages] * page_size
    slots = torch.from_numpy((firsts[:, None] + np.arange(page_size)).reshape(-1))
    places = rng.permutation(arena.nbytes // mover.layout.page_bytes)[:pages]
    move = mover.prepare(slots.to(mover.pool.device), arena, places * mover.layout.page_bytes)
    for mark in mover.fence():
        mark.synchronize()
    return move
