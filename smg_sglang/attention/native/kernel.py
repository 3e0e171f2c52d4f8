"""The C kernel as a `PageAttention`, through ctypes, which lets go of the GIL for each call."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smg_sglang.attention.pages import Int64s, Memory, PageTable, check_call

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class _Job(ctypes.Structure):
    """`smg_job` of pages.c, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q",
                "out",
                "lse",
                "bases",
                "offsets",
                "first_rows",
                "tokens",
                "memories",
                "unit_pages",
                "unit_requests",
                "request_rows",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("requests", "units", "k_row", "k_head", "v_row", "v_head")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("q_heads", "kv_heads", "dim", "v_dim", "dtype", "bfloat16_queries")
        ),
        *((name, ctypes.c_float) for name in ("scale", "logit_cap", "v_scale")),
    )


class NativeAttention:
    """As `pages.PageAttention`.

    Threads are started when a call first needs them, and sleep between calls.
    """

    def __init__(self, library: Path, name: str, threads: int, cores: Sequence[int] = ()) -> None:
        """threads: that compute, the caller's among them. cores: those the others may run on.

        Raises OSError where the library cannot be loaded.
        """
        if threads < 1:
            raise ValueError(f"attention in {threads} threads: one is the least")
        self.name, self.threads = name, threads
        self._library = _loaded(library)
        numbers = (ctypes.c_int32 * len(cores))(*cores)
        self._workers = self._library.smg_workers_new(numbers, len(cores))
        if not self._workers:
            raise MemoryError("no memory for the threads of the attention kernel")
        self._planned: tuple[PageTable, _Job, Int64s] | None = None
        self._end = weakref.finalize(self, self._library.smg_workers_close, self._workers)

    @property
    def started(self) -> int:
        """Threads that were started in this process."""
        return int(self._library.smg_workers_started(self._workers))

    def attend_pages(
        self,
        q: torch.Tensor,
        table: PageTable,
        memories: Sequence[Memory],
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        logit_cap: float = 0.0,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """As `pages.PageAttention.attend_pages`."""
        check_call(q, table, memories, out, lse)
        queries = q.float().contiguous()
        job, bases = self._job_of(table)
        for memory in range(len(bases)):
            bases[memory] = memories[memory][:2]
        job.q, job.out, job.lse = queries.data_ptr(), out.data_ptr(), lse.data_ptr()
        job.q_heads, job.bfloat16_queries = q.shape[1], q.dtype == torch.bfloat16
        job.scale, job.logit_cap, job.v_scale = scale * k_scale, logit_cap, v_scale
        if self._library.smg_attend(self._workers, ctypes.byref(job), self.threads):
            raise MemoryError("no memory for the states of the attention kernel")

    def _job_of(self, table: PageTable) -> tuple[_Job, Int64s]:
        """What is the same for all layers of a table, and room for where its memories begin."""
        if self._planned is None or self._planned[0] is not table:
            bases = np.zeros((len(table.ends), 2), np.int64)
            self._planned = table, _planned_job(table, bases), bases
        return self._planned[1:]

    def read(self, address: int, offsets: Int64s, size: int) -> None:
        """Read `size` bytes at each offset from an address, in as many threads: what the memory
        gives at best, to compare with."""
        begin = offsets.ctypes.data
        self._library.smg_read(self._workers, address, begin, len(offsets), size, self.threads)

    def close(self) -> None:
        """As `pages.PageAttention.close`."""
        self._end()


def _planned_job(table: PageTable, bases: Int64s) -> _Job:
    layout = table.layout
    return _Job(
        bases=bases.ctypes.data,
        offsets=table.offsets.ctypes.data,
        first_rows=table.first_rows.ctypes.data,
        tokens=table.tokens.ctypes.data,
        memories=table.memories.ctypes.data,
        unit_pages=table.units.ctypes.data,
        unit_requests=table.unit_requests.ctypes.data,
        request_rows=table.request_rows.ctypes.data,
        requests=len(table.request_rows) - 1,
        units=len(table.unit_requests),
        k_row=layout.k_row,
        k_head=layout.k_head,
        v_row=layout.v_row,
        v_head=layout.v_head,
        kv_heads=layout.kv_heads,
        dim=layout.dim,
        v_dim=layout.v_dim,
        dtype=DTYPES.index(layout.dtype),
    )


def _loaded(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    workers, size = ctypes.c_void_p, ctypes.c_int64
    library.smg_workers_new.restype = workers
    library.smg_workers_new.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.smg_workers_started.argtypes = [workers]
    library.smg_workers_close.argtypes = [workers]
    library.smg_workers_close.restype = None
    library.smg_attend.argtypes = [workers, ctypes.c_void_p, ctypes.c_int]
    address = ctypes.c_void_p
    library.smg_read.argtypes = [workers, address, address, size, size, ctypes.c_int]
    library.smg_read.restype = ctypes.c_uint64
    return library
