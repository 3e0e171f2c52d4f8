"""The CUDA mover on a CPU: streams and events do nothing, the kernel is interpreted.

Shows that the right bytes are asked for; ordering on a device is for tests/gpu.
"""

import os
import re
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fake_cuda import Driver, set_device
from tests.interpreter import interpreted
from tests.transfer import worlds


class Nothing:
    """A stream or an event of a device that has finished everything."""

    def __init__(self, *_args, **_options):
        pass

    def record(self, *_):
        pass

    def wait_event(self, *_):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "Stream", Nothing)
    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with interpreted(monkeypatch, "smg_sglang.transfer.triton_rows"):
        yield driver


SHAPES = [
    {"kind": "mha", "heads": 3, "dim": 64},
    {"kind": "mha", "heads": 1, "dim": 5, "v_dim": 3},
    {"kind": "mla", "dim": 72},
    {"kind": "states"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=["tp1", "odd", "mla", "states"])
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("scattered", [True, False])
def test_pages_come_back_byte_for_byte(driver, shape, pinned, scattered):
    from smg_sglang.transfer.cuda import CudaMover

    pool = worlds.make_pool(**shape, layers=2, page_size=4, slots=65)
    arena, offsets = worlds.make_arena(pool, 7, gap=2)
    # A ring so small that a staged move goes through it in several chunks.
    ring_bytes = 2 * pool.layout.page_bytes
    mover = CudaMover(pool, pins=pinned, programs=2, ring_bytes=ring_bytes)
    if pinned:
        mover.pin(arena)
        assert mover.wait_pinned(arena)
    slots = worlds.page_slots(pool, 7, scattered=scattered)
    back_to = worlds.page_slots(pool, 7, seed=5, scattered=scattered)
    move = mover.prepare(slots, arena, offsets)
    assert mover.enqueues([move]) is pinned
    worlds.round_trip(pool, mover, slots, back_to, arena, offsets)
    mover.close()
    assert not driver.registered


@pytest.mark.parametrize("shape", SHAPES, ids=["tp1", "odd", "mla", "states"])
def test_other_ways_to_copy_move_the_same_bytes(driver, shape):
    """Those of `bench/copy_candidates.py`, in several chunks where they have a buffer."""
    from bench.copy_candidates import StagedMover, candidates
    from smg_sglang.transfer.pinning import ArenaPins

    pool = worlds.make_pool(**shape, layers=2, page_size=4, slots=65)
    pins = ArenaPins()
    made = {name: make() for name, make in candidates(pool, pins).items()}
    made["three pages at once"] = StagedMover(
        pool, staged_bytes=3 * pool.layout.page_bytes, shared_pins=pins
    )
    assert len(made) == 7
    page = pool.layout.page_size
    pages = min(7, pool.num_slots // page)
    for seed, mover in enumerate(made.values()):
        pool = worlds.make_pool(**shape, layers=2, page_size=4, slots=65, seed=seed)
        for mine, fresh in zip(mover.pool.rows, pool.rows, strict=True):
            for rows, other in zip(mine, fresh, strict=True):
                rows.copy_(other)
        arena, offsets = worlds.make_arena(pool, pages, gap=2)
        mover.pin(arena)
        assert mover.wait_pinned(arena)
        slots = worlds.page_slots(pool, pages)
        back_to = worlds.page_slots(pool, pages, seed=5)
        worlds.round_trip(mover.pool, mover, slots, back_to, arena, offsets)
        mover.unpin(arena)
        mover.close()
    pins.close()


def test_what_the_driver_refuses_to_lock_is_staged(driver, monkeypatch):
    from smg_sglang.transfer import pinning
    from smg_sglang.transfer.cuda import CudaMover

    pool = worlds.make_pool(page_size=4)
    arena, offsets = worlds.make_arena(pool, 6)
    monkeypatch.setattr(pinning, "PIECE_BYTES", pool.layout.page_bytes)
    driver.limit = 3 * pool.layout.page_bytes
    mover = CudaMover(pool)
    mover.pin(arena)
    assert not mover.wait_pinned(arena)
    low = np.sort(offsets)[:3]
    assert mover.enqueues([mover.prepare(worlds.page_slots(pool, 3), arena, low)])
    assert not mover.enqueues([mover.prepare(worlds.page_slots(pool, 6), arena, offsets)])
    mover.unpin(arena)
    assert not driver.registered


def test_batches_that_only_enqueue_need_no_thread_but_never_overtake_one(driver):
    from smg_sglang.transfer.cuda import CudaMover
    from smg_sglang.transfer.layer_loads import LayerLoads

    pool = worlds.make_pool(page_size=4)
    arena, offsets = worlds.make_arena(pool, 3)
    mover = CudaMover(pool)
    loads = LayerLoads(mover)
    slots = worlds.page_slots(pool, 3)
    mover.pin(arena)
    mover.wait_pinned(arena)
    loads.queue("a", slots, arena, offsets)
    index = loads.start()
    assert loads.counter.events[index].settled  # by this thread, before start returned
    assert loads.finish(index)
    loads.close()
    mover.close()


@pytest.mark.parametrize("to_arena", [True, False])
@pytest.mark.parametrize(
    ("unit", "row_words", "access"),
    [(16, 256, "v2.b64"), (16, 144, "v2.b64"), (8, 25, "b64"), (1, 15, "b8")],
)
def test_the_kernel_compiles_for_hopper_without_a_gpu(unit, row_words, access, to_arena):
    """To accesses as wide as addresses allow, on both sides."""
    compiled = compile_for_hopper(unit, row_words, to_arena=to_arena)
    accesses = set(re.findall(r"(ld|st)\.global\.([\w.]+)", compiled.asm["ptx"]))
    # Numbers of slots and pages are read one by one.
    assert accesses == {("ld", "b64"), ("ld", access), ("st", access)}


@pytest.mark.parametrize(("tile_words", "warps"), [(2048, 4), (1024, 4), (4096, 8)])
@pytest.mark.parametrize("to_arena", [True, False])
def test_no_tile_spills_registers(tile_words, warps, to_arena):
    """What ptxas says of the kernel, and of the tiles that `bench/copy_candidates.py` tries."""
    compiled = compile_for_hopper(
        16, 256, to_arena=to_arena, tile_words=tile_words, num_warps=warps
    )
    said = ptxas_report(compiled.asm["ptx"])
    assert re.search(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), said
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    assert registers * 32 * warps <= 65536 // 4, "room for other blocks on an SM"


def compile_for_hopper(unit, row_words, *, to_arena, tile_words=None, **options):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from smg_sglang.transfer.triton_rows import TILE_WORDS, WORDS, _move_tiles

    width = triton.next_power_of_2(row_words)
    numbers = {"table": "*i64", "slots": "*i64", "pages": "*i64", "num_rows": "i32", "num_tokens": "i32"}  # fmt: skip
    constants = {
        "word": WORDS[unit], "unit": unit, "row_words": row_words, "page_size": 16,
        "rows_per_tile": (tile_words or TILE_WORDS) // width, "words_per_tile": width,
        "to_arena": to_arena,
    }  # fmt: skip
    source = ASTSource(
        fn=_move_tiles,
        signature=numbers | dict.fromkeys(constants, "constexpr"),
        constexprs={(len(numbers) + i,): value for i, value in enumerate(constants.values())},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "cubin" in compiled.asm
    return compiled


def ptxas_report(ptx):
    """Triton brings the assembler."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", "-o", os.devnull, source]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr


@pytest.fixture
def hopper(monkeypatch):
    """Kernels are compiled for a device that is not there, and not launched."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())


@pytest.mark.parametrize("to_arena", [True, False])
def test_one_compilation_serves_all_numbers_and_places(hopper, monkeypatch, to_arena):
    """Or a kernel would be compiled while a request waits."""
    from smg_sglang.transfer import triton_rows

    kernel = triton_rows._move_tiles
    monkeypatch.setattr(
        kernel, "run", lambda *args, warmup, run=kernel.run, **more: run(*args, warmup=True, **more)
    )
    kernel.device_caches.clear()
    table, numbers = torch.zeros(64, 2, dtype=torch.int64), torch.zeros(2000, dtype=torch.int64)
    for pages, first in [(0, 0), (1, 0), (1, 1), (2, 3), (16, 0), (1984, 5)]:
        triton_rows.move_rows(
            table[first:],
            numbers[first : first + pages],
            numbers[first : first + pages],
            row_bytes=2048,
            page_size=1,
            unit=16,
            programs=16,
            to_arena=to_arena,
        )
    compiled, *_ = kernel.device_caches[0]
    assert len(compiled) == 1
