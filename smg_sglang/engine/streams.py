"""Requests whose context is larger than the device's KV pool: old pages in host memory, new ones on
the device.

A *streamed* request computes its prompt chunk by chunk like any other. After a chunk its pages are
copied to host memory and held there, and their device slots are free for the next chunk. Attention
reads what has left the device from host memory. While the request generates, its newest tokens
gather on the device until a few hundred are there; then those leave, too. So a stream needs a chunk
of the device, whatever its length, and host memory for all of its tokens.

**Order.** A slot is freed after its bytes are in host memory: `keep` returns when the copy is done,
and the copy comes after the forward that wrote the slot (on a CPU that has returned; on a GPU
the mover's fence). A host page is read while `Stream.held` holds it, and it is not written: pages
are published once. A staging buffer is refilled after the attention that read it has returned. All
of this happens on the scheduler thread, but for the ring's own copies, which attention waits for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.engine.host_pages import Held
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.transfer.segments import SegmentRing
from smg_sglang.tree.page_keys import KEY_BYTES, keys_from_hex

if TYPE_CHECKING:
    from smg_sglang.engine.cache import SmgRadixCache
    from smg_sglang.engine.host_tier import HostTier

logger = logging.getLogger(__name__)

_active: Streams | None = None


def active() -> Streams | None:
    """The streams of this process's worker, for its attention backend; None without any."""
    return _active if _active is not None and len(_active) else None


def activate(streams: Streams) -> None:
    """Make these the process's streams: a worker has one cache."""
    global _active  # noqa: PLW0603  # the backend is built before the cache, and knows no cache
    _active = streams


#: Tokens of a staging buffer. Large enough that merging partial states costs little beside
#: attending (measured on a CPU: `docs/contexts.md`).
SEGMENT_TOKENS = 2048
#: The newest tokens of a stream that stay on the device while it generates, at most.
TAIL_TOKENS = 512


@dataclass(eq=False)
class Stream:
    """One streamed request.

    Attributes:
        table: the streams it is one of.
        path: page keys of its pages in host memory, from the root.
        last_hash: SGLang's hex hash of the last of them.
        held: those pages, in order.
        resident_from: tokens before this have no device slots any more.
        host_need: tokens of host memory that it may come to need.
    """

    table: Streams
    req: Any
    host_need: int
    path: bytes = b""
    last_hash: str | None = None
    held: list[Held] = field(default_factory=list)
    resident_from: int = 0
    failure: str | None = None

    @property
    def host_pages(self) -> int:
        return len(self.path) // KEY_BYTES

    @property
    def runs(self) -> list[HostRun]:
        """What attention reads from host memory: exactly the tokens before `resident_from`."""
        runs, missing = [], self.resident_from
        for part in self.held:
            pages = min(part.num_pages, missing // part.run.page_size)
            if pages == part.num_pages:
                runs.append(part.run)
            elif pages:
                runs.append(HostRun(part.run.arena, part.run.offsets[:pages], part.run.page_size))
            missing -= pages * part.run.page_size
        return runs


@dataclass(frozen=True)
class Limits:
    """All in tokens.

    Attributes:
        device: the device pool.
        host: host memory of this worker's namespace, if it had all of it.
        page: tokens a page.
    """

    device: int
    host: int
    page: int

    @property
    def chunk(self) -> int:
        """The most that a stream computes at once: others keep half of the device."""
        return max(self.page, self.device // 2 // self.page * self.page)

    @property
    def tail(self) -> int:
        """The most that a generating stream keeps on the device."""
        return max(self.page, min(TAIL_TOKENS, self.device // 16) // self.page * self.page)

    def paged(self, tokens: int) -> int:
        return -(-tokens // self.page) * self.page

    def needs_stream(self, tokens: int, new: int) -> bool:
        """Whether a request of so many known tokens and `new` to come is too large for the device.

        Answers are seldom as long as they may be, so only an eighth of the pool counts for them;
        SGLang clips what a request may generate to what is left.
        """
        return self.paged(tokens) + min(new, self.device // 8) + self.page + 1 > self.device


class Streams:
    """The streamed requests of one worker. Scheduler thread only."""

    def __init__(self, cache: SmgRadixCache, tier: HostTier) -> None:
        self._cache = cache
        self._tier = tier
        self._pages = tier.pages
        self._by_rid: dict[str, Stream] = {}
        layout = tier.layout
        ring = SegmentRing(
            layout,
            tier.device,
            max(1, SEGMENT_TOKENS // layout.page_size),
            before_copy=tier.before_copy,
        )
        self.reader = HostReader(layout, ring)
        self._ring = ring

    @property
    def limits(self) -> Limits:
        """As they are now: a memory server that is away has no room."""
        device = self._cache.token_to_kv_pool_allocator.size
        return Limits(device, self._tier.host_tokens(), self._tier.layout.page_size)

    def __len__(self) -> int:
        return len(self._by_rid)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._by_rid.values())

    def get(self, req: Any) -> Stream | None:
        stream = self._by_rid.get(req.rid)
        return stream if stream is not None and stream.req is req else None

    def by_row(self) -> dict[int, Stream]:
        """Streams by their row of the request-to-token table."""
        return {s.req.kv.req_pool_idx: s for s in self if s.req.kv.req_pool_idx is not None}

    # ---- before a request is admitted ----

    def needs(self, req: Any) -> bool:
        """Whether it runs as a stream, if it runs."""
        return self.get(req) is not None or self.limits.needs_stream(
            len(req.full_untruncated_fill_ids or req.origin_input_ids), new_tokens(req)
        )

    def new_tokens_limit(self, req: Any) -> int:
        """Tokens it may generate as a stream; below 1 where host memory has no room for that."""
        return self.limits.host - self.limits.paged(len(req.origin_input_ids)) - self.limits.page

    def host_room(self) -> int:
        """Tokens of host memory that no stream counts on."""
        return self.limits.host - sum(stream.host_need for stream in self)

    def open(self, req: Any) -> Stream:
        """Hold what host memory has of the request: from now on it is a stream.

        What the device's tree has of it is put into host memory first, where that lacks it: a
        stream does not lock the tree, or it would hold the very slots it needs.
        """
        limit = req._compute_max_prefix_len(len(req.full_untruncated_fill_ids))
        tokens = max(0, limit) // self.limits.page * self.limits.page
        stream = Stream(self, req, self.host_need(req))
        path, hexes = self._keys(req, 0, tokens, None)
        held = self._pages.find(path)
        if sum(part.num_pages for part in held) * self.limits.page < req.prefix_len:
            self._pages.release(held)
            slots = self._cache.prefix_device_indices(req)
            on_device = slots.numel() // self.limits.page
            self._tier.spill_now(path[: on_device * KEY_BYTES], slots)
            held = self._pages.find(path)
        pages = sum(part.num_pages for part in held)
        stream.held, stream.path = held, path[: pages * KEY_BYTES]
        stream.last_hash = hexes[pages - 1] if pages else None
        stream.resident_from = pages * self.limits.page
        self._by_rid[req.rid] = stream
        return stream

    def host_need(self, req: Any) -> int:
        """Tokens of host memory that the request may come to need, in whole pages."""
        return self.limits.paged(len(req.full_untruncated_fill_ids) + new_tokens(req))

    # ---- while it runs ----

    def checkpoint(self, stream: Stream, up_to: int) -> None:
        """Move the whole pages of the first `up_to` tokens, whose KV is computed, to host memory.

        Where host memory has no room they stay on the device, and `failure` says why.
        """
        page, req = self.limits.page, stream.req
        known, first = up_to // page, stream.host_pages
        if known > first:
            path, hexes = self._keys(req, first * page, known * page, stream.last_hash)
            slots = self._row(req)[first * page : known * page].to(torch.int64)
            try:
                held = self._pages.keep(stream.path + path, first, slots)
            except MemoryUnavailable as error:
                logger.warning("smg: request %s cannot go on: %s", req.rid, error)
                stream.failure = str(error)
                return
            stream.held += held
            stream.path += path
            stream.last_hash = hexes[-1]
        self._free_until(stream, stream.host_pages * page)

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
        """Move a generating stream's newest tokens to host memory if there are `least` or more."""
        # The KV of the newest token may still be on its way.
        known = stream.req.kv.kv_committed_len - 1
        if known - stream.resident_from >= least:
            stream.req.refresh_fill_ids()
            self.checkpoint(stream, known)

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
        return self.limits.page - 1

    def prefix_slots(self, req: Any) -> torch.Tensor:
        """int64 [prefix]: what stands in the table for a prefix in host memory."""
        return torch.full(
            (req.prefix_len,), self.filler, dtype=torch.int64, device=self._tier.device
        )

    def _row(self, req: Any) -> torch.Tensor:
        row: torch.Tensor = self._cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        return row

    def _keys(self, req: Any, begin: int, end: int, parent: str | None) -> tuple[bytes, list[str]]:
        """Page keys of tokens [begin, end), and SGLang's hashes they are made of."""
        if begin >= end:
            return b"", []
        key = RadixKey(
            req.full_untruncated_fill_ids[begin:end], req.extra_key, cache_salt=req.cache_salt
        )
        hexes = get_storage_hash_str(key, parent, page_size=self.limits.page)
        return keys_from_hex(hexes), hexes

    def shut_down(self) -> None:
        """End the ring's thread."""
        self.reader.begin()
        self._ring.close()


def new_tokens(req: Any) -> int:
    """Tokens that the request may still generate."""
    return max((req.sampling_params.max_new_tokens or 0) - len(req.output_ids), 0)
