"""Every policy, random calls, compared with the naive twin after each of them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from smg_sglang.tree.radix_tree import RadixTree

from .factories import POLICIES, World, to_path
from .naive import NaiveTree

# Few names and short paths, so that paths meet, split nodes and come back after eviction.
paths = st.lists(st.integers(0, 2), max_size=9).map(tuple)


class TreeMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize()
    def start(self):
        self.world = World(RadixTree(POLICIES[self.policy]()))
        self.tree = self.world.tree
        self.naive = NaiveTree(POLICIES[self.policy]())
        self.now = 0.0
        self.held = []
        """(node of the tree, run of the twin), seen at some time, perhaps gone."""

    @rule(path=paths)
    def insert_whole(self, path):
        self._insert(path, 0)

    @rule(path=paths)
    def continue_what_is_known(self, path):
        self._insert(path, len(self.naive.match(path)[0]))

    @rule(path=paths, start=st.integers(0, 9))
    def insert_from_somewhere(self, path, start):
        self._insert(path, min(start, len(path)))

    def _insert(self, path, start):
        pages = self.world.fresh(len(path) - start)
        expected = self.naive.insert(path, [int(page) for page in pages], start)
        if expected is None:
            with pytest.raises(KeyError):
                self.tree.insert(to_path(path), pages, start)
            return
        inserted = self.tree.insert(to_path(path), pages, start)
        assert list(inserted.duplicates) == expected[0]
        self._hold(inserted.node, expected[1])

    @rule(path=paths)
    def match(self, path):
        match = self.tree.match(to_path(path))
        pages, run = self.naive.match(path)
        assert list(match.pages) == pages
        assert match.length == len(pages)
        self._hold(match.node, run)

    @rule(path=paths)
    def touch(self, path):
        node = self.tree.touch(self.tree.match(to_path(path)))
        self._hold(node, self.naive.touch(path))

    @rule(path=paths)
    def renew(self, path):
        node = self.tree.renew(self.tree.match(to_path(path)))
        self._hold(node, self.naive.touch(path, uses=0))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data):
        node, run = data.draw(st.sampled_from(self.held))
        if not run.attached:
            with pytest.raises(KeyError):
                self.tree.pin(node)
            return
        self.tree.pin(node)
        run.pins += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unpin(self, data):
        pinned = [pair for pair in self.held if pair[1].pins]
        node, run = data.draw(st.sampled_from(pinned or self.held))
        if not run.pins:
            with pytest.raises(ValueError):
                self.tree.unpin(node)
            return
        self.tree.unpin(node)
        run.pins -= 1

    @rule(path=paths, seconds=st.integers(1, 4), most=st.integers(0, 9), tenant=st.integers(0, 1))
    def retain(self, path, seconds, most, tenant):
        # A path is one tenant's: page keys hold the salt.
        of = bytes([path[0] if path else tenant])
        until = self.now + seconds
        heeded = self.tree.retain(to_path(path), until, of, most)
        assert heeded == self.naive.retain(path, until, of, most)

    @rule(path=paths)
    def end_retain(self, path):
        assert self.tree.end_retain(to_path(path)) == self.naive.end_retain(path)

    @rule(path=paths)
    def demote(self, path):
        assert self.tree.demote(to_path(path)) == self.naive.demote(path)

    @rule()
    def time_passes(self):
        self.now += 1
        self.tree.expire(self.now)
        self.naive.expire(self.now)

    @rule(count=st.sampled_from([1, 2, 3, 6]))
    def evict_but_what_is_retained(self, count):
        freed = self.tree.evict(count, spare_retained=True)
        assert sorted(freed) == sorted(self.naive.evict(count, spare_retained=True))

    # Mostly a few pages: the order only shows in what is left for the next eviction.
    @rule(count=st.sampled_from([1, 2, 3, 1, 2, 3, 4, 6, 12, 0, -1]))
    def evict(self, count):
        assert sorted(self.tree.evict(count)) == sorted(self.naive.evict(count))

    @rule()
    def evict_leaf(self):
        assert sorted(self.tree.evict_leaf()) == sorted(self.naive.evict_leaf())

    @rule(rarely=st.integers(0, 15))
    def clear(self, rarely):
        if rarely != 7:
            return
        assert sorted(self.tree.clear()) == sorted(self.naive.clear())

    @invariant()
    def the_books_are_right(self):
        self.tree.check_invariants()
        contents = self.naive.contents()
        assert self.tree.num_pages == len(contents)
        assert self.tree.pinned_pages() == self.naive.pinned_pages()
        assert dict(self.tree.retained) == self.naive.retained()
        for path, page in contents.items():
            pages = self.tree.match(to_path(path)).pages
            assert len(pages) == len(path)
            assert pages[-1] == page

    def _hold(self, node, run):
        if run is not None and not any(run is known for _, known in self.held):
            self.held.append((node, run))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tree_does_what_its_naive_twin_does(policy):
    machine = type("Machine", (TreeMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=50, deadline=None)
    )
