"""One query a request over keys that lie anywhere in a paged pool, on the CPU: one call a layer.

The kernel reads K and V where they are: nothing is gathered first. Its units of work are (request,
256 keys, KV head), so that one long request, and a batch of short ones, keep all cores busy
(split-KV as in FlashDecoding); the query heads of a KV head are done together, so that each row is
read once. Compiled by numba, which SGLang depends on; the result is cached on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import config, get_num_threads, njit, prange, set_num_threads, types
from numba.extending import intrinsic, overload

from smg_sglang.attention.partial import PartialState

#: Keys a unit of work.
CHUNK = 256
#: Query heads a KV head from which matrix products beat this kernel.
MAX_GROUP = 16

_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}

# All of fastmath but the promise that there are no infinities: an empty state has lse = -inf.
_FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}


class DecodePlan(NamedTuple):
    """Which keys the row of each request attends to, cut into units; made once a forward pass.

    slots: int32, the pool rows of all requests one after another. rows, begins, ends: int64, for
    each unit its request and its range of `slots`; the units of a request are neighbours.
    """

    slots: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def plan_decode(slots: Sequence[npt.NDArray[np.integer[Any]]], chunk: int = CHUNK) -> DecodePlan:
    """Plan for requests whose keys are in these pool rows, in any order, without duplicates."""
    lengths = np.array([len(request) for request in slots], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    counts = -(-lengths // chunk)
    rows = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[rows] + nth * chunk
    ends = np.minimum(begins + chunk, (starts + lengths)[rows])
    flat = np.concatenate(slots) if len(slots) else np.empty(0)
    return DecodePlan(flat.astype(np.int32, copy=False), rows, begins, ends)


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
) -> PartialState:
    """Attend row r of q [R, q_heads, dim] to the plan's keys of request r.

    k_pool [slots, kv_heads, dim], v_pool [slots, kv_heads, v_dim]: float32 or bfloat16. The
    output is float32. Uses as many threads as torch; one thread at a time may call.
    """
    out = torch.empty(q.shape[0], q.shape[1], v_pool.shape[2])
    lse = torch.empty(q.shape[0], q.shape[1])
    # numba's count is a thread's own; it follows torch's, which follows the rank's cores.
    threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
    if get_num_threads() != threads:
        set_num_threads(threads)
    _attend(
        q.float().contiguous().numpy(),
        k_pool.view(_DTYPES[k_pool.dtype]).numpy(),
        v_pool.view(_DTYPES[v_pool.dtype]).numpy(),
        *plan,
        np.float32(scale),
        np.float32(logit_cap),
        out.numpy(),
        lse.numpy(),
    )
    return PartialState(out, lse)


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


@njit(fastmath=_FAST, nogil=True, cache=True)
def _unit(q: Any, k: Any, v: Any, head: int, slots: Any, scale: Any, cap: Any, out: Any) -> Any:  # noqa: PLR0917  # numba
    """One unit: q [group, dim] over one KV head of `slots`. Fills out [group, v_dim], not
    normalised; returns (maximum, sum) of each query head."""
    group, keys = q.shape[0], slots.shape[0]
    scores = np.empty((group, keys), np.float32)
    for i in range(keys):
        # Held in locals: LLVM does not hoist array reads out of the inner loops, four times slower.
        slot = slots[i]
        for g in range(group):
            dot = np.float32(0)
            for d in range(q.shape[1]):
                dot += q[g, d] * _as_float(k[slot, head, d])
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
    for i in range(keys):
        slot = slots[i]
        for g in range(group):
            weight = scores[g, i]
            for d in range(acc.shape[1]):
                acc[g, d] += weight * _as_float(v[slot, head, d])
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
    k: Any,
    v: Any,
    slots: Any,
    rows: Any,
    begins: Any,
    ends: Any,
    scale: Any,
    cap: Any,
    out: Any,
    lse: Any,
) -> None:
    units, kv_heads = rows.shape[0], k.shape[1]
    group = q.shape[1] // kv_heads
    outs = np.empty((units, q.shape[1], v.shape[2]), np.float32)
    tops, totals = np.empty(outs.shape[:2], np.float32), np.empty(outs.shape[:2], np.float32)
    # The heads of a unit are neighbours, and numba gives a thread neighbours: it reads whole rows.
    for task in prange(units * kv_heads):
        unit, head = task // kv_heads, task % kv_heads
        mine = slice(head * group, (head + 1) * group)
        keys = slots[begins[unit] : ends[unit]]
        top, total = _unit(
            q[rows[unit], mine].copy(), k, v, head, keys, scale, cap, outs[unit, mine]
        )
        tops[unit, mine] = top
        totals[unit, mine] = total
    _merge(rows, outs, tops, totals, out, lse)
