import hashlib
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.tree.page_keys import KEY_BYTES, keys_from_hex, page_keys

TOKENS = list(range(100, 164))


def split(path: bytes) -> list[bytes]:
    return [path[i : i + KEY_BYTES] for i in range(0, len(path), KEY_BYTES)]


def test_only_whole_pages_get_a_key():
    assert len(page_keys(TOKENS[:35], 16)) == 2 * KEY_BYTES
    assert page_keys(TOKENS[:15], 16) == b""
    assert page_keys([], 16) == b""


def test_a_longer_prompt_starts_with_the_path_of_a_shorter_one():
    assert page_keys(TOKENS, 4).startswith(page_keys(TOKENS[:32], 4))


@given(
    tokens=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
    page_size=st.integers(1, 8),
    cut=st.integers(0, 40),
    salt=st.none() | st.text(max_size=3),
)
def test_keys_computed_in_two_steps_are_those_computed_at_once(tokens, page_size, cut, salt):
    whole = page_keys(tokens, page_size, cache_salt=salt)
    done = min(cut, len(tokens) // page_size)
    head = page_keys(tokens[: done * page_size], page_size, cache_salt=salt)
    tail = page_keys(
        tokens[done * page_size :], page_size, parent=head[-KEY_BYTES:], cache_salt=salt
    )
    assert head + tail == whole


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, ">i8"])
def test_lists_arrays_and_numpy_give_the_same_keys(dtype):
    expected = page_keys(TOKENS, 4)
    assert page_keys(np.array(TOKENS, dtype), 4) == expected
    assert page_keys(array("q", TOKENS), 4) == expected
    assert page_keys(tuple(TOKENS), 4) == expected


def test_a_strided_view_gives_the_keys_of_its_tokens():
    assert page_keys(np.repeat(np.array(TOKENS), 2)[::2], 4) == page_keys(TOKENS, 4)


def test_every_namespace_has_its_own_keys():
    namespaces = [
        {},
        {"extra_key": ""},
        {"cache_salt": ""},
        {"extra_key": "ab"},
        {"cache_salt": "ab"},
        {"extra_key": "a", "cache_salt": "b"},
        {"extra_key": "", "cache_salt": "ab"},
        {"extra_key": "b", "cache_salt": "a"},
    ]
    keys = [key for space in namespaces for key in split(page_keys(TOKENS, 4, **space))]
    assert len(set(keys)) == len(keys)


def test_the_same_tokens_have_another_key_at_another_place():
    keys = split(page_keys([7] * 64, 4))
    assert len(set(keys)) == len(keys)


def test_the_same_tokens_have_another_key_after_another_prefix():
    one, other = page_keys([1, 2, 9, 9], 2), page_keys([2, 1, 9, 9], 2)
    assert one[KEY_BYTES:] != other[KEY_BYTES:]


def test_pages_of_another_size_have_other_keys():
    assert page_keys(TOKENS, 32)[-KEY_BYTES:] != page_keys(TOKENS, 64)[-KEY_BYTES:]


def test_a_key_is_blake2b_over_parent_and_int64_tokens():
    parent = bytes(range(KEY_BYTES))
    text = parent + np.array([5, 6], "<i8").tobytes()
    expected = hashlib.blake2b(text, digest_size=16).digest()
    assert page_keys([5, 6], 2, parent=parent) == expected


@pytest.mark.parametrize(
    ("tokens", "page_size", "parent"),
    [(TOKENS, 0, b""), (TOKENS, 4, b"short"), ([0.5, 1.5], 1, b""), ([[1, 2]], 1, b"")],
)
def test_what_is_no_page_of_tokens_is_refused(tokens, page_size, parent):
    with pytest.raises(ValueError):
        page_keys(tokens, page_size, parent=parent)


def test_tokens_past_64_bits_are_refused():
    with pytest.raises(ValueError):
        page_keys([2**63], 1)


def test_sglang_hashes_become_their_first_128_bits():
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(3)]
    expected = b"".join(hashlib.sha256(bytes([i])).digest()[:16] for i in range(3))
    assert keys_from_hex(hashes) == expected
    assert keys_from_hex([]) == b""


def test_a_hash_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="32 hex digits"):
        keys_from_hex(["ab" * 32, "ab" * 15])
