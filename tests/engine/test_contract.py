"""What we rely on inside SGLang 0.5.23, where its interfaces are young.

When one of these fails with a new SGLang, the failure ends on a line that says which of our files
depends on what changed.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import pkgutil
import re

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchResult
from sglang.srt.mem_cache.unified_cache import unified_cache_linker

from smg_sglang.engine.cache.linker import SmgLinker, device_pool, has_latents
from smg_sglang.engine.cache.linker_wrapper import SmgLinkerWrapper
from smg_sglang.engine.cache.radix_cache import SmgRadixCache
from smg_sglang.errors import ConfigError
from smg_sglang.transfer.movers import make_mover
from tests.transfer import worlds

from .contract import needed_by

PAGE = 16

# ---- shapes: names and parameters ----

LINKER = "mem_cache.unified_cache.unified_cache_linker"
WRAPPER = f"{LINKER}.UnifiedCacheLinkerWrapper"
STORAGE = "mem_cache.hicache_storage.HiCacheStorage"
CACHE = "mem_cache.unified_radix_cache.UnifiedRadixCache"
CORE = "mem_cache.rust_tree_core.adapter.RustUnifiedTreeCore"
UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
SENDER = "managers.scheduler_components.output_sender.SenderWrapper"
CONTROLLER = "managers.data_parallel_controller.DataParallelController"
STATE = "managers.scheduler_components.internal_state.SchedulerInternalStateController"

SIGNATURES = [
    # what we implement
    ("cache/linker.py", f"{LINKER}.UnifiedCacheLinker.lookup", "self rid transfers"),
    ("cache/linker.py", f"{LINKER}.UnifiedCacheLinker.load", "self rid transfers"),
    ("cache/linker.py", f"{LINKER}.UnifiedCacheLinker.start_layer_wise_loading", "self"),
    (
        "cache/linker.py",
        f"{LINKER}.UnifiedCacheLinker.finish_layer_wise_loading",
        "self counter_index",
    ),
    ("cache/linker.py", f"{LINKER}.UnifiedCacheLinker.cancel_queued_load", "self rid"),
    ("cache/linker.py", f"{LINKER}.UnifiedCacheLinker.offload", "self transfers session_id"),
    ("cache/linker.py", f"{LINKER}.UnifiedCacheLinker.record_offload_ready", "self"),
    # what we override
    ("cache/linker_wrapper.py", f"{WRAPPER}.__init__", "self cache cache_linker"),
    ("cache/linker_wrapper.py", f"{WRAPPER}.match", "self key req result"),
    ("cache/linker_wrapper.py", f"{WRAPPER}._offload_node", "self node_id transfers"),
    ("cache/linker_wrapper.py", f"{WRAPPER}.release_request", "self rid"),
    ("cache/radix_cache.py", f"{CACHE}.init_cache_linker", "self cache_linker"),
    ("cache/radix_cache.py", f"{CACHE}._evict_device_leaf", "self node_id tracker"),
    ("cache/radix_cache.py", f"{CACHE}.on_release", "self req checkpointed"),
    # what we call
    ("cache/linker_wrapper.py", f"{WRAPPER}._tail_hashes", "self key result device_hit_len"),
    (
        "cache/linker_wrapper.py",
        "mem_cache.utils.get_storage_hash_str",
        "key prior_hash page_size",
    ),
    (
        "cache/linker_wrapper.py",
        f"{WRAPPER}._sync_restorable_prefix",
        "self restorable num_pages device_hit_pages",
    ),
    ("cache/linker_wrapper.py", f"{CACHE}.inc_lock_ref", "self node_id skip_lock_components"),
    ("cache/linker_wrapper.py", f"{CACHE}.dec_lock_ref", "self node_id params skip_swa"),
    ("cache/linker_wrapper.py", f"{CORE}.get_prefix_hash_values", "self node_id"),
    ("cache/linker_wrapper.py", f"{CORE}.get_hash_values", "self node_id"),
    ("cache/linker_wrapper.py", f"{CORE}.prefetch_anchor_info", "self node_id"),
    ("cache/linker_wrapper.py", f"{CORE}.root_node_handle", "self extra_key"),
    (
        "cache/linker_wrapper.py",
        f"{CORE}.collect_full_device_indices",
        "self from_node_id until_node_id",
    ),
    ("cache/linker_wrapper.py", f"{CORE}.mark_external_linker_offload_pending", "self node_id"),
    ("options/refusals.py", "arg_groups.model_override_base.model_config_of", "server_args"),
    ("options/refusals.py", "mem_cache.kv_cache_builder.uses_ssm_state", "model_config"),
    (
        "cache/radix_cache.py",
        "managers.schedule_batch.split_cached_prefix_by_tier",
        "prefix_len host_hit_len storage_hit_len storage_hit_start host_hit_is_storage",
    ),
    ("storage/backend.py", f"{STORAGE}.batch_get_v2", "self transfers extra_info"),
    ("storage/backend.py", f"{STORAGE}.batch_set_v2", "self transfers extra_info"),
    ("storage/backend.py", f"{STORAGE}.batch_exists", "self keys extra_info"),
    (
        "storage/backend.py",
        f"{STORAGE}.register_mem_host_pool_v2",
        "self host_pool host_pool_name",
    ),
    ("cache/hints.py", f"{CORE}.collect_path_info", "self end_node_ids"),
    ("cache/hints.py", f"{CACHE}.lock", "self node_id skip_lock_components"),
    ("cache/hints.py", f"{CACHE}.unlock", "self lock"),
    ("cache/hint_messages.py", "managers.io_struct.hook_custom_types", "new_types"),
    (
        "seams/hint_route.py",
        "managers.communicator.FanOutCommunicator.__init__",
        "self send fan_out mode",
    ),
    (
        "seams/hint_route.py",
        "entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",
        "self request is_multimodal output_constrained",
    ),
    # what we hook
    ("seams/plugin.py", "managers.scheduler.Scheduler.init_request_dispatcher", "self"),
    ("seams/plugin.py", "server_args.ServerArgs.add_cli_args", "parser"),
    ("seams/plugin.py", "server_args.ServerArgs.from_cli_args", "args"),
    ("seams/plugin.py", "server_args.ServerArgs.resolve_once", "self"),
    ("seams/plugin.py", "server_args.ServerArgs.check_server_args", "self"),
    (
        "seams/plugin.py",
        "utils.common.kill_process_tree",
        "parent_pid include_parent skip_pid wait_timeout",
    ),
    ("seams/plugin.py", "mem_cache.registry.create_unified_radix_cache", "ctx cache_class"),
    (
        "seams/plugin.py",
        "managers.schedule_batch.release_req",
        "req remaing_req_count req_to_token_pool token_to_kv_pool_allocator tree_cache "
        "hisparse_coordinator offload_kv",
    ),
    ("seams/plugin.py", f"{STATE}.get_internal_state", "self recv_req"),
    ("split/publication.py", f"{SENDER}.send_output", "self output recv_obj"),
    (
        "split/controller.py",
        f"{CONTROLLER}.__init__",
        "self server_args port_args run_scheduler_process_func prelaunched_schedulers",
    ),
    ("split/controller.py", f"{CONTROLLER}.get_init_info", "self"),
    ("split/controller.py", f"{CONTROLLER}.event_loop", "self"),
    ("seams/plugin.py", f"{UPDATER}.update_weights_from_disk", "self recv_req"),
    ("seams/plugin.py", f"{UPDATER}.update_weights_from_ipc", "self recv_req"),
    ("seams/plugin.py", f"{UPDATER}.begin_weight_update", "self recv_req"),
    ("seams/plugin.py", f"{UPDATER}.end_weight_update", "self recv_req"),
    (
        "attention/graphs.py",
        "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",
        "self forward_batch",
    ),
    (
        "attention/graphs.py",
        "model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph",
        "self forward_batch",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_backend.FlashInferAttnBackend.__init__",
        "self model_runner skip_prefill kv_indptr_buf kv_last_page_len_buf init_new_workspace",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_backend.FlashInferAttnBackend.forward_extend",
        "self q k v layer forward_batch save_kv_cache",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_backend.FlashInferAttnBackend.forward_decode",
        "self q k v layer forward_batch save_kv_cache",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_backend.FlashInferAttnBackend.init_forward_metadata",
        "self forward_batch",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_mla_backend.FlashInferMLAAttnBackend.__init__",
        "self model_runner skip_prefill kv_indptr_buf q_indptr_decode_buf",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_mla_backend.FlashInferMLAAttnBackend.forward_extend",
        "self q k v layer forward_batch save_kv_cache q_rope k_rope",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_mla_backend.FlashInferMLAAttnBackend.forward_decode",
        "self q k v layer forward_batch save_kv_cache q_rope k_rope",
    ),
    (
        "attention/cuda.py",
        "layers.attention.flashinfer_mla_backend.FlashInferMLAAttnBackend.init_forward_metadata",
        "self forward_batch",
    ),
    (
        "attention/cuda.py",
        "layers.attention.triton_backend.TritonAttnBackend.__init__",
        "self model_runner skip_prefill kv_indptr_buf dllm_fa4",
    ),
    (
        "attention/cuda.py",
        "layers.attention.triton_backend.TritonAttnBackend.forward_extend",
        "self q k v layer forward_batch save_kv_cache sinks score_mod aux_tensors",
    ),
    (
        "attention/cuda.py",
        "layers.attention.triton_backend.TritonAttnBackend.forward_decode",
        "self q k v layer forward_batch save_kv_cache sinks score_mod aux_tensors",
    ),
    (
        "attention/cuda.py",
        "layers.attention.triton_backend.TritonAttnBackend.init_forward_metadata",
        "self forward_batch",
    ),
    (
        "attention/cuda.py",
        "mem_cache.memory_pool.MLATokenToKVPool.set_mla_kv_buffer",
        "self layer loc_info cache_k_nope cache_k_rope layer_id_override",
    ),
    (
        "attention/cuda.py",
        "models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
        "backend_name handler_func",
    ),
    (
        "attention/backend.py",
        "layers.attention.attention_registry.register_attention_backend",
        "name",
    ),
    (
        "attention/backend.py",
        "arg_groups.choices.add_attention_backend_choices",
        "iterable",
    ),
]


@pytest.mark.parametrize(("ours", "target", "parameters"), SIGNATURES, ids=lambda v: v)
def test_a_signature_is_what_we_wrote_against(ours, target, parameters):
    function = pkgutil.resolve_name(f"sglang.srt.{target}")
    found = " ".join(inspect.signature(function).parameters)
    assert found == parameters, f"smg_sglang/engine/{ours} depends on {target}"


@needed_by("engine/cache/linker.py")
def test_a_linker_has_these_methods_to_implement():
    assert unified_cache_linker.UnifiedCacheLinker.__abstractmethods__ == {
        "lookup",
        "load",
        "start_layer_wise_loading",
        "finish_layer_wise_loading",
        "cancel_queued_load",
        "offload",
        "num_completed_offloads",
        "pop_completed_offload",
        "reset",
        "close",
    }
    assert not inspect.isabstract(SmgLinker)


@needed_by("engine/cache/linker.py")
def test_a_linker_is_built_with_these_keywords():
    from sglang.srt.mem_cache.unified_cache import linker_factory

    source = inspect.getsource(linker_factory.create_unified_cache_linker)
    passed = {"components", "extra_config", "forward_stream"}
    assert all(f"{name}=" in source for name in passed)
    assert set(inspect.signature(SmgLinker).parameters) == {"server_args", "params"} | passed


@needed_by("engine/cache/linker.py (full_layers, state_layers)")
def test_pools_of_states_say_which_layers_they_have_and_where_their_bytes_are():
    from sglang.srt.mem_cache import memory_pool

    hybrid = inspect.getsource(memory_pool.HybridLinearKVPool)
    assert "self.full_attention_layer_id_mapping" in hybrid and "self.full_kv_pool" in hybrid
    requests = inspect.getsource(memory_pool.HybridReqToTokenPool)
    for name in ("mamba_pool", "mamba_map", "mamba_ckpt_pool"):
        assert f"self.{name}" in requests
    assert hasattr(memory_pool.HybridReqToTokenPool, "register_layer_transfer_counter")
    fields = {field.name for field in dataclasses.fields(memory_pool.MambaPool.State)}
    assert {name for name in fields if not name.startswith("replayssm_")} == {"conv", "temporal"}
    assert memory_pool.MambaPool._slot_siblings == ()


@needed_by("engine/cache/linker_wrapper.py (spill_state)")
def test_a_node_that_host_memory_has_is_not_offered_again():
    from sglang.srt.mem_cache.unified_cache import unified_tree_core_interface as interface

    core = interface.UnifiedTreeCoreInterface
    for name in ("build_external_linker_offload_transfers", "get_component_device_value"):
        assert hasattr(core, name)
    assert "mamba_exist" in {f.name for f in dataclasses.fields(InsertResult)}
    assert "mamba_value" in {f.name for f in dataclasses.fields(InsertParams)}


@needed_by("engine/cpu/convolutions.py")
def test_convolutions_ask_for_triton_by_these_names():
    from sglang.srt.layers.attention.mamba import causal_conv1d

    for function, kernel in (
        (causal_conv1d.causal_conv1d_fn, "_causal_conv1d_fn_triton("),
        (causal_conv1d.causal_conv1d_update, "_causal_conv1d_update_triton("),
    ):
        assert kernel in inspect.getsource(function)


@needed_by("engine/cache/radix_cache.py")
def test_records_have_the_fields_we_fill():
    assert unified_cache_linker._PendingOffload._fields == (
        "lock_node_id",
        "lock_params",
        "publish_node_ids",
    )
    assert unified_cache_linker.ExternalCacheHitMarker._fields == ("tail_hashes", "device_hit_len")
    used = {"device_prefix_len", "last_device_node", "best_match_node", "last_host_node"}
    assert used | {"host_hit_length"} <= set(MatchResult._fields)


@needed_by("engine/seams/plugin.py (_around_prepare_for_extend)")
def test_a_request_knows_whether_its_hits_were_counted():
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    source = inspect.getsource(Req.__init__)
    for name in ("_cache_breakdown_computed", "cached_tokens_device", "origin_input_ids"):
        assert f"self.{name} = " in source
    assert list(inspect.signature(ScheduleBatch.prepare_for_extend).parameters) == ["self"]


@needed_by("engine/seams/plugin.py (CONTROLLER_TITLE)")
def test_the_controller_process_has_its_title_before_it_loads_plugins():
    from sglang.srt.managers import data_parallel_controller

    from smg_sglang.engine.seams.plugin import CONTROLLER_TITLE

    source = inspect.getsource(data_parallel_controller.run_data_parallel_controller_process)
    title = source.index(f'setproctitle("{CONTROLLER_TITLE}")')
    assert title < source.index("load_plugins()") < source.index("= DataParallelController(")


@needed_by("engine/split/controller.py (PhaseDataParallelController)")
def test_the_controller_process_uses_only_what_the_phase_controller_has():
    from sglang.srt.managers import data_parallel_controller

    source = inspect.getsource(data_parallel_controller.run_data_parallel_controller_process)
    assert set(re.findall(r"controller\.(\w+)", source)) == {
        "scheduler_procs",
        "get_init_info",
        "local_kv_event_sources",
        "event_loop",
    }


@needed_by("engine/split/publication.py")
def test_a_sender_has_no_socket_but_on_the_first_rank():
    from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper

    assert SenderWrapper(None).socket is None


@needed_by("engine/cache/linker_wrapper.py (spill_retracted)")
def test_a_request_has_what_its_spill_needs():
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo

    source = inspect.getsource(Req)
    for name in ("skip_radix_cache_insert", "full_untruncated_fill_ids", "extra_key", "cache_salt"):
        assert f"self.{name}" in source
    for name in ("refresh_fill_ids", "owned_kv_len", "finished"):
        assert list(inspect.signature(getattr(Req, name)).parameters) == ["self"]
    assert hasattr(ReqKvInfo, "holds_kv")
    assert "req_pool_idx" in inspect.getsource(ReqKvInfo)


@needed_by("engine/seams/offline.py")
def test_an_engine_says_what_builds_its_arguments():
    from sglang.srt.entrypoints.engine import Engine

    assert "self.server_args_class(**kwargs)" in inspect.getsource(Engine.__init__)


@needed_by("engine/options/record.py (ATTRIBUTE)")
def test_our_mark_survives_resolution_and_pickling():
    from sglang.srt.server_args import ServerArgs

    from smg_sglang.engine.options.record import ATTRIBUTE

    record = ServerArgs(model_path="dummy", device="cpu")
    record._resolution_finished = True
    setattr(record, ATTRIBUTE, {"config": {}})
    assert getattr(pickle.loads(pickle.dumps(record)), ATTRIBUTE) == {"config": {}}


def kv_pool(**more):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    shape = {"size": 64, "page_size": PAGE, "head_num": 2, "head_dim": 16, "layer_num": 3}
    where = {"device": "cpu", "enable_memory_saver": False}
    return MHATokenToKVPool(**{"dtype": torch.float32} | shape | where | more)


@needed_by("engine/cache/linker.py (device_pool)")
def test_a_kv_pool_is_rows_of_slots_by_layer():
    layout = device_pool(kv_pool(), PAGE).layout
    assert (layout.num_layers, layout.page_size) == (3, PAGE)
    assert layout.page_bytes == 3 * 2 * PAGE * (2 * 16 * 4)


@needed_by("engine/cache/linker.py (device_pool)")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_a_byte_an_element_and_no_more(dtype):
    """SGLang keeps it as uint8; its scales, one a layer, are the model's."""
    pool = kv_pool(dtype=dtype)
    layout = device_pool(pool, PAGE).layout
    assert pool.store_dtype is torch.uint8
    assert layout.page_bytes == 3 * 2 * PAGE * (2 * 16)
    assert layout.dtype == str(dtype).removeprefix("torch.")


@needed_by("engine/cache/linker.py (device_pool)")
def test_a_pool_with_scales_of_each_token_is_refused():
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import FP4MXBlock16KVCacheMethod

    pool = kv_pool(dtype=torch.float4_e2m1fn_x2, quant_method=FP4MXBlock16KVCacheMethod())
    assert pool.k_scale_buffer is not None
    with pytest.raises(ConfigError, match="does not know the KV pool MHATokenToKVPool"):
        device_pool(pool, PAGE)


@needed_by("engine/cache/linker.py (_sparse_pool)")
def test_index_keys_go_with_the_latents_of_their_page():
    """DeepSeek-V3.2's pool, whose kernels want a GPU: its layout and copies on a CPU."""
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    page = 64
    options = {
        "size": 6 * page, "page_size": page, "dtype": torch.bfloat16, "layer_num": 2,
        "kv_lora_rank": 32, "qk_rope_head_dim": 8, "kv_cache_dim": 40, "index_head_dim": 128, "index_buf_size": 6 * page,
        "device": "cpu", "enable_memory_saver": False,
    }  # fmt: skip
    sglang = DSATokenToKVPool(**options)
    pool = device_pool(sglang, page)
    assert has_latents(sglang)
    assert pool.layout.page_bytes == 2 * page * (40 * 2 + 128 + 4)
    for tensor in (*sglang.kv_buffer, *sglang.index_k_with_scale_buffer):
        tensor.view(torch.uint8).random_(0, 256)
    index = [buffer.clone() for buffer in sglang.index_k_with_scale_buffer]
    slots = torch.arange(2 * page, 4 * page)
    arena, offsets = worlds.make_arena(pool, 2)
    worlds.round_trip(pool, make_mover(pool), slots, slots + page, arena, offsets)
    for layer, before in enumerate(index):
        # Pages 2 and 3 came back as pages 3 and 4: keys and scales of each as they were.
        assert torch.equal(sglang.index_k_with_scale_buffer[layer][3:5], before[2:4])
    with pytest.raises(ConfigError, match="a key for each token"):
        device_pool(DSATokenToKVPool(**options, skip_topk_layers=[False, True]), page)


@needed_by("engine/cache/linker.py (has_latents)")
def test_a_pool_of_latents_is_rows_of_one_part():
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    pool = MLATokenToKVPool(
        size=64,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
    )
    assert has_latents(pool) and not has_latents(kv_pool())
    assert device_pool(pool, PAGE).layout.page_bytes == 3 * PAGE * (32 + 8) * 2


@needed_by("engine/cache/radix_cache.py")
def test_our_classes_override_what_sglang_has():
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    added = {"tier", "host_tier", "spill_before_eviction", "_path", "_path_slots"}
    added |= {"_submit", "before_retraction", "spill_retracted", "release_finished"}
    added |= {"_abc_impl", "streams", "_stream", "_has_failed"}
    added |= {"prefetch", "prefetch_waiting", "tree_evictable_size"}
    added |= {"_fitting", "_spill_window", "prefix_waits", "wait_for_prefix", "host_events"}
    added |= {"hints", "take_kv_hints", "_evict_demoted"}
    added |= {"_find", "waits_for_storage", "spill_state"}
    added |= {"internal_state", "on_weight_update", "least_of_ranks"}
    for ours, theirs in (
        (SmgRadixCache, UnifiedRadixCache),
        (SmgLinkerWrapper, unified_cache_linker.UnifiedCacheLinkerWrapper),
    ):
        names = {name for name in vars(ours) if not name.startswith("__")}
        assert names - added <= set(dir(theirs))
        taken = names & added & set(dir(theirs)) - {"_abc_impl"}
        assert not taken, "SGLang has a method of that name now"


@needed_by("engine/streams/table.py (docs/ordering.md), held by tests/engine/streams/test_order.py")
def test_under_overlap_the_scheduler_and_the_forward_wait_for_each_other():
    from sglang.srt.managers.scheduler import Scheduler

    loop = inspect.getsource(Scheduler.event_loop_overlap)
    launched = loop.index("batch_result = self.run_batch(batch)")
    assert (
        launched < loop.index("self._apply_war_barrier()") < loop.index("self.result_queue.append")
    )
    barrier = inspect.getsource(Scheduler._apply_war_barrier)
    assert "self.schedule_stream.wait_stream(self.forward_stream)" in barrier
    assert "self.schedule_stream.wait_event(ev)" in barrier
    launch = inspect.getsource(Scheduler.run_batch)
    assert "self.forward_stream.wait_stream(self.schedule_stream)" in launch


@needed_by("engine/attention/cuda.py")
def test_an_eager_batch_names_its_requests_and_is_planned_as_it_is_computed():
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner

    fields = ForwardBatch.__dataclass_fields__
    assert {"rids", "seq_lens_cpu", "extend_seq_lens_cpu", "req_pool_indices"} <= fields.keys()
    for mode in ("_execute_decode", "_execute_extend"):
        source = inspect.getsource(getattr(EagerRunner, mode))
        planned = source.index("attn_backend.init_forward_metadata(forward_batch)")
        assert source.index("forward_batch = self.load_batch") < planned
        assert planned < source.index("model_runner.model.forward(")


@needed_by("engine/attention/cuda.py")
def test_models_with_latents_ask_the_backend_for_its_name_and_the_registry_by_it():
    from sglang.srt.models import deepseek_v2
    from sglang.srt.models.deepseek_common import attention_forward_methods

    dispatch = inspect.getsource(deepseek_v2.DeepseekV2AttentionMLA.dispatch_attn_forward_method)
    assert "backend.prefill_attention_backend_str or" in dispatch
    assert "backend.decode_attention_backend_str or" in dispatch
    assert "handler = AttentionBackendRegistry.get_handler(attention_backend)" in dispatch
    core = inspect.getsource(attention_forward_methods.DeepseekMLAForwardMixin.forward_absorb_core)
    assert "self.attn_mqa(\n" in core


@needed_by("engine/attention/backend.py")
def test_the_model_runner_asks_which_backends_expand_prefixes_of_latents():
    from sglang.srt.arg_groups import choices
    from sglang.srt.model_executor.model_runner_components import misc_utils

    gate = inspect.getsource(misc_utils.maybe_disable_chunked_prefix_cache)
    assert "not in CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS" in gate
    listed = misc_utils.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS
    assert listed is choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS
