"""The entry point that SGLang calls in each of its processes, and every hook we set.

Nothing here has an effect until `--enable-smg` is given: each hook looks for our mark on the
arguments first. Hooks are the seams SGLang 0.5.23 lacks; `patches/` has their upstream form.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import setproctitle

from smg_sglang.config import flags
from smg_sglang.engine.options import command_line, configuration, record
from smg_sglang.engine.seams import hint_route, launch
from smg_sglang.engine.split import publication

#: What SGLang calls the process of its data-parallel controller before it loads plugins.
CONTROLLER_TITLE = "sglang::data_parallel_controller"
IO_STRUCT = "sglang.srt.managers.io_struct"


def register() -> None:
    """Register our hooks, and the CPU attention backend, with this SGLang process.

    Called by SGLang's `load_plugins()` before arguments are parsed, in the main process and again
    in each scheduler, detokenizer and controller process.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def hook(target: str, function: Callable[..., Any], kind: HookType) -> None:
        HookRegistry.register(f"sglang.srt.{target}", function, kind)

    hook("server_args.ServerArgs.add_cli_args", _after_add_cli_args, HookType.AFTER)
    hook("server_args.ServerArgs.from_cli_args", _after_from_cli_args, HookType.AFTER)
    hook("server_args.ServerArgs.resolve_once", _before_resolve_once, HookType.BEFORE)
    hook("server_args.ServerArgs.check_server_args", _after_check, HookType.AFTER)
    # Hooking a module imports it, so each process gets only the hooks of its own role.
    if multiprocessing.parent_process() is None:
        hook("utils.common.kill_process_tree", _before_kill_tree, HookType.BEFORE)
    if multiprocessing.parent_process() is not None and IO_STRUCT in sys.modules:
        from smg_sglang.engine.cache import hint_messages

        hint_messages.register()
    if "sglang.srt.managers.scheduler" in sys.modules:
        _register_worker_hooks(hook, HookType)
    if setproctitle.getproctitle() == CONTROLLER_TITLE:
        from smg_sglang.engine.split.controller import PhaseDataParallelController

        controller = "managers.data_parallel_controller.DataParallelController"
        hook(controller, PhaseDataParallelController, HookType.REPLACE)
    from smg_sglang.engine.attention import backend

    backend.register()


def _register_worker_hooks(hook: Callable[..., None], kind: Any) -> None:
    from smg_sglang.engine.cache.hint_messages import after_init_request_dispatcher

    parts, batch = "managers.scheduler_components", "managers.schedule_batch"
    state = f"{parts}.internal_state.SchedulerInternalStateController.get_internal_state"
    hook("mem_cache.registry.create_unified_radix_cache", _around_create_cache, kind.AROUND)
    hook(state, _after_internal_state, kind.AFTER)
    hook(f"{batch}.ScheduleBatch.prepare_for_extend", _around_prepare_for_extend, kind.AROUND)
    output = f"{parts}.output_sender.SenderWrapper.send_output"
    hook(output, publication.around_send_output, kind.AROUND)
    hook(f"{batch}.release_req", _before_release_req, kind.BEFORE)
    hook("managers.scheduler.Scheduler.get_new_batch_prefill", _after_new_batch, kind.AFTER)
    dispatcher = "managers.scheduler.Scheduler.init_request_dispatcher"
    hook(dispatcher, after_init_request_dispatcher, kind.AFTER)
    _register_admission_hooks(hook, kind)
    # Updates by tensor, by broadcast and over RDMA run between begin and end.
    updater = f"{parts}.weight_updater.SchedulerWeightUpdaterManager"
    hook(f"{updater}.begin_weight_update", _before_begin_weight_update, kind.BEFORE)
    hook(f"{updater}.end_weight_update", _before_end_weight_update, kind.BEFORE)
    hook(f"{updater}.update_weights_from_disk", _before_weight_update, kind.BEFORE)
    hook(f"{updater}.update_weights_from_ipc", _before_weight_update, kind.BEFORE)


def _register_admission_hooks(hook: Callable[..., None], kind: Any) -> None:
    """Requests that wait for others, and contexts larger than the device: the places where SGLang
    asks whom to admit, and what fits."""
    from smg_sglang.engine.attention import backend
    from smg_sglang.engine.attention.graphs import around_can_run_graph
    from smg_sglang.engine.cache.waits import around_add_one_req
    from smg_sglang.engine.streams import scheduling as streams

    backend.expand_prefixes()
    adder, scheduler = "managers.schedule_policy.PrefillAdder", "managers.scheduler.Scheduler"
    running = f"{adder}._get_running_request_total_token_offset"
    memory = "managers.schedule_batch.ScheduleBatch.check_decode_mem"
    info = "managers.tp_worker.TpModelWorker.get_worker_info"
    hook(f"{adder}.add_one_req", around_add_one_req, kind.AROUND)
    hook(f"{adder}.add_chunked_req", streams.around_add_chunked_req, kind.AROUND)
    hook(running, streams.around_running_offset, kind.AROUND)
    hook(memory, streams.before_check_decode_mem, kind.BEFORE)
    new_tokens = streams.around_init_max_new_tokens
    hook(f"{scheduler}.init_req_max_new_tokens", new_tokens, kind.AROUND)
    hook(info, streams.after_get_worker_info, kind.AFTER)
    for phase in ("decode", "prefill"):
        runner = f"{phase}_cuda_graph_runner.{phase.title()}CudaGraphRunner"
        hook(f"model_executor.runner.{runner}.can_run_graph", around_can_run_graph, kind.AROUND)


def _after_add_cli_args(result: Any, parser: Any, *args: Any, **kwargs: Any) -> None:
    command_line.add_cli_args(parser)


def _after_from_cli_args(result: Any, cls: Any, args: Any) -> None:
    command_line.configure_from_cli(result, args)


def _before_resolve_once(server_args: Any) -> None:
    """Programs that build SGLang's own Engine choose by environment: SMG_ENABLE=1."""
    if record.is_enabled(server_args) or getattr(server_args, "_resolution_finished", False):
        return
    given = flags.from_environment()
    if given is not None:
        configuration.configure(server_args, given, origin="environment")


def _after_check(result: Any, server_args: Any) -> None:
    """SGLang checks the resolved arguments once, in the main process, then starts the workers."""
    launch.check_model(server_args)
    launch.prepare_split(server_args)
    launch.start_memory(server_args)
    if record.is_enabled(server_args):
        hint_route.add_route()


def _before_kill_tree(parent_pid: int | None = None, *args: Any, **kwargs: Any) -> None:
    """Every end of a server goes through here: the memory server must not be started again."""
    if parent_pid in (None, os.getpid()):
        launch.retire_memory()


def _around_create_cache(original: Callable[..., Any], ctx: Any, **kwargs: Any) -> Any:
    if record.is_enabled(ctx.server_args):
        from smg_sglang.engine.cache.radix_cache import SmgRadixCache

        kwargs["cache_class"] = SmgRadixCache
    cache = original(ctx, **kwargs)
    publication.attach(cache, ctx.server_args)
    return cache


def _after_internal_state(result: Any, component: Any, *args: Any) -> None:
    internal_state = getattr(component.scheduler.tree_cache, "internal_state", None)
    if internal_state is not None:
        result.internal_state.update(internal_state())


def _before_weight_update(component: Any, *args: Any, **kwargs: Any) -> None:
    cache = getattr(component.scheduler, "tree_cache", None)
    if (on_weight_update := getattr(cache, "on_weight_update", None)) is not None:
        on_weight_update()


def _before_begin_weight_update(component: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang refuses a session inside another."""
    if component._session is None:
        _before_weight_update(component)


def _before_end_weight_update(component: Any, *args: Any, **kwargs: Any) -> None:
    """And an end without a session."""
    if component._session is not None:
        _before_weight_update(component)


def _after_new_batch(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Who is still in the queue waits: the time to load for them."""
    prefetch_waiting = getattr(scheduler.tree_cache, "prefetch_waiting", None)
    if prefetch_waiting is not None:
        prefetch_waiting(scheduler.waiting_queue)


def _before_release_req(*, req: Any, tree_cache: Any, **kwargs: Any) -> None:
    """SGLang forgets the KV of a request it retracts (its own TODO there); we keep it."""
    before_retraction = getattr(tree_cache, "before_retraction", None)
    if before_retraction is not None:
        before_retraction(req)


def _around_prepare_for_extend(
    original: Callable[..., Any], batch: Any, *args: Any, **kw: Any
) -> Any:
    """Count the prompt tokens of requests admitted for the first time, and their device hits."""
    tier = getattr(batch.tree_cache, "host_tier", None)
    if tier is None:
        return original(batch, *args, **kw)
    new = [req for req in batch.reqs if not req._cache_breakdown_computed]
    result = original(batch, *args, **kw)
    for req in new:
        tier.counters.prompt_tokens += len(req.origin_input_ids)
        tier.counters.hit_tokens["device"] += req.cached_tokens_device
    return result
