import numpy as np
import pytest

from smg_sglang.tree.eviction import FIFO, LFU, SLRU, CostAware
from smg_sglang.tree.radix_tree import RadixTree

from .factories import POLICIES, World, to_path


@pytest.fixture(params=POLICIES)
def world(request):
    """A world that is checked when the test is over, once for each policy."""
    world = World(RadixTree(POLICIES[request.param]()))
    yield world
    world.tree.check_invariants()


def test_an_empty_tree_matches_nothing(world):
    match = world.tree.match(to_path([1, 2]))
    assert (match.length, list(match.pages)) == (0, [])
    assert list(world.tree.evict(5)) == []


def test_a_path_gives_the_pages_it_was_inserted_with(world):
    world.insert([1, 2, 3])
    assert list(world.tree.match(to_path([1, 2, 3])).pages) == [0, 1, 2]
    assert list(world.tree.match(to_path([1, 2])).pages) == [0, 1]
    assert list(world.tree.match(to_path([1, 2, 3, 4])).pages) == [0, 1, 2]
    assert world.known([2, 3]) == 0


def test_keys_behind_a_difference_do_not_match_even_if_they_are_equal(world):
    world.insert([1, 2, 3, 4])
    assert world.known([1, 9, 3, 4]) == 1


def test_pages_in_several_nodes_come_in_the_order_of_the_path(world):
    world.insert([1, 2, 3, 4])
    world.insert([1, 2, 5, 6])
    assert list(world.tree.match(to_path([1, 2, 5, 6])).pages) == [0, 1, 6, 7]


def test_pages_already_there_stay_and_the_callers_come_back(world):
    world.insert([1, 2, 3])
    inserted = world.insert([1, 2, 4, 5])
    assert list(inserted.duplicates) == [3, 4]
    assert list(world.tree.match(to_path([1, 2, 4, 5])).pages) == [0, 1, 5, 6]
    assert world.tree.num_pages == 5


def test_inserting_a_known_path_takes_nothing(world):
    world.insert([1, 2, 3])
    assert list(world.insert([1, 2]).duplicates) == [3, 4]
    assert world.tree.num_pages == 3


def test_pages_can_continue_a_known_prefix(world):
    world.insert([1, 2])
    assert list(world.insert([1, 2, 3], start=1).duplicates) == [2]
    assert list(world.tree.match(to_path([1, 2, 3])).pages) == [0, 1, 3]


def test_pages_whose_parents_are_missing_are_refused(world):
    world.insert([1, 2])
    with pytest.raises(KeyError, match="only 2 of those"):
        world.insert([1, 2, 3, 4], start=3)
    assert world.known([1, 2, 3]) == 2


@pytest.mark.parametrize("start", [-1, 0, 2, 4])
def test_pages_that_do_not_fit_the_path_are_refused(start):
    with pytest.raises(ValueError, match="3 keys"):
        RadixTree().insert(to_path([1, 2, 3]), np.arange(2), start)


@pytest.mark.parametrize("call", ["match", "insert"])
def test_a_path_that_is_no_whole_number_of_keys_is_refused(call):
    arguments = (np.arange(1),) if call == "insert" else ()
    with pytest.raises(ValueError, match="17 bytes"):
        getattr(RadixTree(), call)(bytes(17), *arguments)


def test_the_tree_keeps_its_own_copy_of_the_pages(world):
    pages = np.arange(2)
    world.tree.insert(to_path([1, 2]), pages)
    pages[:] = 99
    match = world.tree.match(to_path([1, 2]))
    assert list(match.pages) == [0, 1]
    with pytest.raises(ValueError):
        match.pages[0] = 5


def test_a_match_keeps_its_pages_after_an_eviction(world):
    world.insert([1, 2, 3])
    match = world.tree.match(to_path([1, 2, 3]))
    world.tree.evict(2)
    assert list(match.pages) == [0, 1, 2]


def test_eviction_takes_the_end_of_the_path_first(world):
    world.insert([1, 2, 3, 4])
    assert sorted(world.tree.evict(2)) == [2, 3]
    assert world.known([1, 2, 3, 4]) == 2
    assert world.tree.num_pages == 2


def test_a_parent_goes_only_after_its_children(world):
    world.insert([1, 2])
    world.insert([1, 2, 3], start=2)
    world.insert([1, 2, 4], start=2)
    assert sorted(world.tree.evict(2)) == [2, 3]
    assert list(world.tree.evict(9)) == [0, 1]
    assert world.tree.num_pages == 0


def test_a_trimmed_leaf_takes_its_tail_back(world):
    world.insert([1, 2, 3, 4, 5, 6])
    world.tree.evict(2)
    world.insert([1, 2, 3, 4, 5, 6], start=4)
    assert list(world.tree.match(to_path([1, 2, 3, 4, 5, 6])).pages) == [0, 1, 2, 3, 6, 7]


def test_a_trimmed_leaf_can_be_split(world):
    world.insert([1, 2, 3, 4, 5, 6])
    world.tree.evict(2)
    world.insert([1, 2, 3, 9])
    world.tree.check_invariants()
    assert world.known([1, 2, 3, 4, 5, 6]) == 4


def test_a_pinned_path_stays(world):
    node = world.insert([1, 2, 3]).node
    world.insert([1, 2, 4])
    world.tree.pin(node)
    assert list(world.tree.evict(99)) == [5]
    assert world.known([1, 2, 3]) == 3
    assert world.tree.pinned_pages() == 3


def test_an_unpinned_path_goes(world):
    node = world.insert([1, 2, 3]).node
    world.tree.pin(node)
    world.tree.pin(node)
    world.tree.evict(99)
    world.tree.unpin(node)
    assert list(world.tree.evict(99)) == []
    world.tree.unpin(node)
    assert list(world.tree.evict(99)) == [0, 1, 2]


def test_a_split_leaves_the_pin_on_the_lower_part(world):
    node = world.insert([1, 2, 3, 4]).node
    world.tree.pin(node)
    world.insert([1, 2, 8])
    assert list(world.tree.evict(99)) == [6]
    assert world.known([1, 2, 3, 4]) == 4
    world.tree.unpin(node)
    assert len(world.tree.evict(99)) == 4


def test_unpinning_without_a_pin_is_refused(world):
    with pytest.raises(ValueError, match="no pin"):
        world.tree.unpin(world.insert([1]).node)


def test_pinning_what_has_left_is_refused(world):
    node = world.insert([1]).node
    world.tree.evict(1)
    with pytest.raises(KeyError, match="left the tree"):
        world.tree.pin(node)


def test_the_root_can_be_pinned_like_any_match(world):
    match = world.tree.match(b"")
    world.tree.pin(match.node)
    world.tree.check_invariants()
    world.tree.clear()
    world.tree.check_invariants()
    world.tree.unpin(match.node)
    world.tree.check_invariants()


def test_clearing_gives_all_pages_back_and_pins_can_still_be_taken_back(world):
    node = world.insert([1, 2]).node
    world.insert([1, 3])
    world.tree.pin(node)
    assert sorted(world.tree.clear()) == [0, 1, 3]
    assert (world.tree.num_pages, world.tree.num_pinned) == (0, 0)
    world.tree.unpin(node)
    world.insert([1, 2])
    assert world.known([1, 2]) == 2


def test_matching_does_not_make_recent_but_touching_does():
    world = World()
    world.insert([1])
    world.insert([2])
    world.tree.match(to_path([1]))
    world.tree.touch(world.tree.match(to_path([2])))
    world.insert([3])
    assert list(world.tree.evict(1)) == [0]
    world.tree.touch(world.tree.match(to_path([2])))
    assert list(world.tree.evict(1)) == [2]


def test_a_parent_is_as_recent_as_its_last_child():
    world = World()
    world.insert([1])
    world.insert([2])
    world.insert([1, 5], start=1)
    assert list(world.tree.evict(1)) == [1]
    assert list(world.tree.evict(1)) == [2]


def test_a_use_of_the_beginning_does_not_keep_the_rest(world):
    world.insert([1, 2, 3, 4])
    world.insert([9])
    node = world.tree.touch(world.tree.match(to_path([1, 2, 8])))
    world.tree.pin(node)
    assert world.tree.pinned_pages() == 2
    assert sorted(world.tree.evict(9)) == [2, 3, 4]
    world.tree.unpin(node)


def test_an_outdated_match_counts_for_what_is_left_of_it(world):
    world.insert([1, 2, 3, 4])
    match = world.tree.match(to_path([1, 2, 3]))
    world.insert([1, 7])
    world.tree.evict_leaf()
    assert world.tree.touch(match).start <= 1


def test_a_use_of_what_has_left_is_of_no_effect(world):
    world.insert([1, 2, 3])
    gone = world.tree.match(to_path([1, 2]))
    world.tree.clear()
    world.tree.touch(gone)
    assert world.known([1, 2, 3]) == 0


def test_a_match_that_was_cut_off_its_node_since_counts_for_itself_only(world):
    world.insert([1, 2, 3, 4])
    match = world.tree.match(to_path([1, 2]))
    world.insert([1, 2, 9])
    assert world.tree.touch(match) is world.tree.match(to_path([1, 2])).node


def test_a_leaf_can_go_as_a_whole(world):
    world.insert([1, 2])
    pinned = world.insert([1, 2, 3, 4], start=2).node
    world.tree.pin(pinned)
    assert list(world.tree.evict_leaf()) == []
    world.tree.unpin(pinned)
    assert list(world.tree.evict_leaf()) == [2, 3]
    assert list(world.tree.evict_leaf()) == [0, 1]
    assert list(world.tree.evict_leaf()) == []


def test_who_inserts_a_prefix_has_not_used_it():
    world = World(RadixTree(LFU()))
    world.insert([1])
    world.insert([1])
    world.tree.renew(world.tree.match(to_path([1])))
    world.insert([2])
    world.tree.touch(world.tree.match(to_path([2])))
    assert list(world.tree.evict(1)) == [0]


def test_a_deep_page_stays_longer_than_a_shallow_one_under_cost():
    world = World(RadixTree(CostAware(doubling_depth=2)))
    world.insert(list(range(1, 9)))
    for name in range(20, 23):
        world.insert([name])
    # Eight pages deep a page costs 5, at the root 1.5: three generations of those go first.
    assert sorted(world.tree.evict(3)) == [8, 9, 10]
    assert list(world.tree.evict(1)) == [7]


def test_a_trimmed_leaf_is_ranked_anew_under_cost():
    world = World(RadixTree(CostAware(doubling_depth=1)))
    world.insert([1, 2, 3, 4])
    world.insert([9, 8])
    assert list(world.tree.evict(1)) == [5]
    assert list(world.tree.evict(1)) == [4]
    # What is left of the first path now ranks by its new end.
    assert list(world.tree.evict(3)) == [1, 2, 3]
    world.tree.check_invariants()


def test_what_nobody_uses_ages_away_under_cost_however_deep():
    world = World(RadixTree(CostAware(doubling_depth=2)))
    world.insert(list(range(1, 9)))
    for name in range(20, 60):
        world.insert([name])
        world.tree.evict(1)
        if world.known(list(range(1, 9))) == 0:
            return
    raise AssertionError("the deep path was never evicted")


def test_lfu_keeps_what_is_used_often():
    world = World(RadixTree(LFU()))
    world.insert([1])
    world.tree.touch(world.tree.match(to_path([1])))
    world.insert([2])
    assert list(world.tree.evict(1)) == [1]


def test_a_parent_was_used_as_often_as_all_its_children():
    world = World(RadixTree(LFU()))
    for names, start in (([1], 0), ([1, 5], 1), ([2], 0)):
        world.insert(names, start)
        for _ in range(1 if names == [1] else 3):
            world.tree.touch(world.tree.match(to_path(names)))
    assert list(world.tree.evict(1)) == [1]
    assert list(world.tree.evict(1)) == [2]


def test_fifo_does_not_care_about_uses():
    world = World(RadixTree(FIFO()))
    world.insert([1])
    world.insert([2])
    world.tree.touch(world.tree.match(to_path([1])))
    assert list(world.tree.evict(1)) == [0]


def test_slru_keeps_a_proven_prefix_through_a_scan():
    world = World(RadixTree(SLRU()))
    world.insert([1])
    world.tree.touch(world.tree.match(to_path([1])))
    for name in range(10, 20):
        world.insert([name])
    assert 0 not in world.tree.evict(10)


def test_a_whole_tree_of_stale_ranks_is_evicted_in_the_order_of_use():
    world = World()
    for name in range(500):
        world.insert([name])
    order = np.random.default_rng(0).permutation(500)
    for name in order:
        world.tree.touch(world.tree.match(to_path([int(name)])))
    assert [int(world.tree.evict(1)[0]) for _ in range(500)] == list(order)
    world.tree.check_invariants()


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree, node: setattr(node, "length", node.length - 1),
        lambda tree, node: setattr(node, "parent", None),
        lambda tree, node: setattr(node, "pins", 1),
        lambda tree, node: setattr(node, "entry", False),
        lambda tree, node: setattr(node, "used_at", -1),
        lambda tree, node: setattr(node, "attached", False),
        lambda tree, node: setattr(node, "keys", node.keys[::-1]),
        lambda tree, node: tree._queue.drop_first(),
        lambda tree, node: tree._root.children.clear(),
        lambda tree, node: setattr(node, "pages", node.pages.copy()),
    ],
)
def test_the_invariant_check_finds_damage(damage):
    world = World()
    node = world.insert([1, 2, 3]).node
    world.tree.check_invariants()
    damage(world.tree, node)
    with pytest.raises(AssertionError):
        world.tree.check_invariants()
