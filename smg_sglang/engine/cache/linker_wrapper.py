"""What lies between SGLang's radix cache and our linker: hits below the device, and spills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    ExternalCacheHitMarker,
    UnifiedCacheLinkerWrapper,
    _PendingOffload,
)

from smg_sglang.engine.cache.linker import SmgLinker
from smg_sglang.engine.paths import page_path
from smg_sglang.tree.page_keys import KEY_BYTES, keys_from_hex

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import MatchResult

    from smg_sglang.engine.cache.radix_cache import SmgRadixCache
    from smg_sglang.tier.host_tier import HostTier
    from smg_sglang.tier.spills import Ends
    from smg_sglang.tier.trail import Trail


class SmgLinkerWrapper(UnifiedCacheLinkerWrapper):
    """Finds tails in the host level and spills nodes there, always by their path from the root."""

    cache: SmgRadixCache
    cache_linker: SmgLinker

    def __init__(self, cache: SmgRadixCache, cache_linker: SmgLinker) -> None:
        super().__init__(cache, cache_linker)
        self.tier: HostTier = cache_linker.tier
        trails = self.tier.trails
        self._window = max([0, *(trail.window for trail in trails if trail.kind == "window")])
        self._has_states = any(trail.kind == "state" for trail in trails)
        self.waiting: set[str] = set()
        """Requests, by id, that wait for what storage brings to host memory."""
        # How often a node is inserted before the tree core asks for its spill. For write-back it
        # never does: there `SmgRadixCache` spills on eviction. (The core's own write-back mode
        # needs HiCache's host pool.)
        cache.write_through_threshold = self.tier.config.write_policy.uses_before_spill

    # ---- match: what lies below the device ----

    def match(self, key: Any, req: Any, result: MatchResult) -> MatchResult:
        """Extend a device match by the host pages that follow it.

        Every rank comes to the same result, the shortest hit of any: what is found is a prefix, so
        all of them have it.
        """
        self.hit_markers.pop(req.rid, None)
        self.waiting.discard(req.rid)
        if self.cache.hints is not None:
            self.cache.hints.arrived(req)
        tail = self._tail_hashes(key, result, result.device_prefix_len)
        head = self._path(result.last_device_node) if result.device_prefix_len else b""
        path = keys_from_hex(tail)
        if self.cache.hints is not None:
            self.cache.hints.matched(head + path)
        if not tail:
            self.tier.lookups.touch(req.rid, head)
            return result
        pages = self._find(req.rid, head + path, len(head) // KEY_BYTES)
        pages = self._fitting(req.rid, path, pages)
        if pages == 0:
            return result
        self.hit_markers[req.rid] = ExternalCacheHitMarker(
            tail_hashes=tail[:pages], device_hit_len=result.device_prefix_len
        )
        return result._replace(
            last_host_node=result.best_match_node,
            host_hit_length=pages * self.cache.page_size,
            swa_host_hit_length=min(pages, self._window) * self.cache.page_size,
            mamba_host_hit_length=int(self._has_states),
        )

    def _find(self, rid: str, path: bytes, start: int) -> int:
        """How many pages of `path[start:]` all ranks find in host memory; where any of them waits
        for more of it from storage, all do."""
        lookups, stored = self.tier.lookups, self.tier.stored
        pages = lookups.find(rid, path, start)
        if stored is None:
            (pages,) = self.cache.least_of_ranks(pages)
            return pages
        waits = stored.waits(rid, path, start + pages)
        if not waits and stored.has_come(rid):
            lookups.forget(rid)
            pages = lookups.find(rid, path, start)
        pages, may_go = self.cache.least_of_ranks(pages, not waits)
        if not may_go:
            self.waiting.add(rid)
        return pages

    def _fitting(self, rid: str, tail: bytes, pages: int) -> int:
        """Of a hit of so many pages as much as layers with windows, or states, have the end of, on
        all ranks: what one can restore is sparse, so a shorter hit is looked for again."""
        while pages and self.tier.trails:
            (least,) = self.cache.least_of_ranks(self.tier.fitting(rid, tail, pages))
            if least == pages:
                break
            pages = least
        return pages

    def _path(self, node_id: int) -> bytes:
        core = self.cache.tree_core
        return keys_from_hex(core.get_prefix_hash_values(node_id) + core.get_hash_values(node_id))

    # ---- offload: a node and what its ancestors lack ----

    def _offload_node(self, node_id: int, transfers: list[Any]) -> None:
        """Spill a node; its ancestors' slots go along, in case the host level has lost them."""
        full, *others = transfers
        ends = {
            pool: (keys_from_hex(each.keys), each.device_indices.to(torch.int64))
            for pool, each in self.cache_linker.by_number(others).items()
        }
        lock = self._submit(node_id, full.device_indices.numel(), ends)
        self.cache.tree_core.mark_external_linker_offload_pending(node_id)
        self.pending_offloads.append(_PendingOffload(node_id, lock, [node_id]))

    def spill_state(self, node_id: int) -> None:
        """A node was given a state. Where host memory has the node (a prompt that parts from
        others there), SGLang does not spill it again, so that its state is spilled here."""
        core = self.cache.tree_core
        if core.build_external_linker_offload_transfers(node_id) is not None:
            return  # it is yet to be spilled
        if any(node_id == pending.lock_node_id for pending in self.pending_offloads):
            return  # it is on its way, with its state
        state = core.get_component_device_value(node_id, ComponentType.MAMBA)
        if state is None:
            return
        (pool,) = (trail.pool for trail in self.tier.trails if trail.kind == "state")
        end = keys_from_hex(core.get_hash_values(node_id)[-1:])
        lock = self._submit(node_id, 0, {pool: (end, state.to(torch.int64))})
        self.pending_offloads.append(_PendingOffload(node_id, lock, []))

    def _submit(self, node_id: int, own_slots: int, ends: Ends) -> Any:
        """The lock on the node, which is returned, keeps the whole path on the device until the
        copy has ended."""
        lock = self.cache.inc_lock_ref(node_id).to_dec_params()
        try:
            self.tier.spills.submit(
                self._path(node_id),
                self._path_slots(node_id),
                own_slots=own_slots,
                ready=self.cache_linker.spill_events(),
                ends=ends,
            )
        except BaseException:
            self.cache.dec_lock_ref(node_id, lock)
            raise
        return lock

    def spill_before_eviction(self, node_id: int) -> None:
        """Write-back: copy a leaf, and what the host level lacks above it, before its slots go."""
        self.tier.spills.spill_now(self._path(node_id), self._path_slots(node_id))

    def spill_retracted(self, req: Any) -> None:
        """Copy the whole pages of a request that is about to lose its slots, so that it is a host
        hit when it resumes. The tree is left alone: its locks would keep memory that is wanted now.
        A state is not copied, since it may be that of a token that is not known yet: the request
        goes on from its newest checkpoint.
        """
        req.refresh_fill_ids()
        # The KV of the newest token may still be on its way.
        known = min(len(req.full_untruncated_fill_ids), req.owned_kv_len()) - 1
        page = self.cache.page_size
        if known < page or req.skip_radix_cache_insert:
            return
        tokens = req.full_untruncated_fill_ids[: known // page * page]
        path, _ = page_path(req, tokens, page)
        row = self.cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(tokens)]
        self.tier.spills.spill_now(path, row.to(torch.int64))
        for trail in self.tier.trails:
            if trail.kind == "window":
                self._spill_window(req, trail, path, row)

    def _spill_window(self, req: Any, trail: Trail, path: bytes, row: torch.Tensor) -> None:
        """The end of a request for layers with windows, unless it has left the device in part."""
        first = max(0, len(path) // KEY_BYTES - trail.window)
        begin = first * self.cache.page_size
        if req.kv.get_evicted_seqlen(ComponentType.SWA) <= begin:
            pool = self.cache.token_to_kv_pool_allocator.get_kvcache()
            slots = pool.translate_loc_from_full_to_swa(row[begin:])
            trail.spill_now(path[first * KEY_BYTES :], slots.to(torch.int64))

    def _path_slots(self, node_id: int) -> torch.Tensor:
        """Device slots int64 of every token on the path from the root."""
        core = self.cache.tree_core
        extra_key, _ = core.prefetch_anchor_info(node_id)
        slots = core.collect_full_device_indices(node_id, core.root_node_handle(extra_key))
        return slots.to(torch.int64)

    # ---- lifecycle ----

    def release_request(self, rid: str) -> None:
        super().release_request(rid)
        if self.cache.hints is not None:
            self.cache.hints.dropped(rid)
        self.waiting.discard(rid)
        self.tier.forget(rid)

    def release_finished(self, rid: str) -> None:
        """Drop what a request found and never loaded: a later chunk of it may have looked again."""
        self.hit_markers.pop(rid, None)
        self.waiting.discard(rid)
        self.tier.forget(rid)
