"""SGLang's unified radix cache with our policies: the device level of the hierarchical tree.

`SmgRadixCache` comes in through `create_unified_radix_cache(cache_class=...)`, `SmgLinkerWrapper`
through its `init_cache_linker`. SGLang keeps matching, slots and admission; what differs here is
when pages are spilled and how a hit below the device is found.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from smg_sglang.config import WritePolicy
from smg_sglang.engine.cache.hints import CacheHints
from smg_sglang.engine.cache.kv_events import HostEvents
from smg_sglang.engine.cache.linker import SmgLinker
from smg_sglang.engine.cache.linker_wrapper import SmgLinkerWrapper
from smg_sglang.engine.cache.prefetch import Prefetch
from smg_sglang.engine.cache.waits import PrefixWaits, pass_over
from smg_sglang.engine.split import publication
from smg_sglang.engine.streams.stream import Stream
from smg_sglang.engine.streams.table import Streams, activate

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import (
        EvictParams,
        EvictResult,
        InsertParams,
        InsertResult,
    )

    from smg_sglang.tier.host_tier import HostTier


class SmgRadixCache(UnifiedRadixCache):
    """The device level, and what hangs on it: `host_tier`, the level below; where they are switched
    on, `streams`, the requests whose context is larger than the device, `prefetch`, which loads for
    requests that wait, `prefix_waits`, those that wait for a prefix that others compute, `hints`,
    what orchestrators say of prefixes, and `host_events`, what routers are told of host memory."""

    streams: Streams | None = None
    prefetch: Prefetch | None = None
    prefix_waits: PrefixWaits | None = None
    hints: CacheHints | None = None
    host_events: HostEvents | None = None

    @property
    def host_tier(self) -> HostTier | None:
        return self.linker.tier if isinstance(self.linker, SmgLinkerWrapper) else None

    def init_cache_linker(self, cache_linker: UnifiedCacheLinker) -> None:
        assert isinstance(cache_linker, SmgLinker)
        self.linker = SmgLinkerWrapper(self, cache_linker)
        if cache_linker.tier.config.stream_context:
            self.streams = Streams(self, cache_linker.tier)
            activate(self.streams)
        if (ahead := cache_linker.tier.ahead) is not None:
            self.prefetch = Prefetch(self, cache_linker.tier, ahead)
        self.prefix_waits = PrefixWaits(self, cache_linker.tier)
        self.hints = CacheHints(self, cache_linker.tier)
        if self.tree_core.kv_events.enabled:
            self.host_events = HostEvents(cache_linker.tier, self.page_size)

    def insert(self, params: InsertParams) -> InsertResult:
        result: InsertResult = super().insert(params)
        is_new = params.mamba_value is not None and not result.mamba_exist
        if is_new and isinstance(self.linker, SmgLinkerWrapper):
            self.linker.spill_state(result.last_device_node)
        return result

    def reset(self) -> None:
        if self.hints is not None:
            self.hints.clear()
        if self.prefetch is not None:
            self.prefetch.drop()
        super().reset()

    def internal_state(self) -> dict[str, Any]:
        """What `/server_info` shows of the cache."""
        parts = [part for part in (self.host_tier, self.streams, self.prefetch) if part is not None]
        if not parts:
            return {}
        smg = publication.state()
        for part in parts:
            smg |= part.state()
        return {"smg": smg}

    def on_weight_update(self) -> None:
        """The weights are about to change, perhaps in part. Loads ahead first: they hold leases of
        the connection that the tier retires."""
        if self.hints is not None:
            self.hints.clear()
        if self.prefetch is not None:
            self.prefetch.drop()
        if self.host_tier is not None:
            # All ranks enter, and agree on the name.
            (name,) = self.least_of_ranks(secrets.randbits(62))
            self.host_tier.weights_changed(f"{name:016x}")
        if self.streams is not None:
            self.streams.weights_changed()

    def least_of_ranks(self, *facts: int) -> list[int]:
        """The least that any rank knows of each, by SGLang's own collective: all ranks enter it."""
        known = torch.tensor(facts, dtype=torch.int64)
        self._all_reduce_attn_groups(known, torch.distributed.ReduceOp.MIN)
        least: list[int] = known.tolist()
        return least

    # ---- requests that wait ----

    def waits_for_storage(self, req: Any) -> bool:
        """Whether a request that has just been matched is to be passed over in this batch, since
        storage is bringing its prefix. Where it is not, SGLang is told what storage has brought."""
        if not isinstance(self.linker, SmgLinkerWrapper) or self.linker.tier.stored is None:
            return False
        if req.rid in self.linker.waiting:
            return True
        start, tokens = self.linker.tier.stored.span(req.rid)
        if tokens:
            req.storage_hit_start, req.storage_hit_length = start, tokens
        return False

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        if self.prefetch is not None:
            self.prefetch.land()
        if self.hints is not None:
            self.hints.step()

    def prefetch_waiting(self, queue: list[Any]) -> None:
        """SGLang has formed a batch, and these requests go on waiting."""
        if self.prefetch is not None:
            hinted = self.hints.prompts() if self.hints is not None else []
            self.prefetch.look_ahead([*queue, *hinted])

    def take_kv_hints(self, message: Any) -> list[str]:
        """Hints without a request. -> what became of each"""
        return [] if self.hints is None else self.hints.told(message)

    def take_events(self) -> list[Any]:
        """KV events of the device, and of host memory."""
        events: list[Any] = super().take_events()
        return events if self.host_events is None else self.host_events.take(events)

    def wait_for_prefix(self, adder: Any, req: Any) -> Any:
        """SGLang asks to admit a request: a verdict without doing so, where it is to wait."""
        if self.waits_for_storage(req):
            return pass_over(adder)
        return None if self.prefix_waits is None else self.prefix_waits.verdict(adder, req)

    def tree_evictable_size(self) -> int:
        """Tokens of the tree that nobody has locked."""
        return int(super().evictable_size())

    def evictable_size(self) -> int:
        """And those on their way to the tree, which `_evict` gives back if need be."""
        under_way = self.prefetch.tokens_under_way if self.prefetch is not None else 0
        return self.tree_evictable_size() + under_way

    def _evict(self, params: EvictParams, *args: Any, **kwargs: Any) -> EvictResult:
        demoted = 0
        if self.hints is not None:
            demoted = self.hints.evict_demoted(params.num_tokens, self._evict_demoted)
            if not (args or kwargs):  # with a target it stops there by itself
                params = replace(params, num_tokens=max(0, params.num_tokens - demoted))
        result: EvictResult = super()._evict(params, *args, **kwargs)
        result.num_tokens_evicted += demoted
        if self.prefetch is not None and result.num_tokens_evicted < params.num_tokens:
            result.num_tokens_evicted += self.prefetch.give_back()
        return result

    def _evict_demoted(self, node_id: int) -> int:
        """A leaf that is not coming back need not be copied anywhere. -> its tokens"""
        tracker = dict.fromkeys(self.tree_components, 0)
        super()._evict_device_leaf(node_id, tracker)
        return int(tracker[ComponentType.FULL])

    # ---- requests that leave the device ----

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        if self.hints is not None:
            self.hints.released(req)
        if isinstance(self.linker, SmgLinkerWrapper):
            self.linker.release_finished(req.rid)
        if self.streams is not None:
            self.streams.close(req)

    def before_retraction(self, req: Any) -> None:
        """The request is about to lose its slots, and will resume."""
        if not isinstance(self.linker, SmgLinkerWrapper) or not req.kv.holds_kv or req.finished():
            return
        if (stream := self._stream(req)) is not None:
            stream.table.leave_tail(stream, self.page_size)
        else:
            self.linker.spill_retracted(req)

    # ---- contexts larger than the device ----

    def _stream(self, req: Any) -> Stream | None:
        return self.streams.get(req) if self.streams is not None else None

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        stream = self._stream(req)
        if stream is None:
            super().checkpoint(req, up_to=up_to, **kwargs)
        else:
            stream.table.checkpoint(stream, up_to)

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        if (stream := self._stream(req)) is not None:
            return stream.table.prefix_slots(stream)
        slots: torch.Tensor = super().prefix_device_indices(req)
        return slots

    def finish_external_linker_loads(self, reqs: list[Any]) -> list[Any]:
        """SGLang drops the output of what this returns, with the reason, and releases it."""
        failed: list[Any] = super().finish_external_linker_loads(reqs)
        if self.streams is None or not len(self.streams):
            return failed
        return failed + [req for req in reqs if self._has_failed(req)]

    def _has_failed(self, req: Any) -> bool:
        """A prompt whose pages could not leave the device. (Where a stream that generates fails,
        `make_decode_room` ends it.)"""
        from smg_sglang.engine.streams.scheduling import failed

        stream = self._stream(req)
        if stream is None or stream.failure is None or req.output_ids:
            return False
        req.skip_radix_cache_insert = True
        req.discard_output_reason = failed(stream)
        return True

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        tier = self.host_tier
        if tier is not None and tier.config.write_policy is WritePolicy.WRITE_BACK:
            self.linker.spill_before_eviction(node_id)
        return super()._evict_device_leaf(node_id, tracker)
