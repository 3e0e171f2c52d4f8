"""Batches whose older keys lie in host memory: in place and segment by segment, delayed or not."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.attention import cpu
from smg_sglang.attention.batch import KV, Rule, attend_pool, plan_batch
from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import random_delay
from smg_sglang.transfer.segments import SegmentRing

from .reference import TOLERANCE, reference

LAYERS = 3


class World:
    """Requests of whole keys and values, a part of them in arenas, the rest scattered in a pool."""

    def __init__(self, requests, *, heads, dims, dtype, page_size, mla=False, segment_pages=2,
                 before_copy=None, arenas=2, kernel=None):  # fmt: skip
        torch.manual_seed(0)
        self.rng = np.random.default_rng(0)
        self.page_size, self.dtype, self.mla = page_size, dtype, mla
        self.requests, self.kernel = requests, kernel
        slots = max(page_size, sum(tail for _, tail, _ in requests))
        self.k = [torch.randn(slots, heads[1], dims[0]).to(dtype) for _ in range(LAYERS)]
        self.v = [torch.randn(slots, heads[1], dims[1]).to(dtype) for _ in range(LAYERS)]
        if mla:
            self.v = [k[..., : dims[1]] for k in self.k]
        pool = (
            DevicePool.mla(self.k, page_size) if mla else DevicePool.mha(self.k, self.v, page_size)
        )
        self.layout = pool.layout
        ring = SegmentRing(self.layout, pool.device, segment_pages, before_copy=before_copy)
        self.ring, self.reader = ring, HostReader(self.layout, ring)
        order = torch.randperm(slots).int()
        tails = [tail for _, tail, _ in requests]
        self.slots = list(order[: sum(tails)].split(tails))
        self.host = [self._runs(pages, heads, dims, arenas) for pages, _, _ in requests]

    def _runs(self, pages, heads, dims, arenas):
        cut = int(self.rng.integers(0, pages + 1)) if arenas > 1 else pages
        return [self._run(n) for n in (cut, pages - cut) if n]

    def _run(self, pages):
        offsets = self.rng.permutation(pages).astype(np.int64) * self.layout.page_bytes + 64
        arena = np.zeros(64 + pages * self.layout.page_bytes, np.uint8)
        for offset in offsets:
            for layer in range(LAYERS):
                for number, part in enumerate(self.layout.parts):
                    rows = torch.randn(self.page_size, part.heads * part.dim).to(self.dtype)
                    raw = rows.view(torch.uint8).numpy().reshape(-1)
                    at = int(offset) + self.layout.part_offset(layer, number)
                    arena[at : at + raw.size] = raw
        return HostRun(arena, offsets, self.page_size)

    def whole(self, request, layer):
        """All keys and values of a request, float64 sources for the reference."""
        parts = [[], []]
        for run in self.host[request]:
            for offset in run.offsets:
                for number, part in enumerate(self.layout.parts):
                    at = int(offset) + self.layout.part_offset(layer, number)
                    raw = run.arena[at : at + self.page_size * part.row_bytes]
                    rows = torch.from_numpy(raw.copy()).view(self.dtype)
                    parts[number].append(rows.view(self.page_size, part.heads, part.dim))
        rows = self.slots[request].long()
        k = torch.cat([*parts[0], self.k[layer][rows]])
        if self.mla:
            return k, k[..., : self.v[0].shape[2]]
        return k, torch.cat([*parts[1], self.v[layer][rows]])

    def check(self, q_heads, *, rule):
        new = [n for _, _, n in self.requests]
        plan = plan_batch(self.slots, new, self.host, self.reader, self.kernel)
        for layer in range(LAYERS):
            q = torch.randn(sum(new), q_heads, self.k[0].shape[2]).to(self.dtype)
            out = torch.full((sum(new), q_heads, self.v[0].shape[2]), torch.nan, dtype=self.dtype)
            attend_pool(q, KV(self.k[layer], self.v[layer]), plan, rule, out, layer)
            for request, queries in enumerate(q.split(new)):
                k, v = self.whole(request, layer)
                how = {"scale": rule.scale, "causal": rule.causal, "logit_cap": rule.logit_cap}
                want = reference(queries, k, v, **how).out
                got = out.split(new)[request].double()
                tolerance = TOLERANCE[self.dtype]
                torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)

    def close(self):
        self.reader.begin()
        self.ring.close()


def run(
    requests, *, heads=(4, 2), dims=(64, 64), dtype=torch.float32, page_size=4, rule=None, **how
):
    world = World(requests, heads=heads, dims=dims, dtype=dtype, page_size=page_size, **how)
    try:
        for _ in range(2):
            world.check(heads[0], rule=rule or Rule(dims[0] ** -0.5))
    finally:
        world.close()


def requests_of(draw):
    pages = draw(st.sampled_from([0, 1, 2, 3, 7]))
    new = draw(st.sampled_from([1, 1, 2, 9, cpu.MASKED_QUERIES + 1]))
    return pages, new + draw(st.sampled_from([0, 1, 5, 30])), new


requests = st.composite(requests_of)()


@given(
    batch=st.lists(requests, min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (32, 1)]),
    dims=st.sampled_from([(64, 64), (128, 128), (256, 256), (96, 64)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    page_size=st.sampled_from([1, 4, 16]),
    segment_pages=st.sampled_from([1, 2, 5]),
)
@settings(deadline=None, max_examples=30)
def test_host_pages_and_slots_together_are_the_whole(
    kernel, *, batch, heads, dims, dtype, page_size, segment_pages
):
    run(batch, heads=heads, dims=dims, dtype=dtype, page_size=page_size,
        segment_pages=segment_pages, kernel=kernel)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_attention_reads_its_values_in_its_keys(kernel, dtype):
    how = {"dims": (96, 64), "dtype": dtype, "mla": True, "kernel": kernel}
    run([(3, 7, 1), (5, 20, 12), (0, 4, 4)], heads=(8, 1), **how)
    run([(3, 7, 1), (5, 20, 12)], heads=(32, 1), **how)


def test_a_logit_cap_bends_the_scores_of_host_pages_too(kernel):
    run([(3, 7, 1), (5, 20, 12)], rule=Rule(1.0, logit_cap=5.0), kernel=kernel)


def test_copies_that_come_late_are_waited_for():
    run([(7, 5, 1), (7, 30, 9), (6, 5, 4)], segment_pages=1, before_copy=random_delay(0.005))
    run([(7, 5, 1), (7, 30, 9)], dtype=torch.float16, segment_pages=1,
        before_copy=random_delay(0.005))  # fmt: skip


def test_copies_run_ahead_of_the_reader_but_not_past_the_ring():
    copied = []
    world = World([(6, 5, 4)], heads=(4, 2), dims=(64, 64), dtype=torch.float32, page_size=4,
                  segment_pages=1, before_copy=lambda: copied.append(time.monotonic()), arenas=1)  # fmt: skip
    world.reader.begin()
    world.reader.stream(world.host)
    world.reader.start_layer(0)
    deadline = time.monotonic() + 5
    while len(copied) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(copied) == 2
    segments = world.reader.segments(world.host[0])
    next(segments)
    while len(copied) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(copied) == 3
    world.close()


def test_a_segment_longer_than_a_buffer_is_refused():
    world = World([(3, 5, 4)], heads=(4, 2), dims=(64, 64), dtype=torch.float32, page_size=4,
                  segment_pages=1, arenas=1)  # fmt: skip
    from smg_sglang.transfer.segments import Segment

    segment = Segment(0, world.host[0][0].arena, world.host[0][0].offsets)
    with pytest.raises(ValueError, match="3 pages in a ring of 1"):
        world.ring.fill(0, segment)
    world.close()
