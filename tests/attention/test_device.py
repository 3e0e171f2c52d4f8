"""Batches on CUDA, dry: FlashInfer's kernels are float64 references on CPU tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smg_sglang.attention import flashinfer
from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.device import DeviceAttention, joined, slots_of
from smg_sglang.attention.flashinfer import Wrappers, one_slot_pages
from smg_sglang.attention.host import HostRun
from smg_sglang.attention.partial import PartialState
from smg_sglang.errors import ConfigError
from tests.interpreter import interpreted

from . import fake_flashinfer
from .reference import TOLERANCE, assert_same_state, random_qkv, reference
from .test_host import LAYERS, World

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    fake_flashinfer.install(monkeypatch)


def make_attention():
    return DeviceAttention(Wrappers(CPU, torch.empty(16, dtype=torch.uint8)))


def plan_of(world, attention, device=CPU):
    lengths = [len(slots) for slots in world.slots]
    keys = one_slot_pages(torch.cat(world.slots).to(device), lengths)
    new = [new for _, _, new in world.requests]
    return attention.plan(keys, new, world.host, world.reader)


def check(world, attention, q_heads, rule, device=CPU):
    """One forward pass over all layers; its plan. Also called by tests/gpu."""
    plan = plan_of(world, attention, device)
    new = list(plan.new)
    for layer in range(LAYERS):
        q = torch.randn(sum(new), q_heads, world.k[0].shape[2]).to(world.dtype)
        pool = KV(world.k[layer].to(device), world.v[layer].to(device))
        out = torch.full_like(q, torch.nan, device=device)
        attention.attend(q.to(device), pool, plan, rule, out, layer)
        outs = out.cpu().split(new)
        for number, (queries, got) in enumerate(zip(q.split(new), outs, strict=True)):
            k, v = world.whole(number, layer)
            how = {"scale": rule.scale, "causal": rule.causal, "logit_cap": rule.logit_cap}
            want = reference(queries, k, v, **how).out
            tolerance = TOLERANCE[world.dtype]
            torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    return plan


requests = st.tuples(
    st.sampled_from([0, 1, 2, 3, 7]), st.sampled_from([0, 1, 5, 30]), st.sampled_from([1, 1, 2, 9])
)


@given(
    batch=st.lists(requests, min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (32, 1)]),
    dim=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    page_size=st.sampled_from([1, 4, 16]),
    segment_pages=st.sampled_from([1, 2, 5]),
    causal=st.booleans(),
)
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_host_pages_and_slots_together_are_the_whole(
    *, batch, heads, dim, dtype, page_size, segment_pages, causal
):
    batch = [(pages, tail + new, new) for pages, tail, new in batch]
    world = World(batch, heads=heads, dims=(dim, dim), dtype=dtype, page_size=page_size,
                  segment_pages=segment_pages)  # fmt: skip
    try:
        attention = make_attention()
        for _ in range(3):
            check(world, attention, heads[0], Rule(dim**-0.5, causal))
    finally:
        world.close()


BATCH = [(3, 7, 1), (5, 20, 12), (0, 4, 4), (3, 9, 1)]


def run(batch=BATCH, rule=None, **how):
    how = {"heads": (4, 2), "dims": (64, 64), "dtype": torch.bfloat16, "page_size": 4} | how
    world = World(batch, **how)
    try:
        return check(world, make_attention(), how["heads"][0], rule or Rule(0.125))
    finally:
        world.close()


def test_a_logit_cap_bends_the_scores_of_host_pages_too():
    run(rule=Rule(1.0, logit_cap=5.0))


def test_a_shape_is_planned_once_a_pass_whatever_the_layers_and_requests():
    plan = run(segment_pages=2, arenas=1)
    shapes = {key[1:3] for key in plan.planned if key[0] == "host"}
    # Two pages at a time, then the last one; for one query, and for twelve.
    assert shapes == {(2, 1), (1, 1), (2, 12), (1, 12)}
    assert len(plan.planned) == 5
    assert all(wrapper.plans == 1 for wrapper in plan.planned.values())


def test_passes_take_turns_with_two_sets_of_wrappers():
    world = World(BATCH, heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16, page_size=4, arenas=1)
    attention = make_attention()
    seen = [set(check(world, attention, 4, Rule(0.125)).planned.values()) for _ in range(4)]
    assert seen[0] == seen[2] and seen[1] == seen[3] and not seen[0] & seen[1]
    world.close()


def test_a_batch_of_single_queries_takes_the_decode_wrapper():
    plan = run([(3, 7, 1), (0, 5, 1)])
    assert {type(wrapper) for wrapper in plan.planned.values()} == {fake_flashinfer.Decode}


def test_what_flashinfer_cannot_do_is_refused():
    q, k, v = random_qkv(3, 5)
    with pytest.raises(ConfigError, match=r"bfloat16 or float16, .*not float32 over float32"):
        flashinfer.heads_of(q, KV(k, v))
    with pytest.raises(ConfigError, match="not float16 over bfloat16"):
        flashinfer.heads_of(q.half(), KV(k.bfloat16(), v.bfloat16()))
    with pytest.raises(ConfigError, match="MLA"):
        flashinfer.heads_of(q.half(), KV(k.half(), k.half()[..., :32]))


@pytest.mark.parametrize("queries", [1, 6])
def test_the_log_sum_exp_is_natural(queries):
    q, k, v = random_qkv(queries, 12, dtype=torch.float16)
    wrappers = Wrappers(CPU, torch.empty(16, dtype=torch.uint8))
    heads = flashinfer.heads_of(q, KV(k, v))
    keys = flashinfer.whole_pages(3, 4, CPU)
    wrapper = wrappers.planned(keys, [queries], Rule(0.125), heads, causal=False)
    got = flashinfer.run(wrapper, q, KV(k, v), 4)
    assert_same_state(got, reference(q, k, v, scale=0.125), torch.float16)
    assert got.lse.dtype == torch.float32


def test_parts_of_rows_of_the_table_come_one_after_another():
    table = torch.arange(60, dtype=torch.int32).view(6, 10)
    got = slots_of(table, torch.tensor([4, 1, 5]), [2, 0, 9], [5, 4, 10])
    assert got.tolist() == [42, 43, 44, 10, 11, 12, 13, 59]
    assert got.dtype == torch.int32


def test_runs_of_one_arena_become_one():
    first, second = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
    runs = [
        HostRun(arena, np.array(offsets), 4)
        for arena, offsets in [(first, [1]), (first, [7, 3]), (second, [2]), (first, [5])]
    ]
    got = joined(runs)
    assert [run.offsets.tolist() for run in got] == [[1, 7, 3], [2], [5]]
    assert [run.arena is first for run in got] == [True, False, True]


def states(count, rows=7, heads=3, dim=40, dtype=torch.bfloat16):
    """Partial states over disjoint keys, one of them over none, and the state over all."""
    q, k, v = random_qkv(rows, 20 * count, (heads, 1), (dim, dim))
    parts = [reference(q, k[i : i + 20], v[i : i + 20], scale=0.1) for i in range(0, len(k), 20)]
    whole = reference(q, k, v, scale=0.1)
    parts = [
        PartialState(part.out.to(dtype).contiguous(), part.lse.float().contiguous())
        for part in parts
    ]
    empty = PartialState(torch.full_like(parts[0].out, torch.nan), torch.full_like(parts[0].lse, -torch.inf))  # fmt: skip
    return [*parts[:1], empty, *parts[1:]], whole


@pytest.fixture
def triton_merge(monkeypatch):
    """The kernel in Triton's interpreter."""
    with interpreted(monkeypatch, "smg_sglang.attention.triton_merge") as module:
        yield module


def test_many_merges_round_no_more_than_their_inputs(triton_merge):
    parts, whole = states(40)
    out, lse = parts[0].out.float(), parts[0].lse.clone()
    for part in parts[1:]:
        triton_merge.merge_in_place(out, lse, part.out, part.lse)
    # Each input is rounded to bf16; rounding at each merge would be several times that.
    torch.testing.assert_close(out.double(), whole.out, atol=2**-9, rtol=2**-9)
    torch.testing.assert_close(lse.double(), whole.lse, atol=1e-4, rtol=1e-4)


def test_nothing_merged_with_nothing_is_nothing(triton_merge):
    out, lse = torch.zeros(2, 3, 5), torch.full((2, 3), -torch.inf)
    triton_merge.merge_in_place(out, lse, torch.zeros(2, 3, 5), lse.clone())
    assert not out.any() and (lse == -torch.inf).all()
    triton_merge.merge_in_place(out[:0], lse[:0], out[:0], lse[:0])


def test_the_merge_compiles_for_hopper_without_a_gpu():
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from smg_sglang.attention.triton_merge import _merge_rows

    signature = {"out": "*fp32", "lse": "*fp32", "other": "*bf16", "other_lse": "*fp32"}
    source = ASTSource(
        fn=_merge_rows,
        signature=signature | {"dim": "constexpr", "width": "constexpr"},
        constexprs={(4,): 80, (5,): 128},
    )
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
