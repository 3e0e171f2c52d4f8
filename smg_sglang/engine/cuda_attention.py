"""SGLang attention backend for CUDA: SGLang's own for FlashInfer, and ours for the batches that
have streams among their requests.

A batch without streams is SGLang's own in every respect, CUDA graphs included. One with streams
runs without graphs (`cuda_graphs` makes SGLang's graph runners ask `can_run_graph`): how many
segments it reads differs from step to step, and a graph could not wait for copies.

Has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from smg_sglang.attention import flashinfer
from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.device import DeviceAttention, DevicePlan, slots_of
from smg_sglang.attention.flashinfer import Wrappers, one_slot_pages
from smg_sglang.engine.attention_backend import asked_in_vain
from smg_sglang.engine.stream import Stream
from smg_sglang.engine.streams import of_batch
from smg_sglang.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class CudaAttentionBackend(FlashInferAttnBackend):
    """FlashInfer, and streams beside it; MHA and GQA in bf16 and fp16.

    All calls come from the scheduler thread, with the forward stream current.
    """

    def __init__(self, model_runner: Any, **stock: Any) -> None:
        """Raises ConfigError for models whose contexts cannot be streamed on CUDA."""
        flashinfer.check_dtypes(model_runner.dtype, model_runner.kv_cache_dtype)
        super().__init__(model_runner, **stock)
        one_pool = self.num_wrappers == 1 and not self.kv_index_translator.reads_are_translated
        model = model_runner.model_config
        if not one_pool or model.head_dim != model.v_head_dim:
            raise ConfigError(
                "--smg-stream-context on CUDA needs a model that attends all of its context in one "
                "KV pool (no sliding windows, no encoder), values as wide as keys; leave it out"
            )
        # SGLang's kernels and ours run one after another on the forward stream.
        workspace = self.workspace_buffer
        self._ours = DeviceAttention(Wrappers(workspace.device, workspace))
        #: The batch that is computed with streams, and its plan. A graph runner's batches, and any
        #: that SGLang plans in another way, are not this object.
        self._streamed: tuple[ForwardBatch, DevicePlan] | None = None

    def can_run_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether a CUDA graph can compute the batch, as far as attention is concerned."""
        return not any(of_batch(forward_batch))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the batch; SGLang calls this once before the layers of an eager forward pass."""
        streams = of_batch(forward_batch)
        if not any(streams):
            self._streamed = None
            super().init_forward_metadata(forward_batch)
            return
        _refuse_mode(forward_batch)
        self.forward_metadata = None
        self._streamed = forward_batch, self._plan(forward_batch, streams)

    def _plan(self, forward_batch: ForwardBatch, streams: list[Stream | None]) -> DevicePlan:
        table = self.req_to_token_pool.req_to_token
        ends = forward_batch.seq_lens_cpu.tolist()
        if forward_batch.forward_mode.is_decode():
            new = [1] * len(ends)
        else:
            new = list(forward_batch.extend_seq_lens_cpu)
        begins = [stream.resident_from if stream is not None else 0 for stream in streams]
        slots = slots_of(table, forward_batch.req_pool_indices, begins, ends)
        keys = one_slot_pages(slots, [end - begin for begin, end in zip(begins, ends, strict=True)])
        hosts = [stream.runs if stream is not None else [] for stream in streams]
        reader = next(stream for stream in streams if stream is not None).table.reader
        return self._ours.plan(keys, new, hosts, reader)

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend the new tokens; as `_forward`."""
        return self._forward(super().forward_extend, *args, **kwargs)

    def forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend one new token a request; as `_forward`."""
        return self._forward(super().forward_decode, *args, **kwargs)

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
        """q [N, heads * dim], returns [N, heads * dim]."""
        plan = self._plan_of(forward_batch)
        if plan is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        _refuse_unknown(layer, kwargs)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, plan)

    def _attend(  # noqa: PLR0917  # SGLang's signature
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        plan: DevicePlan,
    ) -> torch.Tensor:
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc.for_layer(forward_batch, layer), k, v)
        # Asked for anew in each layer: it waits there for what is loaded for other requests.
        stored = KV(*pool.get_kv_buffer(layer.layer_id))
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        out = torch.empty_like(q)
        rule = Rule(layer.scaling, causal=True, logit_cap=layer.logit_cap)
        self._ours.attend(q, stored, plan, rule, out, layer.layer_id)
        return out.view(q.shape[0], -1)

    def _plan_of(self, forward_batch: ForwardBatch) -> DevicePlan | None:
        if self._streamed is None or self._streamed[0] is not forward_batch:
            return None
        return self._streamed[1]


def _refuse_mode(forward_batch: ForwardBatch) -> None:
    mode = forward_batch.forward_mode
    if not mode.is_decode() and not mode.is_extend_without_speculative():
        raise ConfigError(f"a streamed context cannot be computed in SGLang's mode {mode.name}")


def _refuse_unknown(layer: RadixAttention, kwargs: dict[str, Any]) -> None:
    """Raise rather than compute without something that the model counts on."""
    asked = asked_in_vain(layer, kwargs)
    if layer.sliding_window_size > -1:
        asked.append("a sliding window")
    if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
        asked.append("attention that is not causal")
    if asked:
        raise ConfigError(
            f"layer {layer.layer_id} asks attention for {', '.join(asked)}, which a context that "
            "is streamed from host memory cannot have on CUDA; leave --smg-stream-context out"
        )
