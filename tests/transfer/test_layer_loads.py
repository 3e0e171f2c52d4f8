import threading
import time
import weakref

import numpy as np
import pytest
import torch

from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.mover import Mark, PageMove, random_delay
from smg_sglang.transfer.movers import make_mover
from tests.transfer import worlds


class Gate:
    """A before_copy hook that lets layers through one by one."""

    def __init__(self):
        self._passes = threading.Semaphore(0)

    def __call__(self):
        assert self._passes.acquire(timeout=10)

    def let_through(self, layers):
        self._passes.release(layers)


class World:
    """A pool whose pages were spilled and then cleared, and loads that bring them back."""

    def __init__(self, before_copy=None, pages=6, **shape):
        self.pool = worlds.make_pool(**shape)
        self.arena, self.offsets = worlds.make_arena(self.pool, pages)
        self.slots = worlds.page_slots(self.pool, pages)
        self.mover = make_mover(self.pool)
        self.mover.spill(self.mover.prepare(self.slots, self.arena, self.offsets))
        self.want = worlds.gathered(self.pool, self.slots)
        worlds.clear(self.pool)
        self.loads = LayerLoads(self.mover, before_copy)

    def queue(self, rid, first, end, **more):
        size = self.pool.layout.page_size
        slots = self.slots[first * size : end * size]
        self.loads.queue(rid, slots, self.arena, self.offsets[first:end], **more)

    def rows_are_back(self, layer, first, end):
        size, parts = self.pool.layout.page_size, len(self.pool.layout.parts)
        slots = self.slots[first * size : end * size]
        return all(
            np.array_equal(
                self.pool.rows[layer][part][slots].numpy(),
                self.want[layer * parts + part][first * size : end * size],
            )
            for part in range(parts)
        )


@pytest.fixture
def make_world():
    made = []

    def make(*args, **shape):
        made.append(World(*args, **shape))
        return made[-1]

    yield make
    for world in made:
        world.loads.close()
        world.mover.close()


def test_starting_nothing_gives_minus_one(make_world):
    world = make_world()
    assert world.loads.start() == -1
    world.loads.counter.set_consumer(-1)
    world.loads.counter.wait_until(0)


def test_all_queued_loads_start_as_one_batch(make_world):
    world = make_world()
    world.queue("a", 0, 2)
    world.queue("b", 2, 6)
    index = world.loads.start()
    world.loads.counter.set_consumer(index)
    for layer in range(3):
        world.loads.counter.wait_until(layer)
        assert world.rows_are_back(layer, 0, 6)
    assert world.loads.finish(index)
    assert world.loads.start() == -1
    assert world.loads.counters.pages == 6
    assert world.loads.counters.bytes == 6 * world.pool.layout.page_bytes


def test_loads_from_two_arenas_share_a_batch(make_world):
    world = make_world()
    world.queue("a", 0, 2)
    copy = world.arena.copy()
    size = world.pool.layout.page_size
    world.loads.queue("b", world.slots[2 * size :], copy, world.offsets[2:])
    assert world.loads.finish(world.loads.start())
    assert all(world.rows_are_back(layer, 0, 6) for layer in range(3))


def test_layers_land_in_order_and_a_wait_blocks_only_until_its_layer(make_world):
    gate = Gate()
    world = make_world(gate)
    world.queue("a", 0, 6)
    index = world.loads.start()
    counter = world.loads.counter
    counter.set_consumer(index)
    for layer in range(3):
        reached = threading.Event()

        def read(layer=layer, reached=reached):
            counter.wait_until(layer)
            reached.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert not reached.wait(0.02)
        gate.let_through(1)
        assert reached.wait(10)
        reader.join()
        assert world.rows_are_back(layer, 0, 6)
        for later in range(layer + 1, 3):
            assert not world.rows_are_back(later, 0, 6)
        counter.wait_until(layer)  # K and V both ask
    assert world.loads.finish(index)
    assert counter.blocked_seconds > 0


def test_three_batches_in_flight_keep_their_own_layers(make_world):
    gate = Gate()
    world = make_world(gate)
    indices = []
    for first in (0, 2, 4):
        world.queue(f"r{first}", first, first + 2)
        indices.append(world.loads.start())
    assert len(set(indices)) == 3
    gate.let_through(9)
    for index, first in zip(indices, (0, 2, 4), strict=True):
        world.loads.counter.set_consumer(index)
        world.loads.counter.wait_until(2)
        assert world.rows_are_back(2, first, first + 2)
    assert all(world.loads.finish(index) for index in indices)


def test_a_batch_that_needs_no_thread_does_not_overtake_one_that_has_it(make_world, monkeypatch):
    go, threads = threading.Event(), []

    def hook():
        threads.append(threading.current_thread().name)
        if threads[-1] == "smg-load":
            go.wait(10)

    world = make_world(before_copy=hook)
    world.queue("a", 0, 2)
    first = world.loads.start()
    monkeypatch.setattr(world.mover, "enqueues", lambda moves: True)
    world.queue("b", 2, 4)
    second = world.loads.start()
    go.set()
    assert world.loads.finish(first) and world.loads.finish(second)
    assert set(threads) == {"smg-load"}
    threads.clear()
    world.queue("c", 4, 6)
    assert world.loads.finish(world.loads.start())
    assert "smg-load" not in threads
    assert all(world.rows_are_back(layer, 0, 6) for layer in range(3))


def test_a_cancelled_load_moves_nothing_and_a_started_one_cannot_be_cancelled(make_world):
    world = make_world()
    world.queue("a", 0, 2)
    world.queue("b", 2, 4)
    assert world.loads.cancel("a")
    assert not world.loads.cancel("a")
    index = world.loads.start()
    assert not world.loads.cancel("b")
    assert world.loads.finish(index)
    assert world.rows_are_back(0, 2, 4)
    assert not worlds.gathered(world.pool, world.slots[: 2 * 4])[0].any()


def test_a_request_is_queued_once(make_world):
    world = make_world()
    world.queue("a", 0, 1)
    with pytest.raises(ValueError, match="queued already"):
        world.queue("a", 1, 2)


def test_a_batch_with_a_load_that_failed_before_it_began_fails_and_moves_nothing(make_world):
    world = make_world()
    world.queue("a", 0, 2)
    world.loads.queue_failed("b")
    index = world.loads.start()
    world.loads.counter.set_consumer(index)
    world.loads.counter.wait_until(0)
    assert not world.loads.finish(index)
    assert not world.rows_are_back(0, 0, 2)
    world.queue("a", 0, 2)
    assert world.loads.finish(world.loads.start())
    assert world.rows_are_back(0, 0, 2)


def test_keep_alive_lives_until_the_load_is_done(make_world):
    class Lease:
        pass

    gate = Gate()
    world = make_world(gate)
    lease = Lease()
    alive = weakref.ref(lease)
    world.queue("a", 0, 1, keep_alive=lease)
    del lease
    index = world.loads.start()
    assert alive() is not None
    gate.let_through(3)
    assert world.loads.finish(index)
    world.loads.close()
    assert alive() is None


def test_memory_that_was_read_is_let_go_before_the_next_batch(make_world):
    world = make_world()
    arena = world.arena.copy()
    mapped = weakref.ref(arena)
    world.loads.queue("a", world.slots, arena, world.offsets)
    del arena
    assert world.loads.finish(world.loads.start())
    deadline = time.monotonic() + 10
    while mapped() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_failed_copy_lets_the_forward_go_on_and_finish_tells(make_world):
    def fail():
        raise OSError("the disk is gone")

    world = make_world(fail)
    world.queue("a", 0, 1)
    index = world.loads.start()
    world.loads.counter.set_consumer(index)
    world.loads.counter.wait_until(2)
    assert not world.loads.finish(index)
    assert world.loads.counters.failed == 1


def test_waits_on_a_finished_batch_return_at_once(make_world):
    world = make_world()
    world.queue("a", 0, 1)
    index = world.loads.start()
    assert world.loads.finish(index)
    world.loads.counter.set_consumer(index)
    world.loads.counter.wait_until(0)
    assert world.loads.finish(index)


def test_speculative_decoding_may_wait_through_events(make_world):
    world = make_world()
    world.queue("a", 0, 6)
    index = world.loads.start()
    world.loads.counter.events[index].wait(world.loads.counter.num_layers - 1)
    assert world.rows_are_back(2, 0, 6)
    assert world.loads.finish(index)


def test_reset_drops_the_queued_and_waits_for_the_started(make_world):
    world = make_world(random_delay(0.005))
    world.queue("a", 0, 2)
    world.loads.start()
    world.queue("b", 2, 4)
    world.loads.reset()
    assert all(world.rows_are_back(layer, 0, 2) for layer in range(3))
    assert world.loads.start() == -1
    assert not world.loads.counter.events


def test_random_delays_change_nothing_that_a_reader_sees(make_world):
    """Readers check every layer as the forward does, over reused slots and reused pages."""
    world = make_world(random_delay(0.002), pages=12, slots=128)
    rng = np.random.default_rng(0)
    in_flight = []
    for step in range(40):
        first = int(rng.integers(0, 4)) * 3
        world.queue(f"r{step}", first, first + 3)
        index = world.loads.start()
        world.loads.counter.set_consumer(index)
        for layer in range(3):
            world.loads.counter.wait_until(layer)
            assert world.rows_are_back(layer, first, first + 3)
        in_flight.append(index)
        if len(in_flight) == 3:
            assert world.loads.finish(in_flight.pop(0))


def test_closing_leaves_no_thread():
    before = threading.active_count()
    world = World()
    world.queue("a", 0, 2)
    world.loads.start()
    world.loads.close()
    world.loads.close()
    assert threading.active_count() <= before + 1  # the compiler's, which ends by itself


def test_idle_loads_use_no_cpu():
    world = World()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    used = time.process_time() - before
    world.loads.close()
    assert used < 0.1


def test_joined_moves_keep_pages_with_their_slots():
    arena, other = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
    moves = [
        PageMove(torch.tensor([1]), arena, np.array([10])),
        PageMove(torch.tensor([2]), other, np.array([20])),
        PageMove(torch.tensor([3]), arena, np.array([30])),
    ]
    joined = PageMove.joined(moves)
    assert [m.slots.tolist() for m in joined] == [[1, 3], [2]]
    assert [m.offsets.tolist() for m in joined] == [[10, 30], [20]]
    assert joined[0].arena is arena


class LateMark(Mark):
    """A copy that was enqueued, and is done when it is `let`."""

    def __init__(self):
        self.let = threading.Event()

    def synchronize(self):
        assert self.let.wait(10)

    def reached(self):
        return self.let.is_set()


def test_paced_a_batch_begins_when_the_one_before_has_landed(make_world):
    """So what has not begun can be given up, also where copies are only enqueued."""
    world = make_world()
    late = LateMark()
    world.mover.mark = lambda: late
    loads = LayerLoads(world.mover, paced=True)
    try:
        indices = []
        for first in range(3):
            size = world.pool.layout.page_size
            slots = world.slots[first * size : (first + 1) * size]
            loads.queue("r", slots, world.arena, world.offsets[first : first + 1])
            indices.append(loads.start())
        while not loads.counter.events[indices[0]].settled:
            time.sleep(0.001)
        assert not loads.has_landed(indices[0]), "enqueued is not landed"
        loads.give_up(indices[1])
        late.let.set()
        assert [loads.finish(index) for index in indices] == [True, False, True]
    finally:
        late.let.set()
        loads.close()
    assert [world.rows_are_back(0, page, page + 1) for page in range(3)] == [True, False, True]
