"""The controller's approximate memory of prompts."""

from smg_sglang.phase.prefixes import BLOCK, Known, Prefixes, path_of
from tests.phase.factories import prompt


def test_the_longest_known_prefix_is_found():
    prefixes = Prefixes()
    tokens = prompt(1, 10 * BLOCK)
    prefixes.learn(path_of(tokens[: 6 * BLOCK]), worker=3)
    assert prefixes.find(path_of(tokens)) == Known(6 * BLOCK, 3)
    assert prefixes.find(path_of(prompt(2, 10 * BLOCK))) == Known(0, None)
    assert prefixes.find(b"") == Known(0, None)


def test_an_answer_counts_as_known():
    prefixes = Prefixes()
    path = path_of(prompt(1, 2 * BLOCK))
    prefixes.learn(path, worker=1)
    prefixes.grew(path, worker=1, tokens=50)
    assert prefixes.find(path + path_of(prompt(2, BLOCK))) == Known(2 * BLOCK + 50, 1)


def test_tenants_are_apart():
    prefixes = Prefixes()
    tokens = prompt(1, 4 * BLOCK)
    prefixes.learn(path_of(tokens, extra_key="lora"), worker=0)
    assert prefixes.find(path_of(tokens)).tokens == 0
    assert prefixes.find(path_of(tokens, cache_salt="x")).tokens == 0


def test_what_is_used_is_remembered_and_the_rest_forgotten():
    prefixes = Prefixes(capacity=100)
    kept = path_of(prompt(0, 4 * BLOCK))
    for seed in range(1, 200):
        prefixes.learn(kept, worker=0)
        prefixes.learn(path_of(prompt(seed, 4 * BLOCK)), worker=1)
    assert len(prefixes) <= 2 * 100 + 8
    assert prefixes.find(kept) == Known(4 * BLOCK, 0)
    assert prefixes.find(path_of(prompt(1, 4 * BLOCK))).tokens == 0
