"""Attention over pages, by the C kernel of every instruction set here and by torch, against
float64."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.attention.native.build import runnable
from smg_sglang.attention.page_attention import native
from smg_sglang.attention.pages import (
    Memory,
    PageRun,
    page_memory,
    page_rows,
    page_run,
    plan_pages,
    pool_memory,
    pool_rows,
    slot_run,
)
from smg_sglang.attention.partial import PartialState
from smg_sglang.attention.torch_pages import TorchAttention
from smg_sglang.transfer.layout import PageLayout, Part

from .page_world import PageWorld, pool_table
from .reference import assert_same_state, random_qkv, reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
VARIANTS = runnable()


@pytest.fixture(scope="module", params=[*(v.name for v in VARIANTS), "torch"])
def attention(request):
    if request.param == "torch":
        yield TorchAttention()
        return
    variant = next(v for v in VARIANTS if v.name == request.param)
    kernel = native(variant, threads=2)
    yield kernel
    kernel.close()


page_sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 15, 16, 17, 64, 300]), max_size=6)


@given(
    requests=st.lists(st.tuples(page_sizes, st.sampled_from([1, 1, 2, 5])), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 2), (6, 3), (9, 3), (8, 2), (5, 1), (7, 1), (16, 1)]),
    dims=st.one_of(
        st.sampled_from([(64, 64), (128, 128), (80, 80), (256, 256), (96, 64), (64, 96)]),
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
    ),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float16),
            (E4M3, torch.bfloat16),
            (E5M2, torch.float16),
        ]
    ),
    gap=st.sampled_from([0, 1, 40]),
    memory_count=st.integers(1, 3),
    unit_tokens=st.sampled_from([16, 64, 256]),
    how=st.fixed_dictionaries(
        {"logit_cap": st.sampled_from([0.0, 0.0, 5.0]), "k_scale": st.sampled_from([1.0, 0.5]),
         "v_scale": st.sampled_from([1.0, 3.0])}
    ),
)  # fmt: skip
@settings(deadline=None, max_examples=120)
def test_attention_over_pages_is_what_its_definition_says(
    attention, *, requests, heads, dims, dtypes, gap, memory_count, unit_tokens, how
):
    lengths, queries = [pages for pages, _ in requests], [n for _, n in requests]
    world = PageWorld(lengths, queries, heads, dims, dtypes[0], gap, memory_count,
                      q_dtype=dtypes[1], unit_tokens=unit_tokens)  # fmt: skip
    # Inside all is float32: what is read is exact, whatever its dtype.
    world.check(attention, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, E4M3, E5M2])
def test_scores_far_apart_neither_overflow_nor_vanish(attention, dtype):
    world = PageWorld([[300, 17], [1]], [1, 2], dtype=dtype, scale_of_keys=8.0)
    world.check(attention, scale=40.0, tolerance=1e-3)


def test_a_key_far_below_the_others_has_no_weight_at_all(attention):
    q, k, v = (torch.ones(1, 1, 8), torch.zeros(40, 1, 8), torch.ones(40, 1, 8))
    k[7], v[7] = -100, 3e38
    k[8], v[8] = -torch.inf, 1e30
    table, memories = pool_table([np.arange(40)], k, v)
    out, lse = torch.empty(1, 1, 8), torch.empty(1, 1)
    attention.attend_pages(q, table, memories, out, lse, scale=1.0)
    torch.testing.assert_close(out, torch.ones(1, 1, 8))


def test_all_scores_may_be_very_negative(attention):
    q, k, v = random_qkv(1, 300)
    q[..., 0], k[..., 0] = 1e4, -1e4
    k = k * 1e-3
    table, memories = pool_table([np.arange(300)], k, v)
    out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
    attention.attend_pages(q, table, memories, out, lse, scale=1.0)
    want = reference(q, k, v, scale=1.0)
    torch.testing.assert_close(out.double(), want.out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse.double(), want.lse, atol=0.1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float16, torch.bfloat16])
def test_every_value_of_a_small_dtype_is_read_exactly(attention, dtype):
    """One key, so that the output is its value: subnormals, zeros and all but what is no number."""
    count = 256 if dtype.itemsize == 1 else 65536
    bits = torch.arange(count, dtype=torch.int32)
    raw = bits.to(torch.uint8 if count == 256 else torch.uint16)
    values = raw.view(dtype).float()
    finite = torch.isfinite(values)
    v = torch.where(finite, values, 0).to(dtype).view(1, count // 256, 256)
    k = torch.ones(1, count // 256, 8).to(dtype)
    table = plan_pages([[slot_run(np.zeros(1, int))]], pool_rows(k, v))
    out, lse = torch.empty(1, count // 256, 256), torch.empty(1, count // 256)
    q = torch.ones(1, count // 256, 8)
    attention.attend_pages(q, table, [pool_memory(k, v)], out, lse, scale=0.125)
    torch.testing.assert_close(out.view(-1), v.float().view(-1), atol=0, rtol=0)
    torch.testing.assert_close(lse, torch.ones_like(lse))


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("part", [0, 1])
def test_a_key_or_value_that_is_no_number_is_not_hidden(attention, dtype, part):
    q, *kv = random_qkv(1, 40)
    kv = [x.to(dtype) for x in kv]
    kv[part][17, 1, 3] = torch.nan
    table, memories = pool_table([np.arange(40)], *kv)
    out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
    attention.attend_pages(q, table, memories, out, lse, scale=0.125)
    assert torch.isfinite(out[:, :2]).all()
    assert torch.isnan(out[:, 2:, 3]).all()


def test_a_pool_whose_values_are_the_front_of_its_keys_is_read_as_it_lies(attention):
    q, k, _ = random_qkv(2, 700, heads=(16, 1), dims=(576, 576), dtype=torch.bfloat16)
    v = k[..., :512]
    slots = [np.random.default_rng(0).permutation(700)[:n] for n in (300, 5)]
    table, memories = pool_table(slots, k, v)
    out, lse = torch.empty(2, 16, 512), torch.empty(2, 16)
    attention.attend_pages(q, table, memories, out, lse, scale=0.05)
    for row, mine in enumerate(slots):
        keys = k[torch.as_tensor(mine)]
        want = reference(q[row : row + 1], keys, keys[..., :512], scale=0.05)
        assert_same_state(PartialState(out[row : row + 1], lse[row : row + 1]), want)


def test_pages_of_an_arena_and_slots_of_a_pool_are_one_request(attention):
    layout = PageLayout((Part("k", 2, 64, 2), Part("v", 2, 64, 2)), 3, 16, "bfloat16")
    arena = np.zeros(8 * layout.page_bytes + 64, np.uint8)
    arena[64:].view(np.uint16)[:] = (
        torch.randn(8 * layout.page_bytes // 2).bfloat16().view(torch.uint16)
    )
    q, k, v = random_qkv(1, 50, dtype=torch.bfloat16)
    offsets = np.array([5, 0, 7], np.int64) * layout.page_bytes + 64
    slots = np.array([3, 4, 5, 40, 41, 9])
    assert page_rows(layout) == pool_rows(k, v)
    table = plan_pages([[slot_run(slots), page_run(1, offsets, 16, 44)]], page_rows(layout))
    for layer in range(3):
        parts = [[], []]
        for part in (0, 1):
            for offset in offsets:
                at = int(offset) + layout.part_offset(layer, part)
                rows = torch.from_numpy(arena[at : at + 16 * 256].copy()).view(torch.bfloat16)
                parts[part].append(rows.view(16, 2, 64))
        keys, values = (
            torch.cat([pool[torch.as_tensor(slots)], torch.cat(host)[:44]])
            for pool, host in zip((k, v), parts, strict=True)
        )
        out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
        memories = [pool_memory(k, v), page_memory(arena, layout, layer)]
        attention.attend_pages(q, table, memories, out, lse, scale=0.125)
        assert_same_state(PartialState(out, lse), reference(q, keys, values, scale=0.125))


@given(slots=st.lists(st.integers(0, 60), unique=True, max_size=60), order=st.booleans())
def test_runs_of_slots_are_their_slots(slots, order):
    slots = np.array(sorted(slots) if order else slots, np.int32)
    run = slot_run(slots)
    again = [
        first + i for first, n in zip(run.first_rows, run.tokens, strict=True) for i in range(n)
    ]
    assert again == slots.tolist()


@given(
    requests=st.lists(page_sizes, max_size=5), unit_tokens=st.sampled_from([1, 16, 100]),
)  # fmt: skip
def test_units_cover_each_token_once_in_order_and_are_none_too_long(requests, unit_tokens):
    layout = pool_rows(torch.empty(1, 1, 8), torch.empty(1, 1, 8))
    runs, at = [], 0
    for sizes in requests:
        firsts = at + np.append(0, np.cumsum(sizes))[:-1].astype(np.int64)
        runs.append([PageRun(0, np.zeros(len(sizes), np.int64), firsts, np.array(sizes, np.int32))])
        at += sum(sizes)
    table = plan_pages(runs, layout, unit_tokens=unit_tokens)
    rows = [f + i for f, n in zip(table.first_rows, table.tokens, strict=True) for i in range(n)]
    assert rows == list(range(at))
    tokens = np.add.reduceat(table.tokens, table.units[:-1]) if len(table.unit_requests) else []
    assert all(0 < n <= unit_tokens for n in tokens)
    of_each = np.zeros(len(requests), int)
    np.add.at(of_each, table.unit_requests, tokens)
    assert of_each.tolist() == [sum(sizes) for sizes in requests]
    assert (np.diff(table.unit_requests) >= 0).all()


def test_a_long_context_leaves_no_more_states_than_are_merged_quickly():
    layout = pool_rows(torch.empty(1, 1, 8), torch.empty(1, 1, 8))
    for tokens, most in ((256, 1), (2560, 10), (1_000_000, 1100)):
        table = plan_pages([[slot_run(np.arange(tokens))], []], layout)
        assert 0 < len(table.unit_requests) <= most


def test_the_result_is_the_same_bits_with_any_number_of_threads():
    world = PageWorld([[300] * 7, [16] * 40, [5]], [1, 1, 1], (8, 2), (64, 64), torch.bfloat16)
    results = []
    for threads in (1, 2, 5):
        kernel = native(VARIANTS[0], threads)
        results += [world.attend(kernel, scale=0.125) for _ in range(3)]
        kernel.close()
    for other in results[1:]:
        assert torch.equal(other.out, results[0].out)
        assert torch.equal(other.lse, results[0].lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_the_same_bits_wherever_the_keys_lie(attention, dtype):
    """As for a prefix that came back from host memory to other slots, neighbours or not."""
    keys = 1237
    q, k, v = random_qkv(1, keys, dtype=dtype)
    scattered = np.random.default_rng(0).permutation(keys)
    pages = np.arange(1248).reshape(-1, 16)[::-1].ravel()
    pages = pages[pages < keys]
    results = []
    for slots in (np.arange(keys), scattered, pages):
        pool = [torch.empty_like(x) for x in (k, v)]
        for to, rows in zip(pool, (k, v), strict=True):
            to[torch.as_tensor(slots)] = rows
        table, memories = pool_table([slots], *pool)
        out, lse = torch.empty(1, q.shape[1], 64), torch.empty(1, q.shape[1])
        attention.attend_pages(q, table, memories, out, lse, scale=0.125)
        results.append((out, lse))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_many_states_are_merged_by_all_threads_alike():
    world = PageWorld([[64] * 60], [4], (16, 4), (128, 128), unit_tokens=16)
    kernel = native(VARIANTS[0], 3)
    world.check(kernel)
    kernel.close()


def test_threads_start_when_they_are_needed_and_end_with_the_kernel():
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    kernel = native(VARIANTS[0], threads=3)
    assert kernel.started == 0
    PageWorld([[5]], [1]).check(kernel)  # one unit of work needs no other thread
    assert kernel.started == 0
    PageWorld([[300, 300]], [1]).check(kernel)
    assert kernel.started > 0
    kernel.close()
    kernel.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before


def test_a_call_takes_no_more_threads_than_it_has_work_for():
    """Also where more were started: those left out must not take a part."""
    kernel = native(VARIANTS[0], threads=4)
    big, small = PageWorld([[300] * 4], [1]), PageWorld([[300]], [1])
    for _ in range(50):
        big.check(kernel)
        small.check(kernel)
    assert kernel.started == 3
    kernel.close()


def test_a_forked_process_starts_threads_of_its_own():
    kernel = native(VARIANTS[0], threads=2)
    world = PageWorld([[300, 300]], [1])
    want = world.attend(kernel, scale=0.125)
    child = os.fork()
    if not child:
        same = torch.equal(world.attend(kernel, scale=0.125).out, want.out)
        os._exit(0 if same and kernel.started == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    kernel.close()


def test_other_threads_of_the_process_run_while_it_computes():
    """The GIL is not held: a Python thread makes progress during one call."""
    q, k, v = random_qkv(1, 4096, (32, 8), (128, 128))
    slots = np.tile(np.arange(4096), 200)
    table, memories = pool_table([slots], k, v)
    out, lse = torch.empty(1, 32, 128), torch.empty(1, 32)
    kernel = native(VARIANTS[-1], threads=1)
    steps = []
    done = threading.Event()

    def count():
        while not done.is_set():
            steps.append(None)

    counter = threading.Thread(target=count)
    counter.start()
    first = len(steps)
    library, attend = kernel._library, kernel._library.smg_attend
    seen = []

    def watched(*arguments):
        before = len(steps)
        result = attend(*arguments)
        seen.append(len(steps) - before)
        return result

    kernel._library = type("Watched", (), {"smg_attend": staticmethod(watched)})
    kernel.attend_pages(q, table, memories, out, lse, scale=0.1)
    kernel._library = library
    done.set()
    counter.join()
    kernel.close()
    assert len(steps) > first
    assert seen[0] > 100


def bad_calls():
    q, k, v = random_qkv(2, 50)
    table, memories = pool_table([np.arange(50), np.arange(3)], k, v)
    short = [Memory(m.k, m.v, m.k_bytes - 1, m.v_bytes) for m in memories]
    short_v = [Memory(m.k, m.v, m.k_bytes, m.v_bytes - 1) for m in memories]
    bytes_ = pool_table([np.arange(5)], k.byte(), v.byte())
    good = {"q": q, "table": table, "memories": memories, "out": torch.empty(2, 4, 64),
            "lse": torch.empty(2, 4)}  # fmt: skip
    return good, [
        ({"q": q[:1]}, "q is"),
        ({"q": q[..., :32]}, "q is"),
        ({"q": q[:, :3]}, "3 query heads"),
        ({"q": q.long()}, "query heads"),
        ({"out": torch.empty(2, 4, 32)}, "out must be"),
        ({"out": torch.empty(2, 64, 4).transpose(1, 2)}, "out must be contiguous"),
        ({"out": torch.empty(2, 4, 64).half()}, "out must be"),
        ({"lse": torch.empty(2, 2)}, "lse must be"),
        ({"memories": []}, "1 memories, 0 are given"),
        ({"memories": short}, "behind its"),
        ({"memories": short_v}, "behind its"),
        ({"q": q[:1], "table": bytes_[0], "memories": bytes_[1]}, "say which float8"),
    ]


@pytest.mark.parametrize(("bad", "says"), bad_calls()[1])
def test_what_does_not_fit_is_refused_before_anything_is_read(attention, bad, says):
    with pytest.raises(ValueError, match=says):
        attention.attend_pages(**{**bad_calls()[0], **bad}, scale=1.0)


def test_a_page_that_ends_behind_its_memory_is_refused():
    q, k, v = random_qkv(1, 50)
    with pytest.raises(ValueError, match="behind its"):
        table, memories = pool_table([np.array([3, 50])], k, v)
        TorchAttention().attend_pages(q, table, memories, torch.empty(1, 4, 64),
                                      torch.empty(1, 4), scale=1.0)  # fmt: skip
    with pytest.raises(ValueError, match="first row of a page is negative: -1"):
        pool_table([np.array([-1, 0, 3])], k, v)
    with pytest.raises(ValueError, match="do not end in the last"):
        page_run(0, np.zeros(2, np.int64), 16, 16)


def test_rows_that_are_no_neighbours_are_refused():
    k = torch.empty(4, 2, 8)
    with pytest.raises(ValueError, match="neighbouring elements"):
        pool_rows(k.transpose(1, 2), k)
    with pytest.raises(ValueError, match="differ"):
        pool_rows(k, k.half())


def test_no_threads_are_too_few():
    with pytest.raises(ValueError, match="one is the least"):
        native(VARIANTS[0], threads=0)
