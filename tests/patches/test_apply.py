"""The patches apply to the SGLang that is installed, and each hook has its patch."""

from __future__ import annotations

import ast
import re

import pytest

from smg_sglang import TESTED_SGLANG

from . import upstream

#: Hook target -> the patches that would make the hook unnecessary.
PATCH_OF = {
    "server_args.ServerArgs.add_cli_args": "0005",
    "server_args.ServerArgs.from_cli_args": "0005",
    "server_args.ServerArgs.resolve_once": "0005",
    "server_args.ServerArgs.check_server_args": "0005",
    "utils.common.kill_process_tree": "0002",
    "mem_cache.registry.create_unified_radix_cache": "0001",
    "managers.scheduler_components.internal_state.SchedulerInternalStateController"
    ".get_internal_state": "0003",
    **{
        f"managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.{name}": "0004"
        for name in (
            "update_weights_from_disk",
            "update_weights_from_ipc",
            "begin_weight_update",
            "end_weight_update",
        )
    },
    "managers.schedule_batch.release_req": "0006",
    "managers.data_parallel_controller.DataParallelController": "0007",
    "managers.scheduler_components.output_sender.SenderWrapper.send_output": "0008",
    "managers.tp_worker.TpModelWorker.get_worker_info": "0009",
    "managers.scheduler.Scheduler.init_req_max_new_tokens": "0009",
    "managers.schedule_policy.PrefillAdder.add_one_req": "0010 0013",
    "managers.schedule_policy.PrefillAdder.add_chunked_req": "0010",
    "managers.schedule_policy.PrefillAdder._get_running_request_total_token_offset": "0010",
    "managers.schedule_batch.ScheduleBatch.check_decode_mem": "0010",
    "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph": "0011",
    "model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph": "0011",
    "managers.scheduler.Scheduler.get_new_batch_prefill": "0012",
    "managers.scheduler.Scheduler.init_request_dispatcher": "0014",
    # Needs none: SGLang calls `checkpoint` of the cache with each request it has prefilled.
    "managers.schedule_batch.ScheduleBatch.prepare_for_extend": None,
}
by_name = pytest.mark.parametrize("patch", upstream.PATCHES, ids=lambda patch: patch.stem)


def test_the_patches_are_for_the_version_that_is_supported():
    import sglang

    assert sglang.__version__ == upstream.VERSION
    assert upstream.VERSION in TESTED_SGLANG


def test_every_hook_has_a_patch_and_every_patch_a_hook(hooks):
    targets = {target.removeprefix("sglang.srt.") for target in hooks.by_target}
    assert targets <= PATCH_OF.keys(), "add a patch, and its hook to PATCH_OF"
    needed = {number for target in targets for number in (PATCH_OF[target] or "").split()}
    assert needed == {patch.name[:4] for patch in upstream.PATCHES}


@by_name
def test_a_patch_applies_alone_and_is_python(patch, tmp_path):
    python = upstream.apply([patch], tmp_path)
    for file in upstream.files_of(patch):
        ast.parse((python / file).read_text())


def test_the_patches_apply_one_after_another(tmp_path):
    upstream.apply(upstream.PATCHES, tmp_path)


@by_name
def test_a_patch_gives_its_reason(patch):
    head = patch.read_text().partition("\n---\n")[0]
    assert re.search(r"^Subject: \[PATCH\] \[\w+\] \S", head, re.MULTILINE)
    assert len(head.partition("\n\n")[2].split()) > 30


@by_name
def test_a_patch_is_small(patch):
    added = [line for line in patch.read_text().splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(added) <= 70
    assert max(map(len, added)) <= 89
