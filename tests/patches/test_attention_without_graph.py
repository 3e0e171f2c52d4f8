"""0011: an attention backend may have a batch computed without a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest


class Opinion:
    """A backend that objects to batches named `streamed`."""

    def can_run_graph(self, forward_batch):
        return forward_batch.rids != ["streamed"]


def decode_batch(rid):
    return SimpleNamespace(
        rids=[rid], replace_embeds=None, spec_info=None, batch_size=1, forward_mode=None
    )


def decode_runner(backend):
    return SimpleNamespace(
        model_runner=SimpleNamespace(
            attn_backend=backend, spec_algorithm=SimpleNamespace(is_ngram=lambda: False)
        ),
        ragged_verify_mode=False,
        require_mlp_tp_gather=False,
        require_mlp_sync=False,
        enable_pdmux=False,
        disable_padding=False,
        max_bs=4,
        is_encoder_decoder=False,
        enable_two_batch_overlap=False,
        _make_graph_key=lambda *args, **kwargs: None,
        _resolve_lora_variant=lambda batch: None,
    )


def prefill_batch(rid):
    return SimpleNamespace(
        rids=[rid],
        global_num_tokens_cpu=None,
        batch_size=1,
        input_ids=[0],
        input_embeds=None,
        replace_embeds=None,
        extend_prefix_lens_cpu=[0],
        forward_mode=SimpleNamespace(is_target_verify=lambda: False),
        capture_hidden_mode=None,
        return_logprob=False,
        contains_mm_inputs=lambda: False,
    )


def prefill_runner(backend):
    return SimpleNamespace(
        model_runner=SimpleNamespace(attn_backend=backend),
        _has_inactive_dp_rank=lambda batch: False,
        max_context_size=None,
        max_seq_len=None,
        can_replay_locally=lambda **kwargs: True,
        enable_lora=False,
        _backend_can_run_prefill_cuda_graph=None,
    )


@dataclass(frozen=True)
class Case:
    module: str
    name: str
    runner: Callable[[Any], Any]
    batch: Callable[[str], Any]

    def verdicts(self, sglangs, backend, rid):
        """Of the hook and of the patch."""
        hooks, stock, patched = sglangs
        target = f"model_executor.runner.{self.module}"
        method = f"{self.name}.can_run_graph"
        hooked = hooks.wrap(f"{target}.{method}", stock.function(f"sglang.srt.{target}", method))
        changed = patched.function(f"sglang.srt.{target}", method)
        asked = self.runner(backend), self.batch(rid)
        return bool(hooked(*asked)), bool(changed(*asked))


cases = pytest.mark.parametrize(
    "case",
    [
        Case("decode_cuda_graph_runner", "DecodeCudaGraphRunner", decode_runner, decode_batch),
        Case("prefill_cuda_graph_runner", "PrefillCudaGraphRunner", prefill_runner, prefill_batch),
    ],
    ids=["decode", "prefill"],
)


@cases
@pytest.mark.parametrize(("rid", "graph"), [("streamed", False), ("ordinary", True)])
def test_hook_and_patch_ask_the_backend_alike(sglangs, case, rid, graph):
    assert case.verdicts(sglangs, Opinion(), rid) == (graph, graph)


@cases
def test_a_backend_without_an_opinion_leaves_it_to_the_runner(sglangs, case):
    willing = SimpleNamespace(can_run_graph=lambda batch: True)
    assert case.verdicts(sglangs, willing, "streamed") == (True, True)
    hooks, stock, _ = sglangs
    target = f"model_executor.runner.{case.module}"
    original = stock.function(f"sglang.srt.{target}", f"{case.name}.can_run_graph")
    hooked = hooks.wrap(f"{target}.{case.name}.can_run_graph", original)
    assert hooked(case.runner(SimpleNamespace()), case.batch("streamed"))


def test_the_base_class_has_no_objection(patched):
    base = patched.function(
        "sglang.srt.layers.attention.base_attn_backend", "AttentionBackend.can_run_graph"
    )
    assert base(None, None) is True
