"""Who waits for a prefix, how long at most, and what it saves."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.tree.waits import LEAST_SAVED, Waits, shared_tokens

MUCH = 10 * LEAST_SAVED


def test_a_request_waits_while_its_prefix_grows_and_goes_on_when_it_is_there():
    waits = Waits(3)
    assert [waits.passes_over("r", known, MUCH) for known in (0, 0, 128, 128, MUCH)] == [
        True, True, True, True, False,
    ]  # fmt: skip
    assert (waits.requests, waits.steps, waits.saved_tokens) == (1, 4, MUCH)
    assert len(waits) == 0


def test_a_request_goes_on_when_nothing_came_for_so_many_steps():
    waits = Waits(3)
    assert [waits.passes_over("r", 0, MUCH) for _ in range(4)] == [True] * 3 + [False]
    assert (waits.requests, waits.steps, waits.saved_tokens) == (1, 3, 0)


def test_what_is_hardly_more_is_not_waited_for():
    waits = Waits(3)
    assert not waits.passes_over("r", 100, 100 + LEAST_SAVED - 1)
    assert waits.passes_over("r", 100, 100 + LEAST_SAVED)


def test_nobody_waits_where_it_is_switched_off():
    waits = Waits(0)
    assert not waits.passes_over("r", 0, MUCH)
    assert len(waits) == waits.requests == 0


def test_who_left_is_forgotten_and_counts_from_the_beginning_if_it_comes_again():
    waits = Waits(2)
    for _ in range(5):
        assert waits.passes_over("r", 0, MUCH)
        waits.forget("r")
        waits.forget("r")
    assert (len(waits), waits.requests) == (0, 0)


@given(
    steps=st.integers(0, 5),
    events=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60),
)
def test_a_request_is_passed_over_at_most_so_often_for_each_time_its_prefix_grew(steps, events):
    waits, best, row = Waits(steps), -1, 0
    for known, coming in (tuple(n * LEAST_SAVED for n in event) for event in events):
        waited = waits.passes_over("r", known, coming)
        if known > best >= 0:
            row = 0
        best = max(best, known)
        row = row + 1 if waited else 0
        best = best if waited else -1
        assert row <= steps
        assert not waited or coming > known


@given(
    common=st.integers(0, 200),
    rest=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    known=st.integers(0, 200),
)
def test_shared_tokens_are_those_that_both_begin_with(common, rest, known):
    known = min(known, common)
    mine, theirs = (array("q", [7] * common + [n] * rest[n]) for n in (0, 1))
    found = shared_tokens(mine, theirs, known)
    assert found == (common if common - known >= LEAST_SAVED else 0)


@pytest.mark.parametrize("known", [0, 1000, 2000])
def test_prompts_that_differ_before_what_is_known_share_nothing_more(known):
    mine, theirs = (array("q", [n, *range(1500)]) for n in (0, 1))
    assert shared_tokens(mine, theirs, known) <= 1
