"""Partial attention of new queries over a sliding window of keys, on the CPU.

Each query sees itself and a number of keys before it. Queries go in blocks, each over the keys that
any of it sees, masked; correct first.
"""

from __future__ import annotations

import math

import torch

from smg_sglang.attention import cpu
from smg_sglang.attention.partial import PartialState

#: Queries at a time: a block's mask has so many rows a query head.
BLOCK = 256


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int
) -> PartialState:
    """Attend q [N, q_heads, dim], the last N of the positions of k [M, kv_heads, dim] and
    v [M, kv_heads, v_dim], N <= M; each sees itself and `window` keys before it. One dtype."""
    n, m = q.shape[0], k.shape[0]
    parts = []
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        first = max(0, m - n + begin - window)
        last = m - n + end
        mask = window_mask(end - begin, last - first, q.shape[1] // k.shape[1], q.dtype, window)
        block = cpu.attend(
            q[begin:end], k[first:last], v[first:last], scale=scale, causal=True, mask=mask
        )
        parts.append(block)
    return PartialState(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))


def window_mask(
    queries: int, keys: int, group: int, dtype: torch.dtype, window: int
) -> torch.Tensor:
    """The additive mask [queries * group, keys] of the last `queries` positions, as
    `cpu.causal_mask` has it without a window."""
    query = torch.arange(keys - queries, keys).unsqueeze(1)
    key = torch.arange(keys)
    hidden = (key > query) | (key < query - window)
    mask = torch.zeros(queries, group, keys, dtype=dtype)
    mask.masked_fill_(hidden.unsqueeze(1), -math.inf)
    return mask.view(queries * group, keys)
