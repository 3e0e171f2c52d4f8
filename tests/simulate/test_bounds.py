"""Bounds that bound: against brute force, against each other, and against published figures."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smg_sglang.config import EvictionName
from smg_sglang.simulate import bounds
from smg_sglang.trace import load_trace

from ..trace.factories import published
from .factories import to_units

# Few names and short paths, so that prefixes meet.
traces = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=7)


def best_by_trying(trace, capacity: int, last_is_computed: bool) -> int:
    """The most hits of any cache that holds whole prefixes, by trying all of them."""
    paths = [tuple(path) for path in trace]

    @cache
    def best(time: int, held: frozenset) -> int:
        if time == len(paths):
            return 0
        prefixes = [paths[time][: n + 1] for n in range(len(paths[time]))]
        served = prefixes[:-1] if last_is_computed else prefixes
        hits = sum(prefix in held for prefix in served)
        return hits + max(best(time + 1, kept) for kept in subsets(held | frozenset(prefixes)))

    @cache
    def subsets(held: frozenset) -> list[frozenset]:
        found = [frozenset()]
        for prefix in sorted(held, key=len):
            parent = prefix[:-1]
            found += [
                kept | {prefix}
                for kept in found
                if len(kept) < capacity and (not parent or parent in kept)
            ]
        return found

    return best(0, frozenset())


@example(trace=[[0, 0], [1], [1, 0], [0], [0, 0, 0]], capacity=2, last_is_computed=True)
@given(trace=traces, capacity=st.integers(0, 4), last_is_computed=st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_optimum_bounds_all_caches_that_hold_prefixes(trace, capacity, last_is_computed):
    served = [len(path) - last_is_computed for path in trace]
    runs = bounds.make_runs([to_units(*path) for path in trace], served)
    best = best_by_trying(trace, capacity, last_is_computed)
    optimum = bounds.belady_hits(runs, capacity)
    # Where a prefix is computed again by a prompt that ends with it, what follows it needs it more
    # often than the bound counts.
    assert optimum >= best if last_is_computed else optimum == best
    assert bounds.infinite_hits(runs) == best_by_trying(trace, 99, last_is_computed)


def named_by_prefix(trace) -> list[bytes]:
    """The paths with an id for each prefix, as Mooncake's traces have it."""
    names: dict[tuple, int] = {}
    ids = [[names.setdefault(tuple(p[: n + 1]), len(names)) for n in range(len(p))] for p in trace]
    return [to_units(*path) for path in ids]


@given(
    trace=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=30),
    capacity=st.integers(1, 12),
    policy=st.sampled_from(list(EvictionName)),
)
@settings(deadline=None)
def test_every_policy_is_below_the_optimum_and_that_below_an_infinite_cache(
    trace, capacity, policy
):
    paths = [to_units(*path) for path in trace]
    runs = bounds.make_runs(paths)
    optimum = bounds.belady_hits(runs, capacity)
    assert bounds.level_hits(paths, capacity, policy, 16) <= optimum
    assert bounds.flat_lru_hits(named_by_prefix(trace), capacity) <= optimum
    assert optimum <= bounds.infinite_hits(runs)
    assert bounds.belady_hits(runs, 10_000) == bounds.infinite_hits(runs)


def leaf_first_lru(trace, capacity: int) -> int:
    """A list of single prefixes whose ends are older than their beginnings."""
    known, hits = {}, 0
    for path in trace:
        prefixes = [tuple(path[: n + 1]) for n in range(len(path))]
        hits += sum(prefix in known for prefix in prefixes)
        for prefix in reversed(prefixes):
            known.pop(prefix, None)
            known[prefix] = None
        while len(known) > capacity:
            del known[next(iter(known))]
    return hits


@given(
    trace=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=30),
    capacity=st.integers(1, 12),
)
@settings(deadline=None)
def test_lru_of_the_tree_is_lru_of_single_units_from_the_end(trace, capacity):
    paths = [to_units(*path) for path in trace]
    hits = bounds.level_hits(paths, capacity, EvictionName.LRU, 16)
    assert hits == leaf_first_lru(trace, capacity)


@pytest.fixture(scope="module")
def conversations():
    requests = load_trace(published("mooncake/conversation_trace.jsonl.gz"))
    return requests, bounds.block_paths(requests)


def test_the_conversations_reach_the_published_share_with_an_infinite_cache(conversations):
    _, paths = conversations
    assert bounds.units(paths) == 288_500
    share = bounds.infinite_hits(bounds.make_runs(paths)) / 288_500
    assert round(share, 3) == 0.366


@pytest.mark.parametrize(
    ("blocks", "share"), [(1_000, 0.044), (5_000, 0.110), (20_000, 0.287), (60_000, 0.359)]
)
def test_the_conversations_have_the_published_lru_curve(conversations, blocks, share):
    requests, paths = conversations
    hits = bounds.flat_lru_hits(paths, blocks)
    assert round(hits / 288_500, 3) == share
    # Leaf first, as the tree must evict, is the better LRU: the ends of prefixes go before what
    # they need.
    tree = bounds.level_hits(paths, blocks, EvictionName.LRU, 512)
    assert hits <= tree <= hits + 0.002 * 288_500
    assert tree == leaf_first_lru([r.blocks.tolist() for r in requests], blocks)
