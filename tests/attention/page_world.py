"""Requests whose keys lie in pages here and there, and what their attention is by definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smg_sglang.attention.pages import (
    Memory,
    PageRun,
    RowLayout,
    plan_pages,
    pool_memory,
    pool_rows,
    slot_run,
)
from smg_sglang.attention.partial import PartialState

from .reference import reference

#: Bytes that no page has: what is read of them is not a number.
POISON = 0xFF


@dataclass
class PageWorld:
    """Requests with some pages each, in several memories, over whole keys in `k` and `v`.

    lengths: for each request the tokens of its pages. queries: its query rows. Rows are `gap`
    elements apart, and pages begin at odd elements.
    """

    lengths: list[list[int]]
    queries: list[int]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float32
    gap: int = 0
    memory_count: int = 2
    scale_of_keys: float = 1.0
    q_dtype: torch.dtype = torch.float32
    unit_tokens: int = 256

    def __post_init__(self):
        self.rng = np.random.default_rng(0)
        torch.manual_seed(0)
        kv = self.heads[1]
        size = self.dtype.itemsize
        rows = [kv * dim * size + self.gap * size for dim in self.dims]
        self.layout = RowLayout(
            kv, *self.dims, self.dtype, rows[0], self.dims[0] * size, rows[1], self.dims[1] * size
        )
        self.k, self.v = [], []
        pages = [(r, n) for r, sizes in enumerate(self.lengths) for n in sizes]
        places = self.rng.integers(0, self.memory_count, len(pages))
        order = self.rng.permutation(len(pages))
        offsets = np.zeros(len(pages), np.int64)
        ends = [size * 3] * self.memory_count  # not aligned to anything
        for page in order:
            offsets[page] = ends[places[page]]
            ends[places[page]] += pages[page][1] * max(rows) + size
        self.bytes = [np.full((2, end), POISON, np.uint8) for end in ends]
        for page, (request, tokens) in enumerate(pages):
            k = self._fill(self.bytes[places[page]][0], offsets[page], tokens, 0)
            v = self._fill(self.bytes[places[page]][1], offsets[page], tokens, 1)
            self.k.append((request, k))
            self.v.append((request, v))
        self.memories = [
            Memory(both[0].ctypes.data, both[1].ctypes.data, both.shape[1], both.shape[1])
            for both in self.bytes
        ]
        at = np.cumsum([0, *(len(sizes) for sizes in self.lengths)])
        self.runs = [
            [
                PageRun(
                    int(places[page]),
                    offsets[page : page + 1],
                    np.zeros(1, np.int64),
                    np.array([pages[page][1]], np.int32),
                )
                for page in range(at[r], at[r + 1])
            ]
            for r in range(len(self.lengths))
        ]
        self.table = plan_pages(self.runs, self.layout, self.queries, self.unit_tokens)
        self.q = torch.randn(sum(self.queries), self.heads[0], self.dims[0]).to(self.q_dtype)

    def _fill(self, memory, offset, tokens, part):
        """Write random rows at an offset; their float64 values [tokens, kv_heads, dim]."""
        shape = (tokens, self.heads[1], self.dims[part])
        width = shape[1] * shape[2] * self.dtype.itemsize
        scale = self.scale_of_keys if part == 0 else 1.0
        rows = (torch.randn(shape) * scale).to(self.dtype)
        row = (self.layout.k_row, self.layout.v_row)[part]
        raw = rows.reshape(-1).view(torch.uint8).numpy().reshape(tokens, width)
        for token in range(tokens):
            begin = int(offset) + token * row
            memory[begin : begin + raw.shape[1]] = raw[token]
        return rows.double()

    def expected(self, *, scale, logit_cap=0.0, k_scale=1.0, v_scale=1.0):
        states = []
        for r, q in enumerate(self.q.split(self.queries)):
            k, v = (
                torch.cat(
                    [torch.empty(0, self.heads[1], dim, dtype=torch.float64)]
                    + [rows for request, rows in parts if request == r]
                )
                for parts, dim in ((self.k, self.dims[0]), (self.v, self.dims[1]))
            )
            states.append(reference(q, k, v, scale=scale * k_scale, logit_cap=logit_cap))
        return PartialState(
            torch.cat([s.out for s in states]) * v_scale, torch.cat([s.lse for s in states])
        )

    def attend(self, attention, *, scale, **how):
        out = torch.full((len(self.q), self.heads[0], self.dims[1]), torch.nan)
        lse = torch.full(out.shape[:2], torch.nan)
        attention.attend_pages(self.q, self.table, self.memories, out, lse, scale=scale, **how)
        return PartialState(out, lse)

    def check(self, attention, *, scale=None, tolerance=2e-5, **how):
        scale = self.dims[0] ** -0.5 if scale is None else scale
        got, want = self.attend(attention, scale=scale, **how), self.expected(scale=scale, **how)
        torch.testing.assert_close(got.out.double(), want.out, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-4, rtol=1e-5)


def pool_table(slots, k, v, **how):
    """(table, memories) of requests in slots of a pool."""
    return plan_pages([[slot_run(s)] for s in slots], pool_rows(k, v), **how), [pool_memory(k, v)]
