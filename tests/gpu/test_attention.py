"""FlashInfer's kernels on a real device, against float64: segments, merges and host pages streamed.

The cases are those of tests/attention. Skipped without CUDA.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smg_sglang.attention import flashinfer
from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.device import DeviceAttention, merge_into, slots_of
from smg_sglang.attention.flashinfer import PagedKeys, Wrappers, one_slot_pages
from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.attention.partial import PartialState
from smg_sglang.transfer.pinning import ArenaPins
from smg_sglang.transfer.segments import SegmentRing
from tests.attention.reference import TOLERANCE, assert_same_state, random_qkv, reference
from tests.attention.test_device import check
from tests.attention.test_host import World

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def wrappers():
    pytest.importorskip("flashinfer")
    return Wrappers(CUDA)


class CudaWorld(World):
    """Its host pages lie in page-locked mappings, and a ring on the device streams them."""

    def __init__(self, *args, segment_pages=2, before_copy=None, pinned=True, **more):
        super().__init__(*args, **more)
        self.ring.close()
        self.pins = ArenaPins()
        self.host = [[self._mapped(run) for run in runs] for runs in self.host]
        self.ring = SegmentRing(
            self.layout, CUDA, segment_pages, before_copy=before_copy, pins=self.pins
        )
        self.reader = HostReader(self.layout, self.ring)
        for runs in self.host if pinned else ():
            for run in runs:
                self.pins.pin(run.arena, CUDA)
                assert self.pins.wait(run.arena)

    def _mapped(self, run):
        arena = np.frombuffer(mmap.mmap(-1, len(run.arena)), np.uint8)
        arena[:] = run.arena
        return HostRun(arena, run.offsets, run.page_size)

    def close(self):
        super().close()
        self.pins.close()


requests = st.tuples(
    st.sampled_from([0, 1, 2, 3, 7]),
    st.sampled_from([0, 1, 5, 30]),
    st.sampled_from([1, 1, 2, 9, 129]),
)


@given(
    batch=st.lists(requests, min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (28, 4), (32, 1)]),
    dim=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    page_size=st.sampled_from([1, 4, 16, 128]),
    segment_pages=st.sampled_from([1, 2, 5]),
    causal=st.booleans(),
    pinned=st.booleans(),
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_host_pages_and_slots_together_are_the_whole(
    wrappers, *, batch, heads, dim, dtype, page_size, segment_pages, causal, pinned
):
    batch = [(pages, tail + new, new) for pages, tail, new in batch]
    world = CudaWorld(batch, heads=heads, dims=(dim, dim), dtype=dtype, page_size=page_size,
                      segment_pages=segment_pages, pinned=pinned)  # fmt: skip
    try:
        for _ in range(3):
            check(world, DeviceAttention(wrappers), heads[0], Rule(dim**-0.5, causal), CUDA)
    finally:
        world.close()


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_that_come_late_are_waited_for(wrappers, pinned):
    batch = [(7, 5, 1), (7, 30, 9), (6, 5, 4)]
    world = CudaWorld(batch, heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16, page_size=16,
                      segment_pages=1, pinned=pinned,
                      before_copy=lambda: torch.cuda._sleep(2_000_000))  # fmt: skip
    try:
        for _ in range(3):
            check(world, DeviceAttention(wrappers), 4, Rule(0.125), CUDA)
    finally:
        world.close()


def test_a_logit_cap_bends_the_scores_of_host_pages_too(wrappers):
    world = CudaWorld([(3, 7, 1), (5, 20, 12)], heads=(4, 2), dims=(64, 64),
                      dtype=torch.bfloat16, page_size=4)  # fmt: skip
    check(world, DeviceAttention(wrappers), 4, Rule(1.0, logit_cap=5.0), CUDA)
    world.close()


def page_table(pages, page_size, tokens):
    """Of one request, in these pages."""
    last = tokens - (len(pages) - 1) * page_size
    indptr = torch.tensor([0, len(pages)], dtype=torch.int32)
    table = torch.tensor(pages, dtype=torch.int32, device=CUDA)
    return PagedKeys(indptr, table, torch.tensor([last], dtype=torch.int32), page_size)


@given(
    lengths=st.lists(st.sampled_from([1, 2, 31, 200, 513]), min_size=1, max_size=6),
    new=st.sampled_from([1, 2, 17, 128, 150]),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (14, 2), (8, 1)]),
    dim=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    page_size=st.sampled_from([1, 16]),
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_cuts_merge_to_what_one_segment_gives(
    wrappers, *, lengths, new, heads, dim, dtype, page_size
):
    """Cuts before the new tokens, of which the last segment has all: it alone is causal."""
    lengths = [*lengths, new]
    padded = [-(-length // page_size) * page_size for length in lengths]
    q, k, v = (x.to(CUDA) for x in random_qkv(new, sum(padded), heads, (dim, dim), dtype))
    wrappers.begin()
    kv, shape, rule = KV(k, v), flashinfer.heads_of(q, KV(k, v)), Rule(dim**-0.5)
    state, first, seen = None, 0, []
    for length, room in reversed(list(zip(lengths, padded, strict=True))):
        pages = list(range(first // page_size, (first + room) // page_size))
        keys = page_table(pages, page_size, length)
        wrapper = wrappers.planned(keys, [new], rule, shape, causal=state is None)
        part = flashinfer.run(wrapper, q, kv, page_size)
        state = (
            PartialState(part.out.float(), part.lse.clone())
            if state is None
            else merge_into(state, part)
        )
        seen.insert(0, slice(first, first + length))
        first += room
    keys = torch.cat([k[rows] for rows in seen])
    values = torch.cat([v[rows] for rows in seen])
    want = reference(q.cpu(), keys.cpu(), values.cpu(), scale=dim**-0.5, causal=True)
    assert_same_state(PartialState(state.out.cpu(), state.lse.cpu()), want, dtype)


def test_two_segments_are_as_exact_as_one(wrappers):
    q, k, v = (x.to(CUDA) for x in random_qkv(64, 4096, (32, 8), (128, 128), torch.bfloat16))
    wrappers.begin()
    kv, shape, rule = KV(k, v), flashinfer.heads_of(q, KV(k, v)), Rule(128**-0.5)

    def attend(first, end):
        keys = page_table(range(first // 16, end // 16), 16, end - first)
        wrapper = wrappers.planned(keys, [64], rule, shape, causal=False)
        return flashinfer.run(wrapper, q, kv, 16)

    one, first, second = attend(0, 4096), attend(0, 1600), attend(1600, 4096)
    two = merge_into(PartialState(first.out.float(), first.lse.clone()), second)
    torch.testing.assert_close(two.out.to(one.out.dtype), one.out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(two.lse, one.lse, atol=1e-3, rtol=1e-3)


def test_slots_are_gathered_without_a_wait(wrappers):
    table = torch.arange(60, dtype=torch.int32, device=CUDA).view(6, 10)
    rows = torch.tensor([4, 1, 5], device=CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    behind = torch.cuda.Event()
    got = slots_of(table, rows, [2, 0, 9], [5, 4, 10])
    behind.record()
    assert not behind.query()
    assert got.tolist() == [42, 43, 44, 10, 11, 12, 13, 59]


def test_a_wrapper_is_not_planned_again_before_the_device_has_its_plan(wrappers):
    """Plans of other lengths, made while the device is far behind."""
    q, k, v = (x.to(CUDA) for x in random_qkv(5, 900, (4, 2), (64, 64), torch.bfloat16))
    kv, shape, rule = KV(k, v), flashinfer.heads_of(q, KV(k, v)), Rule(0.125)
    lengths, outs = [900, 5, 450, 17, 300, 64], []
    for length in lengths:
        wrappers.begin()
        torch.cuda._sleep(20_000_000)
        keys = one_slot_pages(torch.arange(length, dtype=torch.int32, device=CUDA), [length])
        wrapper = wrappers.planned(keys, [5], rule, shape, causal=True)
        outs.append(flashinfer.run(wrapper, q, kv, 1).out)
    for length, out in zip(lengths, outs, strict=True):
        want = reference(q.cpu(), k[:length].cpu(), v[:length].cpu(), scale=0.125, causal=True).out
        tolerance = TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(out.cpu().double(), want, atol=tolerance, rtol=tolerance)
