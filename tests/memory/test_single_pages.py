"""Namespaces of single pages, found by their own keys: scenarios, and random histories against a
naive twin."""

from random import Random

import numpy as np
import pytest

from smg_sglang.memory.books import Books

from .world import make_namespace, make_path

A, B = b"client a", b"client b"


class World:
    """Books of `pages` pages of 1 KiB with two clients of one namespace."""

    def __init__(self, pages=64):
        self.books = Books(pages * 1024, 8192)
        for name in (A, B):
            self.books.connect(name, make_namespace(layout="window"))
        self._ids = iter(range(1, 1 << 30))

    def write(self, *keys, client=A):
        """Reserve what is lacking of the keys and publish it: which of them, and the pages."""
        id_ = next(self._ids)
        lacking, pages = self.books.reserve_each(client, id_, make_path(*keys))
        self.books.publish(client, id_)
        return lacking.tolist(), pages.tolist()

    def last(self, keys, window, client=A):
        id_ = next(self._ids)
        length, pages = self.books.lookup_last(client, id_, make_path(*keys), window)
        return id_, length, pages.tolist()

    def check(self):
        self.books.check_invariants()


@pytest.mark.parametrize(
    ("here", "window", "length"),
    [
        ([1, 2, 3, 4], 2, 4),
        ([1, 2, 3], 2, 3),
        ([2, 3, 4], 2, 4),
        ([1, 2, 4], 2, 2),
        ([1], 2, 1),
        ([3, 4], 2, 4),
        ([4], 2, 0),
        ([4], 1, 4),
        ([], 3, 0),
        ([1, 2, 3, 4], 9, 4),
        ([2, 3, 4], 9, 0),
    ],
)
def test_a_hit_ends_where_its_last_pages_are_all_there(here, window, length):
    world = World()
    world.write(*here)
    _, found, pages = world.last([1, 2, 3, 4], window)
    assert found == length
    assert len(pages) == min(window, length)
    world.check()


def test_only_what_is_lacking_is_written():
    world = World()
    world.write(1, 2)
    lacking, pages = world.write(2, 3, 1, 4)
    assert lacking == [1, 3]
    assert len(pages) == 2
    world.check()


def test_a_leased_window_stays_when_memory_is_full():
    world = World(pages=8)
    _, pages = world.write(1, 2, 3)
    lease, length, leased = world.last([1, 2, 3], 2)
    assert (length, leased) == (3, pages[1:])
    for key in range(100, 140):
        world.write(key, client=B)
    _, length, again = world.last([2, 3], 2, client=B)
    assert (length, again) == (2, leased)
    world.books.release(A, lease)
    world.check()


def test_where_there_is_no_room_it_is_told_how_many_are_short():
    world = World(pages=8)
    lacking, pages = world.write(*range(20))
    assert (len(lacking), len(pages)) == (20, 8)
    world.check()


def test_pages_of_a_dead_writer_are_nobodys():
    world = World()
    world.books.reserve_each(A, 1, make_path(1, 2))
    world.books.connection_lost(A)
    assert world.last([1, 2], 2, client=B)[1] == 0
    world.check()


def test_what_was_reserved_before_a_flush_is_dropped():
    world = World()
    world.books.reserve_each(A, 1, make_path(1))
    world.books.flush(B)
    world.books.publish(A, 1)
    assert world.last([1], 1)[1] == 0
    world.check()


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_give_each_key_the_page_that_was_written_for_it(seed):
    rng = Random(seed)
    world = World(pages=rng.choice([8, 16, 64]))
    content, leases, writing = {}, {}, {}  # page -> key; id -> [(page, key)]
    for step in range(300):
        client = rng.choice([A, B])
        keys = rng.sample(range(12), rng.randrange(1, 8))
        match rng.randrange(4):
            case 0:
                lacking, pages = world.books.reserve_each(client, step, make_path(*keys))
                mine = [keys[i] for i in lacking[: len(pages)]]
                held = {page for pairs in leases.values() for page, _ in pairs}
                assert not held & set(pages.tolist()), "a leased page was given away"
                content.update(dict.fromkeys(pages.tolist()))
                if len(pages):
                    writing[client, step] = list(zip(pages.tolist(), mine, strict=True))
            case 1 if writing:
                (client, id_), pairs = writing.popitem()
                content.update(pairs)
                (world.books.publish if rng.random() < 0.8 else world.books.abandon)(client, id_)
            case 2:
                window = rng.randrange(1, 5)
                length, pages = world.books.lookup_last(client, step, make_path(*keys), window)
                mine = keys[max(0, length - window) : length]
                assert [content[page] for page in pages.tolist()] == mine
                if len(pages):
                    leases[client, step] = list(zip(pages.tolist(), mine, strict=True))
            case 3 if leases:
                world.books.release(*rng.choice(list(leases)))
                leases = {k: v for k, v in leases.items() if k in _held(world.books)}
        for pairs in leases.values():
            assert all(content[page] == key for page, key in pairs), "a leased page was written"
        world.check()


def _held(books):
    return {(name, id_) for name, c in books._connections.items() for id_ in c.leases}


def test_keys_in_part_are_refused():
    world = World()
    with pytest.raises(ValueError, match="keys of 16 bytes"):
        world.books.lookup_last(A, 1, b"x" * 17, 1)
    with pytest.raises(ValueError, match="keys of 16 bytes"):
        world.books.reserve_each(A, 1, b"x" * 17)
    assert np.count_nonzero(world.books._allocators[1024].states) == 0
