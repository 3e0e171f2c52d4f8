"""Figures from hand-made answers."""

import pytest

from bench.serving.client import Answer, _note
from bench.serving.statistics import compare, spread, summarise


def answer(sent: float, times: list[float], prompt: int = 10, **cached: int) -> Answer:
    return Answer(0, prompt, sent, times, [1] * len(times), dict(cached))


def test_a_summary_counts_hits_by_tier_against_the_infinite_cache():
    answers = [answer(0, [1, 2], device=4, host=0), answer(1, [4, 5], device=0, host=6)]
    summary = summarise(answers, seconds=5, infinite=[4, 8])
    assert summary["hit_share"] == {"device": 0.2, "host": 0.3}
    assert summary["infinite_hit_share"] == 0.6
    assert summary["of_infinite"] == pytest.approx(10 / 12)
    assert summary["ttft_s"]["mean"] == 2
    assert summary["itl_s"]["p50"] == 1
    assert summary["tokens_per_s"] == 24 / 5


def test_a_summary_without_reuse_has_no_share_of_infinite():
    assert summarise([answer(0, [1])], 1, [0])["of_infinite"] is None


def test_tokens_that_come_together_share_their_time():
    got = Answer(0, 3, 0.0)
    for tokens, now in ((1, 1.0), (3, 2.0)):
        event = {"meta_info": {"completion_tokens": tokens, "cached_tokens": 0}}
        _note(got, event | {"output_ids": [7] * tokens}, now)
    assert got.token_s == [1.0, 1.5, 2.0]
    assert got.gaps_s == [0.5, 0.5]


def test_the_interval_of_a_ratio_holds_it_and_shrinks_with_repeats():
    noise = [1.8, 2.0, 2.2, 2.1, 1.9]
    few = compare(noise, [1.0] * 5)
    many = compare(noise * 20, [1.0] * 100)
    assert few["ratio"] == many["ratio"] == 2
    assert few["low"] <= many["low"] <= 2 <= many["high"] <= few["high"]


def test_what_slows_both_of_a_pair_does_not_change_their_ratio():
    slow = [1.0, 5.0, 2.0, 9.0]
    figures = compare([1.01 * x for x in slow], slow)
    assert figures["low"] == pytest.approx(1.01) == figures["high"]


def test_repeats_that_make_no_pairs_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        compare([1.0], [1.0, 2.0])


def test_the_spread_of_nothing_is_empty():
    assert spread([]) == {}
