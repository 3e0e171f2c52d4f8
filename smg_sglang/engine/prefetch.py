"""Host pages of requests that wait, brought to the device while there is room.

The device's tree is asked how far it knows a prompt, host memory what follows; those pages are
loaded into free slots, piece by piece, on a thread of their own. What has landed joins the tree, as
if another request had computed it, and the request finds it there when its turn comes. One that is
admitted earlier loads what is left itself, layer by layer in front of its forward; of its pieces
those that have not begun are given up.

In which order: slots are loaded after the forwards that may still read them (`Mover.fence`); nobody
knows them until every layer has landed (`LayerLoads.has_landed`), and pieces join the tree in the
order of their pages. So a forward never reads a slot that is being loaded here.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from smg_sglang.config import WritePolicy
from smg_sglang.tree.page_keys import KEY_BYTES, keys_from_hex

if TYPE_CHECKING:
    from smg_sglang.engine.cache import SmgRadixCache
    from smg_sglang.engine.host_tier import HostTier
    from smg_sglang.memory.client import Lease
    from smg_sglang.transfer.layer_loads import LayerLoads

logger = logging.getLogger(__name__)

#: So many of the requests that wait are looked after, the next ones to be admitted.
LOOK_AHEAD = 16
#: For so many of them host memory is asked in one step of the scheduler (0.1 to 0.3 ms each).
LOOKUPS_A_STEP = 4
#: What a request that is admitted may find under way, and load a second time: some 5 ms, at 10 GB/s
#: on a CPU and (not measured) at 50 GB/s on CUDA.
PIECE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
#: Share of the pool that may hold what was loaded for requests which still wait.
MAX_AHEAD = 0.25
#: Share of the pool that stays for requests which run, or are admitted first.
MIN_ROOM = 0.25


@dataclass
class _Waiting:
    """What is known of one request that waits.

    Attributes:
        tokens: of its prompt, as many whole pages as may be found in a cache.
        path: their page keys.
        loaded: tokens that were, or are being, loaded for it.
        under_way: pieces of it that have not landed.
        done: nothing more can be loaded for it.
    """

    tokens: array[int]
    path: bytes
    extra_key: str | None
    cache_salt: str | None
    loaded: int = 0
    under_way: int = 0
    done: bool = False

    def key(self, end: int) -> RadixKey:
        return RadixKey(self.tokens[:end], self.extra_key, cache_salt=self.cache_salt)


@dataclass(frozen=True)
class _Piece:
    """A load under way: of tokens [begin, begin + len(slots)) of a request.

    Attributes:
        index: its batch of `HostTier.ahead`.
        lease: released with its last piece; None in the others.
    """

    waiting: _Waiting
    begin: int
    slots: torch.Tensor
    index: int
    lease: Lease | None


class Prefetch:
    """The loads of one worker for requests in its waiting queue. Scheduler thread only."""

    def __init__(self, cache: SmgRadixCache, tier: HostTier, loads: LayerLoads) -> None:
        self._cache = cache
        self._tier = tier
        self._loads = loads
        self._waiting: dict[str, _Waiting] = {}
        self._pieces: deque[_Piece] = deque()
        layout = tier.layout
        self._piece_pages = max(1, PIECE_BYTES[tier.device.type] // layout.page_bytes)
        self._page = layout.page_size

    @property
    def tokens_under_way(self) -> int:
        """Slots that are neither free nor in the tree."""
        return sum(piece.slots.numel() for piece in self._pieces)

    def land(self) -> None:
        """Put the pieces that have landed into the tree. Before requests are matched."""
        while self._pieces and self._loads.has_landed(self._pieces[0].index):
            self._finish(self._pieces.popleft())

    def drop(self) -> None:
        """Wait for the pieces under way and forget them: their KV is not wanted any more."""
        self._waiting.clear()
        for piece in self._pieces:
            self._loads.give_up(piece.index)
        while self._pieces:
            self._finish(self._pieces.popleft(), keep=False)

    def look_ahead(self, queue: Sequence[Any]) -> None:
        """Start to load for the first of these requests. After a batch has been formed, so that
        `queue` are those who go on waiting."""
        first = queue[:LOOK_AHEAD]
        self._give_up_others({req.rid for req in first})
        for req in first:
            if req.rid not in self._waiting:
                self._waiting[req.rid] = self._new(req)
        states = [self._waiting[req.rid] for req in first]
        ready = [state for state in states if not (state.done or state.under_way)]
        for waiting in ready[:LOOKUPS_A_STEP]:
            if not self._start(waiting):
                return

    def _give_up_others(self, rids: set[str]) -> None:
        if gone := self._waiting.keys() - rids:
            left = [self._waiting.pop(rid) for rid in gone]
            for piece in self._pieces:
                if any(piece.waiting is waiting for waiting in left):
                    self._loads.give_up(piece.index)

    def _new(self, req: Any) -> _Waiting:
        tokens = req.origin_input_ids + req.output_ids
        end = max(0, req._compute_max_prefix_len(len(tokens))) // self._page * self._page
        streams = self._cache.streams
        if (
            req.positional_embed_overrides is not None
            or req.session is not None
            or (streams is not None and streams.needs(req))
        ):
            end = 0
        waiting = _Waiting(tokens[:end], b"", req.extra_key, req.cache_salt, done=end == 0)
        if end:
            hexes = get_storage_hash_str(waiting.key(end), None, page_size=self._page)
            waiting.path = keys_from_hex(hexes)
        return waiting

    def _start(self, waiting: _Waiting) -> bool:
        """Load what host memory has next of a request; False where there is no room for others."""
        begin = self._match(waiting, len(waiting.tokens)).device_prefix_len // self._page
        pages = len(waiting.path) // KEY_BYTES - begin
        if pages < 1:
            waiting.done = True
            return True
        if (room := self._room() // self._page) < 1:
            return False
        end = begin + min(pages, room)
        lease = self._tier.lookup(waiting.path[: end * KEY_BYTES], begin)
        if lease is None:
            waiting.done = True
            return True
        slots = self._allocate(len(lease.pages) * self._page)
        if slots is None:
            self._tier.release(lease)
            return False
        self._load(waiting, begin, lease, slots)
        return True

    def _load(self, waiting: _Waiting, begin: int, lease: Lease, slots: torch.Tensor) -> None:
        """Load the pages of a lease into slots, from page `begin` of the request on."""
        waiting.loaded += slots.numel()
        pages, offsets, size = len(lease.pages), lease.offsets, self._piece_pages
        for first in range(0, pages, size):
            last = min(first + size, pages)
            mine = slots[first * self._page : last * self._page]
            self._loads.queue("piece", mine, lease.arena.buffer, offsets[first:last], lease)
            held = lease if last == pages else None
            piece = _Piece(waiting, (begin + first) * self._page, mine, self._loads.start(), held)
            self._pieces.append(piece)
            waiting.under_way += 1

    def _match(self, waiting: _Waiting, end: int) -> Any:
        return self._cache.match_prefix(MatchPrefixParams(key=waiting.key(end)))

    def _room(self) -> int:
        """Tokens that may be loaded now."""
        cache, allocator = self._cache, self._cache.token_to_kv_pool_allocator
        free = allocator.available_size()
        unused = free + cache.evictable_size() + self.tokens_under_way
        most = min(unused - int(allocator.size * MIN_ROOM), int(allocator.size * MAX_AHEAD))
        room = most - sum(waiting.loaded for waiting in self._waiting.values())
        if self._tier.config.write_policy is WritePolicy.WRITE_BACK:
            room = min(room, free)  # there an eviction costs a copy, which the scheduler waits for
        return max(0, room)

    def _allocate(self, tokens: int) -> torch.Tensor | None:
        cache = self._cache
        allocator = cache.token_to_kv_pool_allocator
        if (missing := tokens - allocator.available_size()) > 0:
            cache.evict(EvictParams(num_tokens=missing))
        slots: torch.Tensor | None = allocator.alloc(tokens)
        return slots

    def _finish(self, piece: _Piece, keep: bool = True) -> None:
        landed = self._loads.finish(piece.index)
        piece.waiting.under_way -= 1
        if piece.lease is not None:
            self._tier.release(piece.lease)
        if not (landed and keep and self._join(piece)):
            piece.waiting.done = True
            self._cache.token_to_kv_pool_allocator.free(piece.slots)

    def _join(self, piece: _Piece) -> bool:
        """Put a piece into the tree; False where what comes before it has left."""
        match = self._match(piece.waiting, piece.begin)
        if match.device_prefix_len < piece.begin:
            return False
        head = self._cache.path_device_indices(match.last_device_node).to(torch.int64)
        values = torch.cat([head, piece.slots])
        # What others have put there meanwhile stays, and our slots for it are freed. inserted_len:
        # nobody has used it yet, and host memory has it, so there is nothing to spill.
        self._cache.insert(
            InsertParams(
                key=piece.waiting.key(len(values)),
                value=values,
                prev_prefix_len=piece.begin,
                inserted_len=len(values),
            )
        )
        self._tier.counters.prefetched_tokens += piece.slots.numel()
        return True
