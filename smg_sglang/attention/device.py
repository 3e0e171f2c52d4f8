"""Attention of a batch of requests over a paged pool and host pages, on CUDA.

The notions are those of `batch`: a pool is [slots, kv_heads, dim], a request is a row of pool
slots, of which the last few are queried, and what comes before them may lie in host memory. Planned
once a forward pass, run once a layer. What is on the device is attended in one launch for all
requests, causal for their new tokens; then, for one streamed request after another, its host pages
as they land in the ring, all of which come before its queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.attention.paged import (
    Heads,
    Kernels,
    PagedKeys,
    Planned,
    heads_of,
    staged,
    whole_pages,
)
from smg_sglang.attention.partial import PartialState, merge


@dataclass(frozen=True)
class Streamed:
    """Rows [begin, end) of the queries, whose request has these runs in host memory."""

    begin: int
    end: int
    runs: Sequence[HostRun]


@dataclass
class DevicePlan:
    """What the layers of a forward pass share.

    new: queries of each request. keys: those on the device. host: gets at what `streamed` has in
    host memory. planned: what was planned, by what for.
    """

    new: Sequence[int]
    keys: PagedKeys
    streamed: list[Streamed]
    host: HostReader | None
    planned: dict[object, Planned] = field(default_factory=dict)


def slots_of(
    table: torch.Tensor, rows: torch.Tensor, begins: Sequence[int], ends: Sequence[int]
) -> torch.Tensor:
    """int32 [sum of ends - begins]: entries [begin, end) of each row, one after another.

    table: integer [rows, width] on the device, rows: integer [R] on the device. Copies what it
    reads on the current stream, and does not wait for the device.
    """
    first = np.asarray(begins, np.int64)
    lengths = np.asarray(ends, np.int64) - first
    shift = first - (np.cumsum(lengths) - lengths)
    plan = staged(np.stack([lengths, shift]), table.device).to(table.device, non_blocking=True)
    total = int(lengths.sum())
    owner = torch.repeat_interleave(plan[0], output_size=total)
    columns = torch.arange(total, device=table.device) + plan[1][owner]
    return table[rows[owner], columns].to(torch.int32)


def joined(runs: Sequence[HostRun]) -> list[HostRun]:
    """The same keys in as few runs as possible: fewer segments, and fewer shapes to plan for."""
    groups: list[list[HostRun]] = []
    for run in runs:
        if groups and groups[-1][0].arena is run.arena:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [
        HostRun(group[0].arena, np.concatenate([run.offsets for run in group]), group[0].page_size)
        for group in groups
    ]


class DeviceAttention:
    """Plans and runs batches. One thread, one forward at a time."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def plan(
        self,
        keys: PagedKeys,
        new: Sequence[int],
        host: Sequence[Sequence[HostRun]] | None = None,
        reader: HostReader | None = None,
    ) -> DevicePlan:
        """Plan for requests with these keys on the device, the last `new` of each queried.

        host: for each request what comes before, in host memory; `reader` gets at it.
        """
        self._kernels.begin()
        if reader is not None:
            reader.begin()
        ends = np.cumsum(np.asarray(new, np.int64)).tolist()
        streamed = [
            Streamed(end - count, end, joined(runs))
            for end, count, runs in zip(ends, new, host or [()] * len(ends), strict=True)
            if runs and count
        ]
        return DevicePlan(new, keys, streamed, reader if streamed else None)

    def attend(  # noqa: PLR0917  # as `batch.attend_pool`
        self,
        q: torch.Tensor,
        pool: KV,
        plan: DevicePlan,
        rule: Rule,
        out: torch.Tensor,
        layer: int = 0,
    ) -> None:
        """Fill out [N, q_heads, v_dim] with the attention of q [N, q_heads, dim], contiguous, over
        the pool.

        The pool already holds the new tokens. All is of one dtype. Layers are numbered as in the
        pages of host memory. Work is enqueued on the current stream.
        """
        heads = heads_of(q, pool)
        if plan.host is not None:
            # First, so that copies run while the device's own keys are attended.
            plan.host.stream([request.runs for request in plan.streamed])
            plan.host.start_layer(layer)
        state = self._on_device(q, pool, plan, rule, heads)
        out.copy_(state.out)
        for request in plan.streamed:
            mine = slice(request.begin, request.end)
            before = PartialState(state.out[mine].float(), state.lse[mine].contiguous())
            out[mine] = self._with_host(request, q[mine], before, plan, rule, heads).out

    def _on_device(
        self, q: torch.Tensor, pool: KV, plan: DevicePlan, rule: Rule, heads: Heads
    ) -> PartialState:
        key = ("device", rule, heads)
        if key not in plan.planned:
            plan.planned[key] = self._kernels.planned(
                plan.keys, plan.new, rule, heads, causal=rule.causal
            )
        return plan.planned[key](q, pool)

    def _with_host(  # noqa: PLR0917
        self,
        request: Streamed,
        q: torch.Tensor,
        state: PartialState,
        plan: DevicePlan,
        rule: Rule,
        heads: Heads,
    ) -> PartialState:
        """Merge the state over the device's keys with those over each host segment."""
        assert plan.host is not None
        page_size = plan.host.layout.page_size
        for parts in plan.host.segments(request.runs):
            pages = parts[0].shape[0] // page_size
            key = ("host", pages, len(q), rule, heads)
            if key not in plan.planned:
                segment = whole_pages(pages, page_size, self._kernels.device)
                plan.planned[key] = self._kernels.planned(
                    segment, [len(q)], rule, heads, causal=False
                )
            # MLA has one part: its values are the front of its keys.
            v = parts[1] if len(parts) > 1 else parts[0][..., : heads.v_dim]
            state = merge_into(state, plan.planned[key](q, KV(parts[0], v)))
        return state


def merge_into(state: PartialState, other: PartialState) -> PartialState:
    """`merge` with a float32 state that the caller does not use any more."""
    if not state.out.is_cuda:
        return merge(state, other)
    from smg_sglang.attention.triton_merge import merge_in_place

    merge_in_place(state.out, state.lse, other.out.contiguous(), other.lse.contiguous())
    return state
