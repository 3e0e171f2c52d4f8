"""The state machine, scenario by scenario."""

import pytest

from smg_sglang.config import EvictionName
from smg_sglang.memory.books import Books, PageSizeRefused
from smg_sglang.memory.room import DESERTED_S

from .world import fresh_path, make_namespace, make_path

A, B = b"client a", b"client b"


class World:
    """Books of `pages` pages of 1 KiB, and clients that follow the protocol."""

    def __init__(self, pages: int = 64, slab_bytes: int = 8192, **options) -> None:
        self.now = 0.0
        self.limit = pages * 1024
        self.books = Books(
            self.limit,
            slab_bytes,
            clock=lambda: self.now,
            may_grow=lambda end_bytes: end_bytes <= self.limit,
            **options,
        )
        self._ids = iter(range(1, 1 << 30))

    def connect(self, name: bytes = A, **namespace) -> bytes:
        self.books.connect(name, make_namespace(**namespace))
        return name

    def write(self, name: bytes, path: bytes) -> int:
        """Reserve and publish; the number of pages that were new."""
        id_ = next(self._ids)
        _, pages = self.books.reserve(name, id_, path)
        self.books.publish(name, id_)
        return len(pages)

    def reserve(self, name: bytes, path: bytes):
        id_ = next(self._ids)
        return id_, *self.books.reserve(name, id_, path)

    def lookup(self, name: bytes, path: bytes, start: int = 0):
        id_ = next(self._ids)
        return id_, self.books.lookup(name, id_, path, start)

    def found(self, name: bytes, path: bytes) -> int:
        id_, pages = self.lookup(name, path)
        self.books.release(name, id_)
        return len(pages)

    def stats(self):
        self.books.check_invariants()
        return self.books.stats(epoch="", uptime_s=0, malformed=0, strays=0, refused=0)


@pytest.mark.parametrize(("eviction", "survivor"), [("lru", 2), ("lfu", 1)])
def test_the_policy_chosen_says_which_pages_go(eviction, survivor):
    world = World(pages=8, eviction=EvictionName(eviction))
    a = world.connect()
    world.write(a, make_path(*[1] * 4))
    assert world.found(a, make_path(*[1] * 4)) == 4
    world.write(a, make_path(*[2] * 4))
    world.write(a, fresh_path(4))
    assert world.found(a, make_path(*[survivor] * 4)) == 4
    world.books.flush(a)
    assert world.write(a, fresh_path(2)) == 2


def test_who_writes_a_path_again_has_not_used_it():
    world = World(pages=8, eviction=EvictionName.LFU)
    a = world.connect()
    used, written = make_path(*[1] * 4), make_path(*[2] * 4)
    world.write(a, used)
    assert world.found(a, used) == 4
    for _ in range(3):
        world.write(a, written)
    world.write(a, fresh_path(4))
    assert world.found(a, used) == 4


def test_published_pages_are_found_by_everybody_in_the_namespace():
    world = World()
    a, b, other = world.connect(A), world.connect(B), world.connect(b"o", model="other")
    path = make_path(1, 2, 3)
    assert world.write(a, path) == 3
    assert world.found(b, path + make_path(4)) == 3
    assert world.found(other, path) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "fp32"},
        {"layout": "x"},
        {"page_size": 1},
        {"page_bytes": 2048},
        {"tp_rank": 1, "tp_size": 2},
    ],
)
def test_whatever_changes_the_bytes_of_a_page_separates(change):
    world = World()
    world.write(world.connect(A), make_path(1))
    assert world.found(world.connect(B, **change), make_path(1)) == 0


def test_a_page_that_is_being_written_is_not_found():
    world = World()
    a = world.connect()
    id_, have, pages = world.reserve(a, make_path(1, 2))
    assert (have, len(pages)) == (0, 2)
    assert world.found(a, make_path(1, 2)) == 0
    world.books.publish(a, id_)
    assert world.found(a, make_path(1, 2)) == 2


def test_reserving_asks_only_for_what_is_missing():
    world = World()
    a = world.connect()
    world.write(a, make_path(1, 2))
    _, have, pages = world.reserve(a, make_path(1, 2, 3))
    assert (have, len(pages)) == (2, 1)
    _, have, pages = world.reserve(a, make_path(1, 2))
    assert (have, len(pages)) == (2, 0)
    assert world.stats().reservations == 1


def test_the_loser_of_a_race_has_its_pages_freed():
    world = World()
    a, b = world.connect(A), world.connect(B)
    path = make_path(1, 2, 3)
    mine, _, _ = world.reserve(a, path)
    theirs, _, _ = world.reserve(b, path[:32])
    world.books.publish(b, theirs)
    world.books.publish(a, mine)
    stats = world.stats()
    assert (stats.pages_ready, stats.pages_writing) == (3, 0)
    assert stats.total.dropped == {"duplicate": 2}
    assert world.found(a, path) == 3


def test_a_miss_leases_nothing():
    world = World()
    a = world.connect()
    world.write(a, make_path(1))
    assert len(world.lookup(a, make_path(1, 2), start=1)[1]) == 0
    assert world.stats().leases == 0


def test_a_full_memory_gives_up_the_least_recently_used_leaf():
    world = World(pages=8)
    a = world.connect()
    old, young = fresh_path(4), fresh_path(4)
    world.write(a, old)
    world.write(a, young)
    world.books.touch(a, old)
    assert world.write(a, fresh_path(4)) == 4
    assert (world.found(a, old), world.found(a, young)) == (4, 0)
    assert world.stats().total.pages_evicted == 4


def test_a_leased_page_is_never_evicted():
    world = World(pages=8)
    a = world.connect()
    leased = fresh_path(5)
    world.write(a, leased)
    lease, pages = world.lookup(a, leased)
    id_, _, new = world.reserve(a, fresh_path(8))
    assert len(new) == 3
    assert not set(new) & set(pages)
    assert world.stats().total.pages_short == 5
    world.books.abandon(a, id_)
    world.books.release(a, lease)
    assert world.write(a, fresh_path(8)) == 8


def test_parents_of_a_reservation_are_never_evicted():
    world = World(pages=8)
    a = world.connect()
    parents = fresh_path(4)
    world.write(a, parents)
    id_, _, _ = world.reserve(a, parents + make_path(1))
    world.reserve(a, fresh_path(8))
    world.books.publish(a, id_)
    assert world.found(a, parents + make_path(1)) == 5


def test_a_flush_leaves_leased_pages_alone_until_their_release():
    world = World(pages=8)
    a, b = world.connect(A), world.connect(B)
    path = fresh_path(8)
    world.write(a, path)
    lease, pages = world.lookup(a, path[:64])
    world.books.flush(b)
    assert world.found(a, path) == 0
    assert world.found(b, path) == 0
    _, _, new = world.reserve(b, fresh_path(8))
    assert not set(new) & set(pages)
    world.books.release(a, lease)
    world.books.connection_lost(b)
    assert world.stats().slabs_free == 1


def test_a_flush_touches_its_own_namespace_only():
    world = World()
    a, b = world.connect(A), world.connect(B, model="b")
    world.write(a, make_path(1))
    world.write(b, make_path(1))
    world.books.flush(a)
    assert (world.found(a, make_path(1)), world.found(b, make_path(1))) == (0, 1)


def test_what_was_reserved_before_a_flush_is_dropped_when_it_is_published():
    world = World()
    a = world.connect()
    world.write(a, make_path(1))
    id_, _, _ = world.reserve(a, make_path(1, 2))
    world.books.flush(a)
    world.books.publish(a, id_)
    assert world.found(a, make_path(1, 2)) == 0
    stats = world.stats()
    assert stats.slabs_free == stats.slabs
    assert stats.total.dropped == {"flushed": 2}
    assert stats.total.flushes == 1


SCRIPT = ["lookup", "reserve", "publish", "lookup new", "flush", "reserve again", "release"]


@pytest.mark.parametrize("steps", range(len(SCRIPT) + 1))
def test_a_client_that_dies_after_any_step_leaves_only_published_pages(steps):
    world = World()
    survivor, a = world.connect(B), world.connect(A)
    world.write(survivor, make_path(1, 2))
    lease = reservation = 0
    for step in SCRIPT[:steps]:
        match step:
            case "lookup":
                lease, _ = world.lookup(a, make_path(1, 2))
            case "reserve":
                reservation, _, _ = world.reserve(a, make_path(1, 2, 3))
            case "publish":
                world.books.publish(a, reservation)
            case "lookup new":
                world.lookup(a, make_path(1, 2, 3))
            case "flush":
                world.books.flush(a)
            case "reserve again":
                world.reserve(a, make_path(1))
            case "release":
                world.books.release(a, lease)
    world.books.connection_lost(a)
    stats = world.stats()
    assert (stats.leases, stats.reservations, stats.pages_writing) == (0, 0, 0)
    flushed = "flush" in SCRIPT[:steps]
    assert stats.pages_ready == (0 if flushed else 3 if "publish" in SCRIPT[:steps] else 2)
    assert world.write(survivor, fresh_path(64)) == 64


def test_unknown_leases_and_reservations_are_ignored():
    world = World()
    a = world.connect()
    world.books.release(a, 7)
    world.books.publish(a, 7)
    world.books.abandon(a, 7)
    world.stats()


def test_an_id_that_is_in_use_is_refused():
    world = World()
    a = world.connect()
    world.write(a, make_path(1))
    world.books.lookup(a, 99, make_path(1), 0)
    with pytest.raises(ValueError, match="in use"):
        world.books.lookup(a, 99, make_path(1), 0)
    world.stats()


def test_a_page_that_cannot_fit_is_refused():
    with pytest.raises(PageSizeRefused, match="raise --host-gb"):
        World(pages=64).connect(page_bytes=65 * 1024)


def test_pages_too_small_to_keep_books_of_are_refused():
    with pytest.raises(PageSizeRefused, match="too small"):
        Books(64 << 30).connect(A, make_namespace(page_bytes=1))


def test_namespaces_come_to_equal_shares():
    world = World(pages=64)
    a, b = world.connect(A), world.connect(B, model="b")
    for _ in range(20):
        world.write(a, fresh_path(8))
    for _ in range(20):
        world.write(b, fresh_path(4))
    held = {s.namespace.model: s.pages_ready for s in world.stats().namespaces}
    assert held == {"m": 32, "b": 32}


def test_pages_that_are_being_written_count_for_the_share():
    world = World(pages=64)
    a, b = world.connect(A), world.connect(B, model="b")
    path = fresh_path(24)
    world.write(b, path)
    assert len(world.reserve(a, fresh_path(40))[2]) == 40
    assert world.write(a, fresh_path(8)) == 0
    assert world.found(b, path) == 24


def test_a_slab_changes_its_page_size():
    world = World(pages=64)
    a, b = world.connect(A), world.connect(B, model="b", page_bytes=2048)
    for _ in range(20):
        world.write(a, fresh_path(8))
    for _ in range(40):
        assert world.write(b, fresh_path(2)) == 2
    held = {s.namespace.model: s.bytes_held for s in world.stats().namespaces}
    assert held == {"m": 32 * 1024, "b": 32 * 1024}


def test_a_deserted_namespace_gives_way_after_a_while():
    world = World(pages=64)
    a, b = world.connect(A), world.connect(B, model="b")
    world.write(b, fresh_path(24))
    world.now += DESERTED_S + 1  # it is not deserted while somebody is there
    world.books.connection_lost(b)
    for _ in range(20):
        world.write(a, fresh_path(8))
    assert {s.namespace.model: s.pages_ready for s in world.stats().namespaces}["b"] == 24
    world.now += DESERTED_S + 1
    for _ in range(20):
        world.write(a, fresh_path(8))
    assert {s.namespace.model: s.pages_ready for s in world.stats().namespaces}["b"] == 0


def test_an_unused_namespace_is_forgotten_but_stays_counted():
    world = World()
    for _ in range(3):
        a = world.connect()
        world.write(a, make_path(1))
        world.books.flush(a)
        world.books.connection_lost(a)
    stats = world.stats()
    assert stats.namespaces == []
    assert stats.total.pages_published == 3
    assert stats.slabs_free == stats.slabs


def test_pages_of_a_client_that_left_are_found_by_the_next():
    world = World()
    world.write(world.connect(A), make_path(1, 2))
    world.books.connection_lost(A)
    assert world.found(world.connect(B), make_path(1, 2)) == 2


def test_how_far_the_arena_was_ever_used_is_known():
    world = World(slab_bytes=8192)
    a = world.connect()
    assert world.books.high_water_bytes == 0
    world.write(a, fresh_path(9))
    world.books.flush(a)
    world.write(a, fresh_path(1))
    assert world.books.high_water_bytes == 2 * 8192


def test_a_box_short_of_memory_is_like_a_full_tier():
    world = World(pages=64)
    world.limit = 16 * 1024
    a = world.connect(A)
    other = world.connect(b"o", model="other", page_bytes=2048)
    old = fresh_path(16)
    assert world.write(a, old) == 16
    _, _, pinned = world.reserve(a, fresh_path(8))
    assert len(pinned) == 8 and world.found(a, old) == 8, "its own oldest pages gave way"
    assert world.write(a, fresh_path(20)) == 8, "fewer than asked, when the rest is pinned"
    assert world.write(other, fresh_path(4)) == 4, "whole slabs change hands as ever"
    world.limit = 64 * 1024
    assert world.write(a, fresh_path(20)) == 20
    world.stats()


def test_a_lookup_that_is_nobodys_use_pins_and_is_not_counted():
    world = World()
    world.write(world.connect(), make_path(1, 2, 3))
    assert len(world.books.lookup(A, 999, make_path(1, 2, 3), 1, is_use=False)) == 2
    stats = world.stats()
    total = stats.total
    assert (stats.leases, total.lookups, total.hits, total.hit_pages) == (1, 0, 0, 0)
    world.books.release(A, 999)
    assert world.stats().leases == 0
