"""SGLang attention backend for the CPU: attends only the new queries, reads the pool in place.

A drop-in for `torch_native`, which attends every position of a cached prefix again, and copies all
keys and values of a request for each token that it decodes, and reads a pool of window layers at
the slots of the others. What this one does no better (cross attention) it leaves to torch_native;
what torch_native would silently compute without (attention sinks, a logit cap with a window) it
refuses.

K and V are asked of the pool once a layer: `get_key_buffer` waits there for the layer's load, so
no buffer may be kept from one layer to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from smg_sglang.attention import decode
from smg_sglang.attention.batch import KV, BatchPlan, Rule, attend_new, attend_pool, plan_batch
from smg_sglang.attention.page_attention import find_native
from smg_sglang.engine.attention.layers import ExtendAndDecode, asked_in_vain
from smg_sglang.engine.streams.table import host_parts, of_batch
from smg_sglang.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class CpuAttentionBackend(ExtendAndDecode, TorchNativeAttnBackend):
    """Extend, decode and mixed batches; MHA, GQA and MLA. All calls come from one thread."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.plan: BatchPlan | None = None
        self._windowed: dict[tuple[int, bool], BatchPlan] = {}
        self._kernel = find_native(torch.get_num_threads())
        if self._kernel is None:
            decode.warm_up(self.token_to_kv_pool.dtype)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the batch; SGLang calls this once before the layers of a forward pass."""
        super().init_forward_metadata(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_target_verify() or mode.is_draft_extend_v2():
            raise ConfigError("--attention-backend smg has no speculative decoding")
        self.plan = None if mode.is_idle() else self._plan(forward_batch)
        self._windowed.clear()

    def _plan(self, forward_batch: ForwardBatch) -> BatchPlan:
        rows, lengths, new = _shape_of(forward_batch)
        table = self.req_to_token_pool.req_to_token
        streams = of_batch(forward_batch)
        if not any(stream is not None and stream.resident_from for stream in streams):
            slots = [table[row, :length] for row, length in zip(rows, lengths, strict=True)]
            return plan_batch(slots, new, kernel=self._kernel)
        begins, hosts, reader = host_parts(streams)
        where = zip(rows, begins, lengths, strict=True)
        slots = [table[row, begin:length] for row, begin, length in where]
        return plan_batch(slots, new, hosts, reader, self._kernel)

    def _plan_window(self, forward_batch: ForwardBatch, layer: RadixAttention) -> BatchPlan:
        """For layers with this window: of what comes before the new tokens only what it holds."""
        window, pool = layer.sliding_window_size, self.token_to_kv_pool
        translated = self.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]
        if (window, translated) not in self._windowed:
            table = self.req_to_token_pool.req_to_token
            slots = [
                table[row, max(0, length - count - window) : length]
                for row, length, count in zip(*_shape_of(forward_batch), strict=True)
            ]
            if translated:
                slots = [pool.translate_loc_from_full_to_swa(each) for each in slots]
            new = _shape_of(forward_batch)[2]
            self._windowed[window, translated] = plan_batch(slots, new, kernel=self._kernel)
        return self._windowed[window, translated]

    def _forward(  # noqa: PLR0917  # SGLang's signature
        self,
        stock: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q [N, heads * dim], returns [N, heads * v_dim]."""
        _refuse_unknown(layer, kwargs)
        if self._is_stock(layer, forward_batch):
            return stock(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _is_stock(self, layer: RadixAttention, forward_batch: ForwardBatch) -> bool:
        """Whether torch_native does this layer."""
        stock = layer.is_cross_attention or forward_batch.encoder_lens is not None
        if (stock or _has_window(layer)) and self.plan is not None and self.plan.host is not None:
            # `options.refusals` refuses such models at start; wrong text would be worse.
            raise ConfigError(
                f"layer {layer.layer_id} has a sliding window or cross attention, which cannot "
                "read host memory: start without --smg-stream-context"
            )
        return stock

    def _attend(  # noqa: PLR0917  # SGLang's signature
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        assert self.plan is not None, "init_forward_metadata comes before the layers"
        pool, plan = self.token_to_kv_pool, self.plan
        if save_kv_cache and k is not None and v is not None:
            place = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            pool.set_kv_buffer(layer, place, k, v)
        stored = KV(pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        rule = Rule(layer.scaling, causal, layer.logit_cap)
        if _has_window(layer):
            rule = replace(rule, window=layer.sliding_window_size)
            plan = self._plan_window(forward_batch, layer)
        if k is not None and v is not None and _is_all(k, stored.k, plan):
            attend_new(q, KV(k, v), plan, rule, out)
        else:
            attend_pool(q, stored, plan, rule, out, layer.layer_id)
        return out.view(q.shape[0], -1)


def _shape_of(forward_batch: ForwardBatch) -> tuple[list[int], list[int], list[int]]:
    """Rows of the token table, lengths, and how many of the tokens are new, by request."""
    lengths = forward_batch.seq_lens.tolist()
    is_decode = forward_batch.forward_mode.is_decode()
    new = [1] * len(lengths) if is_decode else forward_batch.extend_seq_lens.tolist()
    return forward_batch.req_pool_indices.tolist(), lengths, new


def _has_window(layer: RadixAttention) -> bool:
    return layer.sliding_window_size not in (None, -1)


def _is_all(k: torch.Tensor, k_pool: torch.Tensor, plan: BatchPlan) -> bool:
    """Whether k, as it came, is all there is to attend to, bit for bit as in the pool.

    k of another shape than the pool's is MLA's, expanded for prompts without a prefix.
    """
    if k.shape[1:] == k_pool.shape[1:] and k.dtype != k_pool.dtype:
        return False
    return all(request.all_new for request in plan.single + plan.longer)


def _refuse_unknown(layer: RadixAttention, kwargs: dict[str, Any]) -> None:
    """Raise rather than compute without something that the model counts on."""
    asked = asked_in_vain(layer, kwargs)
    if layer.logit_cap > 0 and _has_window(layer):
        asked.append("a logit cap with a sliding window")
    if asked:
        raise ConfigError(
            f"layer {layer.layer_id} asks attention for {', '.join(asked)}, which the CPU backends "
            "smg and torch_native do not have: this model needs a GPU"
        )
