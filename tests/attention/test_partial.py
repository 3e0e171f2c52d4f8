"""Merging partial states gives the attention over all keys."""

from __future__ import annotations

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.attention import cpu
from smg_sglang.attention.partial import empty_state, merge

from .reference import assert_same_state, random_qkv, reference

SCALE = 0.125


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=60)
def test_any_cut_of_the_keys_merges_to_the_whole_in_any_order(lengths, order, dtype):
    q, k, v = random_qkv(3, sum(lengths), dtype=dtype)
    cuts = list(zip(k.split(lengths), v.split(lengths), strict=True))
    order.shuffle(cuts)
    parts = [cpu.attend(q, ks, vs, scale=SCALE, causal=False) for ks, vs in cuts]
    assert_same_state(functools.reduce(merge, parts), reference(q, k, v, scale=SCALE), dtype)


@given(prefix=st.integers(0, 40), new=st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_a_prefix_and_the_new_tokens_merge_to_causal_attention(prefix, new):
    q, k, v = random_qkv(new, prefix + new)
    before = cpu.attend(q, k[:prefix], v[:prefix], scale=SCALE, causal=False)
    after = cpu.attend(q, k[prefix:], v[prefix:], scale=SCALE, causal=True)
    assert_same_state(merge(before, after), reference(q, k, v, scale=SCALE, causal=True))


def test_the_empty_state_is_neutral():
    q, k, v = random_qkv(2, 7)
    state = cpu.attend(q, k, v, scale=SCALE, causal=False)
    empty = empty_state(2, 4, 64, torch.float32)
    for merged in (merge(state, empty), merge(empty, state)):
        torch.testing.assert_close(merged.out, state.out)
        torch.testing.assert_close(merged.lse, state.lse)


def test_two_empty_states_stay_empty():
    empty = empty_state(2, 4, 64, torch.float32)
    merged = merge(empty, empty)
    assert not merged.out.any()
    assert (merged.lse == -torch.inf).all()


def test_a_merged_state_keeps_the_dtype():
    q, k, v = random_qkv(2, 7, dtype=torch.bfloat16)
    half = [cpu.attend(q, k[a], v[a], scale=SCALE, causal=False) for a in (slice(3), slice(3, 7))]
    assert merge(*half).out.dtype == torch.bfloat16


def test_a_part_with_overwhelming_scores_wins_without_overflow():
    q, k, v = random_qkv(1, 4)
    low = cpu.attend(q, k, v, scale=SCALE, causal=False)
    high = cpu.attend(q * 1000, k, v, scale=1.0, causal=False)
    assert torch.isfinite(merge(low, high).out).all()
