"""Requests whose context is larger than the device's KV pool: old pages in host memory, new ones on
the device.

A *streamed* request computes its prompt chunk by chunk like any other. After a chunk its pages are
copied to host memory and held there, and their device slots are free for the next chunk. Attention
reads what has left the device from host memory. While the request generates, its newest tokens
gather on the device until a few hundred are there; then those leave, too. So a stream needs a chunk
of the device, whatever its length, and host memory for all of its tokens.

On CUDA, where all that is read from host memory crosses a link, the newest pages that host memory
has stay on the device as well, up to a share of a quarter of it.

With several ranks each has its shard of a stream, in host memory of its own. All do the same in the
same step, so what one alone can know (how much host memory has, and whether it took a page) is
agreed on first (`SmgRadixCache.least_of_ranks`).

`docs/ordering.md` has the argument why nobody reads what is not there yet, or writes what is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.engine.paths import page_path, whole_pages
from smg_sglang.engine.streams.limits import SEGMENT_TOKENS, Limits, new_tokens
from smg_sglang.engine.streams.stream import Stream
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.tier.host_pages import Held, pages_of
from smg_sglang.transfer.segments import SegmentRing
from smg_sglang.tree.page_keys import KEY_BYTES

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from smg_sglang.engine.cache.radix_cache import SmgRadixCache
    from smg_sglang.tier.host_tier import HostTier

logger = logging.getLogger(__name__)

#: Set on a request that runs as a stream.
STREAMED = "smg_streamed"

_active: Streams | None = None


def active() -> Streams | None:
    """The streams of this process's worker, for its attention backend; None without any."""
    return _active if _active is not None and len(_active) else None


def of_batch(forward_batch: ForwardBatch) -> list[Stream | None]:
    """For each request of a batch its stream; [] where there are none at all."""
    streams = active()
    if streams is None or not forward_batch.rids:
        return []
    return [streams.by_rid(rid) for rid in forward_batch.rids]


def host_parts(
    streams: list[Stream | None],
) -> tuple[list[int], list[list[HostRun]], HostReader]:
    """For each request the tokens that are not on the device, where they lie in host memory, and
    what reads them there; one request at least is a stream."""
    begins = [stream.resident_from if stream is not None else 0 for stream in streams]
    runs = [stream.runs if stream is not None else [] for stream in streams]
    return begins, runs, next(stream.table.reader for stream in streams if stream is not None)


def activate(streams: Streams) -> None:
    """Make these the process's streams: a worker has one cache."""
    global _active  # noqa: PLW0603  # the backend is built before the cache, and knows no cache
    _active = streams


class Streams:
    """The streamed requests of one worker. Scheduler thread only."""

    def __init__(self, cache: SmgRadixCache, tier: HostTier) -> None:
        self._cache = cache
        self._tier = tier
        self._pages = tier.pages
        self._pages.wait_for_ranks = partial(cache.least_of_ranks, 0)
        self._by_rid: dict[str, Stream] = {}
        layout = tier.layout
        ring = SegmentRing(
            layout,
            tier.device,
            max(1, SEGMENT_TOKENS[tier.device.type] // layout.page_size),
            before_copy=tier.before_copy,
            pins=tier.pins,
        )
        self.reader = HostReader(layout, ring)

    @property
    def page(self) -> int:
        """Tokens a page."""
        return self._tier.layout.page_size

    @property
    def limits(self) -> Limits:
        """What streams may have of the device."""
        device = self._cache.token_to_kv_pool_allocator.size
        return Limits(device, self.page, self._tier.device.type == "cuda")

    def host_tokens(self) -> int:
        """What host memory can hold for every rank. Asks the connection, so once for a decision;
        all ranks enter."""
        (tokens,) = self._cache.least_of_ranks(self._tier.host_tokens())
        return tokens

    def __len__(self) -> int:
        return len(self._by_rid)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._by_rid.values())

    def get(self, req: Any) -> Stream | None:
        stream = self._by_rid.get(req.rid)
        return stream if stream is not None and stream.req is req else None

    def by_rid(self, rid: str) -> Stream | None:
        """The stream of a request that is in a batch."""
        return self._by_rid.get(rid)

    # ---- before a request is admitted ----

    def needs(self, req: Any) -> bool:
        """Whether it runs as a stream: decided when it arrives, once, since SGLang counts on room
        for all others on the device, whatever they generate."""
        return self.get(req) is not None or getattr(req, STREAMED, False)

    def host_room(self) -> int:
        """Tokens of host memory that no stream counts on. All ranks enter."""
        return self.host_tokens() - sum(stream.host_need for stream in self)

    def open(self, req: Any) -> Stream:
        """Hold what host memory has of the request: from now on it is a stream.

        What the device's tree has of it is put into host memory first, where that lacks it: a
        stream does not lock the tree, or it would hold the very slots it needs.
        """
        tokens = whole_pages(req, len(req.full_untruncated_fill_ids), self.page)
        stream = Stream(self, req, self.host_need(req))
        path, hexes = self._keys(req, 0, tokens, None)
        held = self._find(path)
        if pages_of(held) * self.page < req.prefix_len:
            self._pages.release(held)
            slots = self._cache.prefix_device_indices(req)
            on_device = slots.numel() // self.page
            self._tier.spills.spill_now(path[: on_device * KEY_BYTES], slots)
            held = self._find(path)
        pages = pages_of(held)
        stream.held, stream.path = held, path[: pages * KEY_BYTES]
        stream.last_hash = hexes[pages - 1] if pages else None
        stream.resident_from = pages * self.page
        self._by_rid[req.rid] = stream
        return stream

    def _find(self, path: bytes) -> list[Held]:
        """Hold what host memory has of a path on every rank."""
        held = self._pages.find(path)
        (pages,) = self._cache.least_of_ranks(pages_of(held))
        return self._pages.first(held, pages)

    def host_need(self, req: Any) -> int:
        """Tokens of host memory that the request may come to need, in whole pages."""
        return self.limits.paged(len(req.full_untruncated_fill_ids) + new_tokens(req))

    # ---- while it runs ----

    def checkpoint(self, stream: Stream, up_to: int) -> None:
        """Copy the whole pages of the first `up_to` tokens, whose KV is computed, to host memory,
        and free their slots but for the newest ones that may stay (`Limits.resident`).

        Where host memory has no room they stay on the device, and `failure` says why.
        """
        self._keep(stream, up_to)
        if stream.failure is None:
            share = self.limits.resident // max(1, len(self)) // self.page
            self._free_until(stream, (stream.host_pages - share) * self.page)

    def _keep(self, stream: Stream, up_to: int) -> None:
        page, req = self.page, stream.req
        known, first = up_to // page, stream.host_pages
        if known > first:
            path, hexes = self._keys(req, first * page, known * page, stream.last_hash)
            slots = self._row(req)[first * page : known * page].to(torch.int64)
            held: list[Held] = []
            failure = None
            try:
                held = self._pages.keep(stream.path + path, first, slots, stream.shared)
            except MemoryUnavailable as error:
                logger.warning("smg: request %s cannot go on: %s", req.rid, error)
                failure = str(error)
            (kept,) = self._cache.least_of_ranks(failure is None)
            if not kept:
                self._pages.release(held)
                stream.failure = (
                    failure or "another rank could not move pages to host memory; its log says why"
                )
                return
            stream.held += held
            stream.path += path
            stream.last_hash = hexes[-1]
            stream.failure = None

    def _free_until(self, stream: Stream, end: int) -> None:
        if end <= stream.resident_from:
            return
        row = self._row(stream.req)[stream.resident_from : end]
        self._cache.token_to_kv_pool_allocator.free(row.to(torch.int64))
        row.fill_(self.filler)
        stream.resident_from = end
        # SGLang frees a request's slots from here on.
        stream.req.kv.cache_protected_len = end

    def leave_tail(self, stream: Stream, least: int) -> None:
        """Move a generating stream's newest tokens to host memory if there are `least` or more.

        A `least` of one page says that slots are short: then nothing stays on the device that
        host memory has.
        """
        # The KV of the newest token may still be on its way.
        known = stream.req.kv.kv_committed_len - 1
        page = self.page
        if known - stream.host_pages * page >= least:
            stream.req.refresh_fill_ids()
            self.checkpoint(stream, known)
        if least <= page and stream.failure is None:
            self._free_until(stream, stream.host_pages * page)

    @property
    def keep_resident(self) -> bool:
        """Whether there are streams, and they keep some of what host memory has on the device."""
        return len(self) > 0 and self.limits.resident > 0

    def leave_device(self) -> None:
        """Free the slots of all that host memory has, since others wait for them."""
        for stream in self:
            self._free_until(stream, stream.host_pages * self.page)

    def weights_changed(self) -> None:
        """What open streams compute from now on rests on former weights."""
        for stream in self:
            stream.shared = False

    def state(self) -> dict[str, int]:
        """What `/server_info` shows: streams, and tokens of host memory."""
        held = sum(pages_of(stream.held) for stream in self)
        return {
            "streams": len(self),
            "stream_held_tokens": held * self.page,
            "stream_promised_tokens": sum(stream.host_need for stream in self),
            "host_tokens": self._tier.host_tokens(),
        }

    def close(self, req: Any) -> None:
        """The request has left the device, or was refused."""
        stream = self.get(req)
        if stream is not None:
            self._pages.release(stream.held)
            del self._by_rid[req.rid]

    @property
    def filler(self) -> int:
        """A slot of SGLang's padding page, for tokens that have none: the last of it, so that the
        next token begins a page."""
        return self.page - 1

    def prefix_slots(self, stream: Stream) -> torch.Tensor:
        """int64 [prefix]: what stands in the table for a prefix in host memory; what of it is on
        the device, too, keeps its slots."""
        gone, prefix = stream.resident_from, stream.req.prefix_len
        filler = torch.full((gone,), self.filler, dtype=torch.int64, device=self._tier.device)
        if prefix <= gone:
            return filler[:prefix]
        return torch.cat([filler, self._row(stream.req)[gone:prefix].to(torch.int64)])

    def _row(self, req: Any) -> torch.Tensor:
        row: torch.Tensor = self._cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        return row

    def _keys(self, req: Any, begin: int, end: int, parent: str | None) -> tuple[bytes, list[str]]:
        """Page keys of tokens [begin, end), and SGLang's hashes they are made of."""
        return page_path(req, req.full_untruncated_fill_ids[begin:end], self.page, parent)
