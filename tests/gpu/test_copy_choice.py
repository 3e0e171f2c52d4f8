"""Both ways of copying, and the choice between them, on a real device. Skipped without one."""

import time

import numpy as np
import pytest
import torch

from smg_sglang.transfer.copy_choice import VARIABLE, CopyMethods
from smg_sglang.transfer.copy_measure import BUDGET_S, choose_copies
from smg_sglang.transfer.cuda import CudaMover
from tests.transfer import worlds

pytestmark = pytest.mark.gpu

SHAPES = [
    {"heads": 8, "dim": 128, "page_size": 16},
    {"heads": 1, "dim": 128, "page_size": 16},
    {"heads": 8, "dim": 128, "page_size": 128},
    {"heads": 3, "dim": 64, "page_size": 1},
    {"kind": "mla", "dim": 576, "page_size": 64},
]
IDS = ["8B", "8B tp8", "page128", "page1", "mla"]
PAGES = 8


@pytest.fixture(params=SHAPES, ids=IDS)
def pool(request):
    slots = 2 * PAGES * request.param["page_size"]
    return worlds.make_pool(**request.param, slots=slots, device="cuda")


@pytest.fixture
def make_mover():
    made = []

    def make(pool, method, arena):
        mover = CudaMover(pool, methods=CopyMethods(method, method), ring_bytes=1 << 20)
        made.append(mover)
        mover.pin(arena)
        assert mover.wait_pinned(arena)
        return mover

    yield make
    torch.cuda.synchronize()
    for mover in made:
        mover.close()


def test_both_methods_copy_the_same_bytes_in_both_directions(pool, make_mover):
    slots = worlds.page_slots(pool, PAGES).cuda()
    before = worlds.gathered(pool, slots)
    spilled, loaded = {}, {}
    for method in ("kernel", "copies"):
        arena, offsets = worlds.make_arena(pool, PAGES)
        mover = make_mover(pool, method, arena)
        move = mover.prepare(slots, arena, offsets)
        mover.spill(move)
        spilled[method] = worlds.pages_in(pool, arena, offsets)
        worlds.clear(pool)
        worlds.load(mover, move)
        loaded[method] = worlds.gathered(pool, slots)
    np.testing.assert_array_equal(spilled["kernel"], spilled["copies"])
    for one, other, want in zip(loaded["kernel"], loaded["copies"], before, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, want)


def test_a_choice_is_measured_soon_and_touches_no_kv(pool, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    choose_copies(pool)  # the first compiles the kernels
    before = worlds.gathered(pool, slice(None))
    began = time.perf_counter()
    choice = choose_copies(pool)
    seconds = time.perf_counter() - began
    print(f"\n{choice}: {1e3 * seconds:.0f} ms")
    assert choice.why == "measured"
    for rates, method in (
        (choice.load_gbps, choice.methods.load),
        (choice.spill_gbps, choice.methods.spill),
    ):
        assert rates.kernel > 0 and rates.copies > 0
        assert method == rates.better()
    assert seconds < 10 * BUDGET_S, "a start is held up"
    for have, want in zip(worlds.gathered(pool, slice(None)), before, strict=True):
        np.testing.assert_array_equal(have, want)
