"""Whom SGLang is told to pass over, while others compute what it shares with them."""

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from smg_sglang.engine.cache.waits import MOST_PASSED_OVER, PrefixWaits
from smg_sglang.tree.waits import Waits

PAGE = 16
DOCUMENT = list(range(1000, 1600))


def request(rid, tokens, *, known=0, host=0, output=(), **more):
    tokens = array("q", tokens)
    return SimpleNamespace(
        rid=rid,
        full_untruncated_fill_ids=tokens,
        prefix_len=known,
        host_hit_length=host,
        output_ids=list(output),
        _compute_max_prefix_len=lambda length: length - 1,
        **{
            "extra_key": None,
            "cache_salt": None,
            "skip_radix_cache_insert": False,
            "input_embeds": None,
            "positional_embed_overrides": None,
            **more,
        },
    )


def question(n, **more):
    return request(f"q{n}", [*DOCUMENT, *range(n, n + 20)], **more)


def adder(*batch, running=()):
    return SimpleNamespace(can_run_list=list(batch), running_batch=SimpleNamespace(reqs=running))


@pytest.fixture
def waits():
    cache = SimpleNamespace(page_size=PAGE, supports_mamba=lambda: False)
    return PrefixWaits(cache, SimpleNamespace(waits=Waits(3)))


def test_a_request_waits_for_one_of_its_batch_and_for_one_that_is_being_computed(waits):
    assert waits.verdict(adder(question(1)), question(2)) is AddReqResult.CONTINUE
    assert waits.verdict(adder(running=[question(1)]), question(2)) is AddReqResult.CONTINUE


def test_a_prompt_that_is_computed_is_in_the_tree_or_nowhere(waits):
    done = question(1, output=[5])
    assert waits.verdict(adder(running=[done]), question(2)) is None


def test_what_it_has_already_is_not_waited_for(waits):
    for found in ({"known": 592}, {"known": 496, "host": 96}, {"host": 592}):
        assert waits.verdict(adder(question(1)), question(2, **found)) is None
    assert waits.verdict(adder(question(1)), question(2, known=496)) is AddReqResult.CONTINUE


def test_whole_pages_count_and_never_the_last_token(waits):
    """The same prompt again: all of its pages are on their way, but for the one of its last
    token."""
    first = request("a", DOCUMENT[:128])
    assert (
        waits.verdict(adder(first), request("b", DOCUMENT[:128], known=48)) is AddReqResult.CONTINUE
    )
    assert waits.verdict(adder(first), request("c", DOCUMENT[:128], known=64)) is None


@pytest.mark.parametrize(
    "different",
    [
        {"extra_key": "adapter"},
        {"cache_salt": "tenant"},
        {"skip_radix_cache_insert": True},
        {"input_embeds": [[0.0]]},
        {"positional_embed_overrides": object()},
    ],
)
def test_what_is_not_found_by_the_same_tokens_is_not_waited_for(waits, different):
    assert waits.verdict(adder(question(1, **different)), question(2)) is None
    assert waits.verdict(adder(question(1)), question(2, **different)) is None


def test_models_with_state_slots_do_not_wait():
    """SGLang takes the slot of a request that it asked for back only where it stops with it."""
    cache = SimpleNamespace(page_size=PAGE, supports_mamba=lambda: True)
    assert (
        PrefixWaits(cache, SimpleNamespace(waits=Waits(3))).verdict(adder(question(1)), question(2))
        is None
    )


def test_many_are_not_passed_over_in_one_pass(waits):
    one = adder(question(0))
    verdicts = [waits.verdict(one, question(n)) for n in range(1, MOST_PASSED_OVER + 1)]
    assert set(verdicts[:-1]) == {AddReqResult.CONTINUE}
    assert verdicts[-1] is AddReqResult.OTHER
    assert waits.verdict(adder(question(0)), question(1)) is AddReqResult.CONTINUE


def test_the_wait_ends_after_so_many_passes(waits):
    passes = [waits.verdict(adder(question(1)), question(2)) for _ in range(4)]
    assert passes == [AddReqResult.CONTINUE] * 3 + [None]
