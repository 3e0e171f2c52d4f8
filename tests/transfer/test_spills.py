import threading
import time

import numpy as np
import pytest
import torch

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.transfer.mover import random_delay
from smg_sglang.transfer.movers import make_mover
from smg_sglang.transfer.spills import SpillDropped, SpillQueue, SpillTarget
from tests.transfer import worlds


class Memory:
    """A tier of a few pages, by name of the job; what it does to a job can be scripted."""

    def __init__(self, pool, pages=32):
        self.pool = pool
        self.arena, self.offsets = worlds.make_arena(pool, pages)
        self.used = 0
        self.script = {}
        self.have = {}
        self.log = []
        self.published = {}

    def reserve(self, key):
        name, pages = key
        self.log.append(("reserve", name))
        if name in self.script:
            raise self.script[name]
        first = self.have.get(name, 0)
        offsets = self.offsets[self.used : self.used + pages - first]
        self.used += len(offsets)
        return SpillTarget((name, offsets), self.arena, offsets, first)

    def publish(self, handle):
        name, offsets = handle
        self.log.append(("publish", name))
        self.published[name] = [
            self.arena[o : o + self.pool.layout.page_bytes].copy() for o in offsets
        ]

    def abandon(self, handle):
        self.log.append(("abandon", handle[0]))


class World:
    def __init__(self, **more):
        self.pool = worlds.make_pool(slots=128)
        self.memory = Memory(self.pool, more.pop("memory_pages", 32))
        self.mover = make_mover(self.pool)
        self.spills = SpillQueue(
            self.mover,
            reserve=self.memory.reserve,
            publish=self.memory.publish,
            abandon=self.memory.abandon,
            **more,
        )
        self.sent = {}

    def submit(self, name, pages, ready=(), seed=None, new_pages=None):
        slots = worlds.page_slots(self.pool, pages, seed=len(self.sent) if seed is None else seed)
        self.sent[name] = worlds.expected_pages(self.pool, slots)
        new_slots = None if new_pages is None else new_pages * self.pool.layout.page_size
        self.spills.submit((name, pages), slots, ready, new_slots)

    def results(self):
        assert self.spills.drain(10)
        return [self.spills.pop_completed() for _ in range(self.spills.num_completed())]


@pytest.fixture
def make_world():
    made = []

    def make(**more):
        made.append(World(**more))
        return made[-1]

    yield make
    for world in made:
        world.spills.close()


def test_published_pages_are_the_slots_bytes(make_world):
    world = make_world(before_copy=random_delay(0.002))
    for number in range(8):
        world.submit(f"job{number}", 1 + number % 4)
    assert world.results() == [True] * 8
    for name, pages in world.sent.items():
        np.testing.assert_array_equal(np.stack(world.memory.published[name]), pages)
    assert world.spills.counters.pages == sum(len(p) for p in world.sent.values())
    assert world.spills.counters.bytes == world.spills.counters.pages * world.pool.layout.page_bytes
    assert world.spills.counters.seconds > 0


def test_jobs_complete_in_submission_order_with_their_own_outcome(make_world):
    world = make_world()
    world.memory.script = {
        "gone": MemoryUnavailable("no server"),
        "orphan": SpillDropped("no_parent"),
    }
    for name in ("a", "gone", "b", "orphan", "c"):
        world.submit(name, 1)
    assert world.results() == [True, False, True, False, True]
    assert world.memory.log == [
        ("reserve", "a"), ("publish", "a"), ("reserve", "gone"), ("reserve", "b"), ("publish", "b"),
        ("reserve", "orphan"), ("reserve", "c"), ("publish", "c"),
    ]  # fmt: skip
    assert world.spills.counters.dropped == {"unavailable": 1, "no_parent": 1}


def test_pages_that_are_in_memory_already_are_not_copied(make_world):
    world = make_world()
    world.memory.have = {"half": 2, "whole": 3}
    world.submit("half", 3)
    world.submit("whole", 3)
    assert world.results() == [True, True]
    np.testing.assert_array_equal(np.stack(world.memory.published["half"]), world.sent["half"][2:])
    assert world.memory.published["whole"] == []
    assert world.spills.counters.pages == 1


def test_a_full_memory_keeps_the_leading_pages_and_the_job_says_false(make_world):
    world = make_world(memory_pages=2)
    world.submit("long", 3)
    assert world.results() == [False]
    np.testing.assert_array_equal(np.stack(world.memory.published["long"]), world.sent["long"][:2])
    assert world.spills.counters.dropped == {"memory_full": 1}


def test_a_failed_copy_abandons_its_pages_and_the_queue_lives_on(make_world):
    broken = [OSError("torn")]

    def hook():
        if broken:
            raise broken.pop()

    world = make_world(before_copy=hook)
    world.submit("torn", 1)
    world.submit("fine", 1)
    assert world.results() == [False, True]
    assert ("abandon", "torn") in world.memory.log
    assert "torn" not in world.memory.published
    assert world.spills.counters.dropped == {"error": 1}


def test_a_job_waits_for_its_events_before_it_reads(make_world):
    class Written:
        def synchronize(self):
            for layer in world.pool.rows:
                for rows in layer:
                    rows.fill_(7)

    world = make_world()
    world.submit("late", 2, ready=[Written()])
    assert world.results() == [True]
    assert all((page == 7).all() for page in world.memory.published["late"])


def test_a_queue_that_is_too_long_drops_in_order(make_world):
    go = threading.Event()
    world = make_world(before_copy=lambda: go.wait(10), max_waiting_pages=3)
    for name in ("a", "b", "c"):
        world.submit(name, 2)
    world.submit("d", 1)
    go.set()
    # b and c found two pages waiting; the dropped ones count until they complete.
    assert world.results() == [True, False, False, False]
    world.submit("larger than the limit", 4)
    assert world.results() == [True]
    assert world.spills.counters.dropped == {"queue_full": 2 + 2 + 1}


def test_what_waiting_jobs_share_counts_once(make_world):
    go = threading.Event()
    world = make_world(before_copy=lambda: go.wait(10), max_waiting_pages=3)
    world.submit("a", 2)
    world.submit("a and b", 3, new_pages=1)
    assert world.spills.waiting_slots == 3 * world.pool.layout.page_size
    go.set()
    assert world.results() == [True, True]
    assert world.spills.waiting_slots == 0


def test_closing_finishes_the_running_job_and_drops_the_waiting(make_world):
    go, running = threading.Event(), threading.Event()

    def hook():
        running.set()
        go.wait(10)

    world = make_world(before_copy=hook)
    world.submit("running", 1)
    world.submit("waiting", 1)
    assert running.wait(10)
    threading.Timer(0.02, go.set).start()
    world.spills.close()
    assert [world.spills.pop_completed() for _ in range(2)] == [True, False]
    assert world.spills.counters.dropped == {"closed": 1}
    world.spills.close()


def test_a_job_submitted_after_closing_still_completes(make_world):
    world = make_world()
    world.spills.close()
    world.submit("late", 1)
    assert world.results() == [False]


def test_drain_gives_up_in_time(make_world):
    go = threading.Event()
    world = make_world(before_copy=lambda: go.wait(10))
    world.submit("slow", 1)
    assert not world.spills.drain(0.01)
    go.set()
    assert world.results() == [True]


def test_popping_nothing_is_an_error(make_world):
    with pytest.raises(IndexError):
        make_world().spills.pop_completed()


def test_an_idle_queue_sleeps_and_a_closed_one_leaves_no_thread():
    world = World()
    thread = next(t for t in threading.enumerate() if t.name == "smg-spill")
    # The thread's own clock: others of this process may compile or copy meanwhile.
    clock = time.pthread_getcpuclockid(thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(0.2)
    used = time.clock_gettime(clock) - before
    world.spills.close()
    assert used < 0.02
    assert not [t for t in threading.enumerate() if t.name == "smg-spill"]


def test_slots_of_the_wrong_shape_are_a_dropped_job_not_a_dead_thread(make_world):
    world = make_world()
    world.spills.submit(("odd", 1), torch.arange(3))
    world.submit("fine", 1)
    assert world.results() == [False, True]
