"""Decode attention over pages with torch alone: what runs where there is no compiler for C.

The rows are gathered some thousand at a time, and their states merged. In float32 throughout.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from smg_sglang.attention import plain
from smg_sglang.attention.pages import Memory, PageTable, check_call
from smg_sglang.attention.partial import empty_state, merge

#: Tokens that are gathered at a time, about.
BLOCK = 2048


class TorchAttention:
    """As `pages.PageAttention`, with torch's own threads; keeps nothing."""

    name = "torch"

    def attend_pages(
        self,
        q: torch.Tensor,
        table: PageTable,
        memories: Sequence[Memory],
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        logit_cap: float = 0.0,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """As `pages.PageAttention.attend_pages`."""
        check_call(q, table, memories, out, lse)
        rows = table.request_rows.tolist()
        states = [
            empty_state(end - begin, q.shape[1], table.layout.v_dim, torch.float32)
            for begin, end in itertools.pairwise(rows)
        ]
        for request, first, last in _blocks(table):
            mine = q[rows[request] : rows[request + 1]].float()
            if len(mine):
                k, v = _gathered(table, memories, first, last)
                state = plain.attend(
                    mine, k, v, scale=scale * k_scale, causal=False, logit_cap=logit_cap
                )
                states[request] = merge(states[request], state)
        for state, (begin, end) in zip(states, itertools.pairwise(rows), strict=True):
            torch.mul(state.out, v_scale, out=out[begin:end])
            lse[begin:end] = state.lse

    def close(self) -> None:
        """It has no threads."""


def _blocks(table: PageTable) -> Iterator[tuple[int, int, int]]:
    """(request, first page, end): units of a request, of BLOCK tokens together."""
    units, owners = table.units.tolist(), table.unit_requests.tolist()
    ends = np.append(0, np.cumsum(table.tokens, dtype=np.int64))
    first = 0
    for unit, request in enumerate(owners):
        end = units[unit + 1]
        last_of_request = unit + 1 == len(owners) or owners[unit + 1] != request
        if last_of_request or ends[end] - ends[first] >= BLOCK:
            yield request, first, end
            first = end


def _gathered(
    table: PageTable, memories: Sequence[Memory], first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [tokens, kv_heads, dim] and values of a range of pages, in float32."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    numbers = table.memories[first:last]
    layout = table.layout
    for number in np.unique(numbers):
        pages = first + np.flatnonzero(numbers == number)
        tokens = table.tokens[pages].astype(np.int64)
        inside = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        rows = np.repeat(table.first_rows[pages], tokens) + inside
        offsets = np.repeat(table.offsets[pages], tokens)
        memory = memories[number]
        k = _Heads(memory.k, memory.k_bytes, layout.k_head, layout.kv_heads, layout.dim)
        v = _Heads(memory.v, memory.v_bytes, layout.v_head, layout.kv_heads, layout.v_dim)
        parts.append(
            (
                k.rows(offsets + rows * layout.k_row, layout.dtype),
                v.rows(offsets + rows * layout.v_row, layout.dtype),
            )
        )
    return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])


class _Heads(NamedTuple):
    """Bytes of keys or values from an address on; head: bytes from head to head."""

    address: int
    size: int
    head: int
    heads: int
    dim: int

    def rows(self, offsets: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """The rows at these byte offsets: float32 [rows, heads, dim]."""
        width = self.dim * dtype.itemsize
        raw = torch.frombuffer(
            (ctypes.c_uint8 * self.size).from_address(self.address), dtype=torch.uint8
        )
        # Row i of this view begins at byte i, whatever rows there really are.
        begins = self.size - (self.heads - 1) * self.head - width + 1
        rows = raw.as_strided((begins, self.heads, width), (1, self.head, 1))
        return rows.index_select(0, torch.from_numpy(offsets)).view(dtype).float()
