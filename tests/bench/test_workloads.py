"""Workloads are what their titles say, and the same on every run."""

import pytest

from bench.serving import workloads


def test_chats_together_are_the_working_set():
    chats = workloads.chats(
        working_set=8192, chat_tokens=1024, first_tokens=544, added_tokens=32, answer_tokens=32
    )
    ends = {}
    for turn, length in zip(chats.turns, chats.prompt_lengths(), strict=True):
        ends[turn.conversation] = length + turn.answer_tokens
    assert len(ends) == 8
    assert sum(ends.values()) == 8192


def test_as_many_chats_as_run_at_once_fit_the_pool():
    chats = workloads.chats(working_set=4 * 4096)
    longest = max(chats.prompt_lengths()) + chats.turns[0].answer_tokens
    assert chats.concurrency * longest <= 0.9 * 4096


def test_every_chat_has_one_turn_a_round():
    chats = workloads.chats(working_set=4096)
    count = len({turn.conversation for turn in chats.turns})
    for start in range(0, len(chats.turns), count):
        round_ = [turn.conversation for turn in chats.turns[start : start + count]]
        assert sorted(round_) == list(range(count))


def test_the_same_seed_makes_the_same_workload():
    assert workloads.documents(working_set=8000) == workloads.documents(working_set=8000)
    assert workloads.no_reuse(seed=1) != workloads.no_reuse(seed=2)


def test_an_infinite_cache_has_the_history_of_a_chat_but_the_last_token():
    chats = workloads.chats(
        working_set=100, chat_tokens=100, first_tokens=40, added_tokens=20, answer_tokens=10
    )
    assert chats.prompt_lengths() == [40, 70, 100][: len(chats.turns)]
    # 40 + 10 tokens, of which 49 have KV: 48 in pages of 16; then 79.
    assert chats.infinite_hits(16) == [0, 48, 64][: len(chats.turns)]
    assert chats.infinite_hits(1) == [0, 49, 79][: len(chats.turns)]


def test_each_document_is_computed_once_by_an_infinite_cache():
    documents = workloads.documents(working_set=6400, document_tokens=1600, questions=3)
    hits = documents.infinite_hits(16)
    assert sum(hit == 0 for hit in hits) == 4
    assert sorted(set(hits)) == [0, 1600]


def test_prompts_without_reuse_hit_nothing():
    assert sum(workloads.no_reuse().infinite_hits(1)) == 0


@pytest.mark.parametrize("pool", [4096, 8192, 1000])
def test_a_prefix_is_asked_again_only_when_others_have_filled_the_pool(pool):
    steps = list(workloads.prefix_steps(4, pool, 2000))
    for number in range(4):
        expected = [step.expected for step in steps if step.prefix == number]
        assert expected == ["cold", "device", "host"]
        assert workloads.overrun(steps, number) * 2000 >= pool
