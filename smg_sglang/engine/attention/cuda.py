"""SGLang attention backends for CUDA: SGLang's own, and ours for the batches that read host memory.

There are three, for what `attention/kernels.py` chooses: over SGLang's backends for FlashInfer and
for FlashInfer's MLA, and over its Triton backend for what FlashInfer has no kernels for. A batch
that is all on the device is SGLang's own in every respect, CUDA graphs included. One that reads
host memory runs without graphs (`graphs` makes SGLang's graph runners ask `can_run_graph`):
how many segments it reads differs from step to step, and a graph could not wait for copies.

**MLA.** SGLang's models choose by the backend's name how to compute: prompts over keys and values
expanded from latents, or, with the expansion absorbed by the queries, over the latents themselves.
Host memory has latents, so a batch that reads it must be absorbed, and goes by a name of ours
(`absorbed`); all others go by the name of SGLang's backend, and are computed as under that.

Has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.device import DeviceAttention, DevicePlan, slots_of
from smg_sglang.attention.kernels import Kind, check_dtypes, kind_of, make_kernels
from smg_sglang.attention.paged import Heads, one_slot_pages
from smg_sglang.engine.attention.layers import ExtendAndDecode, asked_in_vain
from smg_sglang.engine.options.record import NAME
from smg_sglang.engine.streams.stream import Stream
from smg_sglang.engine.streams.table import host_parts, of_batch
from smg_sglang.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Streaming(ExtendAndDecode):
    """Streams, beside the SGLang backend that comes next in the order of classes.

    All calls come from the scheduler thread, with the forward stream current.
    """

    #: SGLang's name for the backend that it is, but for batches that read host memory.
    stock: str
    kind: Kind
    #: SGLang's Triton backend does without, but a plan of ours needs them.
    needs_cpu_seq_lens = True
    #: The batch that reads host memory, and its plan. A graph runner's batches, and any that SGLang
    #: plans in another way, are not this object.
    _streamed: tuple[ForwardBatch, DevicePlan] | None = None

    def __init__(self, model_runner: Any, **stock: Any) -> None:
        """Raises ConfigError for models whose contexts cannot be streamed on CUDA."""
        super().__init__(model_runner, **stock)  # type: ignore[call-arg]
        translated = self.kv_index_translator.reads_are_translated  # type: ignore[attr-defined]
        if getattr(self, "num_wrappers", 1) != 1 or translated:
            raise ConfigError(
                "--smg-stream-context on CUDA needs a model that attends all of its context in one "
                "KV pool (no sliding windows, no encoder); leave it out"
            )
        # SGLang's kernels and ours run one after another on the forward stream.
        workspace = getattr(self, "workspace_buffer", None)
        device = torch.device(model_runner.device) if workspace is None else workspace.device
        self._ours = DeviceAttention(make_kernels(self.kind, device, workspace))

    @property
    def _name(self) -> str:
        return self.stock if self._streamed is None else NAME

    def _named_by_sglang(self, name: str | None) -> None:
        """SGLang sets these to what `--attention-backend` says; models ask them before each layer.
        Which batch they ask for they do not say: it is the one that was planned last."""

    prefill_attention_backend_str = property(lambda self: self._name, _named_by_sglang)
    decode_attention_backend_str = property(lambda self: self._name, _named_by_sglang)

    def can_run_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether a CUDA graph can compute the batch, as far as attention is concerned."""
        return not _reads_host_memory(of_batch(forward_batch))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the batch; SGLang calls this once before the layers of an eager forward pass."""
        streams = of_batch(forward_batch)
        if not _reads_host_memory(streams):
            self._streamed = None
            super().init_forward_metadata(forward_batch)  # type: ignore[misc]
            return
        _refuse_mode(forward_batch)
        self.forward_metadata = None
        self._streamed = forward_batch, self._plan(forward_batch, streams)

    def _plan(self, forward_batch: ForwardBatch, streams: list[Stream | None]) -> DevicePlan:
        table = self.req_to_token_pool.req_to_token  # type: ignore[attr-defined]
        ends = forward_batch.seq_lens_cpu.tolist()
        if forward_batch.forward_mode.is_decode():
            new = [1] * len(ends)
        else:
            new = list(forward_batch.extend_seq_lens_cpu)
        begins, hosts, reader = host_parts(streams)
        slots = slots_of(table, forward_batch.req_pool_indices, begins, ends)
        keys = one_slot_pages(slots, [end - begin for begin, end in zip(begins, ends, strict=True)])
        return self._ours.plan(keys, new, hosts, reader)

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
        """q [N, heads * dim], returns [N, heads * v_dim].

        MLA's q and k may come in two: what is as wide as values, and `q_rope` and `k_rope`.
        """
        plan = self._plan_of(forward_batch)
        if plan is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        q_rope, k_rope = kwargs.pop("q_rope", None), kwargs.pop("k_rope", None)
        _refuse_unknown(layer, kwargs)
        if save_kv_cache and k is not None and v is not None:
            self._save(layer, forward_batch, k, v, k_rope)
        if q_rope is not None:
            heads = layer.tp_q_head_num
            q = torch.cat([q.view(len(q), heads, -1), q_rope.view(len(q), heads, -1)], dim=-1)
        return self._attend(q, layer, plan)

    def _save(
        self,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        k: torch.Tensor,
        v: torch.Tensor,
        k_rope: torch.Tensor | None,
    ) -> None:
        pool = self.token_to_kv_pool  # type: ignore[attr-defined]
        place = KVWriteLoc.for_layer(forward_batch, layer)
        if k_rope is not None:
            pool.set_mla_kv_buffer(layer, place, k, k_rope)
        else:
            pool.set_kv_buffer(layer, place, k, v)

    def _attend(self, q: torch.Tensor, layer: RadixAttention, plan: DevicePlan) -> torch.Tensor:
        # Asked for anew in each layer: it waits there for what is loaded for other requests.
        pool = self.token_to_kv_pool  # type: ignore[attr-defined]
        stored = KV(*pool.get_kv_buffer(layer.layer_id))
        _refuse_expanded(layer, stored)
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        rule = Rule(layer.scaling, causal=True, logit_cap=layer.logit_cap)
        self._ours.attend(q, stored, plan, rule, out, layer.layer_id)
        return out.view(q.shape[0], -1)

    def _plan_of(self, forward_batch: ForwardBatch) -> DevicePlan | None:
        if self._streamed is None or self._streamed[0] is not forward_batch:
            return None
        return self._streamed[1]


class PagedBackend(Streaming, FlashInferAttnBackend):
    """Keys and values, MHA and GQA, in bf16 and fp16."""

    stock, kind = "flashinfer", Kind.PAGED


class LatentBackend(Streaming, FlashInferMLAAttnBackend):
    """MLA in bf16 and fp16."""

    stock, kind = "flashinfer", Kind.LATENT


class ExactBackend(Streaming, TritonAttnBackend):
    """What FlashInfer has no kernels for: fp32, values of another width, MLA of odd sizes."""

    stock, kind = "triton", Kind.EXACT


def create(model_runner: Any) -> Streaming:
    """The backend for this model runner; ConfigError for models that cannot be streamed on CUDA."""
    check_dtypes(model_runner.dtype, model_runner.kv_cache_dtype)
    latent = model_runner.use_mla_backend
    if latent:
        _register_absorbed()
    kind = kind_of(_heads(model_runner), latent)
    if kind is Kind.EXACT:
        return ExactBackend(model_runner)
    if kind is Kind.LATENT:
        return LatentBackend(model_runner)
    # What SGLang's registry does for FlashInfer, but with our subclass of its class.
    return PagedBackend(model_runner, init_new_workspace=model_runner.init_new_workspace)


def _heads(model_runner: Any) -> Heads:
    """Of the attention of this rank over what its pool has."""
    model, ranks = model_runner.model_config, get_parallel().attn_tp_size
    query = model.num_attention_heads // ranks
    if not model_runner.use_mla_backend:
        kv = model.get_num_kv_heads(ranks)
        return Heads(query, kv, model.head_dim, model.v_head_dim, model_runner.dtype)
    width = model.kv_lora_rank + model.qk_rope_head_dim
    return Heads(query, 1, width, model.kv_lora_rank, model_runner.dtype)


def absorbed(attn: Any, forward_batch: ForwardBatch) -> Any:
    """How SGLang's models with latents compute a batch that goes by our name."""
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    return AttnForwardMethod.MLA


def _register_absorbed() -> None:
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )

    AttentionBackendRegistry.register(NAME, absorbed)


def _reads_host_memory(streams: list[Stream | None]) -> bool:
    """Whether any has tokens that are not on the device."""
    return any(stream is not None and stream.resident_from for stream in streams)


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


def _refuse_expanded(layer: RadixAttention, stored: KV) -> None:
    if stored.k.shape[1:] != (layer.tp_k_head_num, layer.head_dim):
        raise ConfigError(
            f"layer {layer.layer_id} attends keys that it has expanded from latents (MLA), while "
            "host memory has the latents: this model cannot be streamed on CUDA; leave "
            "--smg-stream-context out"
        )
