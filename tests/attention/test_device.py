"""Batches on CUDA, dry, with each of the kernels: FlashInfer's are float64 references on CPU
tensors, plain products are what they are on CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smg_sglang.attention import plain
from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.device import DeviceAttention, joined, slots_of
from smg_sglang.attention.host import HostRun
from smg_sglang.attention.kernels import Kind, check_dtypes, kind_of, make_kernels
from smg_sglang.attention.paged import Heads, PagedKeys, heads_of, one_slot_pages, whole_pages
from smg_sglang.attention.partial import PartialState
from smg_sglang.engine.options.refusals import LATENT_ROWS
from smg_sglang.errors import ConfigError
from tests.interpreter import interpreted

from . import fake_flashinfer
from .reference import TOLERANCE, assert_same_state, random_qkv, reference
from .test_host import LAYERS, World

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    fake_flashinfer.install(monkeypatch)


def kernels_for(world, q_heads):
    """What a model of this shape would get, on a CPU."""
    (_, kv_heads, dim), v_dim = world.k[0].shape, world.v[0].shape[2]
    kind = kind_of(Heads(q_heads, kv_heads, dim, v_dim, world.dtype), world.mla)
    return make_kernels(kind, CPU, torch.empty(16, dtype=torch.uint8))


def make_attention(world, q_heads):
    return DeviceAttention(kernels_for(world, q_heads))


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
        k = world.k[layer].to(device)
        v = k[..., : world.v[0].shape[2]] if world.mla else world.v[layer].to(device)
        pool = KV(k, v)
        shape = (*q.shape[:2], world.v[0].shape[2])
        out = torch.full(shape, torch.nan, dtype=q.dtype, device=device)
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


#: Shapes of each kind (query and KV heads, widths of keys and values, dtypes, MLA), and the kind
#: that is to be chosen for them.
HALVES = [torch.bfloat16, torch.float16]
MHA = [(1, 1), (4, 4), (9, 3), (32, 1)]
SHAPES = {
    Kind.PAGED: (MHA, [(64, 64), (128, 128), (256, 256)], HALVES, [False]),
    Kind.LATENT: (
        [(1, 1), (16, 1), (128, 1)],
        [(576, 512), (192, 128), (256, 128)],
        HALVES,
        [True],
    ),
    Kind.EXACT: (MHA, [(64, 64), (80, 80), (192, 128), (96, 160)], [torch.float32], [False]),
}
ODD = {
    "latents in float32": (16, 576, 512, torch.float32, True),
    "latents of odd sizes": (40, 288, 256, torch.bfloat16, True),
    "latents under heads that do not divide a tile": (20, 576, 512, torch.bfloat16, True),
    "values of another width": (4, 192, 128, torch.bfloat16, False),
    "heads of 80": (4, 80, 80, torch.bfloat16, False),
    "heads of 96": (4, 96, 96, torch.float16, False),
    "heads of 32": (4, 32, 32, torch.bfloat16, False),
}


@st.composite
def shapes(draw):
    kind = draw(st.sampled_from(list(SHAPES)))
    heads, dims, dtypes, latent = (draw(st.sampled_from(of)) for of in SHAPES[kind])
    return kind, {"heads": heads, "dims": dims, "dtype": dtypes, "mla": latent}


def check_shape(batch, shape, causal, **how):
    """A batch with the kernels that are chosen; their kind's plan."""
    batch = [(pages, tail + new, new) for pages, tail, new in batch]
    world = World(batch, **shape, **how)
    q_heads, scale = shape["heads"][0], shape["dims"][0] ** -0.5
    try:
        attention = make_attention(world, q_heads)
        for _ in range(3):
            check(world, attention, q_heads, Rule(scale, causal))
    finally:
        world.close()


@given(
    batch=st.lists(requests, min_size=1, max_size=4),
    shape=shapes(),
    page_size=st.sampled_from([1, 4, 16]),
    segment_pages=st.sampled_from([1, 2, 5]),
    causal=st.booleans(),
)
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_host_pages_and_slots_together_are_the_whole(
    *, batch, shape, page_size, segment_pages, causal
):
    kind, shape = shape
    heads = Heads(*shape["heads"], *shape["dims"], shape["dtype"])
    assert kind_of(heads, shape["mla"]) is kind
    check_shape(batch, shape, causal, page_size=page_size, segment_pages=segment_pages)


@pytest.mark.parametrize("odd", ODD)
def test_what_flashinfer_has_no_kernels_for_is_computed_as_plain_products(odd):
    query, dim, v_dim, dtype, latent = ODD[odd]
    shape = {"heads": (query, 1), "dims": (dim, v_dim), "dtype": dtype, "mla": latent}
    assert kind_of(Heads(query, 1, dim, v_dim, dtype), latent) is Kind.EXACT
    check_shape([(3, 7, 1), (5, 20, 12), (0, 4, 4)], shape, True, page_size=4)


def causal_plans(query):
    """Plans for a prompt at the end of keys of many lengths."""
    kernels = make_kernels(Kind.LATENT, CPU, torch.empty(16, dtype=torch.uint8), "fa2")
    heads = Heads(query, 1, 576, 512, torch.bfloat16)
    for new in (1, 2, 7, 64, 65, 130):
        for length in range(new, new + 130):
            keys = one_slot_pages(torch.arange(length, dtype=torch.int32), [length])
            yield kernels.planned(keys, [new], Rule(1.0), heads, causal=True)


def test_flashinfer_plans_all_lengths_of_latents_under_heads_that_divide_its_tiles():
    """What it would get wrong it refuses, but not before the lengths are there."""
    chosen = [
        heads
        for heads in range(1, 200)
        if kind_of(Heads(heads, 1, 576, 512, torch.bfloat16), True) is Kind.LATENT
    ]
    assert chosen == [1, 2, 4, 8, 16, 32, 64, 128]
    for heads in chosen:
        assert len(list(causal_plans(heads))) == 780
    with pytest.raises(ValueError, match="would omit a visible key"):
        list(causal_plans(20))


@pytest.mark.parametrize("heads", [1, 16, 128])
def test_flashinfer_plans_the_largest_chunk_that_is_allowed(heads):
    new = LATENT_ROWS // heads
    kernels = make_kernels(Kind.LATENT, CPU, torch.empty(16, dtype=torch.uint8))
    shape = Heads(heads, 1, 576, 512, torch.bfloat16)
    for length, causal in [(new, True), (2 * new, True), (8192, False), (16, False)]:
        keys = one_slot_pages(torch.arange(length, dtype=torch.int32), [length])
        kernels.planned(keys, [new], Rule(1.0), shape, causal=causal)


def test_float32_is_as_exact_in_segments_as_in_one(monkeypatch):
    """Blocks of few queries, and far less than bfloat16's rounding."""
    monkeypatch.setattr(plain, "_SCORES", 100)
    world = World([(5, 20, 12)], heads=(4, 2), dims=(64, 64), dtype=torch.float32, page_size=4)
    attention, q = make_attention(world, 4), torch.randn(12, 4, 64)
    out = torch.empty_like(q)
    attention.attend(q, KV(world.k[0], world.v[0]), plan_of(world, attention), Rule(0.125), out)
    k, v = world.whole(0, 0)
    want = reference(q, k, v, scale=0.125, causal=True).out
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)
    world.close()


BATCH = [(3, 7, 1), (5, 20, 12), (0, 4, 4), (3, 9, 1)]


def run(batch=BATCH, rule=None, **how):
    how = {"heads": (4, 2), "dims": (64, 64), "dtype": torch.bfloat16, "page_size": 4} | how
    world = World(batch, **how)
    try:
        heads = how["heads"][0]
        return check(world, make_attention(world, heads), heads, rule or Rule(0.125))
    finally:
        world.close()


def test_a_logit_cap_bends_the_scores_of_host_pages_too():
    run(rule=Rule(1.0, logit_cap=5.0))


MLA = {"heads": (16, 1), "dims": (576, 512), "mla": True}


@pytest.mark.parametrize("how", [{}, MLA], ids=["keys and values", "latents"])
def test_a_shape_is_planned_once_a_pass_whatever_the_layers_and_requests(how):
    plan = run(segment_pages=2, arenas=1, **how)
    shapes = {key[1:3] for key in plan.planned if key[0] == "host"}
    # Two pages at a time, then the last one; for one query, and for twelve.
    assert shapes == {(2, 1), (1, 1), (2, 12), (1, 12)}
    assert len(plan.planned) == 5
    assert all(planned.wrapper.plans == 1 for planned in plan.planned.values())


@pytest.mark.parametrize("how", [{}, MLA], ids=["keys and values", "latents"])
def test_passes_take_turns_with_two_sets_of_wrappers(how):
    how = {"heads": (4, 2), "dims": (64, 64)} | how
    world = World(BATCH, dtype=torch.bfloat16, page_size=4, arenas=1, **how)
    heads = how["heads"][0]
    attention = make_attention(world, heads)
    seen = [
        {
            planned.wrapper
            for planned in check(world, attention, heads, Rule(0.125)).planned.values()
        }
        for _ in range(4)
    ]
    assert seen[0] == seen[2] and seen[1] == seen[3] and not seen[0] & seen[1]
    world.close()


def test_a_batch_of_single_queries_takes_the_decode_wrapper():
    plan = run([(3, 7, 1), (0, 5, 1)])
    kinds = {type(planned.wrapper) for planned in plan.planned.values()}
    assert kinds == {fake_flashinfer.Decode}


@pytest.mark.parametrize(
    ("queries", "keys", "named"),
    [
        (torch.float32, torch.bfloat16, "not float32 over bfloat16"),
        (torch.float16, torch.bfloat16, "not float16 over bfloat16"),
        (torch.bfloat16, torch.float8_e4m3fn, "not bfloat16 over float8_e4m3fn"),
        (torch.float64, torch.float64, "not float64 over float64"),
    ],
)
def test_queries_and_keys_of_different_dtypes_are_refused(queries, keys, named):
    with pytest.raises(ConfigError, match=named):
        check_dtypes(queries, keys)


def test_a_logit_cap_over_latents_is_refused():
    with pytest.raises(ConfigError, match="logit cap"):
        run(rule=Rule(1.0, logit_cap=5.0), **MLA)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("queries", [1, 6])
def test_the_log_sum_exp_is_natural(queries, kind):
    latent = kind is Kind.LATENT
    heads, dims = ((16, 1), (192, 192)) if latent else ((4, 2), (64, 64))
    q, k, v = random_qkv(queries, 12, heads, dims, torch.float16)
    if latent:
        v = k[..., :128]
    kernels = make_kernels(kind, CPU, torch.empty(16, dtype=torch.uint8))
    keys = whole_pages(3, 4, CPU)
    planned = kernels.planned(keys, [queries], Rule(0.125), heads_of(q, KV(k, v)), causal=False)
    got = planned(q, KV(k, v))
    assert_same_state(got, reference(q, k, v, scale=0.125), torch.float16)
    assert got.lse.dtype == torch.float32 and got.out.dtype == torch.float16


@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 17]), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(Kind),
    causal=st.booleans(),
)
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_scattered_pages_that_are_filled_in_part_are_read_to_their_last_token(
    lengths, page_size, kind, causal
):
    """In a pool that ends with half a page."""
    latent = kind is Kind.LATENT
    heads, dims = ((16, 1), (192, 192)) if latent else ((4, 2), (64, 64))
    rooms = [-(-length // page_size) for length in lengths]
    table = torch.randperm(sum(rooms) + 2)[: sum(rooms)].int()
    new = [min(length, 3) for length in lengths]
    q, k, v = random_qkv(sum(new), (sum(rooms) + 2) * page_size + 1, heads, dims, torch.float16)
    v = k[..., :128] if latent else v
    kernels = make_kernels(kind, CPU, torch.empty(16, dtype=torch.uint8))
    keys, shape = PagedKeys(lengths, table, page_size), heads_of(q, KV(k, v))
    got = kernels.planned(keys, new, Rule(0.125), shape, causal=causal)(q, KV(k, v))
    parts = zip(*(x.split(new) for x in (q, *got)), table.split(rooms), lengths, strict=True)
    for queries, out, lse, pages, length in parts:
        slots = (pages.long()[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        want = reference(queries, k[slots], v[slots], scale=0.125, causal=causal)
        assert_same_state(PartialState(out, lse), want, torch.float16)


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
