"""The infinite cache against its definition: the longest common prefix with anything before."""

from hypothesis import given
from hypothesis import strategies as st

from bench.serving.infinite_cache import InfiniteCache

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), max_size=12)


def common(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


@given(PROMPTS, st.integers(1, 4))
def test_hits_are_whole_pages_of_the_longest_common_prefix(prompts, page):
    cache = InfiniteCache(page)
    for number, prompt in enumerate(prompts):
        longest = max(
            (common(prompt, earlier) // page * page for earlier in prompts[:number]), default=0
        )
        whole = min(longest, (len(prompt) - 1) // page * page)
        # A page counts where all of it was in one earlier prompt.
        assert cache.ask(prompt) == whole


def test_the_last_token_of_an_answer_has_no_kv():
    cache = InfiniteCache(4)
    cache.ask([1, 2, 3])
    cache.answered([1, 2, 3], [4])
    assert cache.ask([1, 2, 3, 4, 5]) == 0
    cache.answered([1, 2, 3], [4, 9])
    assert cache.ask([1, 2, 3, 4, 5]) == 4
