"""Caches with streams and without, as our hooks find them and as a patched SGLang asks them.

Requests are SGLang's own; of the streams only the pages are missing.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang.srt.sampling.sampling_params import SamplingParams

from smg_sglang.engine.streams import scheduling as stream_scheduling
from smg_sglang.engine.streams.limits import Limits
from smg_sglang.engine.streams.stream import Stream
from smg_sglang.engine.streams.table import STREAMED, Streams

# A stream computes at most half of the device at once, and keeps a tail of 64 tokens on it.
DEVICE, PAGE, HOST = 1024, 16, 8192


class Allocator:
    """The device pool, of which `free` tokens are free."""

    page_size, size = PAGE, DEVICE
    max_new_tokens_for_memory = BaseTokenToKVPoolAllocator.max_new_tokens_for_memory
    request_slot_reserve = BaseTokenToKVPoolAllocator.request_slot_reserve

    def __init__(self, free: int = DEVICE) -> None:
        self.available_size = lambda: free

    def create_prefill_budget(self, tree_cache, **kwargs):
        return PrefillBudget(self, tree_cache, **kwargs)


class Table(Streams):
    """Streams whose pages are only counted: `in_host` by request, `left` what had to move."""

    def __init__(self, cache, host: int, in_host: dict[str, int]) -> None:
        self._cache = cache
        self._tier = SimpleNamespace(
            host_tokens=lambda: host,
            layout=SimpleNamespace(page_size=PAGE),
            device=torch.device("cpu"),
        )
        self._by_rid: dict[str, Stream] = {}
        self._in_host = in_host
        self.left: list[tuple[str, int]] = []

    def open(self, req):
        stream = Stream(self, req, self.host_need(req))
        stream.resident_from = self._in_host.get(req.rid, 0)
        self._by_rid[req.rid] = stream
        return stream

    def leave_tail(self, stream, least) -> None:
        self.left.append((stream.req.rid, least))


class Plain:
    """A cache that knows no streams: what SGLang asks any."""

    disable = False
    streams: Table | None = None

    def __init__(self, allocator: Allocator) -> None:
        self.token_to_kv_pool_allocator = allocator

    def supports_mamba(self):
        return False

    def least_of_ranks(self, *facts):
        return list(facts)

    def evictable_size(self):
        return 0

    def lock(self, node):
        return None

    def unlock(self, lock):
        assert lock is None

    def root_node_handle(self, extra_key):
        return "root"

    def finish_storage_prefetch_admission(self, handle, **kwargs):
        pass


class Streaming(Plain):
    """A cache with streams, as our hooks find it."""

    def __init__(
        self, allocator: Allocator, host: int = HOST, in_host: dict[str, int] | None = None
    ) -> None:
        super().__init__(allocator)
        self.streams = Table(self, host, in_host or {})
        self.hits = {"host": 0}
        self.host_tier = SimpleNamespace(counters=SimpleNamespace(hit_tokens=self.hits))
        self.linker = SimpleNamespace(release_finished=lambda rid: None)


class Asked(Streaming):
    """The same as `SmgRadixCache` would be where SGLang has the patches."""

    def serves_beyond_device(self):
        return True

    def max_new_tokens_for_memory(self, req, max_new_tokens, on_device):
        return stream_scheduling.max_new_tokens(self.streams, req, max_new_tokens, on_device)

    def admit_streamed(self, adder, req, has_chunked_req):
        return stream_scheduling.admit(self.streams, adder, req, has_chunked_req)

    def streamed_chunk_limit(self, adder, req):
        return stream_scheduling.chunk_limit(self.streams, adder, req)

    def device_tokens_to_come(self, req, tokens):
        return stream_scheduling.device_tokens(self.streams, req, tokens)

    def wait_for_prefix(self, adder, req):
        """0013: nobody waits here."""
        return None

    def make_decode_room(self, batch):
        if len(self.streams):
            stream_scheduling.make_decode_room(self.streams, batch)


def defaults(patched):
    """A cache that knows no streams, where SGLang has the patches."""
    base = patched.module("sglang.srt.mem_cache.base_prefix_cache").BasePrefixCache
    names = [name for name in vars(Asked) if not name.startswith("__")]
    return type("Defaults", (Plain,), {name: vars(base)[name] for name in names})


def request(rid: str, prompt: int, new: int | None = 100, done: int = 0, **others: Any) -> Req:
    """One with `prompt` tokens, of which the first `done` are computed."""
    params = SamplingParams(max_new_tokens=new, min_new_tokens=others.pop("least", 0))
    req = Req(rid, "", array("q", range(prompt)), params)
    req.full_untruncated_fill_ids = req.origin_input_ids
    req.prefix_len = done
    if Limits(DEVICE, PAGE).needs_stream(prompt, new or 0):
        setattr(req, STREAMED, True)
    for name, value in others.items():
        setattr(req, name, value)
    return req
