"""What clients say of prefixes: retained ones go last, demoted ones first, within bounds."""

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.memory.books import Books

from .world import fresh_path, make_namespace, make_path

PAGE = 1024
ALICE, BOB = b"alice", b"bob"


class World:
    """Books of `pages` pages of 1 KiB, in which one tenant may retain half."""

    def __init__(self, pages=16, share=0.5):
        self.now = 0.0
        self.limit = pages * PAGE
        self.books = Books(
            self.limit,
            8 * PAGE,
            clock=lambda: self.now,
            may_grow=lambda end_bytes: end_bytes <= self.limit,
            hint_share=share,
        )
        self._ids = count(1)
        self.connect(b"c", make_namespace())

    def connect(self, name, namespace):
        self.books.connect(name, namespace)

    def write(self, path, name=b"c"):
        id_ = next(self._ids)
        _, pages = self.books.reserve(name, id_, path)
        self.books.publish(name, id_)
        return len(pages)

    def found(self, path, name=b"c"):
        id_ = next(self._ids)
        pages = self.books.lookup(name, id_, path, 0, False)
        self.books.release(name, id_)
        return len(pages)

    def retain(self, path, seconds=60.0, tenant=ALICE, name=b"c"):
        return self.books.retain(name, path, seconds, tenant)

    def retained(self):
        self.books.check_invariants()
        stats = self.books.stats(epoch="", uptime_s=0, malformed=0, strays=0, refused=0)
        return stats.pages_retained


def test_what_is_retained_outlives_what_is_not_however_old_it_is():
    world, kept = World(), fresh_path(4)
    world.write(kept)
    assert world.retain(kept) == (4, 4, 0)
    for _ in range(20):
        assert world.write(fresh_path(4)) == 4
    assert world.found(kept) == 4
    assert world.retained() == 4


def test_a_retain_ends_by_itself_and_when_it_is_told_to():
    world, first, second = World(), fresh_path(4), fresh_path(4)
    for path in (first, second):
        world.write(path)
        world.retain(path, 30.0)
    world.retain(second, 0.0)
    assert world.retained() == 4
    world.now = 30.0
    assert world.retained() == 0
    for _ in range(4):
        world.write(fresh_path(4))
    assert (world.found(first), world.found(second)) == (0, 0)


def test_a_shorter_retain_does_not_end_a_longer_one():
    world, path = World(), fresh_path(2)
    world.write(path)
    world.retain(path, 100.0)
    world.retain(path, 1.0)
    world.now = 50.0
    assert world.retained() == 2


def test_where_all_is_retained_it_goes_all_the_same():
    world = World(share=1.0)
    for _ in range(4):
        path = fresh_path(4)
        world.write(path)
        world.retain(path)
    assert world.retained() == 16
    assert world.write(fresh_path(4)) == 4
    assert world.retained() == 12


def test_a_tenant_retains_its_share_and_no_more():
    world, path = World(), fresh_path(12)
    world.write(path)
    assert world.retain(path) == (12, 8, 4)
    assert world.retain(path) == (12, 8, 4)
    assert world.retained() == 8


def test_tenants_have_a_share_each_and_leave_a_quarter_to_nobody():
    world = World(pages=32)
    paths = [fresh_path(16), fresh_path(16)]
    for path, tenant in zip(paths, (ALICE, BOB), strict=True):
        world.write(path)
        world.retain(path, tenant=tenant)
    assert world.retained() == 16 + 8


def test_a_share_counts_all_namespaces():
    world, path = World(pages=32), fresh_path(12)
    world.connect(b"other", make_namespace("other"))
    for name in (b"c", b"other"):
        world.write(path, name)
    assert world.retain(path, name=b"c") == (12, 12, 0)
    assert world.retain(path, name=b"other") == (12, 4, 8)


def test_a_share_of_nothing_refuses_all():
    world, path = World(share=0.0), fresh_path(4)
    world.write(path)
    assert world.retain(path) == (4, 0, 4)


def test_other_namespaces_give_before_what_is_retained():
    world, kept = World(), fresh_path(8)
    world.connect(b"other", make_namespace("other"))
    world.write(kept)
    world.retain(kept)
    world.write(fresh_path(8), b"other")
    assert world.write(fresh_path(6), b"other") == 6
    assert world.found(kept) == 8


def test_what_was_demoted_goes_first_and_a_use_takes_it_back():
    world, old, going, back = World(), fresh_path(4), fresh_path(4), fresh_path(4)
    for path in (old, going, back):
        world.write(path)
    for path in (going, back):
        assert world.books.demote(b"c", path) == (4, 4, 0)
    world.books.touch(b"c", back)
    world.write(fresh_path(8))
    assert [world.found(path) for path in (old, going, back)] == [4, 0, 4]


def test_what_is_demoted_is_retained_no_longer_with_all_below_it():
    world = World()
    turn = fresh_path(3)
    longer = turn + make_path(7, 8)
    world.write(longer)
    world.retain(longer)
    assert world.books.demote(b"c", turn) == (3, 5, 0)
    assert world.retained() == 0


def test_a_shared_beginning_is_not_demoted_with_one_end_of_it():
    world, shared = World(), make_path(1, 2, 3, 4)
    one, other = shared + make_path(5), shared + make_path(6)
    for path in (one, other):
        world.write(path)
        world.retain(path)
    assert world.books.demote(b"c", one) == (5, 1, 0)
    assert world.retained() == 5


def test_an_end_that_has_gone_demotes_nobody_elses():
    world, shared = World(), make_path(1, 2, 3, 4)
    world.write(shared + make_path(6))
    world.retain(shared + make_path(6))
    assert world.books.demote(b"c", shared + make_path(5)) == (4, 0, 0)
    assert world.books.retain(b"c", shared + make_path(5), 0.0, ALICE) == (4, 0, 0)
    assert world.retained() == 5


def test_a_flush_forgets_what_was_retained():
    world, path = World(), fresh_path(4)
    world.write(path)
    world.retain(path)
    world.books.flush(b"c")
    assert world.retained() == 0
    world.write(path)
    assert world.retain(path) == (4, 4, 0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "retain", "demote", "wait"]),
        st.integers(0, 5),
        st.integers(1, 6),
        st.sampled_from([ALICE, BOB]),
    ),
    max_size=60,
)


@given(steps=STEPS, share=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@pytest.mark.parametrize("pages", [8, 16])
def test_whatever_is_asked_shares_hold_and_retained_pages_stay_while_others_may_go(
    pages, steps, share
):
    world = World(pages, share)
    until = {}
    for kind, number, length, tenant in steps:
        path = b"".join(
            make_path(n) for n in (100 if tenant == ALICE else 200, number, *range(length))
        )
        known = world.found(path)
        if kind == "write":
            before, tree = world.retained(), world.books._connections[b"c"].space.tree
            others = tree.num_pages - before
            missing = length + 2 - known
            room = world.limit // PAGE - tree.num_pages
            world.write(path)
            if missing <= room + others - known:
                assert world.retained() == before
        elif kind == "retain":
            heeded = world.retain(path, float(number), tenant)
            assert heeded.known == known
            assert heeded.refused == 0 or not number or heeded.done + heeded.refused == known
            until[path] = world.now + number
        elif kind == "demote":
            world.books.demote(b"c", path)
        else:
            world.now += number
        retained = world.books._connections[b"c"].space.tree.retained
        assert all(kept <= share * pages for kept in retained.values())
        assert sum(retained.values()) <= (1 + share) / 2 * pages
        world.retained()
