"""Our cache over SGLang's own allocator and Rust tree, with a tier of the test's below it."""

from types import SimpleNamespace

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from smg_sglang.engine.cache.linker import SmgLinker
from smg_sglang.engine.cache.radix_cache import SmgRadixCache
from smg_sglang.memory.namespace import Namespace


def make_cache(slots, page, tier) -> SmgRadixCache:
    """A cache of `slots` slots on a CPU; it has its allocator."""
    cache = SmgRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=PagedTokenToKVPoolAllocator(
                slots, page, torch.float32, "cpu", SimpleNamespace(), False
            ),
            page_size=page,
            tree_components=(ComponentType.FULL,),
        )
    )
    linker = SmgLinker.__new__(SmgLinker)
    linker.tier, linker.layer_done_counter = tier, None
    linker.pools = {PoolName.KV: SimpleNamespace(device=torch.device("cpu"))}
    cache.init_cache_linker(linker)
    return cache


def namespace_of(layout, **more) -> Namespace:
    """Of a model `m` whose pages look so."""
    return Namespace(
        model="m",
        dtype=layout.dtype,
        layout=layout.describe(),
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        **more,
    )
