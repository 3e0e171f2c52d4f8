"""Attention over a part of the keys, and how such parts become the whole.

Softmax attention over disjoint sets of keys merges exactly from the outputs and the log-sum-exps
(online softmax, Milakov and Gimelshein 2018; the split-KV merge of FlashDecoding and FlashInfer).
So a prefix and the new tokens, or device pages and host pages, may be attended one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PartialState(NamedTuple):
    """Attention of N queries over some of their keys.

    out: [N, heads, v_dim], normalised over these keys; zeros where there are none.
    lse: float32 [N, heads], natural log of the sum of exp(score); -inf where there are no keys.
    """

    out: torch.Tensor
    lse: torch.Tensor


def empty_state(queries: int, heads: int, v_dim: int, dtype: torch.dtype) -> PartialState:
    """The state over no keys: the neutral element of `merge`."""
    out = torch.zeros(queries, heads, v_dim, dtype=dtype)
    return PartialState(out, torch.full((queries, heads), -torch.inf))


def merge(first: PartialState, second: PartialState) -> PartialState:
    """The state over both sets of keys, which must be disjoint.

    Computed in float32; the output has the dtype of `first.out`. Associative and commutative up
    to rounding.
    """
    lse = torch.logaddexp(first.lse, second.lse)
    # Where both sides are empty, exp(-inf - -inf) is nan; their outputs are zero, so is the weight.
    weight = torch.exp(second.lse - lse).nan_to_num_(nan=0.0)
    out = torch.lerp(first.out.float(), second.out.float(), weight.unsqueeze(-1))
    return PartialState(out.to(first.out.dtype), lse)
