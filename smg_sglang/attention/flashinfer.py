"""FlashInfer's paged wrappers: partial attention over page tables, on CUDA.

FlashInfer has bf16 and fp16 kernels only. Its log-sum-exps are base 2; here all are natural. There
is a kind for keys and values, and one for latents (MLA), whose queries have absorbed the
projection of the keys.

On a CPU it is checked against FlashInfer's signatures, its kernels replaced by float64 references.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.paged import Heads, PagedKeys, staged
from smg_sglang.attention.partial import PartialState
from smg_sglang.errors import ConfigError

#: FlashInfer's own recommendation.
WORKSPACE_BYTES = 128 << 20
_LN2 = math.log(2)

Make = Callable[[torch.Tensor, str], Any]


class Wrappers:
    """FlashInfer's wrappers for one device. One thread, one forward at a time.

    A plan is copied to the device from page-locked memory of its wrapper, so a wrapper may be
    planned again only when the device is through with the former plan. The CPU may be one forward
    ahead: forwards take turns with two sets of wrappers, and a set is used again after the event
    at the end of the forward that used it last.
    """

    #: FlashInfer's backend that SGLang takes, too: its kernels are compiled then.
    backend: str

    def __init__(
        self,
        device: torch.device,
        workspace: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """
        Args:
            workspace: uint8, used by one kernel at a time on the stream of the forward; SGLang's
                own will do.
            backend: FlashInfer's, for several queries a request and for latents.
        """
        if workspace is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.device = device
        self._workspace, self._backend = workspace, backend or self.backend
        self._sets: list[dict[Make, list[Any]]] = [{}, {}]
        self._ends: list[Any] = [None, None]
        self._taken: Counter[Make] = Counter()
        self._turn = 0

    def begin(self) -> None:
        """A new forward pass: plans of the one before the last are forgotten."""
        if self.device.type == "cuda":
            end = torch.cuda.Event(blocking=True)
            end.record()
            self._ends[self._turn] = end
        self._turn = 1 - self._turn
        if self._ends[self._turn] is not None:
            self._ends[self._turn].synchronize()
        self._taken.clear()

    def _take(self, make: Make) -> Any:
        """A wrapper of this kind that has no plan of this pass or the one before."""
        wrappers, taken = self._sets[self._turn].setdefault(make, []), self._taken[make]
        self._taken[make] += 1
        if taken == len(wrappers):
            wrappers.append(make(self._workspace, self._backend))
        return wrappers[taken]

    def _indptr(self, lengths: Sequence[int]) -> torch.Tensor:
        """int32 [R + 1] on the CPU, so that no plan waits for the device."""
        return staged(np.cumsum([0, *lengths], dtype=np.int32), self.device)


class PagedKernels(Wrappers):
    """Keys and values, MHA and GQA."""

    backend = "fa2"

    def planned(
        self, keys: PagedKeys, new: Sequence[int], rule: Rule, heads: Heads, *, causal: bool
    ) -> PagedPlan:
        """As `paged.Kernels.planned`."""
        single = all(count == 1 for count in new)
        wrapper = self._take(decode_wrapper if single else prefill_wrapper)
        last = [(length - 1) % keys.page_size + 1 for length in keys.lengths]
        tables = (
            self._indptr(keys.pages_each),
            keys.pages,
            staged(np.array(last, np.int32), self.device),
        )
        shape = (heads.query, heads.kv, heads.dim, keys.page_size)
        options = {
            "sm_scale": rule.scale,
            "logits_soft_cap": rule.logit_cap or None,
            "q_data_type": heads.dtype,
            "kv_data_type": heads.dtype,
        }
        if single:
            wrapper.plan(*tables, *shape, **options)
        else:
            wrapper.plan(self._indptr(new), *tables, *shape, causal=causal, **options)
        return PagedPlan(wrapper, keys.page_size)


class PagedPlan(NamedTuple):
    """One of FlashInfer's two wrappers for keys and values, planned."""

    wrapper: Any
    page_size: int

    def __call__(self, q: torch.Tensor, kv: KV) -> PartialState:
        """As `paged.Planned`."""
        pages = _in_pages(kv.k, self.page_size), _in_pages(kv.v, self.page_size)
        out, lse = self.wrapper.run(q, pages, return_lse=True)
        return PartialState(out, lse * _LN2)


class LatentKernels(Wrappers):
    """Latents (MLA): keys [slots, 1, dim], whose front, v_dim wide, are the values.

    Given in two parts, as SGLang gives them, so that FlashInfer's choice falls on the same kernels.
    """

    backend = "auto"

    def planned(
        self, keys: PagedKeys, new: Sequence[int], rule: Rule, heads: Heads, *, causal: bool
    ) -> LatentPlan:
        """As `paged.Kernels.planned`; ConfigError for a logit cap."""
        from flashinfer.mla import MLAPlanMetadata

        if rule.logit_cap > 0:
            raise ConfigError(
                "FlashInfer's kernels for latents (MLA) have no logit cap, which this model asks "
                "for; leave --smg-stream-context out"
            )
        wrapper = self._take(latent_wrapper)
        wrapper.plan(
            metadata=MLAPlanMetadata.csr(
                qo_indptr=self._indptr(new),
                kv_indptr=self._indptr(keys.pages_each),
                kv_indices=keys.pages,
                kv_len_arr=staged(np.array(keys.lengths, np.int32), self.device),
            ),
            num_heads=heads.query,
            head_dim_ckv=heads.v_dim,
            head_dim_kpe=heads.dim - heads.v_dim,
            page_size=keys.page_size,
            causal=causal,
            sm_scale=rule.scale,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="base2",
        )
        return LatentPlan(wrapper, keys.page_size, heads.v_dim)


class LatentPlan(NamedTuple):
    """FlashInfer's wrapper for latents, planned."""

    wrapper: Any
    page_size: int
    v_dim: int

    def __call__(self, q: torch.Tensor, kv: KV) -> PartialState:
        """As `paged.Planned`; the kernels take latents without a dimension of heads."""
        latents = _in_pages(kv.k.squeeze(1), self.page_size)
        query, keys = ((x[..., : self.v_dim], x[..., self.v_dim :]) for x in (q, latents))
        out, lse = self.wrapper.run(query=query, kv_cache=keys, return_lse=True)
        return PartialState(out, lse * _LN2)


def _in_pages(pool: torch.Tensor, page_size: int) -> torch.Tensor:
    """[slots, ...] as [pages, page_size, ...]; slots may end with half a page."""
    pages = pool.shape[0] // page_size
    return pool[: pages * page_size].view(pages, page_size, *pool.shape[1:])


def prefill_wrapper(workspace: torch.Tensor, backend: str) -> Any:
    """FlashInfer's for several queries a request."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)


def decode_wrapper(workspace: torch.Tensor, backend: str) -> Any:
    """FlashInfer's for one query a request. Its tensor-core path takes any number of query heads a
    KV head; the other one only some."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    return BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=True, backend="fa2"
    )


def latent_wrapper(workspace: torch.Tensor, backend: str) -> Any:
    """FlashInfer's for latents, whatever the number of queries."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    return BatchMLAPagedAttentionWrapper(workspace, backend=backend)
