"""The page keys of a request are equal exactly where a server's would be."""

import numpy as np
import pytest

from smg_sglang.simulate.paths import request_path
from smg_sglang.trace.request import Request, block_ids
from smg_sglang.tree.page_keys import KEY_BYTES

from .factories import ask


def common(a: Request, b: Request, page: int = 16) -> int:
    """Leading pages that are equal."""
    first, second = request_path(a, page).keys, request_path(b, page).keys
    pages = range(0, min(len(first), len(second)), KEY_BYTES)
    return sum(1 for at in pages if first[: at + KEY_BYTES] == second[: at + KEY_BYTES])


def test_a_path_counts_whole_pages_of_prompt_and_answer():
    path = request_path(ask(1, 2, tokens=100, out=30), 16)
    # 100 + 30 tokens, and the last one's KV is never computed.
    assert (len(path), path.prompt, path.matchable) == (8, 6, 6)


def test_the_last_token_of_a_prompt_is_never_matched():
    assert request_path(ask(1, 2, tokens=128), 16).matchable == 7
    assert request_path(ask(1, 2, tokens=113), 16).matchable == 7
    assert request_path(ask(1, 2, tokens=112), 16).matchable == 6


@pytest.mark.parametrize("page", [1, 16, 32, 48, 64, 128])
def test_prompts_share_what_their_ids_share(page):
    a, b = ask(1, 2, 3, 4, number=0), ask(1, 2, 7, 4, number=1)
    assert common(a, b, page) == 128 // page
    assert common(a, a, page) == len(request_path(a, page))


def test_an_id_of_one_block_in_another_place_is_another_page():
    assert common(ask(1, 2), ask(2, 1)) == 0


def test_tokens_are_compared_as_they_are():
    tokens = list(range(100, 200))
    a = Request(0, 0.0, block_ids(tokens), 1, 100, 1)
    b = Request(1, 0.0, block_ids([*tokens[:50], 7, *tokens[51:]]), 1, 100, 1)
    assert common(a, b) == 3


def test_the_same_prompt_gets_the_same_answer_and_another_prompt_another():
    a, b = ask(1, 2, tokens=100, out=40, number=0), ask(1, 2, tokens=100, out=40, number=1)
    assert common(a, b) == len(request_path(a, 16)) == 8
    assert common(a, ask(1, 2, tokens=99, out=40)) == 6


def test_tokens_that_no_id_names_are_nobody_elses():
    a, b = ask(1, 2, tokens=190, number=0), ask(1, 2, tokens=190, number=1)
    assert (common(a, b), common(a, a)) == (8, 11)


def test_keys_of_ids_and_of_made_up_tokens_never_meet_by_chance():
    keys = set()
    for request in (ask(1, 2, 3, out=90), ask(4, 5, 6, out=90), ask(7, out=500)):
        path = np.frombuffer(request_path(request, 16).keys, np.int64).reshape(-1, 2)
        assert not keys & set(map(tuple, path.tolist()))
        keys |= set(map(tuple, path.tolist()))
