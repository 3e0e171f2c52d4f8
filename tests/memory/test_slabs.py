import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.memory.slabs import PageAllocator, SlabPool, choose_slab_bytes

MIB = 1 << 20


def make_allocator(page_bytes: int = 1000, arena: int = 64 << 10, slab: int = 8192):
    pool = SlabPool(arena, slab)
    geometry = pool.geometry_for(page_bytes)
    assert geometry is not None
    return PageAllocator(geometry, pool), pool


def test_slabs_are_64_mib_or_an_eighth_of_a_small_arena():
    assert choose_slab_bytes(64 << 30) == 64 * MIB
    assert choose_slab_bytes(80 * MIB) == 10 * MIB
    assert choose_slab_bytes(10_000) == 4096


def test_a_page_larger_than_a_slab_gets_a_run_of_slabs():
    geometry = SlabPool(1 << 30, 64 * MIB).geometry_for(80 * MIB)
    assert geometry is not None
    assert geometry.slab_bytes % (64 * MIB) == 0
    assert geometry.pages_per_slab * 80 * MIB <= geometry.slab_bytes


def test_a_page_as_large_as_the_arena_fits_and_a_larger_one_does_not():
    pool = SlabPool(1 << 30, 64 * MIB)
    geometry = pool.geometry_for(1 << 30)
    assert geometry is not None and geometry.pages_per_slab == 1
    assert pool.geometry_for((1 << 30) + 1) is None


@given(page_mib=st.integers(1, 130))
def test_slabs_waste_an_eighth_of_their_bytes_at_most(page_mib):
    geometry = SlabPool(64 << 30, 64 * MIB).geometry_for(page_mib * MIB)
    assert geometry is not None
    used = geometry.pages_per_slab * geometry.page_bytes
    assert used >= geometry.slab_bytes * 7 / 8


def test_offsets_of_pages_do_not_overlap_and_stay_inside():
    allocator, pool = make_allocator()
    pages = allocator.take(1000)
    offsets = np.sort(allocator.geometry.offsets(pages))
    assert len(pages) == 8 * 8
    assert (np.diff(offsets) >= 1000).all()
    assert offsets[-1] + 1000 <= pool.num_slabs * pool.slab_bytes
    assert offsets.dtype == np.int64


def test_lowest_pages_come_first_and_in_order():
    allocator, _ = make_allocator()
    first = allocator.take(10)
    assert first.tolist() == list(range(10))
    allocator.give(first[[4, 2, 3]])
    assert allocator.take(4).tolist() == [2, 3, 4, 10]


def test_an_empty_slab_goes_back_to_the_pool():
    allocator, pool = make_allocator()
    pages = allocator.take(9)
    assert pool.num_free == 6
    allocator.give(pages[8:])
    assert pool.num_free == 7
    allocator.give(pages[:8])
    assert pool.num_free == 8
    assert pool.high_water == 2


def test_freeing_a_free_page_is_refused():
    allocator, _ = make_allocator()
    pages = allocator.take(3)
    allocator.give(pages[:1])
    with pytest.raises(ValueError, match="freed again"):
        allocator.give(pages)
    with pytest.raises(ValueError, match="being written"):
        allocator.mark_ready(pages)
    allocator.check_invariants()


def test_runs_of_slabs_are_aligned():
    pool = SlabPool(8 * 4096, 4096)
    assert pool.take(1) == 0
    assert pool.take(4) == 1
    assert pool.take(4) is None
    pool.give(0, 1)
    assert pool.take(4) == 0


def test_while_the_arena_may_not_grow_only_used_slabs_are_given_out():
    pool = SlabPool(8 * 4096, 4096, lambda end_bytes: end_bytes <= 2 * 4096)
    assert (pool.take(1), pool.take(1), pool.take(1)) == (0, 1, None)
    pool.give(0, 1)
    assert (pool.take(1), pool.take(1)) == (0, None)
    assert (pool.high_water, pool.num_free) == (2, 6)


@given(st.lists(st.integers(-20, 20), max_size=40), st.randoms())
def test_taking_and_giving_loses_no_page(steps, random):
    allocator, pool = make_allocator(page_bytes=700)
    held: list[int] = []
    for step in steps:
        if step > 0:
            taken = allocator.take(step).tolist()
            assert not set(taken) & set(held)
            assert len(taken) == min(step, 88 - len(held))
            held += taken
        elif held:
            random.shuffle(held)
            allocator.give(np.array(held[step:], dtype=np.int64))
            del held[step:]
        allocator.check_invariants()
    allocator.give(np.array(held, dtype=np.int64))
    assert pool.num_free == pool.num_slabs
