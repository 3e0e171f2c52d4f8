"""Host pages of requests that wait, brought to the device while there is room.

The device's tree is asked how far it knows a prompt, host memory what follows; those pages are
loaded into free slots, piece by piece, on a thread of their own. What has landed joins the tree, as
if another request had computed it, and the request finds it there when its turn comes. One that is
admitted earlier loads what is left itself, layer by layer in front of its forward; of its pieces
those that have not begun are given up. Slots under way count as evictable: where the tree has
nothing left to evict, they are given back.

In which order: slots are loaded after the forwards that may still read them (`Mover.fence`); nobody
knows them until every layer has landed (`LayerLoads.has_landed`), and pieces join the tree in the
order of their pages. So a forward never reads a slot that is being loaded here.

With several ranks all do the same in the same step, since their trees must be equal: what a rank
alone can know (what its memory holds, what has landed, and whether all of it) is agreed on first.
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

from smg_sglang.config import WritePolicy
from smg_sglang.engine.paths import page_path, whole_pages
from smg_sglang.tree.page_keys import KEY_BYTES

if TYPE_CHECKING:
    from smg_sglang.engine.cache.radix_cache import SmgRadixCache
    from smg_sglang.memory.client import Lease
    from smg_sglang.tier.host_tier import HostTier
    from smg_sglang.transfer.layer_loads import LayerLoads

logger = logging.getLogger(__name__)

#: So many of the requests that wait are looked after, the next ones to be admitted.
LOOK_AHEAD = 16
#: For so many of them host memory is asked in one step of the scheduler (0.1 to 0.3 ms each).
LOOKUPS_A_STEP = 4
#: What a request that is admitted may find under way, and load a second time: some 5 ms, at 10 GB/s
#: on a CPU and (not measured) at 50 GB/s on CUDA.
PIECE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
#: Share of the pool that may hold what was, or is being, loaded for requests which still wait.
MAX_AHEAD = 0.25
#: Share of the pool that stays for requests which run, or are admitted first.
MIN_ROOM = 0.25
#: Share of the pool below which a part of what a request needs is not worth a load.
LEAST = 1 / 16


@dataclass(eq=False)
class _Waiting:
    """What is known of one request that waits.

    Attributes:
        tokens: of its prompt, as many whole pages as may be found in a cache.
        path: their page keys; empty before they are needed.
        head: tokens of it that the device had when it was last looked at, or has got since.
        node: the tree's node that these end at.
        loaded: tokens of these that were loaded for it.
        under_way: pieces of it that have not landed.
        done: nothing more can be loaded for it.
    """

    tokens: array[int]
    extra_key: str | None
    cache_salt: str | None
    priority: int
    path: bytes = b""
    head: int = 0
    node: Any = None
    loaded: int = 0
    under_way: int = 0
    done: bool = False

    def key(self, end: int) -> RadixKey:
        return RadixKey(self.tokens, self.extra_key, limit=end, cache_salt=self.cache_salt)


@dataclass(eq=False)
class _Load:
    """What one request is being loaded, in pieces.

    Attributes:
        first_key: page key of its first page: others with the same prefix wait for it.
        failed: a piece has not come, so that those behind it have nowhere to hang.
    """

    waiting: _Waiting
    lease: Lease
    first_key: bytes
    failed: bool = False


@dataclass(frozen=True, eq=False)
class _Piece:
    """Tokens [begin, begin + len(slots)) of a request, being loaded as batch `index`."""

    load: _Load
    begin: int
    slots: torch.Tensor
    index: int


class Prefetch:
    """The loads of one worker for requests in its waiting queue. Scheduler thread only."""

    def __init__(self, cache: SmgRadixCache, tier: HostTier, loads: LayerLoads) -> None:
        self._cache = cache
        self._tier = tier
        self._loads = loads
        self._waiting: dict[str, _Waiting] = {}
        self._pieces: deque[_Piece] = deque()
        self._dropped_tokens = 0
        self._page = tier.layout.page_size
        self._piece_pages = max(1, PIECE_BYTES[tier.device.type] // tier.layout.page_bytes)

    @property
    def tokens_under_way(self) -> int:
        """Slots that are neither free nor in the tree; `give_back` frees them."""
        return sum(piece.slots.numel() for piece in self._pieces)

    def state(self) -> dict[str, int]:
        """What `/server_info` shows, in tokens since the start and now."""
        return {
            "prefetched_tokens": self._tier.counters.prefetched_tokens,
            "prefetch_dropped_tokens": self._dropped_tokens,
            "prefetch_tokens_under_way": self.tokens_under_way,
        }

    def land(self) -> None:
        """Put the pieces that have landed into the tree. Before requests are matched."""
        if not self._pieces:
            return
        has_landed = [self._loads.has_landed(piece.index) for piece in self._pieces]
        (ready,) = self._cache.least_of_ranks([*has_landed, False].index(False))
        pieces = [self._pieces.popleft() for _ in range(ready)]
        landed = [self._loads.finish(piece.index) for piece in pieces]
        for piece, on_all in zip(pieces, self._cache.least_of_ranks(*landed), strict=True):
            self._finish(piece, landed=bool(on_all))

    def give_back(self) -> int:
        """Free all slots under way, because memory is short or their KV is not wanted any more.
        Waits for a piece that has begun. Returns how many."""
        tokens = self.tokens_under_way
        for piece in self._pieces:
            piece.load.failed = True
            self._loads.give_up(piece.index)
        while self._pieces:
            piece = self._pieces.popleft()
            self._loads.finish(piece.index)
            self._finish(piece, landed=False)
        return tokens

    def is_loading(self, rid: str) -> bool:
        """Whether something is under way for one that waits."""
        waiting = self._waiting.get(rid)
        return waiting is not None and bool(waiting.under_way)

    def is_done(self, rid: str) -> bool:
        """Whether all has been loaded for one that waits, or nothing more can be."""
        waiting = self._waiting.get(rid)
        return waiting is not None and waiting.done and not waiting.under_way

    def drop(self) -> None:
        """The cache or the weights are others from now on."""
        self.give_back()
        self._waiting.clear()

    def look_ahead(self, queue: Sequence[Any]) -> None:
        """Start to load for the first of these requests. After a batch has been formed, so that
        `queue` are those who go on waiting."""
        first = queue[:LOOK_AHEAD]
        self._forget_others(queue, {req.rid for req in first})
        for req in first:
            if req.rid not in self._waiting:
                self._waiting[req.rid] = self._new(req)
        if not self._room():
            return
        states = [self._waiting[req.rid] for req in first]
        ready = [state for state in states if not (state.done or state.under_way)]
        for waiting in ready[:LOOKUPS_A_STEP]:
            if not self._start(waiting):
                return

    def _forget_others(self, queue: Sequence[Any], first: set[str]) -> None:
        """Those who have left the queue; one that was only overtaken keeps its pieces."""
        if not self._waiting.keys() <= first:
            gone = self._waiting.keys() - {req.rid for req in queue}
            left = [self._waiting.pop(rid) for rid in gone]
            for piece in self._pieces:
                if piece.load.waiting in left:
                    self._loads.give_up(piece.index)

    def _new(self, req: Any) -> _Waiting:
        tokens = req.origin_input_ids + req.output_ids
        end = whole_pages(req, len(tokens), self._page)
        streams = self._cache.streams
        unfit = (
            req.positional_embed_overrides is not None
            or req.session is not None
            or (streams is not None and streams.needs(req))
        )
        done = unfit or end == 0
        waiting = _Waiting(
            tokens[:end], req.extra_key, req.cache_salt, req.priority or 0, done=done
        )
        if not done:
            self._look_at(waiting)
        return waiting

    def _look_at(self, waiting: _Waiting) -> None:
        match = self._match(waiting, len(waiting.tokens))
        waiting.head, waiting.node = match.device_prefix_len, match.last_device_node

    def _start(self, waiting: _Waiting) -> bool:
        """Load what host memory has next of a request; False where no other should be tried."""
        if not waiting.path:
            waiting.path, _ = page_path(waiting, waiting.tokens, self._page)
        self._look_at(waiting)
        begin = waiting.head // self._page
        wanted = len(waiting.path) // KEY_BYTES - begin
        if wanted < 1:
            waiting.done = True
            return True
        first_key = waiting.path[begin * KEY_BYTES :][:KEY_BYTES]
        if any(piece.load.first_key == first_key for piece in self._pieces):
            return True  # it will find there what another one is being loaded
        pages = min(wanted, self._room() // self._page)
        if pages < min(wanted, self._piece_pages, self._share(LEAST) // self._page):
            return False
        lease = self._tier.lookups.lookup(waiting.path[: (begin + pages) * KEY_BYTES], begin)
        found = 0 if lease is None else len(lease.pages)
        found, answers = self._cache.least_of_ranks(found, self._tier.connections.answers)
        if lease is None or not found:
            if lease is not None:
                self._tier.release(lease)
            waiting.done = bool(answers)
            return waiting.done
        slots = self._allocate(found * self._page, waiting.node)
        if slots is None:
            self._tier.release(lease)
            return False
        self._load(_Load(waiting, lease, first_key), slots)
        return True

    def _load(self, load: _Load, slots: torch.Tensor) -> None:
        """Load the pages of a lease into slots, behind what the device has of the request."""
        lease, size = load.lease, self._piece_pages * self._page
        begin, offsets = load.waiting.head, lease.offsets
        for first in range(0, slots.numel(), size):
            mine = slots[first : first + size]
            pages = slice(first // self._page, (first + mine.numel()) // self._page)
            try:
                self._loads.queue("piece", mine, lease.arena.buffer, offsets[pages], lease)
            except ValueError:
                # Nothing of ours may end the scheduler; the request loads for itself, or computes.
                logger.exception("smg: a load ahead was refused")
                self._loads.queue_failed("piece", keep_alive=lease)
            self._pieces.append(_Piece(load, begin + first, mine, self._loads.start()))
            load.waiting.under_way += 1

    def _match(self, waiting: _Waiting, end: int) -> Any:
        return self._cache.match_prefix(MatchPrefixParams(key=waiting.key(end)))

    def _share(self, of_pool: float) -> int:
        return int(self._cache.token_to_kv_pool_allocator.size * of_pool)

    def _room(self) -> int:
        """Tokens that may be loaded now. What the device has of requests that wait is not evicted
        for others that wait."""
        free = self._cache.token_to_kv_pool_allocator.available_size()
        kept = sum({waiting.node: waiting.head for waiting in self._waiting.values()}.values())
        loaded = sum(waiting.loaded for waiting in self._waiting.values())
        room = free + self._cache.tree_evictable_size() - kept - self._share(MIN_ROOM)
        room = min(room, self._share(MAX_AHEAD) - loaded - self.tokens_under_way)
        if self._tier.config.write_policy is WritePolicy.WRITE_BACK:
            room = min(room, free)  # there an eviction costs a copy, which the scheduler waits for
        return max(0, room)

    def _allocate(self, tokens: int, head: Any) -> torch.Tensor | None:
        """Free slots; where some are to be freed first, not those of the node `head`, and those of
        others that wait last."""
        cache = self._cache
        allocator = cache.token_to_kv_pool_allocator
        if (missing := tokens - allocator.available_size()) > 0:
            lock = cache.lock(head)
            for waiting in reversed(self._waiting.values()):
                if waiting.head:
                    self._match(waiting, waiting.head)
            if missing <= cache.tree_evictable_size():
                cache.evict(EvictParams(num_tokens=missing))
            cache.unlock(lock)
        slots: torch.Tensor | None = allocator.alloc(tokens)
        return slots

    def _free(self, slots: torch.Tensor) -> None:
        # Whole pages, from a page's beginning.
        self._cache.token_to_kv_pool_allocator.free_segment(slots, start_pos=0)

    def _finish(self, piece: _Piece, *, landed: bool) -> None:
        """A piece is not written any more; landed: all of it, on all ranks."""
        load, waiting = piece.load, piece.load.waiting
        waiting.under_way -= 1
        if not waiting.under_way:  # a request has one load at a time
            self._tier.release(load.lease)
        if landed and not load.failed and self._join(piece):
            return
        self._free(piece.slots)
        self._dropped_tokens += piece.slots.numel()
        if not load.failed:
            load.failed = waiting.done = True
            for behind in self._pieces:
                if behind.load is load:
                    self._loads.give_up(behind.index)

    def _join(self, piece: _Piece) -> bool:
        """Put a piece into the tree; False where what comes before it has left."""
        waiting = piece.load.waiting
        match = self._match(waiting, piece.begin)
        if match.device_prefix_len < piece.begin:
            return False
        head = self._cache.path_device_indices(match.last_device_node).to(torch.int64)
        values = torch.cat([head, piece.slots])
        # What others have put there meanwhile stays, and our slots for it are freed. inserted_len:
        # nobody has used it yet, and host memory has it, so there is nothing to spill.
        result = self._cache.insert(
            InsertParams(
                key=waiting.key(len(values)),
                value=values,
                prev_prefix_len=piece.begin,
                inserted_len=len(values),
                priority=waiting.priority,
            )
        )
        waiting.head, waiting.node = len(values), result.last_device_node
        waiting.loaded += piece.slots.numel()
        self._tier.counters.prefetched_tokens += piece.slots.numel()
        return True
