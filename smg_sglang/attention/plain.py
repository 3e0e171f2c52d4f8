"""Attention as plain matrix products in float32: any shape, any dtype, any device, and exact.

For what no kernel can do, and slower than any of them: the scores go through memory, a block of
queries at a time. On CUDA products of float32 are as exact as torch's are told to be, which by
default (SGLang's, too) is float32 throughout.
"""

from __future__ import annotations

import math

import torch

from smg_sglang.attention.partial import PartialState

# Scores that are held at a time: 64 MiB of float32.
_SCORES = 1 << 24


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    logit_cap: float = 0.0,
) -> PartialState:
    """Attend q [N, q_heads, dim] to k [M, kv_heads, dim] and v [M, kv_heads, v_dim].

    causal: the queries are the last N of the M positions, N <= M. logit_cap: as in `cpu.attend`.
    The output has the queries' dtype. Work is enqueued on the current stream, and nothing waits.
    """
    n, m = q.shape[0], k.shape[0]
    block = max(1, _SCORES // max(1, q.shape[1] * m))
    parts = []
    for i in range(0, max(1, n), block):
        scores = _scores(q[i : i + block], k, scale, logit_cap)
        if causal:
            # The block's first query is position m - n + i and sees itself and what is before.
            scores.masked_fill_(_hidden(scores, m - n + i), -math.inf)
        parts.append(_weigh(scores, v, q.dtype))
    return PartialState(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    """Scores [kv_heads, group, queries, keys]; K is read once a group, and not copied for it."""
    n, (m, kv_heads, dim) = len(q), k.shape
    group = q.shape[1] // kv_heads
    rows = q.float().reshape(n, kv_heads, group, dim).permute(1, 2, 0, 3)
    rows = rows.reshape(kv_heads, group * n, dim)
    scores = (rows @ k.float().permute(1, 2, 0)).mul_(scale).view(kv_heads, group, n, m)
    return torch.tanh(scores / cap) * cap if cap > 0 else scores


def _hidden(scores: torch.Tensor, position: int) -> torch.Tensor:
    """Which keys are later than the query, where the first query is at `position`."""
    queries, keys = scores.shape[2:]
    positions = torch.arange(position, position + queries, device=scores.device)
    return torch.arange(keys, device=scores.device) > positions.unsqueeze(1)


def _weigh(scores: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> PartialState:
    kv_heads, group, n, m = scores.shape
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).view(kv_heads, group * n, m)
    out = (weights @ v.float().transpose(0, 1)).view(kv_heads, group, n, v.shape[2])
    out = out.permute(2, 0, 1, 3).reshape(n, kv_heads * group, v.shape[2]).to(dtype)
    return PartialState(out, lse.permute(2, 0, 1).reshape(n, kv_heads * group))
