"""Measures, when a worker starts on CUDA, which way of copying is faster.

On memory of its own, a few MiB on either side, so that no KV is touched; before there are requests,
so that no copies are in its way.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections import defaultdict

import numpy as np
import torch

from smg_sglang.transfer.copy_choice import CopyChoice, CopyMethods, CopyRates, Method, ordered
from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.layout import DevicePool, PageLayout
from smg_sglang.transfer.mover import PageMove
from smg_sglang.transfer.pinning import ArenaPins

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 8 << 20
"""Of host memory; twice that on the device. Some 2,000 tokens of one layer of an 8B model."""
MAX_PAGES = 256
"""Small pages cost time by number: each is a copy of its own."""
ROUNDS = 7
BUDGET_S = 0.1
"""No round begins after it. (Kernels that are not in Triton's cache are compiled before: a mover
does that in any case.)"""


def choose_copies(pool: DevicePool) -> CopyChoice:
    """As the environment orders, or else as measured with the pool's pages. Raises nothing: on any
    error the default is chosen, and the log says so."""
    try:
        return ordered(os.environ) or _measured(pool)
    except Exception as error:
        first_line = str(error).partition("\n")[0]  # CUDA's errors go on
        choice = CopyChoice(CopyMethods(), f"not measured: {type(error).__name__}: {first_line}")
        logger.warning("smg: ways of copying were %s; the default is %s", choice.why, choice)
        return choice


def _measured(pool: DevicePool) -> CopyChoice:
    began = time.perf_counter()
    load, spill = measure(pool)
    choice = CopyChoice.measured(load, spill)
    logger.info("smg: %s, chosen in %.0f ms", choice, 1e3 * (time.perf_counter() - began))
    return choice


def measure(pool: DevicePool) -> tuple[CopyRates, CopyRates]:
    """(loads, spills) of one layer of many pages at random places, medians on an idle device.

    One layer, because that is what a load copies at a time, K and V by one launch of the kernel. A
    spill of more layers is one launch, too. Figures hold the CPU's time to enqueue where the device
    waits for it, so by kernel larger spills are a little faster than measured, smaller ones slower.

    Raises:
        RuntimeError: CUDA's, or that it page-locks no memory.
    """
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

    def rate(method: Method, *, to_arena: bool) -> float:
        return arena.nbytes / float(np.median(seconds[method, to_arena])) / 1e9

    return (
        CopyRates(rate("kernel", to_arena=False), rate("copies", to_arena=False)),
        CopyRates(rate("kernel", to_arena=True), rate("copies", to_arena=True)),
    )


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
    return max(1, min(SCRATCH_BYTES // layout.layer_bytes, MAX_PAGES))


def _rounds(
    scratch: DevicePool, arena: np.ndarray, pages: int, pins: ArenaPins
) -> dict[tuple[Method, bool], list[float]]:
    """Seconds of each round, by method and whether to the arena. The methods take turns; a first
    round, which is not counted, warms up."""
    methods: tuple[Method, ...] = ("kernel", "copies")
    movers = {
        method: CudaMover(
            scratch, shared_pins=pins, methods=CopyMethods(method, method), ring_bytes=0
        )
        for method in methods
    }
    move = _random_move(movers["kernel"], arena, pages)
    seconds: dict[tuple[Method, bool], list[float]] = defaultdict(list)
    began = time.perf_counter()
    for number in range(ROUNDS + 1):
        if number > 1 and time.perf_counter() - began > BUDGET_S:
            break
        for method, mover in movers.items():
            for to_arena in (False, True):
                taken = mover.time_copy(move, to_arena=to_arena)
                if number:
                    seconds[method, to_arena].append(taken)
    return seconds


def _random_move(mover: CudaMover, arena: np.ndarray, pages: int) -> PageMove:
    page_size = mover.layout.page_size
    rng = np.random.default_rng(0)
    firsts = rng.permutation(2 * pages)[:pages] * page_size
    slots = torch.from_numpy((firsts[:, None] + np.arange(page_size)).reshape(-1))
    offsets = rng.permutation(pages) * mover.layout.page_bytes
    move = mover.prepare(slots.to(mover.pool.device), arena, offsets)
    for mark in mover.fence():
        mark.synchronize()
    return move
