"""One query a request over keys that lie anywhere in memory, on the CPU: one call a layer.

The kernel reads K and V where they are, in the slots of a pool and in pages of host memory alike:
nothing is gathered first. Its units of work are (request, 256 keys, KV head), so that one long
request, and a batch of short ones, keep all cores busy (split-KV as in FlashDecoding); the query
heads of a KV head are done together, so that each row is read once. Compiled by numba, which SGLang
depends on; the result is cached on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir  # type: ignore[import-untyped] # it has no stubs
from numba import carray, config, get_num_threads, njit, prange, set_num_threads, types
from numba.extending import intrinsic, overload

from smg_sglang.attention.partial import PartialState

#: Keys a unit of work.
CHUNK = 256
#: Rows ahead that are fetched while one is read: a page of 16, after which the next page may be
#: anywhere. Measured at 7,936 keys in 30 layers: pool 42 to 30 ms, host pages 50 to 37.
AHEAD = 16
LINE = 64
#: Query heads a KV head from which matrix products beat this kernel.
MAX_GROUP = 16

_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}
_ELEMENTS = {torch.float32: np.float32, torch.bfloat16: np.uint16}

# All of fastmath but the promise that there are no infinities: an empty state has lse = -inf.
_FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}

Ints = npt.NDArray[np.integer[Any]]


class Piece(NamedTuple):
    """Keys of one request that lie in one memory: its pool, or a mapping of host pages.

    memory: 0 is the pool, others are numbered by the caller. pages: int64, the byte offset from
    which each key's row is counted (zeros in the pool). rows: the key's row from there on.
    """

    memory: int
    pages: npt.NDArray[np.int64]
    rows: Ints


class DecodePlan(NamedTuple):
    """Which keys the row of each request attends to, cut into units; made once a forward pass.

    pages int64, rows int32: where the keys of all requests are, as in `Piece`, one after another.
    requests, begins, ends, memories: int64, for each unit its request, its range of the keys, and
    the memory that they are in; the units of a request are neighbours.
    """

    pages: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    requests: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    memories: npt.NDArray[np.int64]


def in_pool(slots: Ints) -> Piece:
    """Keys in these slots of the pool."""
    return Piece(0, np.zeros(len(slots), np.int64), slots)


def plan_decode(slots: Sequence[Ints], chunk: int = CHUNK) -> DecodePlan:
    """Plan for requests whose keys are in these pool rows, in any order, without duplicates."""
    return plan_pieces([[in_pool(request)] for request in slots], chunk)


def plan_pieces(requests: Sequence[Sequence[Piece]], chunk: int = CHUNK) -> DecodePlan:
    """Plan for requests whose keys lie in several memories, in any order, without duplicates."""
    pieces = [piece for request in requests for piece in request]
    owners = np.repeat(np.arange(len(requests)), [len(request) for request in requests])
    lengths = np.array([len(piece.rows) for piece in pieces], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    counts = -(-lengths // chunk)
    of = np.repeat(np.arange(len(pieces)), counts)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[of] + nth * chunk
    ends = np.minimum(begins + chunk, (starts + lengths)[of])
    memories = np.array([piece.memory for piece in pieces], dtype=np.int64)
    pages = np.concatenate([piece.pages for piece in pieces]) if pieces else np.empty(0, np.int64)
    rows = np.concatenate([piece.rows for piece in pieces]) if pieces else np.empty(0)
    return DecodePlan(
        pages, rows.astype(np.int32, copy=False), owners[of], begins, ends, memories[of]
    )


def supports(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> bool:
    """Whether `attend_slots` takes these; else gather the rows and use `cpu.attend`."""
    group = q.shape[1] // k_pool.shape[1]
    return group <= MAX_GROUP and k_pool.dtype == v_pool.dtype and k_pool.dtype in _DTYPES


def attend_slots(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    logit_cap: float = 0.0,
    memories: Sequence[tuple[int, int]] = (),
) -> PartialState:
    """Attend row r of q [R, q_heads, dim] to the plan's keys of request r.

    k_pool [slots, kv_heads, dim], v_pool [slots, kv_heads, v_dim]: float32 or bfloat16. memories:
    of memory 1 and on the addresses of this layer's K and V in a page at offset 0; their rows are
    as long as the pool's. The output is float32. Uses as many threads as torch; one thread at a
    time may call.
    """
    out = torch.empty(q.shape[0], q.shape[1], v_pool.shape[2])
    lse = torch.empty(q.shape[0], q.shape[1])
    # numba's count is a thread's own; it follows torch's, which follows the rank's cores.
    threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
    if get_num_threads() != threads:
        set_num_threads(threads)
    bases = np.array([(k_pool.data_ptr(), v_pool.data_ptr()), *memories], np.int64)
    _attend(
        q.float().contiguous().numpy(),
        np.empty(0, _ELEMENTS[k_pool.dtype]),
        bases,
        _byte_strides(k_pool),
        _byte_strides(v_pool),
        *plan,
        np.float32(scale),
        np.float32(logit_cap),
        out.numpy(),
        lse.numpy(),
    )
    return PartialState(out, lse)


def _byte_strides(pool: torch.Tensor) -> tuple[int, int, int]:
    """(bytes from row to row, from head to head, number of heads)."""
    size = pool.element_size()
    if pool.stride(2) != 1:
        raise ValueError(f"the elements of a head must be neighbours, strides are {pool.stride()}")
    return pool.stride(0) * size, pool.stride(1) * size, pool.shape[1]


def warm_up(dtype: torch.dtype) -> None:
    """Compile for pools of this dtype, or load from the cache, so that no request waits for it."""
    if dtype in _DTYPES:
        pool = torch.zeros(1, 1, 8, dtype=dtype)
        attend_slots(torch.zeros(1, 1, 8), pool, pool, plan_decode([np.zeros(1, int)]), scale=1.0)


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    """Read an int32 as the float32 with the same bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


def _as_float(x: Any) -> Any:
    """float32 as it is; uint16 holds a bfloat16, which is the upper half of a float32."""
    raise NotImplementedError("only inside numba")


@overload(_as_float, inline="always")
def _as_float_impl(x: Any) -> Any:
    def same(x: Any) -> Any:
        return x

    def widened(x: Any) -> Any:
        return _float_of_bits(np.int32(np.uint32(x) << np.uint32(16)))

    return same if x == types.float32 else widened


@njit(fastmath=_FAST, inline="always")
def _exp(x: Any) -> Any:
    """exp(x) for x <= 0 within 2e-7 relative: 2**i times a polynomial, which LLVM vectorises.

    Minimax coefficients of 2**f on [-0.5, 0.5]. Below -87 the result is under 2e-38, not zero,
    which nothing can notice beside the maximum's 1.
    """
    x = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    i = np.floor(x + np.float32(0.5))
    f = x - i
    p = np.float32(1.5403530393381608e-4)
    p = p * f + np.float32(1.3333558146428443e-3)
    p = p * f + np.float32(9.618129107628477e-3)
    p = p * f + np.float32(5.550410866482158e-2)
    p = p * f + np.float32(2.402265069591007e-1)
    p = p * f + np.float32(6.931471805599453e-1)
    p = p * f + np.float32(1.0)
    return p * _float_of_bits((np.int32(i) + np.int32(127)) << np.int32(23))


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the array `like`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def _fetch_line(typingctx: Any, address: Any) -> Any:
    """Bring the cache line at an address nearer; one that is not mapped does no harm."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        read, keep, data = (ir.Constant(word, value) for value in (0, 3, 1))
        builder.call(fetch, [builder.inttoptr(args[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(fastmath=_FAST, nogil=True, inline="always")
def _fetch(base: Any, pages: Any, rows: Any, row: Any, at: Any, size: Any) -> None:  # noqa: PLR0917
    """Fetch `size` bytes of key `at`, if there is one."""
    if at < rows.shape[0]:
        begin = base + pages[at] + rows[at] * row
        for line in range(0, size, LINE):
            _fetch_line(begin + line)


@njit(fastmath=_FAST, nogil=True, cache=True)
def _unit(  # noqa: PLR0917  # numba
    q: Any,
    like: Any,
    k: Any,
    v: Any,
    k_row: Any,
    v_row: Any,
    pages: Any,
    rows: Any,
    scale: Any,
    cap: Any,
    out: Any,
) -> Any:
    """One unit: q [group, dim] over one KV head of some keys, from addresses `k` and `v` on. Fills
    out [group, v_dim], not normalised; returns (maximum, sum) of each query head."""
    group, dim, keys = q.shape[0], q.shape[1], rows.shape[0]
    scores = np.empty((group, keys), np.float32)
    for i in range(keys):
        _fetch(k, pages, rows, k_row, i + AHEAD, dim * like.itemsize)
        # An array of the row: LLVM does not hoist an address out of the inner loops by itself.
        key = carray(_pointer(k + pages[i] + rows[i] * k_row, like), dim)
        for g in range(group):
            dot = np.float32(0)
            for d in range(dim):
                dot += q[g, d] * _as_float(key[d])
            scores[g, i] = dot * scale
    if cap > 0:
        scores[:] = np.tanh(scores / cap) * cap
    top, total = np.empty(group, np.float32), np.empty(group, np.float32)
    for g in range(group):
        highest = np.float32(-np.inf)
        for i in range(keys):
            highest = max(highest, scores[g, i])
        sum_ = np.float32(0)
        for i in range(keys):
            weight = _exp(scores[g, i] - highest)
            scores[g, i] = weight
            sum_ += weight
        top[g], total[g] = highest, sum_
    acc = np.zeros(out.shape, np.float32)
    v_dim = acc.shape[1]
    for i in range(keys):
        _fetch(v, pages, rows, v_row, i + AHEAD, v_dim * like.itemsize)
        value = carray(_pointer(v + pages[i] + rows[i] * v_row, like), v_dim)
        for g in range(group):
            weight = scores[g, i]
            for d in range(v_dim):
                acc[g, d] += weight * _as_float(value[d])
    out[:] = acc
    return top, total


@njit(fastmath=_FAST, nogil=True, cache=True)
def _merge(rows: Any, outs: Any, tops: Any, totals: Any, out: Any, lse: Any) -> None:  # noqa: PLR0917  # numba
    """Merge the units of each row: under one part in CHUNK of the work, so in one thread."""
    out[:] = 0
    lse[:] = -np.inf
    first = 0
    while first < rows.shape[0]:
        row, end = rows[first], first + 1
        while end < rows.shape[0] and rows[end] == row:
            end += 1
        for h in range(out.shape[1]):
            highest = np.max(tops[first:end, h])
            total = np.float32(0)
            for u in range(first, end):
                weight = np.exp(tops[u, h] - highest)
                total += weight * totals[u, h]
                out[row, h] += weight * outs[u, h]
            out[row, h] /= total
            lse[row, h] = highest + np.log(total)
        first = end


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def _attend(  # noqa: PLR0917  # numba
    q: Any,
    like: Any,
    bases: Any,
    k_strides: Any,
    v_strides: Any,
    pages: Any,
    rows: Any,
    requests: Any,
    begins: Any,
    ends: Any,
    memories: Any,
    scale: Any,
    cap: Any,
    out: Any,
    lse: Any,
) -> None:
    (k_row, k_head, kv_heads), (v_row, v_head, _) = k_strides, v_strides
    units = requests.shape[0]
    group = q.shape[1] // kv_heads
    outs = np.empty((units, q.shape[1], out.shape[2]), np.float32)
    tops, totals = np.empty(outs.shape[:2], np.float32), np.empty(outs.shape[:2], np.float32)
    # The heads of a unit are neighbours, and numba gives a thread neighbours: it reads whole rows.
    for task in prange(units * kv_heads):
        unit, head = task // kv_heads, task % kv_heads
        mine = slice(head * group, (head + 1) * group)
        keys = slice(begins[unit], ends[unit])
        top, total = _unit(
            q[requests[unit], mine].copy(),
            like,
            bases[memories[unit], 0] + head * k_head,
            bases[memories[unit], 1] + head * v_head,
            k_row,
            v_row,
            pages[keys],
            rows[keys],
            scale,
            cap,
            outs[unit, mine],
        )
        tops[unit, mine] = top
        totals[unit, mine] = total
    _merge(requests, outs, tops, totals, out, lse)
