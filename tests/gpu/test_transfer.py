"""Copies on a real CUDA device: bytes, order between streams, pinning. Skipped without one."""

import mmap
import os

import numpy as np
import pytest
import torch

from smg_sglang.memory.arena import Arena, create_memfd
from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.spills import SpillQueue, SpillTarget
from tests.transfer import worlds

pytestmark = pytest.mark.gpu

LONG = 200_000_000
"""Clock cycles: about 0.1 s, far longer than any copy here."""


class World:
    """A pool on the device and a memfd arena, as the memory server makes it."""

    def __init__(self, *, pinned=True, pages=64, dtype=torch.bfloat16, **shape):
        shape = {"layers": 4, "heads": 3, "dim": 64, "page_size": 16} | shape
        slots = 2 * pages * shape["page_size"]
        self.pool = worlds.make_pool(**shape, slots=slots, dtype=dtype, device="cuda")
        nbytes = pages * self.pool.layout.page_bytes
        fd = create_memfd(nbytes)
        self.arena = Arena(fd, nbytes).buffer
        os.close(fd)
        order = np.random.default_rng(0).permutation(pages).astype(np.int64)
        self.offsets = order * self.pool.layout.page_bytes
        self.slots = worlds.page_slots(self.pool, pages).cuda()
        self.forward = torch.cuda.Stream()
        self.mover = CudaMover(
            self.pool,
            pins=pinned,
            order_after=[self.forward],
            ring_bytes=1 << 20,
        )
        if pinned:
            self.mover.pin(self.arena)
            assert self.mover.wait_pinned(self.arena)

    def spill(self):
        move = self.mover.prepare(self.slots, self.arena, self.offsets)
        self.mover.spill(move)
        return worlds.gathered(self.pool, self.slots)


@pytest.fixture
def make_world():
    made = []

    def make(*args, **more):
        made.append(World(*args, **more))
        return made[-1]

    yield make
    torch.cuda.synchronize()
    for world in made:
        world.mover.close()


def same(pool, slots, want):
    return all(
        np.array_equal(have, expected)
        for have, expected in zip(worlds.gathered(pool, slots), want, strict=True)
    )


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"page_size": 1},
        {"page_size": 128, "pages": 8},
        {"kind": "mla", "dim": 576},
        {"heads": 1, "dim": 5, "v_dim": 3},
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.float32},
    ],
    ids=["smollm2", "page1", "page128", "mla", "odd", "fp8", "fp32"],
)
def test_pages_come_back_byte_for_byte(make_world, pinned, shape):
    world = make_world(pinned=pinned, **shape)
    want = world.spill()
    np.testing.assert_array_equal(
        worlds.pages_in(world.pool, world.arena, world.offsets),
        worlds.expected_pages(world.pool, world.slots),
    )
    worlds.clear(world.pool)
    loads = LayerLoads(world.mover)
    loads.queue("a", world.slots, world.arena, world.offsets)
    assert loads.finish(loads.start())
    assert same(world.pool, world.slots, want)
    loads.close()


@pytest.mark.parametrize("seed", range(40))
def test_pages_of_any_shape_at_any_alignment_come_back(seed):
    pool, slots, back_to, like, offsets = worlds.random_world(seed, "cuda")
    arena = np.frombuffer(mmap.mmap(-1, len(like)), np.uint8)  # shares no page with anything
    mover = CudaMover(pool, ring_bytes=1 << 20)
    mover.pin(arena)
    assert mover.wait_pinned(arena)
    worlds.round_trip(pool, mover, slots, back_to, arena, offsets)
    mover.close()


def test_nothing_is_compiled_after_a_mover_is_made(make_world):
    from smg_sglang.transfer.triton_rows import _move_tiles

    world = make_world()
    kernels, *_ = _move_tiles.device_caches[torch.cuda.current_device()]
    made = len(kernels)
    assert made >= 2  # one for each direction
    size = world.pool.layout.page_size
    for pages in (1, 2, 15, 64):
        slots = world.slots[: pages * size]
        move = world.mover.prepare(slots, world.arena, world.offsets[:pages])
        world.mover.spill(move)
        worlds.load(world.mover, move)
    assert len(kernels) == made


def test_the_forward_stream_waits_for_each_layer_and_the_cpu_does_not(make_world):
    world = make_world()
    want = world.spill()
    worlds.clear(world.pool)
    torch.cuda.synchronize()

    def slow_copy():
        torch.cuda._sleep(LONG // 10)

    loads = LayerLoads(world.mover, before_copy=slow_copy)
    loads.queue("a", world.slots, world.arena, world.offsets)
    index = loads.start()
    loads.counter.set_consumer(index)
    seen = []
    with torch.cuda.stream(world.forward):
        for layer in range(world.pool.layout.num_layers):
            loads.counter.wait_until(layer)
            seen += [rows[world.slots] for rows in world.pool.rows[layer]]
        read = torch.cuda.Event()
        read.record()
    assert not read.query()
    read.synchronize()
    for have, expected in zip(seen, want, strict=True):
        np.testing.assert_array_equal(have.cpu().numpy(), expected)
    assert loads.finish(index)
    loads.close()


def test_a_load_comes_after_a_forward_that_still_writes_its_slots(make_world):
    world = make_world()
    want = world.spill()
    with torch.cuda.stream(world.forward):
        torch.cuda._sleep(LONG)
        worlds.clear(world.pool)
    loads = LayerLoads(world.mover)
    loads.queue("a", world.slots, world.arena, world.offsets)
    assert loads.finish(loads.start())
    assert same(world.pool, world.slots, want)
    loads.close()


def test_a_spill_comes_after_the_forward_that_writes_its_slots(make_world):
    world = make_world()
    published = []
    spills = SpillQueue(
        world.mover,
        reserve=lambda _: SpillTarget(None, world.arena, world.offsets),
        publish=lambda _: published.append(world.arena.copy()),
        abandon=lambda _: None,
    )
    written = torch.cuda.Event(blocking=True)
    with torch.cuda.stream(world.forward):
        torch.cuda._sleep(LONG)
        for layer in world.pool.rows:
            for rows in layer:
                rows.fill_(7)
        written.record()
    spills.submit("job", world.slots, [written])
    assert spills.num_completed() == 0
    assert spills.drain(10)
    assert spills.pop_completed()
    assert (published[0] == 7).all()
    spills.close()


def test_random_delays_on_the_load_stream_change_nothing_that_is_read(make_world):
    world = make_world()
    want = world.spill()
    rng = np.random.default_rng(0)
    loads = LayerLoads(world.mover, lambda: torch.cuda._sleep(int(rng.integers(0, LONG // 50))))
    size, parts = world.pool.layout.page_size, len(world.pool.layout.parts)
    for step in range(30):
        first = int(rng.integers(0, 48))
        tokens = slice(first * size, (first + 16) * size)
        slots = world.slots[tokens]
        loads.queue(f"r{step}", slots, world.arena, world.offsets[first : first + 16])
        index = loads.start()
        loads.counter.set_consumer(index)
        with torch.cuda.stream(world.forward):
            for layer in range(world.pool.layout.num_layers):
                loads.counter.wait_until(layer)
                for part, rows in enumerate(world.pool.rows[layer]):
                    have = rows[slots].cpu().numpy()
                    np.testing.assert_array_equal(have, want[layer * parts + part][tokens])
            worlds.clear(world.pool)  # the next load must bring it all back
        assert loads.finish(index)
    loads.close()


def test_starting_a_pinned_load_does_not_wait_for_the_device(make_world):
    world = make_world()
    world.spill()
    loads = LayerLoads(world.mover)
    with torch.cuda.stream(world.forward):
        torch.cuda._sleep(LONG)
        busy = torch.cuda.Event()
        busy.record()
    loads.queue("a", world.slots, world.arena, world.offsets)
    index = loads.start()
    loads.counter.set_consumer(index)
    loads.counter.wait_until(world.pool.layout.num_layers - 1)
    assert not busy.query()
    assert loads.finish(index)
    loads.close()
