"""Our implementation of SGLang's `UnifiedCacheLinker`: the host tier behind the device pools."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MambaPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from smg_sglang.config import HostDtype, SmgConfig
from smg_sglang.engine.cache.identity import model_identity
from smg_sglang.engine.options.record import carried
from smg_sglang.errors import ConfigError
from smg_sglang.memory.namespace import Namespace
from smg_sglang.metrics import TierMetrics
from smg_sglang.tier.ends import EndLayers
from smg_sglang.tier.host_tier import HostTier
from smg_sglang.tier.ranks import Ranks
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import BeforeCopy, random_delay
from smg_sglang.transfer.narrow import host_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.hicache_storage import PoolTransfer
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class SmgLinker(UnifiedCacheLinker):
    """Built by SGLang once per worker (`create_unified_cache_linker`, backend "dynamic").

    `SmgLinkerWrapper` asks `tier` directly for what this interface has no words for: the path of a
    lookup and of an offload.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        params: CacheInitParams,
        *,
        components: set[Any],
        extra_config: dict[str, Any],
        forward_stream: Any = None,
    ) -> None:
        from sglang.srt.runtime_context import get_parallel

        kvcache, page_size = params.token_to_kv_pool_allocator.get_kvcache(), params.page_size
        pool, layers = full_layers(kvcache, page_size)
        windows = window_layers(kvcache, page_size, params.sliding_window_size)
        states = state_layers(params.req_to_token_pool)
        config = SmgConfig.from_builtins(extra_config)
        layout = host_layout(pool.layout, narrow=config.host_dtype is HostDtype.FP8)
        parallel = get_parallel()
        ranks = Ranks(parallel.attn_tp_rank, parallel.attn_tp_size, alike=has_latents(kvcache))
        namespace = Namespace(
            model=model_identity(server_args),
            dtype=pool.layout.dtype,
            layout=layout.describe(),
            page_size=params.page_size,
            page_bytes=layout.page_bytes,
            tp_rank=ranks.shard,
            tp_size=ranks.shards,
        )
        self.forward_stream = forward_stream
        self.tier = HostTier(
            config,
            carried(server_args)["address"],
            namespace,
            pool,
            layers=layers,
            ends=[*windows, *states],
            ranks=ranks,
            forward_streams=() if forward_stream is None else (forward_stream,),
            before_copy=_test_delay(),
        )
        self.layer_done_counter = self.tier.load_backs.loads.counter
        if states:
            # States are waited for where a request's slot is read.
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self.pools = {PoolName.KV: pool}
        for end in (*windows, *states):
            self.pools[PoolName.SWA if end.kind == "window" else PoolName.MAMBA] = end.pool
        self._metrics = _metrics(self.tier, server_args) if params.enable_metrics else None

    def by_number(self, transfers: Sequence[PoolTransfer]) -> dict[int, PoolTransfer]:
        """What SGLang says of pools, by the tier's numbers of them."""
        names = list(self.pools)
        return {names.index(transfer.name): transfer for transfer in transfers}

    def spill_events(self) -> tuple[Any, ...]:
        """The device events after which pages may be read; none on a CPU, where forwards return
        when they are done (and `torch.cpu.Event` synchronises nothing)."""
        if self.pools[PoolName.KV].device.type == "cpu":
            return ()
        return tuple(self.record_offload_ready())

    # ---- UnifiedCacheLinker ----

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        raise NotImplementedError("SmgLinkerWrapper.match looks up by path")

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        full, *others = transfers
        ends = {pool: each.device_indices for pool, each in self.by_number(others).items()}
        return self.tier.load(rid, full.device_indices, ends)

    def start_layer_wise_loading(self) -> int:
        return self.tier.load_backs.start()

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self.tier.load_backs.finish(counter_index)

    def cancel_queued_load(self, rid: str) -> bool:
        return self.tier.load_backs.cancel(rid)

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        raise NotImplementedError("SmgLinkerWrapper._offload_node spills by path")

    def num_completed_offloads(self) -> int:
        return self.tier.spills.num_completed()

    def pop_completed_offload(self) -> bool:
        return self.tier.spills.pop_completed()

    def reset(self) -> None:
        self.tier.flush()

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self.tier.close()


def _test_delay() -> BeforeCopy | None:
    """For stress tests: SMG_TEST_COPY_DELAY_MS delays every copy by up to that long, at random."""
    milliseconds = float(os.environ.get("SMG_TEST_COPY_DELAY_MS", "0"))
    return random_delay(milliseconds / 1000) if milliseconds > 0 else None


def full_layers(kvcache: Any, page_size: int) -> tuple[DevicePool, list[int]]:
    """The pool of the layers that attend all of a context, and the model's numbers of these.

    Raises:
        ConfigError: a pool that is neither plain MHA/GQA nor plain MLA.
    """
    if isinstance(kvcache, HybridLinearKVPool):
        numbers = kvcache.full_attention_layer_id_mapping
        return device_pool(kvcache.full_kv_pool, page_size), sorted(
            numbers, key=numbers.__getitem__
        )
    if not isinstance(kvcache, SWAKVPool):
        pool = device_pool(kvcache, page_size)
        return pool, list(range(pool.layout.num_layers))
    return device_pool(kvcache.full_kv_pool, page_size), _numbers(kvcache, is_window=False)


def window_layers(kvcache: Any, page_size: int, window: int | None) -> list[EndLayers]:
    """The layers with a sliding window of so many tokens, where they have a pool of their own."""
    if not isinstance(kvcache, SWAKVPool):
        return []
    assert window is not None
    pool = device_pool(kvcache.swa_kv_pool, page_size)
    # As many as SGLang's component asks for (`SWAComponent.build_external_linker_transfer`).
    return [EndLayers(pool, _numbers(kvcache, is_window=True), -(-window // page_size))]


def state_layers(requests: Any) -> list[EndLayers]:
    """The layers whose requests have a state (Mamba, linear attention, short convolutions), from
    SGLang's pool of requests.

    Raises:
        ConfigError: states of which a part lies elsewhere.
    """
    if not isinstance(requests, HybridReqToTokenPool):
        return []
    pool = requests.mamba_pool
    state = pool.mamba_cache
    elsewhere = {
        "in a pool of checkpoints (--enable-int8-mamba-checkpoint)": requests.mamba_ckpt_pool,
        "in a ring of newer tokens (--enable-linear-replayssm)": state.replayssm_d,
        "in other tensors of its slot": pool._slot_siblings or None,
    }
    for where, found in elsewhere.items():
        if found is not None:
            raise ConfigError(f"--enable-smg cannot keep states of which a part lies {where}.")
    if type(pool) is not MambaPool:
        raise ConfigError(f"--enable-smg does not know the pool of states {type(pool).__name__}.")
    tensors = {f"conv{n}": each for n, each in enumerate(state.conv)}
    tensors["temporal"] = state.temporal
    layers = sorted(requests.mamba_map, key=requests.mamba_map.__getitem__)
    return [EndLayers(DevicePool.states(tensors), layers, 1, kind="state")]


def _numbers(kvcache: Any, *, is_window: bool) -> list[int]:
    mine = {at: n for n, (at, windowed) in kvcache.layers_mapping.items() if windowed is is_window}
    return [mine[at] for at in sorted(mine)]


def device_pool(kvcache: Any, page_size: int) -> DevicePool:
    """One of SGLang's KV pools as byte rows.

    Raises:
        ConfigError: a pool that is neither plain MHA/GQA nor MLA (sparse or not), or has more of a
            token than K and V (scales).
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if type(kvcache) is MHATokenToKVPool and not _has_scales(kvcache):
        return DevicePool.mha(kvcache.k_buffer, kvcache.v_buffer, page_size, kvcache.dtype)
    if _is_sparse(kvcache):
        return _sparse_pool(kvcache, page_size)
    if has_latents(kvcache):
        return DevicePool.mla(kvcache.kv_buffer, page_size, kvcache.dtype)
    raise ConfigError(
        f"--enable-smg does not know the KV pool {type(kvcache).__name__} of this model or these "
        "flags; start without it."
    )


def _is_sparse(kvcache: Any) -> bool:
    """Whether keys of an indexer lie beside the latents (DeepSeek-V3.2, GLM-5)."""
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    return type(kvcache) is DSATokenToKVPool


def _sparse_pool(kvcache: Any, page_size: int) -> DevicePool:
    """Latents, and the indexer's keys with their scales. Of the latter a page has first all keys
    and then all scales; as pages are copied whole, they go as so many rows of equal length.

    Raises:
        ConfigError: pooled index keys, layers without them, or pages of another size than theirs.
    """
    if kvcache.index_kpool != 1 or any(kvcache.skip_topk_layers) or page_size != kvcache.page_size:
        raise ConfigError(
            "--enable-smg keeps the index keys of sparse attention only where each layer has a key "
            "for each token; start without it."
        )
    slots = kvcache.kv_buffer[0].shape[0]
    latents = [layer.view(torch.uint8) for layer in kvcache.kv_buffer]
    index = kvcache.index_k_with_scale_buffer
    keys = [layer.view(-1, 1, layer.shape[1] // page_size) for layer in index]
    return DevicePool({"kv": latents, "index": [layer[:slots] for layer in keys]}, page_size)


def _has_scales(kvcache: Any) -> bool:
    """Whether tokens have scales of their own beside K and V (fp4); fp8 has the model's."""
    return kvcache.k_scale_buffer is not None or kvcache.native_k_scale_buffer is not None


def has_latents(kvcache: Any) -> bool:
    """Whether tokens are stored as MLA's latents, of which each rank has all."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    pool = kvcache.full_kv_pool if isinstance(kvcache, HybridLinearKVPool) else kvcache
    return type(pool) is MLATokenToKVPool or _is_sparse(pool)


def _metrics(tier: HostTier, server_args: ServerArgs) -> TierMetrics:
    from sglang.srt.runtime_context import get_parallel

    labels = {
        "model_name": server_args.served_model_name or server_args.model_path,
        "tp_rank": str(get_parallel().tp_rank),
    }
    metrics = TierMetrics(labels, tier.read_metrics)
    tier.lookups.observe = metrics.observe_lookup
    return metrics
