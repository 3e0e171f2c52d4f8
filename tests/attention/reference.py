"""Attention in float64, written down as its definition."""

from __future__ import annotations

import torch

from smg_sglang.attention.partial import PartialState

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def reference(q, k, v, *, scale, causal=False, logit_cap=0.0) -> PartialState:
    """q [N, q_heads, dim], k [M, kv_heads, dim], v [M, kv_heads, v_dim]; float64 out."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->nhm", q.double(), k) * scale
    if logit_cap > 0:
        scores = torch.tanh(scores / logit_cap) * logit_cap
    if causal:
        hidden = torch.arange(m) > torch.arange(m - n, m).unsqueeze(1)
        scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(nan=0.0)
    return PartialState(torch.einsum("nhm,mhd->nhd", weights, v), lse)


def random_qkv(n, m, heads=(4, 2), dims=(64, 64), dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(n, heads[0], dims[0]).to(dtype)
    k = torch.randn(m, heads[1], dims[0]).to(dtype)
    v = torch.randn(m, heads[1], dims[1]).to(dtype)
    return q, k, v


def assert_same_state(got: PartialState, want: PartialState, dtype=torch.float32) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.out.double(), want.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=2e-3, rtol=2e-3)
