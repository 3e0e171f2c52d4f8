"""FlashInfer's paged wrappers with float64 references for kernels.

The two for keys and values are stand-ins: each call is bound to the signature of the real wrapper
that is installed, and the page tables are checked as its kernels would take them for granted. The
one for latents is the real one, which checks for itself, over a backend whose kernel is replaced.
"""

from __future__ import annotations

import inspect
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from .reference import reference

real = pytest.importorskip("flashinfer")
pytest.importorskip("flashinfer.mla")
from flashinfer.mla._batch_mla import _auto_policy as auto  # noqa: E402
from flashinfer.mla._batch_mla import _wrapper as wrapper  # noqa: E402
from flashinfer.mla._batch_mla._backends import _fa_common as fa_common  # noqa: E402
from flashinfer.mla._batch_mla._backends import fa2_backend as fa2  # noqa: E402


def bound(function, *args, **kwargs):
    """The call's arguments by the real name; a TypeError where the real one would raise it."""
    call = inspect.signature(function).bind(None, *args, **kwargs)
    call.apply_defaults()
    return SimpleNamespace(**call.arguments)


def check_tables(indptr, indices, last, page_size, *, lengths=False):
    """last: tokens of each last page, or of all pages of a request."""
    assert indptr.dtype == indices.dtype == last.dtype == torch.int32
    # On the CPU already, or FlashInfer waits for the device.
    assert indptr.device.type == last.device.type == "cpu"
    pages = indptr.diff()
    assert indptr[0] == 0 and indptr[-1] == len(indices) and (pages > 0).all()
    assert len(last) == len(pages)
    if lengths:
        last = last - (pages - 1) * page_size
    assert ((last >= 1) & (last <= page_size)).all()
    assert len(set(indices.tolist())) == len(indices) or len(pages) > 1


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


class Latent(fa2._BatchMLAPagedAttentionFa2Backend):
    """FlashInfer's fa2 for latents, on an H100 that is not there: all but what it compiles."""

    def __init__(self, **options):
        pinned = torch.empty(8, dtype=torch.uint8)
        super().__init__(**(options | {"pin_memory_int_workspace_buffer": pinned}))

    def plan(self, **plan):
        # What the real one does with them, but for the module that it builds.
        inspect.signature(super().plan).bind(**plan)
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
        check_tables(*(plan[name] for name in names[1:]), plan["page_size"], lengths=True)
        assert plan["qo_indptr"].device.type == "cpu"
        self.tables = {name: plan[name].tolist() for name in names}
        self.planned = SimpleNamespace(**plan)
        self._q_data_type, self._kv_data_type = plan["q_data_type"], plan["kv_data_type"]

    def _run_generated_fa(self, *, q_nope, q_pe, ckv_cache, kpe_cache, return_lse, **more):
        plan = self.planned
        self._validate_run_input_dtypes(
            q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv_cache, kpe_cache=kpe_cache
        )
        assert return_lse and not more["return_lse_base_on_e"]
        assert q_nope.shape[1] == plan.num_heads and ckv_cache.shape[1] == plan.page_size
        # The kernel reads rows by two strides.
        assert all(x.stride(-1) == 1 for x in (q_nope, q_pe, ckv_cache, kpe_cache))
        q, keys = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
        new = torch.tensor(self.tables["qo_indptr"]).diff().tolist()
        states = [self.request(number, x, keys) for number, x in enumerate(q.split(new))]
        out = torch.cat([state.out for state in states]).to(q.dtype)
        return out, torch.cat([state.lse for state in states]).float() / math.log(2)

    def request(self, number, q, keys):
        begin, end = self.tables["kv_indptr"][number : number + 2]
        rows = keys[self.tables["kv_indices"][begin:end]].flatten(0, 1)
        k = rows[: self.tables["kv_len_arr"][number]].unsqueeze(1)
        v = k[..., : self.planned.head_dim_ckv]
        return reference(q, k, v, scale=self.planned.sm_scale, causal=self.planned.causal)


class LatentWrapper(real.mla.BatchMLAPagedAttentionWrapper):
    """The real one; counts its plans, and takes no call that it says is deprecated."""

    plans = 0

    def plan(self, **plan):
        self.plans += 1
        # SGLang's are, whose workspace is not zeroed, as kernels for packed ones would have it.
        assert plan["query_layout"] == plan["kv_cache_layout"] == "split"
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            super().plan(**plan)

    def run(self, **call):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            return super().run(**call)


def install(monkeypatch):
    """Put the fakes in FlashInfer's place."""
    monkeypatch.setattr(real.mla, "BatchMLAPagedAttentionWrapper", LatentWrapper)
    monkeypatch.setitem(wrapper._BACKEND_TYPES, "fa2", Latent)
    # For which FlashInfer's choice is fa2.
    monkeypatch.setattr(auto, "_get_compute_capability", lambda device: (8, 0))
    monkeypatch.setattr(fa_common, "get_compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(fa_common, "get_device_sm_count", lambda device: 132)
    monkeypatch.setattr(fa_common, "_get_fa_shared_memory_limits", lambda device: (233472, 232448))
    monkeypatch.setattr(real, "BatchPrefillWithPagedKVCacheWrapper", Prefill)
    monkeypatch.setattr(real, "BatchDecodeWithPagedKVCacheWrapper", Decode)
