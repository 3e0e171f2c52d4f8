"""FlashInfer's two paged wrappers with float64 references for kernels.

Each call is bound to the signature of the real wrapper that is installed, and the page tables are
checked as its kernels would take them for granted.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from .reference import reference

real = pytest.importorskip("flashinfer")


def bound(function, *args, **kwargs):
    """The call's arguments by the real name; a TypeError where the real one would raise it."""
    call = inspect.signature(function).bind(None, *args, **kwargs)
    call.apply_defaults()
    return SimpleNamespace(**call.arguments)


def check_tables(indptr, indices, last, page_size):
    assert indptr.dtype == indices.dtype == last.dtype == torch.int32
    # On the CPU already, or FlashInfer waits for the device.
    assert indptr.device.type == last.device.type == "cpu"
    lengths = indptr.diff()
    assert indptr[0] == 0 and indptr[-1] == len(indices) and (lengths > 0).all()
    assert len(last) == len(lengths)
    assert ((last >= 1) & (last <= page_size)).all()
    assert len(set(indices.tolist())) == len(indices) or len(lengths) > 1


class Wrapper:
    made = 0

    def __init__(self, *args, **kwargs):
        self.options = bound(self.real.__init__, *args, **kwargs)
        assert self.options.kv_layout == "NHD"
        self.plans = 0
        type(self).made += 1

    def keep(self, queries, tables, plan, *, causal):
        indptr, indices, last = tables
        check_tables(indptr, indices, last, plan.page_size)
        assert plan.q_data_type == plan.kv_data_type
        assert plan.q_data_type in (torch.bfloat16, torch.float16)
        self.plans += 1
        self.queries, self.causal = queries, causal
        self.planned = plan
        self.tables = indptr.tolist(), indices.clone(), last.tolist()

    def run(self, *args, **kwargs):
        call = bound(self.real.run, *args, **kwargs)
        assert call.return_lse
        k, v = call.paged_kv_cache
        plan = self.planned
        assert call.q.dtype == k.dtype == v.dtype == plan.q_data_type
        assert call.q.shape == (sum(self.queries), plan.num_qo_heads, self.dim)
        assert k.shape[1:] == v.shape[1:] == (plan.page_size, plan.num_kv_heads, self.dim)
        assert call.q.is_contiguous()
        states = [
            self.request(number, q, k, v) for number, q in enumerate(call.q.split(self.queries))
        ]
        out = torch.cat([state.out for state in states]).to(call.q.dtype)
        lse = torch.cat([state.lse for state in states]).float() / math.log(2)
        return out, lse

    def request(self, number, q, k, v):
        indptr, indices, last = self.tables
        pages = indices[indptr[number] : indptr[number + 1]].long()
        tokens = (len(pages) - 1) * self.planned.page_size + last[number]
        keys, values = (x[pages].flatten(0, 1)[:tokens] for x in (k, v))
        return reference(
            q,
            keys,
            values,
            scale=self.planned.sm_scale,
            causal=self.causal,
            logit_cap=self.planned.logits_soft_cap or 0.0,
        )


class Prefill(Wrapper):
    real = real.BatchPrefillWithPagedKVCacheWrapper

    def plan(self, *args, **kwargs):
        plan = bound(self.real.plan, *args, **kwargs)
        self.dim = plan.head_dim_qk
        assert plan.qo_indptr.dtype == torch.int32 and plan.qo_indptr.device.type == "cpu"
        tables = plan.paged_kv_indptr, plan.paged_kv_indices, plan.paged_kv_last_page_len
        self.keep(plan.qo_indptr.diff().tolist(), tables, plan, causal=plan.causal)


class Decode(Wrapper):
    real = real.BatchDecodeWithPagedKVCacheWrapper

    def plan(self, *args, **kwargs):
        # `plan` passes its keywords on to this.
        plan = bound(self.real._plan_impl, *args, **kwargs)
        self.dim = plan.head_dim
        queries = [1] * len(plan.last_page_len)
        self.keep(queries, (plan.indptr, plan.indices, plan.last_page_len), plan, causal=False)


def install(monkeypatch):
    """Put the fakes in FlashInfer's place."""
    monkeypatch.setattr(real, "BatchPrefillWithPagedKVCacheWrapper", Prefill)
    monkeypatch.setattr(real, "BatchDecodeWithPagedKVCacheWrapper", Decode)
