"""Decode attention over pages where they lie: the one interface, and what it speaks of.

`native` has a kernel in C for it, and `torch_pages` does the same where there is no compiler;
`page_attention` chooses. Any page size, several memories, several query rows a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from smg_sglang.transfer.layout import DTYPES, PageLayout

#: Tokens a unit of work, about, and units a table. A unit is one thread's, and leaves one state to
#: be merged: a hundredth of what it has read, which long contexts take from memory again.
UNIT_TOKENS = 256
UNITS = 1024
#: Query rows a KV head up to which reading the keys is what takes the time.
MAX_ROWS = 16

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


class RowLayout(NamedTuple):
    """How the rows of a layer lie in every memory. Strides are in bytes, from row to row and from
    head to head; the elements of a head are neighbours."""

    kv_heads: int
    dim: int
    v_dim: int
    dtype: torch.dtype
    k_row: int
    k_head: int
    v_row: int
    v_head: int

    @property
    def k_bytes(self) -> int:
        """From the beginning of a key row to its end."""
        return (self.kv_heads - 1) * self.k_head + self.dim * self.dtype.itemsize

    @property
    def v_bytes(self) -> int:
        return (self.kv_heads - 1) * self.v_head + self.v_dim * self.dtype.itemsize


class PageRun(NamedTuple):
    """Pages of one request in one memory, in any order.

    memory: numbered by the caller. offsets: of each page from the memory's base, in bytes.
    first_rows: its first row, counted from there. tokens: its rows, 0 or more.
    """

    memory: int
    offsets: Int64s
    first_rows: Int64s
    tokens: Int32s


class Memory(NamedTuple):
    """Where a layer's keys and values are in one memory: addresses of offset 0, and how many bytes
    may be read from there on. Whoever calls keeps them readable until the call has returned."""

    k: int
    v: int
    k_bytes: int
    v_bytes: int


@dataclass(frozen=True, eq=False)
class PageTable:
    """Which keys the query rows of each request attend to; made once for all layers of a forward.

    The first four are [pages], of one request after another, as in `PageRun`. units: [units + 1],
    ranges of the pages, none without tokens, and unit_requests: [units] whose they are, in order.
    request_rows: [requests + 1], ranges of the query rows. ends: [memories][2], bytes from the
    base of K and of V that are read.
    """

    layout: RowLayout
    offsets: Int64s
    first_rows: Int64s
    tokens: Int32s
    memories: Int32s
    units: Int64s
    unit_requests: Int32s
    request_rows: Int64s
    ends: Int64s

    @property
    def rows(self) -> int:
        return int(self.request_rows[-1])


class PageAttention(Protocol):
    """Attends to pages in place. One thread at a time; the GIL is not held while it computes."""

    @property
    def name(self) -> str:
        """What computes, for people: `avx512-bf16`, ..., `torch`."""

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
        """Attend q [rows, q_heads, dim] to the table's pages, each row to all of its request's.

        out: float32 [rows, q_heads, v_dim], lse: float32 [rows, q_heads], both contiguous, filled
        as a `PartialState` (zeros and -inf where there are no keys). Scores are scale * k_scale *
        q·k, then cap * tanh(score / cap) where logit_cap > 0; values are times v_scale.

        Raises:
            ValueError: shapes or dtypes do not fit, or a page ends behind its memory; nothing was
                read then.
        """

    def close(self) -> None:
        """End its threads, if it has any. No call may be running."""


# ---- where keys are ----


def pool_rows(k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype | None = None) -> RowLayout:
    """The layout of a pool's k [slots, kv_heads, dim] and v [slots, kv_heads, v_dim].

    dtype: what the elements mean, where the pool stores them as bytes.
    """
    for name, pool in (("k", k), ("v", v)):
        if pool.dim() != 3 or pool.stride(2) != 1:
            raise ValueError(
                f"{name} must be [slots, heads, dim] with neighbouring elements, is "
                f"{tuple(pool.shape)} with strides {pool.stride()}"
            )
    if k.shape[:2] != v.shape[:2] or k.dtype != v.dtype:
        raise ValueError(f"k {k.dtype} {tuple(k.shape)} and v {v.dtype} {tuple(v.shape)} differ")
    size = k.element_size()
    strides = (x.stride(axis) * size for x in (k, v) for axis in (0, 1))
    return RowLayout(k.shape[1], k.shape[2], v.shape[2], dtype or k.dtype, *strides)


def pool_memory(k: torch.Tensor, v: torch.Tensor) -> Memory:
    """All of a layer's pool."""
    return Memory(k.data_ptr(), v.data_ptr(), _extent(k), _extent(v))


def _extent(x: torch.Tensor) -> int:
    if not x.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def page_rows(layout: PageLayout, v_dim: int | None = None) -> RowLayout:
    """The layout of rows in pages of host memory. v_dim: MLA's, whose values are the front of its
    keys and as strided as they are."""
    k, v = layout.parts[0], layout.parts[-1]
    dtype = next(dtype for dtype, name in DTYPES.items() if name == layout.dtype)
    heads = (k.dim * k.itemsize, v.dim * v.itemsize)
    return RowLayout(
        k.heads, k.dim, v_dim or v.dim, dtype, k.row_bytes, heads[0], v.row_bytes, heads[1]
    )


def page_memory(arena: np.ndarray, layout: PageLayout, layer: int) -> Memory:
    """A layer of the pages in a mapping [uint8]; offsets are counted from its beginning."""
    k = layout.part_offset(layer, 0)
    v = layout.part_offset(layer, len(layout.parts) - 1)
    begin = arena.ctypes.data
    return Memory(begin + k, begin + v, arena.nbytes - k, arena.nbytes - v)


def slot_run(slots: npt.NDArray[np.integer], memory: int = 0) -> PageRun:
    """Keys in these slots of a pool, in this order: neighbours are read as one page."""
    numbers: Int64s = slots.astype(np.int64, copy=False)
    begins = np.flatnonzero(np.append(True, np.diff(numbers) != 1))[: len(numbers)]
    tokens = np.diff(begins, append=len(numbers)).astype(np.int32)
    return PageRun(memory, np.zeros(len(begins), np.int64), numbers[begins], tokens)


def page_run(memory: int, offsets: Int64s, page_size: int, tokens: int | None = None) -> PageRun:
    """Pages at these byte offsets. tokens: of all, where the last page is filled in part."""
    sizes = np.full(len(offsets), page_size, np.int32)
    if tokens is not None:
        if not 0 <= len(offsets) * page_size - tokens < max(1, page_size):
            raise ValueError(f"{tokens} tokens do not end in the last of {len(offsets)} pages")
        sizes[-1:] -= len(offsets) * page_size - tokens
    return PageRun(memory, offsets.astype(np.int64), np.zeros(len(offsets), np.int64), sizes)


# ---- the plan ----


def plan_pages(
    requests: Sequence[Sequence[PageRun]],
    layout: RowLayout,
    queries: Sequence[int] | None = None,
    unit_tokens: int | None = None,
) -> PageTable:
    """Plan for requests whose keys are in these pages, without duplicates.

    queries: how many query rows each has; one by default. unit_tokens: tokens a unit.

    Raises:
        ValueError: a page begins before its memory, or has a negative number of rows.
    """
    runs = [run for request in requests for run in request]
    sizes = [len(run.tokens) for run in runs]
    of = np.repeat(np.arange(len(requests)), [len(request) for request in requests])
    owners = np.repeat(of, sizes)
    memories = np.repeat(np.array([run.memory for run in runs], np.int64), sizes)
    offsets, first_rows, tokens = (
        _joined([getattr(run, field) for run in runs])
        for field in ("offsets", "first_rows", "tokens")
    )
    _check_pages(offsets, first_rows, tokens, memories)
    unit_tokens = unit_tokens or max(UNIT_TOKENS, int(tokens.sum()) // UNITS)
    cut = _cut(owners, tokens, unit_tokens)
    owners, offsets, memories = owners[cut.page], offsets[cut.page], memories[cut.page]
    first_rows = first_rows[cut.page] + cut.first
    units, unit_requests = _units(owners, cut.tokens, unit_tokens)
    rows = np.asarray(queries if queries is not None else np.ones(len(requests)), np.int64)
    if len(rows) != len(requests) or (rows < 0).any():
        raise ValueError(f"query rows {rows.tolist()} of {len(requests)} requests")
    return PageTable(
        layout,
        offsets,
        first_rows,
        cut.tokens.astype(np.int32),
        memories.astype(np.int32),
        units,
        unit_requests.astype(np.int32),
        np.concatenate([[0], np.cumsum(rows)]).astype(np.int64),
        _ends(layout, offsets, first_rows + cut.tokens, memories),
    )


def _joined(arrays: list[np.ndarray]) -> Int64s:
    return np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64, copy=False)


def _check_pages(offsets: Int64s, first_rows: Int64s, tokens: Int64s, memories: Int64s) -> None:
    for name, values in (
        ("an offset", offsets),
        ("a first row", first_rows),
        ("a number of tokens", tokens),
        ("a memory", memories),
    ):
        if len(values) and values.min() < 0:
            raise ValueError(f"{name} of a page is negative: {values.min()}")
        if len(values) != len(offsets):
            raise ValueError(f"{len(offsets)} pages have {len(values)} of what is {name} of each")


class _Cut(NamedTuple):
    """Pages in parts: of which page each is, its first row in it, its tokens."""

    page: Int64s
    first: Int64s
    tokens: Int64s


def _before(owners: Int64s, tokens: Int64s) -> Int64s:
    """How many tokens of its request come before each page."""
    before = np.cumsum(tokens) - tokens
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    return before - np.repeat(before[starts], np.diff(starts, append=len(owners)))


def _cut(owners: Int64s, tokens: Int64s, most: int) -> _Cut:
    """In parts that lie in the same `most` tokens of their request, none of them empty.

    So what is summed together does not depend on which keys happen to be neighbours: a prefix that
    came back to other slots gives the same bits.
    """
    begin = _before(owners, tokens)
    parts = np.where(tokens > 0, (begin + tokens - 1) // most - begin // most + 1, 0)
    page = np.repeat(np.arange(len(tokens)), parts)
    nth = np.arange(len(page)) - np.repeat(np.cumsum(parts) - parts, parts)
    window = (begin // most)[page] + nth
    first = np.maximum(begin[page], window * most)
    last = np.minimum((begin + tokens)[page], (window + 1) * most)
    return _Cut(page, first - begin[page], last - first)


def _units(owners: Int64s, tokens: Int64s, most: int) -> tuple[Int64s, Int64s]:
    """(where each unit begins, and the end; whose it is): the pages in the same `most` tokens of
    a request."""
    mine = _before(owners, tokens)
    new = (np.diff(owners, prepend=-1) != 0) | (np.diff(mine // most, prepend=-1) != 0)
    begins = np.flatnonzero(new)
    return np.append(begins, len(owners)).astype(np.int64), owners[begins]


def _ends(layout: RowLayout, offsets: Int64s, rows: Int64s, memories: Int64s) -> Int64s:
    """`rows`: the row behind the last one of each page."""
    ends = np.zeros((int(memories.max(initial=-1)) + 1, 2), np.int64)
    for memory in range(len(ends)):
        mine = memories == memory
        if mine.any():
            before = offsets[mine], rows[mine] - 1
            ends[memory, 0] = (before[0] + before[1] * layout.k_row).max() + layout.k_bytes
            ends[memory, 1] = (before[0] + before[1] * layout.v_row).max() + layout.v_bytes
    return ends


# ---- what every implementation checks ----


def check_call(
    q: torch.Tensor,
    table: PageTable,
    memories: Sequence[Memory],
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Raise ValueError for what `PageAttention.attend_pages` does not take."""
    layout = table.layout
    if layout.dtype not in DTYPES or layout.dtype == torch.uint8:
        raise ValueError(f"keys of {layout.dtype} are not known; say which float8 bytes hold")
    if min(layout.kv_heads, layout.dim, layout.v_dim) < 1:
        raise ValueError(f"keys without heads or elements: {layout}")
    if q.dim() != 3 or q.shape[0] != table.rows or q.shape[2] != layout.dim:
        raise ValueError(f"q is {tuple(q.shape)}, not [{table.rows}, q_heads, {layout.dim}]")
    if q.shape[1] % layout.kv_heads or not q.shape[1] or not q.dtype.is_floating_point:
        raise ValueError(f"{q.shape[1]} query heads ({q.dtype}) over {layout.kv_heads} KV heads")
    _check_result("out", out, (table.rows, q.shape[1], layout.v_dim))
    _check_result("lse", lse, (table.rows, q.shape[1]))
    if len(memories) < len(table.ends):
        raise ValueError(f"pages lie in {len(table.ends)} memories, {len(memories)} are given")
    for number, (memory, (k, v)) in enumerate(zip(memories, table.ends.tolist(), strict=False)):
        if k > memory.k_bytes or v > memory.v_bytes:
            raise ValueError(
                f"a page of memory {number} ends at byte {k} of K and {v} of V, behind its "
                f"{memory.k_bytes} and {memory.v_bytes} bytes"
            )


def _check_result(name: str, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous float32 {shape}, is {x.dtype} {tuple(x.shape)}"
        )
