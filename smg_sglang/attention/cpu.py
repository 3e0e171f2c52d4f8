"""Partial attention of new queries over keys and values, on the CPU.

Torch's flash kernel for the CPU does the work: it returns the log-sum-exp and takes fewer KV heads
than query heads. Three things are added. Only the new queries run: with a prefix in the cache, the
stock backend attends all positions again and throws most of them away. The queries that share a
KV head become rows of one matrix product, so that K and V are read once a group. And what the
kernel cannot do (a logit cap) goes through plain matrix products.

Layouts are tokens first, as in SGLang's pools: q [N, q_heads, dim], k [M, kv_heads, dim],
v [M, kv_heads, v_dim]; rows may be strided. Any thread may call; nothing is kept between calls.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from smg_sglang.attention import plain
from smg_sglang.attention.partial import PartialState, empty_state, merge

#: Up to here one masked pass beats an unmasked one over the prefix, a causal one over the new
#: tokens and a merge (measured at 2,700 keys: equal near 128 queries).
MASKED_QUERIES = 128


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    logit_cap: float = 0.0,
    mask: torch.Tensor | None = None,
) -> PartialState:
    """Attend N queries to M keys; q, k and v have one dtype (float32, bfloat16 or float16).

    causal: the queries are the last N of the M positions, and see no later key. mask: what
    `causal_mask` returned for these sizes, to build it once for many layers. logit_cap: scores
    become cap * tanh(score / cap) when it is above zero (Gemma 2).
    """
    n, m = q.shape[0], k.shape[0]
    if n == 0 or m == 0:
        return empty_state(n, q.shape[1], v.shape[2], q.dtype)
    if causal and m < n:
        raise ValueError(f"causal attention of {n} queries needs as many keys, there are {m}")
    if logit_cap > 0 or v.shape[2] > k.shape[2]:
        return plain.attend(q, k, v, scale=scale, causal=causal, logit_cap=logit_cap)
    v_dim = v.shape[2]
    v = _as_wide_as_keys(v, k)
    if not causal or n == 1:
        state = _grouped(q, k, v, scale)
    elif mask is not None:
        state = _grouped(q, k, v, scale, mask)
    else:
        state = _causal(q, k, v, scale)
    return PartialState(state.out[..., :v_dim], state.lse)


def causal_mask(queries: int, keys: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask [queries * group, keys] of the last `queries` positions.

    group: query heads a KV head; each query's row comes that many times.
    """
    hidden = torch.ones(queries, queries, dtype=torch.bool).triu_(1)
    mask = torch.zeros(queries, group, keys, dtype=dtype)
    mask[:, :, keys - queries :].masked_fill_(hidden.unsqueeze(1), -math.inf)
    return mask.view(queries * group, keys)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> PartialState:
    """In one pass where that is quicker, else the prefix and the new tokens, merged."""
    n, m = q.shape[0], k.shape[0]
    if n == m:
        return _square(q, k, v, scale)
    if n <= MASKED_QUERIES:
        mask = causal_mask(n, m, q.shape[1] // k.shape[1], q.dtype)
        return _grouped(q, k, v, scale, mask)
    prefix = m - n
    before = _grouped(q, k[:prefix], v[:prefix], scale)
    return merge(before, _square(q, k[prefix:], v[prefix:], scale))


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's kernel on [heads, tokens, dim]; returns (out, lse) in the same layout."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, causal, attn_mask=mask, scale=scale
    )
    return out[0], lse[0]


def _square(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> PartialState:
    """As many queries as keys, causal: the kernel skips the upper half."""
    out, lse = _flash(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=scale, causal=True
    )
    return PartialState(out.transpose(0, 1), lse.transpose(0, 1))


def _grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> PartialState:
    """The query heads of a KV head as rows of one product."""
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    rows = q.reshape(n, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, n * group, dim)
    out, lse = _flash(
        rows, k.transpose(0, 1), v.transpose(0, 1), scale=scale, causal=False, mask=mask
    )
    out = out.reshape(kv_heads, n, group, -1).transpose(0, 1).reshape(n, q_heads, -1)
    return PartialState(out, lse.reshape(kv_heads, n, group).transpose(0, 1).reshape(n, q_heads))


def _as_wide_as_keys(v: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The kernel wants values as wide as keys: MLA's are narrower (512 of 576, or 128 of 192)."""
    if v.shape[2] == k.shape[2]:
        return v
    # Absorbed MLA's values are the front of its keys: then the keys serve, and nothing is copied.
    if v.data_ptr() == k.data_ptr() and v.stride() == k.stride():
        return k
    return F.pad(v, (0, k.shape[2] - v.shape[2]))
