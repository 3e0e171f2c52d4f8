"""FlashInfer's paged wrappers: partial attention over page tables, on CUDA.

FlashInfer has bf16 and fp16 kernels only. Its log-sum-exps are base 2; here all are natural. MLA
has one latent instead of keys and values, which these wrappers do not take.

Checked against FlashInfer's signatures and, with its kernels replaced by float64 references, on a
CPU. Has not run on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.partial import PartialState
from smg_sglang.errors import ConfigError

DTYPES = (torch.bfloat16, torch.float16)
#: FlashInfer's own recommendation.
WORKSPACE_BYTES = 128 << 20
_LN2 = math.log(2)


class Wrapper(Protocol):
    """What is used of FlashInfer's two paged wrappers."""

    def plan(self, *args: Any, **kwargs: Any) -> None: ...

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class PagedKeys(NamedTuple):
    """The page tables of R requests: `indptr` int32 [R + 1] and `last` int32 [R] on the CPU (so
    that no plan waits for the device), `pages` int32 [indptr[-1]] on the device, and tokens a page.
    """

    indptr: torch.Tensor
    pages: torch.Tensor
    last: torch.Tensor
    page_size: int


class Heads(NamedTuple):
    """What a layer's kernels are compiled for. dtype: of queries, keys and values."""

    query: int
    kv: int
    dim: int
    dtype: torch.dtype


def one_slot_pages(slots: torch.Tensor, lengths: Sequence[int]) -> PagedKeys:
    """Page tables whose pages are single slots, as SGLang gives them to FlashInfer.

    slots: int32 [sum of lengths] on the device, of one request after another.
    """
    return PagedKeys(_indptr(lengths), slots, torch.ones(len(lengths), dtype=torch.int32), 1)


def whole_pages(pages: int, page_size: int, device: torch.device) -> PagedKeys:
    """The page table of one request in the first pages of a buffer, in their order."""
    table = torch.arange(pages, dtype=torch.int32, device=device)
    last = torch.tensor([page_size], dtype=torch.int32)
    return PagedKeys(_indptr([pages]), table, last, page_size)


class Wrappers:
    """FlashInfer's wrappers for one device, and their plans. One thread, one forward at a time.

    A plan is copied to the device from page-locked memory of its wrapper, so a wrapper may be
    planned again only when the device is through with the former plan. The CPU may be one forward
    ahead: forwards take turns with two sets of wrappers, and a set is used again after the event
    at the end of the forward that used it last.
    """

    def __init__(
        self,
        device: torch.device,
        workspace: torch.Tensor | None = None,
        backend: str = "fa2",
    ) -> None:
        """
        Args:
            workspace: uint8, used by one kernel at a time on the stream of the forward; SGLang's
                own will do.
            backend: FlashInfer's, for several queries a request. SGLang takes fa2 too.
        """
        if workspace is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.device = device
        self._workspace, self._backend = workspace, backend
        self._sets: list[dict[bool, list[Wrapper]]] = [{True: [], False: []} for _ in range(2)]
        self._ends: list[Any] = [None, None]
        self._taken = {True: 0, False: 0}
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
        self._taken = {True: 0, False: 0}

    def planned(
        self, keys: PagedKeys, new: Sequence[int], rule: Rule, heads: Heads, *, causal: bool
    ) -> Wrapper:
        """A wrapper, planned for requests with these keys and so many queries each.

        causal: the queries are the last of the keys. Valid until the forward after the next.
        """
        single = all(count == 1 for count in new)
        wrapper = self._wrapper(single)
        tables = (keys.indptr, keys.pages, keys.last)
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
            wrapper.plan(_indptr(new), *tables, *shape, causal=causal, **options)
        return wrapper

    def _wrapper(self, single: bool) -> Wrapper:
        wrappers, taken = self._sets[self._turn][single], self._taken[single]
        self._taken[single] += 1
        if taken == len(wrappers):
            make = decode_wrapper if single else prefill_wrapper
            wrappers.append(make(self._workspace, self._backend))
        return wrappers[taken]


def run(wrapper: Wrapper, q: torch.Tensor, kv: KV, page_size: int) -> PartialState:
    """Attend q [N, q_heads, dim] to the planned pages of K and V [slots, kv_heads, dim].

    The output has the queries' dtype. Enqueued on the current stream.
    """
    # A pool's slots may end with half a page.
    pages = kv.k.shape[0] // page_size
    k, v = (x[: pages * page_size].view(pages, page_size, *x.shape[1:]) for x in kv)
    out, lse = wrapper.run(q, (k, v), return_lse=True)
    return PartialState(out, lse * _LN2)


def prefill_wrapper(workspace: torch.Tensor, backend: str) -> Wrapper:
    """FlashInfer's for several queries a request."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    made: Wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
    return made


def decode_wrapper(workspace: torch.Tensor, backend: str) -> Wrapper:
    """FlashInfer's for one query a request. Its tensor-core path takes any number of query heads a
    KV head; the other one only some."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    made: Wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=True, backend="fa2"
    )
    return made


def check_dtypes(queries: torch.dtype, keys: torch.dtype) -> None:
    """Raise ConfigError for what FlashInfer has no kernels for here."""
    if queries not in DTYPES or keys != queries:
        names = (str(dtype).removeprefix("torch.") for dtype in (queries, keys))
        raise ConfigError(
            "contexts are streamed from host memory on CUDA in bfloat16 or float16, queries and KV "
            "alike, not {} over {}: choose with --dtype and --kv-cache-dtype auto, or leave "
            "--smg-stream-context out".format(*names)
        )


def heads_of(q: torch.Tensor, pool: KV) -> Heads:
    """What the kernels are compiled for; ConfigError for what FlashInfer does not have."""
    check_dtypes(q.dtype, pool.k.dtype)
    if pool.v.shape != pool.k.shape:
        raise ConfigError(
            f"values of width {pool.v.shape[2]} beside keys of width {pool.k.shape[2]} (MLA) "
            "cannot be streamed from host memory on CUDA yet; leave --smg-stream-context out"
        )
    return Heads(q.shape[1], pool.k.shape[1], pool.k.shape[2], q.dtype)


def _indptr(lengths: Sequence[int]) -> torch.Tensor:
    ends = np.cumsum(np.asarray(lengths, np.int32), dtype=np.int32)
    return torch.from_numpy(np.concatenate([np.zeros(1, np.int32), ends]))
