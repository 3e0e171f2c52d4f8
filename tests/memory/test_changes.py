"""What the memory server says has come and gone: whoever replays it has what its books have."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.memory.arena import PageGeometry  # noqa: F401  (its size is the books')
from smg_sglang.memory.books import Books
from smg_sglang.memory.changes import ChangeLog
from smg_sglang.memory.namespace import Namespace
from smg_sglang.tree.page_keys import KEY_BYTES

PAGE = 4096
NAMESPACE = Namespace(
    model="m", dtype="float32", layout="l", page_size=16, page_bytes=PAGE, tp_rank=0, tp_size=1
)


def keys(*numbers):
    return b"".join(number.to_bytes(KEY_BYTES, "big") for number in numbers)


def replay(here, whole, entries):
    """The keys that are there after these changes."""
    here = set() if whole else here
    for came, joined in entries:
        mine = {joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)}
        assert here.isdisjoint(mine) if came else mine <= here
        here = here | mine if came else here - mine
    return here


def test_changes_are_told_once_in_order():
    log = ChangeLog()
    log.add(True, keys(1, 2))
    log.add(False, b"")
    log.add(False, keys(2))
    assert (log.next, log.since(0)) == (2, [(True, keys(1, 2)), (False, keys(2))])
    assert log.since(1) == [(False, keys(2))]
    assert log.since(2) == []


@pytest.mark.parametrize("number", [-1, 3, 1 << 60])
def test_a_number_that_was_never_given_is_not_known(number):
    log = ChangeLog()
    log.add(True, keys(1))
    assert log.since(number) is None


def test_what_was_forgotten_is_not_known():
    log = ChangeLog(capacity=3)
    for n in range(4):
        log.add(True, keys(n))
    assert log.since(0) is None
    assert log.since(1) == [(True, keys(n)) for n in (1, 2, 3)]
    log.restart()
    assert all(log.since(n) is None for n in range(5))
    assert log.since(log.next) == []


class World:
    """Books of a few pages, and clients that write prefixes of a random tree."""

    def __init__(self, pages, seed):
        self.books = Books(pages * PAGE, slab_bytes=PAGE)
        self.rng = random.Random(seed)
        self.clients = [b"a", b"b"]
        for client in self.clients:
            self.books.connect(client, NAMESPACE)
        self.id = 0

    def path(self):
        at, numbers = 1, []
        for _ in range(self.rng.randrange(1, 7)):
            at = 3 * at + self.rng.randrange(3)
            numbers.append(at)
        return keys(*numbers)

    def write(self):
        self.id += 1
        client = self.rng.choice(self.clients)
        self.books.reserve(client, self.id, self.path())
        self.books.publish(client, self.id)

    def held(self):
        tree = self.books._connections[b"a"].space.tree
        found = set()
        for node in tree.nodes():
            run = node.keys[: KEY_BYTES * node.length]
            found |= {run[at : at + KEY_BYTES] for at in range(0, len(run), KEY_BYTES)}
        return found


@given(
    pages=st.integers(1, 12),
    seed=st.integers(0, 1 << 16),
    steps=st.lists(st.sampled_from(["write"] * 6 + ["ask"] * 3 + ["flush"]), max_size=60),
)
def test_whoever_replays_the_changes_has_what_the_books_have(pages, seed, steps):
    world, here, since = World(pages, seed), set(), -1
    for step in [*steps, "ask"]:
        if step == "write":
            world.write()
        elif step == "flush":
            world.books.flush(b"a")
        else:
            since, whole, entries = world.books.changes(b"b", since)
            here = replay(here, whole, entries)
            assert here == world.held()
    world.books.check_invariants()


def test_nothing_is_noted_before_somebody_asks():
    world = World(8, 0)
    for _ in range(5):
        world.write()
    space = world.books._connections[b"a"].space
    assert space._changes is None
    _, whole, entries = world.books.changes(b"a", 0)
    assert whole
    assert replay(set(), True, entries) == world.held()
