"""CPU attention of new queries against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.attention import cpu, plain

from .reference import assert_same_state, random_qkv, reference

heads = st.sampled_from([(1, 1), (4, 4), (9, 3), (8, 1), (14, 2)])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@given(
    lengths=st.tuples(
        st.sampled_from([0, 1, 2, 31, 200]), st.sampled_from([1, 2, 3, 17, 128, 129, 150])
    ),
    heads=heads,
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=dtypes,
    causal=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_attention_is_what_its_definition_says(lengths, heads, dim, dtype, causal):
    prefix, new = lengths
    q, k, v = random_qkv(new, prefix + new, heads, (dim, dim), dtype)
    got = cpu.attend(q, k, v, scale=dim**-0.5, causal=causal)
    assert got.out.dtype == dtype
    assert_same_state(got, reference(q, k, v, scale=dim**-0.5, causal=causal), dtype)


@given(
    prefix=st.sampled_from([0, 1, 30]),
    new=st.sampled_from([1, 2, 140]),
    dims=st.sampled_from([(192, 128), (96, 64), (64, 128)]),
    causal=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_values_may_have_another_width_than_keys(prefix, new, dims, causal):
    q, k, v = random_qkv(new, prefix + new, dims=dims)
    got = cpu.attend(q, k, v, scale=0.1, causal=causal)
    assert_same_state(got, reference(q, k, v, scale=0.1, causal=causal))


def test_values_that_are_the_front_of_the_keys_need_no_copy():
    q, k, _ = random_qkv(5, 30, heads=(16, 1), dims=(96, 96))
    v = k[..., :64]
    got = cpu.attend(q, k, v, scale=0.1, causal=True)
    assert_same_state(got, reference(q, k, v, scale=0.1, causal=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("new", [1, 5, 40])
def test_a_logit_cap_bends_the_scores(new, causal):
    q, k, v = random_qkv(new, 40)
    got = cpu.attend(q * 8, k, v, scale=1.0, causal=causal, logit_cap=5.0)
    assert_same_state(got, reference(q * 8, k, v, scale=1.0, causal=causal, logit_cap=5.0))


def test_the_plain_path_works_in_blocks(monkeypatch):
    monkeypatch.setattr(plain, "_SCORES", 4 * 40 * 3)
    q, k, v = random_qkv(10, 40)
    got = cpu.attend(q, k, v, scale=0.125, causal=True, logit_cap=50.0)
    assert_same_state(got, reference(q, k, v, scale=0.125, causal=True, logit_cap=50.0))


def test_strided_rows_are_read_as_they_lie():
    q, k, v = random_qkv(6, 80)
    got = cpu.attend(q, k[::2], v[::2], scale=0.125, causal=True)
    assert_same_state(got, reference(q, k[::2], v[::2], scale=0.125, causal=True))


def test_no_query_and_no_key_give_an_empty_state():
    q, k, v = random_qkv(3, 5)
    assert cpu.attend(q[:0], k, v, scale=1.0, causal=False).out.shape == (0, 4, 64)
    state = cpu.attend(q, k[:0], v[:0], scale=1.0, causal=False)
    assert (state.lse == -torch.inf).all()
    assert not state.out.any()


def test_more_causal_queries_than_keys_are_refused():
    q, k, v = random_qkv(4, 3)
    with pytest.raises(ValueError, match="4 queries"):
        cpu.attend(q, k, v, scale=1.0, causal=True)


def test_a_mask_made_before_gives_the_same():
    q, k, v = random_qkv(7, 50)
    mask = cpu.causal_mask(7, 50, 2, torch.float32)
    with_mask = cpu.attend(q, k, v, scale=0.125, causal=True, mask=mask)
    torch.testing.assert_close(with_mask.out, cpu.attend(q, k, v, scale=0.125, causal=True).out)
