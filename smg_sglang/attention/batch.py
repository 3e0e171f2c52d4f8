"""Attention of a batch of requests over a paged pool, on the CPU.

A pool is [slots, kv_heads, dim]; a request is a row of pool slots, in the order of its tokens, of
which the last few are queried. What comes before may lie in host memory: one query reads it in
place, several read it segment by segment, merged as the segments come. Planned once a forward pass,
run once a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smg_sglang.attention import cpu, decode, windows
from smg_sglang.attention.decode_pages import PagesPlan
from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.attention.pages import PageAttention, PageRun, slot_run
from smg_sglang.attention.partial import PartialState, merge


class KV(NamedTuple):
    """Keys [tokens or slots, kv_heads, dim] and values [the same, kv_heads, v_dim]."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def latent(self) -> bool:
        """Whether the values are the front of the keys (MLA)."""
        return self.v.data_ptr() == self.k.data_ptr()


@dataclass(frozen=True)
class Rule:
    """How a layer attends: scores are scale * q·k, then cap * tanh(score / cap) where cap > 0.

    window: how many keys before itself a query sees, all where it is None. (Plans for windows hold
    no keys that no query sees.)
    """

    scale: float
    causal: bool = True
    logit_cap: float = 0.0
    window: int | None = None


@dataclass
class Request:
    """One request: rows [begin, end) of the queries are its last positions.

    slots: integer tensor [length], those of its tokens that are in the pool; the queried ones are
    among them. host: what comes before, in host memory. first: its first slot where they are
    consecutive, else None. mask: the causal mask, built by the first layer for the others.
    """

    begin: int
    end: int
    slots: torch.Tensor
    host: Sequence[HostRun] = ()
    first: int | None = None
    mask: torch.Tensor | None = None

    @property
    def all_new(self) -> bool:
        """Whether no position was computed before."""
        return self.end - self.begin == len(self.slots) and not self.host

    def rows_of(self, pool: torch.Tensor) -> torch.Tensor:
        """Its rows of a pool: a view where they are consecutive, else a copy."""
        if self.first is not None:
            return pool.narrow(0, self.first, len(self.slots))
        return pool.index_select(0, self.slots)


@dataclass(frozen=True)
class BatchPlan:
    """What the layers of a forward pass share.

    single: the requests with one query, which are answered together; `decode` plans them, in this
    order, and single_rows holds their query rows, None where those are all rows in order.
    longer: the others that have any query. host: reads what lies in host memory, where any does.
    """

    single: list[Request]
    longer: list[Request]
    single_rows: torch.Tensor | None
    decode: decode.DecodePlan | PagesPlan
    host: HostReader | None = None


def plan_batch(
    slots: Sequence[torch.Tensor],
    new: Sequence[int],
    host: Sequence[Sequence[HostRun]] | None = None,
    reader: HostReader | None = None,
    kernel: PageAttention | None = None,
) -> BatchPlan:
    """Plan for requests whose tokens are in these slots, the last `new` of each queried.

    host: for each request what comes before its slots, in host memory; `reader` gets at it.
    kernel: answers the requests with one query; numba does without one.
    """
    ends = np.cumsum(np.asarray(new, dtype=np.int64)).tolist()
    host = host or [()] * len(slots)
    requests = [
        Request(end - count, end, row, before)
        for row, count, end, before in zip(slots, new, ends, host, strict=True)
    ]
    single = [request for request in requests if request.end - request.begin == 1]
    longer = [request for request in requests if request.end - request.begin > 1]
    for request in longer:
        request.first = _first_of_run(request.slots.numpy())
    if reader is not None:
        reader.begin()
    rows = torch.tensor([request.begin for request in single], dtype=torch.int64)
    plan: decode.DecodePlan | PagesPlan
    if kernel is None:
        plan = decode.plan_pieces([_pieces(request, reader) for request in single])
    else:
        runs = [_page_runs(request, reader) for request in single]
        plan = PagesPlan(kernel, runs, reader.layout if reader is not None else None)
    return BatchPlan(single, longer, rows if longer else None, plan, reader)


def _pieces(request: Request, reader: HostReader | None) -> list[decode.Piece]:
    on_device = [decode.in_pool(request.slots.numpy())]
    return on_device + reader.pieces(request.host) if reader and request.host else on_device


def _page_runs(request: Request, reader: HostReader | None) -> list[PageRun]:
    on_device = [slot_run(request.slots.numpy())]
    return on_device + reader.page_runs(request.host) if reader and request.host else on_device


def _first_of_run(slots: npt.NDArray[np.integer]) -> int | None:
    if slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
        return int(slots[0])
    return None


def attend_pool(  # noqa: PLR0917  # called once a layer, by one caller
    q: torch.Tensor, pool: KV, plan: BatchPlan, rule: Rule, out: torch.Tensor, layer: int = 0
) -> None:
    """Fill out [N, q_heads, v_dim] with the attention of q [N, q_heads, dim] over the pool.

    The pool already holds the new tokens. Its dtype may differ from the queries': what is read is
    converted then. Layers are numbered as in the pages of host memory.
    """
    supports = plan.decode.supports if isinstance(plan.decode, PagesPlan) else decode.supports
    in_place = supports(q, pool.k, pool.v)
    gathered = plan.longer if in_place else plan.single + plan.longer
    if plan.host is not None:
        plan.host.stream([request.host for request in gathered if request.host])
        plan.host.start_layer(layer)
    if in_place and plan.single:
        _attend_single(q, pool, plan, rule, out, layer)
    for request in gathered:
        _attend_one(request, q, _read(request, pool, q.dtype), rule, out, plan.host)


def attend_new(q: torch.Tensor, new: KV, plan: BatchPlan, rule: Rule, out: torch.Tensor) -> None:
    """Fill out where no request has a prefix: `new` [N, ...] holds all keys and values."""
    for request in plan.single + plan.longer:
        mine = slice(request.begin, request.end)
        _attend_one(request, q, KV(new.k[mine], new.v[mine]), rule, out)


def _attend_one(  # noqa: PLR0917
    request: Request,
    q: torch.Tensor,
    kv: KV,
    rule: Rule,
    out: torch.Tensor,
    host: HostReader | None = None,
) -> None:
    mine = slice(request.begin, request.end)
    if rule.window is not None:
        state = windows.attend(q[mine], kv.k, kv.v, scale=rule.scale, window=rule.window)
        out[mine] = state.out
        return
    new, keys = request.end - request.begin, kv.k.shape[0]
    if rule.causal and request.mask is None and 1 < new < keys and new <= cpu.MASKED_QUERIES:
        request.mask = cpu.causal_mask(new, keys, q.shape[1] // kv.k.shape[1], q.dtype)
    state = cpu.attend(
        q[mine],
        kv.k,
        kv.v,
        scale=rule.scale,
        causal=rule.causal,
        logit_cap=rule.logit_cap,
        mask=request.mask,
    )
    if request.host:
        assert host is not None
        state = _attend_host(request.host, q[mine], kv.v.shape[2], rule, state, host)
    out[mine] = state.out


def _attend_host(  # noqa: PLR0917
    runs: Sequence[HostRun],
    q: torch.Tensor,
    v_dim: int,
    rule: Rule,
    state: PartialState,
    host: HostReader,
) -> PartialState:
    """Merge the state over the device's keys with those over each host segment, as it lands."""
    # In float32, or each merge would round.
    state = PartialState(state.out.float(), state.lse)
    for parts in host.segments(runs):
        k = parts[0].to(q.dtype)
        # MLA has one part: its values are the front of its keys.
        v = parts[1].to(q.dtype) if len(parts) > 1 else k[..., :v_dim]
        before = cpu.attend(q, k, v, scale=rule.scale, causal=False, logit_cap=rule.logit_cap)
        state = merge(state, before)
    return state


def _attend_single(  # noqa: PLR0917
    q: torch.Tensor, pool: KV, plan: BatchPlan, rule: Rule, out: torch.Tensor, layer: int
) -> None:
    """Requests with one query: it sees every key, so causal or not is the same."""
    rows = slice(len(plan.single)) if plan.single_rows is None else plan.single_rows
    how = {"scale": rule.scale, "logit_cap": rule.logit_cap}
    if isinstance(plan.decode, PagesPlan):
        memories = plan.host.page_memories(layer) if plan.host is not None else ()
        state = plan.decode.attend(q[rows], pool.k, pool.v, memories, **how)
    else:
        bases = plan.host.memories(layer) if plan.host is not None else ()
        state = decode.attend_slots(q[rows], pool.k, pool.v, plan.decode, memories=bases, **how)
    out[rows] = state.out.to(out.dtype)


def _read(request: Request, pool: KV, dtype: torch.dtype) -> KV:
    """The request's keys and values; MLA's values stay a view of the keys they are part of."""
    k = request.rows_of(pool.k).to(dtype)
    if pool.latent:
        return KV(k, k[..., : pool.v.shape[2]])
    return KV(k, request.rows_of(pool.v).to(dtype))
