"""Batches over a pool: prefixes, new tokens and single queries together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.attention import cpu
from smg_sglang.attention.batch import KV, Rule, attend_new, attend_pool, plan_batch

from .reference import TOLERANCE, random_qkv, reference

POOL = 900


def slots_of(lengths, scattered, seed=0):
    torch.manual_seed(seed)
    order = torch.randperm(POOL) if scattered else torch.arange(POOL)
    return list(order[: sum(lengths)].int().split(lengths))


def expected(q, pool, slots, new, rule):
    outs = []
    for queries, request in zip(q.split(new), slots, strict=True):
        rows = request.long()
        how = {"scale": rule.scale, "causal": rule.causal, "logit_cap": rule.logit_cap}
        outs.append(reference(queries, pool.k[rows], pool.v[rows], **how).out)
    return torch.cat(outs)


def check(lengths, new, *, scattered, dtype, rule, kernel=None):
    dims, heads = (64, 64), (4, 2)
    q, k, v = random_qkv(sum(new), POOL, heads, dims, dtype)
    pool, slots = KV(k, v), slots_of(lengths, scattered)
    out = torch.full((sum(new), heads[0], dims[1]), torch.nan, dtype=dtype)
    plan = plan_batch(slots, new, kernel=kernel)
    attend_pool(q, pool, plan, rule, out)
    want = expected(q, pool, slots, new, rule)
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    return plan


requests = st.tuples(
    st.sampled_from([0, 1, 5, 60]), st.sampled_from([1, 1, 2, 9, cpu.MASKED_QUERIES + 1])
)


@given(
    batch=st.lists(requests, min_size=1, max_size=4),
    scattered=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    causal=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_mixed_batch_is_what_its_definition_says(kernel, *, batch, scattered, dtype, causal):
    lengths = [prefix + new for prefix, new in batch]
    rule = Rule(0.125, causal)
    new = [n for _, n in batch]
    check(lengths, new, scattered=scattered, dtype=dtype, rule=rule, kernel=kernel)


@pytest.mark.parametrize("scattered", [True, False])
def test_a_logit_cap_holds_in_every_path(kernel, scattered):
    rule = Rule(1.0, logit_cap=3.0)
    how = {"dtype": torch.float32, "rule": rule, "kernel": kernel}
    check([5, 70, 40], [1, 20, 40], scattered=scattered, **how)


@pytest.mark.parametrize("heads", [(32, 1), (8, 1)])
def test_a_pool_whose_values_lie_in_its_keys(kernel, heads):
    q, k, _ = random_qkv(12, POOL, heads, (96, 96))
    pool, slots, new = KV(k, k[..., :64]), slots_of([30, 8, 20], True), [1, 8, 3]
    out = torch.empty(12, heads[0], 64)
    attend_pool(q, pool, plan_batch(slots, new, kernel=kernel), Rule(0.1), out)
    torch.testing.assert_close(
        out.double(), expected(q, pool, slots, new, Rule(0.1)), atol=2e-5, rtol=2e-5
    )


def test_consecutive_slots_are_read_in_place():
    plan = check([50], [5], scattered=False, dtype=torch.float32, rule=Rule(0.125))
    pool = torch.zeros(POOL, 2, 4)
    assert plan.longer[0].rows_of(pool).data_ptr() == pool.data_ptr()


def test_slots_with_a_gap_are_copied():
    gap = torch.tensor([3, 4, 6, 7], dtype=torch.int32)
    shuffled = torch.tensor([3, 5, 4, 6], dtype=torch.int32)
    plan = plan_batch([gap, shuffled], [2, 2])
    assert [request.first for request in plan.longer] == [None, None]


def test_the_mask_of_a_request_is_made_once():
    q, k, v = random_qkv(6, POOL)
    plan = plan_batch(slots_of([40], True), [6])
    out = torch.empty(6, 4, 64)
    attend_pool(q, KV(k, v), plan, Rule(0.125), out)
    mask = plan.longer[0].mask
    assert mask is not None
    attend_pool(q, KV(k, v), plan, Rule(0.125), out)
    assert plan.longer[0].mask is mask


def test_prompts_without_a_prefix_need_no_pool():
    new = [1, 7, 30]
    q, k, v = random_qkv(38, 38)
    slots = slots_of(new, False)
    out = torch.empty(38, 4, 64)
    attend_new(q, KV(k, v), plan_batch(slots, new), Rule(0.125), out)
    want = expected(q, KV(k, v), slots, new, Rule(0.125))
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


def test_a_request_without_new_tokens_takes_no_rows():
    plan = plan_batch(slots_of([4, 9, 6], False), [2, 0, 1])
    assert [(r.begin, r.end) for r in plan.longer] == [(0, 2)]
    assert [(r.begin, r.end) for r in plan.single] == [(2, 3)]


def test_a_pool_of_another_dtype_is_converted():
    q, k, v = random_qkv(4, POOL)
    low = KV(k.half(), v.half())
    slots, new = slots_of([30, 40], True), [1, 3]
    out = torch.empty(4, 4, 64)
    attend_pool(q, low, plan_batch(slots, new), Rule(0.125), out)
    want = expected(q, low, slots, new, Rule(0.125))
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


def test_layers_whose_rows_lie_differently_share_a_plan(kernel):
    slots, new = slots_of([30, 8], True), [1, 1]
    plan = plan_batch(slots, new, kernel=kernel)
    for heads, dims in (((4, 2), (64, 64)), ((4, 4), (64, 64)), ((4, 2), (64, 32))):
        q, k, v = random_qkv(2, POOL, heads, dims)
        out = torch.empty(2, heads[0], dims[1])
        attend_pool(q, KV(k, v), plan, Rule(0.1), out)
        want = expected(q, KV(k, v), slots, new, Rule(0.1))
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
