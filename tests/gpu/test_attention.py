"""The kernels on a real device, against float64: segments, merges and host pages streamed.

The cases are those of tests/attention. Skipped without CUDA.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.device import DeviceAttention, merge_into, slots_of
from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.attention.kernels import Kind, kind_of, make_kernels
from smg_sglang.attention.paged import Heads, PagedKeys, heads_of, one_slot_pages
from smg_sglang.attention.partial import PartialState
from smg_sglang.transfer.pinning import ArenaPins
from smg_sglang.transfer.segments import SegmentRing
from tests.attention.reference import TOLERANCE, assert_same_state, random_qkv, reference
from tests.attention.test_device import ODD, SHAPES, check, shapes
from tests.attention.test_host import World

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def kernels():
    """Of each kind."""
    pytest.importorskip("flashinfer")
    return {kind: make_kernels(kind, CUDA) for kind in Kind}


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
    shape=shapes(),
    page_size=st.sampled_from([1, 4, 16, 128]),
    segment_pages=st.sampled_from([1, 2, 5]),
    causal=st.booleans(),
    pinned=st.booleans(),
)
@settings(
    deadline=None, max_examples=90, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_host_pages_and_slots_together_are_the_whole(
    kernels, *, batch, shape, page_size, segment_pages, causal, pinned
):
    kind, shape = shape
    batch = [(pages, tail + new, new) for pages, tail, new in batch]
    world = CudaWorld(batch, **shape, page_size=page_size, segment_pages=segment_pages,
                      pinned=pinned)  # fmt: skip
    rule = Rule(shape["dims"][0] ** -0.5, causal)
    try:
        for _ in range(3):
            check(world, DeviceAttention(kernels[kind]), shape["heads"][0], rule, CUDA)
    finally:
        world.close()


@pytest.mark.parametrize("odd", ODD)
def test_what_flashinfer_has_no_kernels_for_is_computed_as_plain_products(kernels, odd):
    query, dim, v_dim, dtype, latent = ODD[odd]
    world = CudaWorld([(3, 7, 1), (5, 20, 12), (0, 4, 4)], heads=(query, 1), dims=(dim, v_dim),
                      dtype=dtype, mla=latent, page_size=4)  # fmt: skip
    kind = kind_of(Heads(query, 1, dim, v_dim, dtype), latent)
    check(world, DeviceAttention(kernels[kind]), query, Rule(dim**-0.5), CUDA)
    world.close()


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32, 64, 128])
def test_flashinfer_takes_all_lengths_of_latents_under_these_heads(kernels, heads):
    """It refuses a plan where a tile of its would miss a key."""
    batch = [(0, 64 + new, new) for new in (1, 2, 3, 63, 64, 65, 130)]
    world = CudaWorld(batch, heads=(heads, 1), dims=(576, 512), dtype=torch.bfloat16, mla=True,
                      page_size=4)  # fmt: skip
    check(world, DeviceAttention(kernels[Kind.LATENT]), heads, Rule(576**-0.5), CUDA)
    world.close()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("kind", Kind)
def test_copies_that_come_late_are_waited_for(kernels, kind, pinned):
    shape = first_shape(kind)
    batch = [(7, 5, 1), (7, 30, 9), (6, 5, 4)]
    world = CudaWorld(batch, **shape, page_size=16, segment_pages=1, pinned=pinned,
                      before_copy=lambda: torch.cuda._sleep(2_000_000))  # fmt: skip
    try:
        for _ in range(3):
            check(world, DeviceAttention(kernels[kind]), shape["heads"][0], Rule(0.125), CUDA)
    finally:
        world.close()


def first_shape(kind):
    heads, dims, dtypes, latent = (of[-1] for of in SHAPES[kind])
    return {"heads": heads, "dims": dims, "dtype": dtypes, "mla": latent}


@pytest.mark.parametrize("kind", [Kind.PAGED, Kind.EXACT])
def test_a_logit_cap_bends_the_scores_of_host_pages_too(kernels, kind):
    world = CudaWorld([(3, 7, 1), (5, 20, 12)], heads=(4, 2), dims=(64, 64),
                      dtype=torch.bfloat16, page_size=4)  # fmt: skip
    check(world, DeviceAttention(kernels[kind]), 4, Rule(1.0, logit_cap=5.0), CUDA)
    world.close()


def page_table(pages, page_size, tokens):
    """Of one request, in these pages."""
    table = torch.tensor(pages, dtype=torch.int32, device=CUDA)
    return PagedKeys([tokens], table, page_size)


@given(
    lengths=st.lists(st.sampled_from([1, 2, 31, 200, 513]), min_size=1, max_size=6),
    new=st.sampled_from([1, 2, 17, 128, 150]),
    shape=shapes(),
    page_size=st.sampled_from([1, 16]),
)
@settings(
    deadline=None, max_examples=90, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_cuts_merge_to_what_one_segment_gives(kernels, *, lengths, new, shape, page_size):
    """Cuts before the new tokens, of which the last segment has all: it alone is causal."""
    (kind, shape), lengths = shape, [*lengths, new]
    (dim, v_dim), dtype = shape["dims"], shape["dtype"]
    padded = [-(-length // page_size) * page_size for length in lengths]
    qkv = random_qkv(new, sum(padded), shape["heads"], (dim, v_dim), dtype)
    q, k, v = (x.to(CUDA) for x in qkv)
    kv = KV(k, k[..., :v_dim] if shape["mla"] else v)
    kernels[kind].begin()
    state, first, seen = None, 0, []
    for length, room in reversed(list(zip(lengths, padded, strict=True))):
        pages = list(range(first // page_size, (first + room) // page_size))
        keys = page_table(pages, page_size, length)
        how = {"heads": heads_of(q, kv), "causal": state is None}
        part = kernels[kind].planned(keys, [new], Rule(dim**-0.5), **how)(q, kv)
        state = (
            PartialState(part.out.float(), part.lse.clone())
            if state is None
            else merge_into(state, part)
        )
        seen.insert(0, slice(first, first + length))
        first += room
    keys, values = (torch.cat([x[rows] for rows in seen]).cpu() for x in kv)
    want = reference(q.cpu(), keys, values, scale=dim**-0.5, causal=True)
    assert_same_state(PartialState(state.out.cpu(), state.lse.cpu()), want, dtype)


@pytest.mark.parametrize("kind", Kind)
def test_two_segments_are_as_exact_as_one(kernels, kind):
    (heads, dims), dtype = MODELS[kind], torch.bfloat16
    q, k, v = (x.to(CUDA) for x in random_qkv(64, 4096, heads, dims, dtype))
    kv = KV(k, k[..., : dims[1]] if kind is Kind.LATENT else v)
    kernels[kind].begin()

    def attend(first, end):
        keys = page_table(range(first // 16, end // 16), 16, end - first)
        rule, shape = Rule(dims[0] ** -0.5), heads_of(q, kv)
        return kernels[kind].planned(keys, [64], rule, shape, causal=False)(q, kv)

    one, first, second = attend(0, 4096), attend(0, 1600), attend(1600, 4096)
    two = merge_into(PartialState(first.out.float(), first.lse.clone()), second)
    torch.testing.assert_close(two.out.to(one.out.dtype), one.out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(two.lse, one.lse, atol=1e-3, rtol=1e-3)


#: Llama-3.1-8B, DeepSeek-V2-Lite.
MODELS = {
    Kind.PAGED: ((32, 8), (128, 128)),
    Kind.LATENT: ((16, 1), (576, 512)),
    Kind.EXACT: ((32, 8), (128, 128)),
}


def test_products_of_float32_are_not_rounded_to_tf32(kernels):
    q, k, v = (x.to(CUDA) for x in random_qkv(9, 3000, (4, 2), (128, 128)))
    keys = one_slot_pages(torch.arange(3000, dtype=torch.int32, device=CUDA), [3000])
    planned = kernels[Kind.EXACT].planned(
        keys, [9], Rule(128**-0.5), heads_of(q, KV(k, v)), causal=True
    )
    want = reference(q.cpu(), k.cpu(), v.cpu(), scale=128**-0.5, causal=True).out
    torch.testing.assert_close(planned(q, KV(k, v)).out.cpu().double(), want, atol=3e-6, rtol=3e-6)


def test_slots_are_gathered_without_a_wait():
    table = torch.arange(60, dtype=torch.int32, device=CUDA).view(6, 10)
    rows = torch.tensor([4, 1, 5], device=CUDA)
    # The first time, CUDA loads the kernels and allocates page-locked memory: both wait for the
    # device, and neither happens again.
    slots_of(table, rows, [2, 0, 9], [5, 4, 10])
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    behind = torch.cuda.Event()
    got = slots_of(table, rows, [2, 0, 9], [5, 4, 10])
    behind.record()
    assert not behind.query()
    assert got.tolist() == [42, 43, 44, 10, 11, 12, 13, 59]


@pytest.mark.parametrize("kind", [Kind.PAGED, Kind.LATENT])
def test_a_wrapper_is_not_planned_again_before_the_device_has_its_plan(kernels, kind):
    """Plans of other lengths, made while the device is far behind."""
    heads, dims = MODELS[kind]
    q, k, v = (x.to(CUDA) for x in random_qkv(5, 900, heads, dims, torch.bfloat16))
    kv = KV(k, k[..., : dims[1]] if kind is Kind.LATENT else v)
    lengths, outs = [900, 5, 450, 17, 300, 64], []
    for length in lengths:
        kernels[kind].begin()
        torch.cuda._sleep(20_000_000)
        keys = one_slot_pages(torch.arange(length, dtype=torch.int32, device=CUDA), [length])
        planned = kernels[kind].planned(keys, [5], Rule(0.125), heads_of(q, kv), causal=True)
        outs.append(planned(q, kv).out)
    for length, out in zip(lengths, outs, strict=True):
        k, v = (x[:length].cpu() for x in kv)
        want = reference(q.cpu(), k, v, scale=0.125, causal=True).out
        tolerance = TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(out.cpu().double(), want, atol=tolerance, rtol=tolerance)
