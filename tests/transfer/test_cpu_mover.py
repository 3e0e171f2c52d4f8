import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.transfer.compiling import KernelLoader, copy_kernels
from smg_sglang.transfer.cpu import CpuMover
from smg_sglang.transfer.movers import make_mover
from tests.transfer import worlds

KERNELS = ["compiled", "torch"]


def make_cpu_mover(pool, kernel):
    if kernel == "compiled" and not copy_kernels.wait():
        pytest.skip("no numba here")
    return CpuMover(pool, compiled=kernel == "compiled")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
@pytest.mark.parametrize(
    "shape",
    [
        {"kind": "mha", "heads": 3, "dim": 64},
        {"kind": "mha", "heads": 1, "dim": 64},
        {"kind": "mha", "heads": 2, "dim": 24, "v_dim": 16},
        {"kind": "mla", "dim": 576},
    ],
    ids=["tp1", "tp_shard", "k_dim_is_not_v_dim", "mla"],
)
def test_pages_come_back_byte_for_byte(kernel, page_size, shape):
    pool = worlds.make_pool(**shape, layers=2, slots=6 * page_size, page_size=page_size)
    arena, offsets = worlds.make_arena(pool, 3)
    slots = worlds.page_slots(pool, 3, seed=3)
    worlds.round_trip(
        pool, make_cpu_mover(pool, kernel), slots, worlds.page_slots(pool, 3), arena, offsets
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
    ],
)
def test_every_dtype_comes_back_byte_for_byte(kernel, dtype):
    pool = worlds.make_pool(dtype=dtype)
    arena, offsets = worlds.make_arena(pool, 5)
    slots = worlds.page_slots(pool, 5, seed=3)
    worlds.round_trip(
        pool, make_cpu_mover(pool, kernel), slots, worlds.page_slots(pool, 5), arena, offsets
    )


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["mha", "mla"]),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
    v_dim=st.integers(1, 9),
    layers=st.integers(1, 3),
    page_size=st.integers(1, 9),
    pages=st.integers(1, 5),
    gap=st.integers(0, 9),
    start=st.integers(0, 65),
    scattered=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape_at_any_offset_comes_back(  # noqa: PLR0917
    kernel, kind, heads, dim, v_dim, layers, page_size, pages, gap, start, scattered, dtype, seed
):
    pool = worlds.make_pool(
        kind, heads=heads, dim=dim, v_dim=v_dim, layers=layers, dtype=dtype,
        page_size=page_size, slots=2 * pages * page_size + 1,
    )  # fmt: skip
    arena, offsets = worlds.make_arena(pool, pages, gap=gap, start=start, seed=seed)
    slots = worlds.page_slots(pool, pages, seed=seed, scattered=scattered)
    back_to = worlds.page_slots(pool, pages, seed=seed + 1, scattered=not scattered)
    worlds.round_trip(pool, make_cpu_mover(pool, kernel), slots, back_to, arena, offsets)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_to_copy_is_fine(kernel):
    pool = worlds.make_pool()
    mover = make_cpu_mover(pool, kernel)
    arena, _ = worlds.make_arena(pool, 1)
    move = mover.prepare(torch.empty(0, dtype=torch.int64), arena, np.empty(0, np.int64))
    mover.spill(move)
    mover.load_layers(range(1), move)


def test_what_lies_outside_its_memory_is_refused():
    pool = worlds.make_pool(slots=64, page_size=4)
    mover = make_mover(pool)
    arena, offsets = worlds.make_arena(pool, 2)
    slots = worlds.page_slots(pool, 2)
    with pytest.raises(ValueError, match="8 slots for 1 pages"):
        mover.prepare(slots, arena, offsets[:1])
    with pytest.raises(ValueError, match="not in a pool of 64"):
        mover.prepare(torch.full_like(slots, 64), arena, offsets)
    with pytest.raises(ValueError, match="not in a pool of 64"):
        mover.prepare(slots - 64, arena, offsets)
    with pytest.raises(ValueError, match="do not fit an arena"):
        mover.prepare(slots, arena, offsets + 1)
    with pytest.raises(ValueError, match="need int64"):
        mover.prepare(slots.to(torch.int32), arena, offsets)
    with pytest.raises(ValueError, match="contiguous uint8"):
        mover.prepare(slots, arena[::2], offsets)


def test_python_runs_on_while_pages_are_copied():
    pool = worlds.make_pool(layers=8, heads=8, dim=128, page_size=16, slots=1024)
    mover = make_cpu_mover(pool, "compiled")
    arena, offsets = worlds.make_arena(pool, 64)
    move = mover.prepare(torch.arange(1024), arena, offsets)

    def this_thread_ran_before_the_copy_ended():
        ended = []
        thread = threading.Thread(target=lambda: (mover.spill(move), ended.append(True)))
        thread.start()  # returns when the other thread gives up the GIL
        ran = not ended
        thread.join()
        return ran

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # nobody is made to give up the GIL
    try:
        # A loaded machine may wake this thread too late, but not every time.
        assert any(this_thread_ran_before_the_copy_ended() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


def test_copies_are_right_while_the_kernels_are_still_compiled(monkeypatch):
    pool = worlds.make_pool()
    mover = CpuMover(pool)
    monkeypatch.setattr(copy_kernels, "_compiled", None)
    arena, offsets = worlds.make_arena(pool, 5)
    slots = worlds.page_slots(pool, 5, seed=3)
    worlds.round_trip(pool, mover, slots, worlds.page_slots(pool, 5), arena, offsets)


def test_without_numba_there_are_no_kernels_and_copies_go_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "smg_sglang.transfer.numba_rows", None)
    loader = KernelLoader("smg_sglang.transfer.numba_rows")
    assert not loader.wait()
    assert loader.ready() is None
