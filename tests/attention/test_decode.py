"""The decode kernel against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.attention import decode
from smg_sglang.attention.partial import PartialState

from .reference import assert_same_state, random_qkv, reference

POOL = 700


def scattered(lengths, seed=0):
    """Slots of each request, scattered over the pool."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(POOL)[:length] for length in lengths]


def expected(q, k, v, slots, **how):
    rows = [
        reference(q[r : r + 1], k[torch.as_tensor(s)], v[torch.as_tensor(s)], **how)
        for r, s in enumerate(slots)
    ]
    return PartialState(torch.cat([r.out for r in rows]), torch.cat([r.lse for r in rows]))


@given(
    lengths=st.lists(st.sampled_from([1, 2, 255, 256, 257, 600]), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (16, 1)]),
    dims=st.sampled_from([(64, 64), (80, 80), (128, 128), (256, 256), (96, 64), (64, 96)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=60)
def test_a_decode_batch_is_what_its_definition_says(lengths, heads, dims, dtype):
    q, k, v = random_qkv(len(lengths), POOL, heads, dims, dtype)
    slots = scattered(lengths)
    got = decode.attend_slots(q, k, v, decode.plan_decode(slots), scale=dims[0] ** -0.5)
    # Inside all is float32, so bfloat16 inputs are as exact as float32 ones.
    assert_same_state(got, expected(q, k, v, slots, scale=dims[0] ** -0.5))


def test_a_logit_cap_bends_the_scores():
    q, k, v = random_qkv(2, POOL)
    slots = scattered([300, 10])
    plan = decode.plan_decode(slots)
    got = decode.attend_slots(q * 8, k, v, plan, scale=1.0, logit_cap=5.0)
    assert_same_state(got, expected(q * 8, k, v, slots, scale=1.0, logit_cap=5.0))


def test_a_request_without_keys_is_empty():
    q, k, v = random_qkv(3, POOL)
    got = decode.attend_slots(q, k, v, decode.plan_decode(scattered([5, 0, 7])), scale=0.125)
    assert (got.lse[1] == -torch.inf).all()
    assert not got.out[1].any()
    assert torch.isfinite(got.lse[[0, 2]]).all()


def test_scores_far_apart_neither_overflow_nor_vanish():
    q, k, v = random_qkv(1, POOL)
    slots = scattered([600])
    plan = decode.plan_decode(slots)
    got = decode.attend_slots(q * 300, k, v, plan, scale=1.0)
    torch.testing.assert_close(
        got.out.double(), expected(q * 300, k, v, slots, scale=1.0).out, atol=1e-2, rtol=1e-3
    )


def test_a_pool_that_is_a_slice_of_rows_is_read_as_it_lies():
    q, k, _ = random_qkv(2, POOL, heads=(8, 1), dims=(96, 96), dtype=torch.bfloat16)
    v = k[..., :64]
    slots = scattered([100, 3])
    got = decode.attend_slots(q, k, v, decode.plan_decode(slots), scale=0.1)
    assert_same_state(got, expected(q, k, v, slots, scale=0.1))


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 512, 1000])
def test_the_units_of_a_request_cover_its_keys_once(length):
    plan = decode.plan_decode([np.arange(3), np.arange(length), np.arange(5)])
    mine = plan.requests == 1
    covered = np.concatenate([np.arange(b, e) for b, e in zip(plan.begins, plan.ends, strict=True)])
    assert covered.tolist() == list(range(3 + length + 5))
    assert (plan.ends - plan.begins <= decode.CHUNK).all()
    assert int((plan.ends - plan.begins)[mine].sum()) == length


def test_what_it_does_not_take_is_said_beforehand():
    q, k, v = random_qkv(1, 3, heads=(32, 1))
    assert not decode.supports(q, k, v)
    q, k, v = random_qkv(1, 3)
    assert decode.supports(q, k, v)
    assert not decode.supports(q, k.half(), v.half())
