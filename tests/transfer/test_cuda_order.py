"""The order of the ring's copies and of what reads them, on CUDA without a GPU: every pair of
accesses to a staging buffer, or to a host page, of which one is a write has to have an order.
"""

import numpy as np
import pytest
import torch

from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.pinning import ArenaPins
from smg_sglang.transfer.segments import Segment, SegmentRing
from tests.fake_cuda import FakeCuda
from tests.transfer import worlds

SEGMENT_PAGES, SEGMENTS = 2, 7


class Reported(CudaMover):
    """Says which buffers and pages its copies touch, on which stream."""

    cuda: FakeCuda

    def load_layers(self, layers, move):
        for offset in move.offsets.tolist():
            self.cuda.read(("page", offset))
        first = int(move.slots[0]) // (SEGMENT_PAGES * self.layout.page_size)
        self.cuda.write(("buffer", first))
        super().load_layers(layers, move)


class World:
    """A ring that streams the pages of an arena, and the forward stream that attends them."""

    def __init__(self, cuda, monkeypatch, *, pinned, depth=3, mover=Reported, **options):
        self.cuda = cuda
        self.pins = ArenaPins()
        pool = worlds.make_pool(page_size=4, layers=2)
        self.layout = pool.layout
        self.arena, self.offsets = worlds.make_arena(pool, SEGMENT_PAGES * SEGMENTS)
        rng = np.random.default_rng(3)
        self.arena[:] = rng.integers(0, 256, len(self.arena), dtype=np.uint8)
        made = type("Mover", (mover,), {"cuda": cuda})
        monkeypatch.setattr(
            "smg_sglang.transfer.segments.make_mover",
            lambda pool, pins: made(pool, shared_pins=pins, pins=pinned, programs=2),
        )
        self.ring = SegmentRing(
            self.layout, torch.device("cpu"), SEGMENT_PAGES, depth=depth, pins=self.pins, **options
        )
        self.forward = cuda.stream("forward")
        if pinned:
            self.pins.pin(self.arena, torch.device("cpu"))
            assert self.pins.wait(self.arena)

    def schedule(self):
        for layer in range(self.layout.num_layers):
            for pages in np.split(self.offsets, SEGMENTS):
                yield Segment(layer, self.arena, pages)

    def read(self):
        """One forward pass: attends every segment, and checks its bytes."""
        with self.cuda.on(self.forward):
            reader = self.ring.read(self.schedule())
            for segment in self.schedule():
                parts = reader.next()
                first = (parts[0].data_ptr() - self.ring.parts[0].data_ptr()) // parts[0].nbytes
                self.cuda.read(("buffer", first))
                self.check(segment, parts)
            reader.close()

    def check(self, segment, parts):
        size = self.layout.page_size
        for number, part in enumerate(parts):
            start = self.layout.part_offset(segment.layer, number)
            length = size * self.layout.parts[number].row_bytes
            want = [self.arena[o + start : o + start + length] for o in segment.offsets.tolist()]
            got = part.contiguous().view(torch.uint8).numpy().reshape(-1)
            np.testing.assert_array_equal(got, np.concatenate(want))

    def close(self):
        self.ring.close()
        self.pins.close()
        assert not self.cuda.driver.registered


@pytest.fixture
def make_world(cuda, monkeypatch):
    made = []

    def make(**options):
        made.append(World(cuda, monkeypatch, **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("depth", [2, 3])
def test_no_buffer_is_filled_while_it_is_read_or_read_while_it_is_filled(make_world, pinned, depth):
    world = make_world(pinned=pinned, depth=depth)
    for _ in range(2):
        world.read()
    assert not world.cuda.races


def test_the_cpu_waits_for_nothing_where_pages_are_locked(make_world):
    world = make_world(pinned=True)
    world.cuda.waits = 0
    world.read()
    assert world.cuda.waits == 0


def test_a_pass_that_ends_early_leaves_no_race_to_the_next(make_world):
    world = make_world(pinned=True)
    with world.cuda.on(world.forward):
        reader = world.ring.read(world.schedule())
        reader.next()
        world.cuda.read(("buffer", 0))
        reader.close()
    world.read()
    assert not world.cuda.races


@pytest.mark.parametrize("forgotten", ["fence", "mark"])
def test_a_forgotten_event_would_be_seen(make_world, forgotten):
    class Careless(Reported):
        def fence(self):
            return [] if forgotten == "fence" else super().fence()

        def mark(self):
            from smg_sglang.transfer.mover import REACHED

            return REACHED if forgotten == "mark" else super().mark()

    world = make_world(pinned=True, mover=Careless)
    world.read()
    assert world.cuda.races


def test_a_page_that_was_spilled_is_read_after_the_spill_and_its_slots_are_free(cuda):
    """What `HostPages.keep` counts on: the CPU knows that the copy is done when `spill` returns."""
    pool = worlds.make_pool(page_size=4, layers=1)
    arena, offsets = worlds.make_arena(pool, 2)
    forward, scheduler = cuda.stream("forward"), cuda.stream("scheduler")
    slots = worlds.page_slots(pool, 2)

    class Spills(Reported):
        def _move(self, layers, move, pages, *, to_arena):
            (cuda.read if to_arena else cuda.write)("slots")
            (cuda.write if to_arena else cuda.read)("pages")
            super()._move(layers, move, pages, to_arena=to_arena)

    Spills.cuda = cuda
    mover = Spills(pool, order_after=[forward], programs=2)
    mover.pin(arena)
    assert mover.wait_pinned(arena)
    with cuda.on(forward):
        cuda.write("slots")  # the pass that computed them, still running
    with cuda.on(scheduler):
        mover.spill(mover.prepare(slots, arena, offsets), after=mover.fence())
    with cuda.on(cuda.stream("anybody")):
        cuda.write("slots")
        cuda.read("pages")
    assert not cuda.races
    mover.close()


@pytest.mark.parametrize("in_thread", [False, True])
def test_slots_are_loaded_after_the_pass_before_and_read_after_their_load(cuda, in_thread):
    pool = worlds.make_pool(page_size=4, layers=2)
    arena, offsets = worlds.make_arena(pool, 2)
    forward, scheduler = cuda.stream("forward"), cuda.stream("scheduler")

    class Loads(CudaMover):
        def load_layers(self, layers, move):
            for layer in layers:
                cuda.write(("slots", layer))
            super().load_layers(layers, move)

        def enqueues(self, moves):
            return not in_thread and super().enqueues(moves)

    mover = Loads(pool, order_after=[forward], programs=2)
    mover.pin(arena)
    assert mover.wait_pinned(arena)
    loads = LayerLoads(mover)
    with cuda.on(forward):
        cuda.read(("slots", 0))
        cuda.read(("slots", 1))
    with cuda.on(scheduler):
        loads.queue("a", worlds.page_slots(pool, 2), arena, offsets)
        loads.counter.set_consumer(loads.start())
    with cuda.on(forward):
        for layer in range(2):
            loads.counter.wait_until(layer)
            cuda.read(("slots", layer))
    assert not cuda.races
    loads.close()
    mover.close()


def test_movers_that_share_their_pins_register_an_arena_once(cuda):
    pool = worlds.make_pool(page_size=4)
    arena, offsets = worlds.make_arena(pool, 2)
    pins = ArenaPins()
    movers = [CudaMover(pool, shared_pins=pins, programs=2) for _ in range(2)]
    moves = [mover.prepare(worlds.page_slots(pool, 2), arena, offsets) for mover in movers]
    assert pins.wait(arena)
    assert all(mover.enqueues([move]) for mover, move in zip(movers, moves, strict=True))
    movers[1].close()
    assert cuda.driver.registered, "the other one still copies it"
    movers[0].unpin(arena)
    assert not cuda.driver.registered
    assert not movers[1].enqueues([moves[1]])
    pins.close()
