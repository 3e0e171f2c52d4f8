"""The requests of a batch with one query each, answered by a kernel that reads pages in place.

What `decode` does with numba, for the same requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smg_sglang.attention.native.kernel import DTYPES
from smg_sglang.attention.pages import (
    MAX_ROWS,
    Memory,
    PageAttention,
    PageRun,
    PageTable,
    page_rows,
    plan_pages,
    pool_memory,
    pool_rows,
)
from smg_sglang.attention.partial import PartialState
from smg_sglang.transfer.layout import PageLayout


class PagesPlan:
    """Where the keys of requests are, for all layers of a forward pass.

    The table is made by the first layer, and again by one whose rows lie differently.
    """

    def __init__(
        self,
        kernel: PageAttention,
        requests: Sequence[Sequence[PageRun]],
        host: PageLayout | None = None,
    ) -> None:
        """requests: memory 0 is the pool. host: how pages lie in the others, if there are any."""
        self._kernel, self._requests, self._host = kernel, requests, host
        self._table: PageTable | None = None

    def supports(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> bool:
        """Whether `attend` takes these."""
        group = q.shape[1] // k_pool.shape[1]
        if group > MAX_ROWS or k_pool.dtype != v_pool.dtype or k_pool.dtype not in DTYPES:
            return False
        rows = pool_rows(k_pool, v_pool)
        return self._host is None or page_rows(self._host, rows.v_dim) == rows

    def attend(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        memories: Sequence[Memory],
        *,
        scale: float,
        logit_cap: float,
    ) -> PartialState:
        """Row r of q [R, q_heads, dim] to the keys of request r; out is float32.

        memories: of memory 1 and on.
        """
        layout = pool_rows(k_pool, v_pool)
        if self._table is None or self._table.layout != layout:
            self._table = plan_pages(self._requests, layout)
        out = torch.empty(q.shape[0], q.shape[1], layout.v_dim)
        lse = torch.empty(q.shape[0], q.shape[1])
        everywhere = [pool_memory(k_pool, v_pool), *memories]
        self._kernel.attend_pages(
            q, self._table, everywhere, out, lse, scale=scale, logit_cap=logit_cap
        )
        return PartialState(out, lse)
