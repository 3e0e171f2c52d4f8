"""0009: which requests beyond the device are accepted, and what they may generate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_parallel

from smg_sglang.engine.options.record import ATTRIBUTE

from .streams import DEVICE, HOST, PAGE, Allocator, Asked, Plain, Streaming, defaults, request

SCHEDULER = "sglang.srt.managers.scheduler"
WORKER = "sglang.srt.managers.tp_worker"


def lengths(source, wrap, cache, *, context: int, asks: bool):
    """(longest request, longest prompt) of a scheduler, by the worker and then by the cache."""
    runner = SimpleNamespace(
        effective_logical_max_total_num_tokens=DEVICE,
        logical_max_total_num_tokens=DEVICE,
        token_to_kv_pool=Allocator(),
        token_to_kv_pool_allocator=Allocator(),
        max_running_requests=8,
        forward_stream=None,
        req_to_token_pool=SimpleNamespace(size=8, max_context_len=context),
    )
    worker = SimpleNamespace(
        model_runner=runner,
        model_config=SimpleNamespace(context_len=context),
        dllm_algorithm=None,
        random_seed=0,
        device="cpu",
        server_args=SimpleNamespace(),
    )
    if isinstance(cache, Streaming):
        setattr(worker.server_args, ATTRIBUTE, {"config": {"stream_context": True}})
    told = source.function(
        WORKER, "TpModelWorker.get_worker_info", page_interleave_shard_size=lambda pool: 1
    )
    info = wrap(told)(worker)
    scheduler = SimpleNamespace(
        max_req_len=info[4],
        max_req_input_len=info[5],
        model_config=worker.model_config,
        tree_cache=cache,
    )
    if asks:
        source.function(SCHEDULER, "Scheduler.maybe_lift_length_limits")(scheduler)
    return scheduler.max_req_len, scheduler.max_req_input_len


@pytest.mark.parametrize(
    ("context", "streams", "expected"),
    [(20_000, True, 19_999), (20_000, False, DEVICE - 1), (512, True, 511), (512, False, 511)],
)
def test_hook_and_patch_bound_a_prompt_alike(sglangs, context, streams, expected):
    hooks, stock, patched = sglangs
    ours, theirs = (Streaming, Asked) if streams else (Plain, defaults(patched))
    name = "managers.tp_worker.TpModelWorker.get_worker_info"
    hooked = lengths(
        stock, lambda f: hooks.wrap(name, f), ours(Allocator()), context=context, asks=False
    )
    assert hooked == lengths(patched, lambda f: f, theirs(Allocator()), context=context, asks=True)
    assert hooked == (expected, expected - 5)


def test_the_scheduler_asks_its_cache_before_it_tells_others(patched):
    source = patched.path(SCHEDULER).read_text()
    line = "        self.maybe_lift_length_limits()\n"
    assert source.count(line) == 1
    before, _, after = source.partition(line)
    assert "self.tree_cache = result.tree_cache" in before
    assert "self.init_batch_result_processor()" in after


def accepted(source, wrap, cache, req: Req, *, context: int, cap: int | None = None):
    """(new tokens at most, at least, why it is refused) of a request that has just come."""
    scheduler = SimpleNamespace(
        tree_cache=cache,
        token_to_kv_pool_allocator=cache.token_to_kv_pool_allocator,
        max_new_tokens_limit=cap,
        max_req_len=context - 1,
        max_total_num_tokens=DEVICE,
        page_size=PAGE,
        kv_shard_widening=1,
        sliding_window_size=None,
        chunked_prefill_size=512,
    )
    with get_parallel().override(tp_rank=0):
        wrap(source.function(SCHEDULER, "Scheduler.init_req_max_new_tokens"))(scheduler, req)
    params = req.sampling_params
    return params.max_new_tokens, params.min_new_tokens, req.to_finish and req.to_finish.message


def everywhere(hooks, stock, patched, make_request, *, streams=True, **how):
    """What is accepted, by the hook and by the patch."""
    ours, theirs = (Streaming, Asked) if streams else (Plain, defaults(patched))
    name = "managers.scheduler.Scheduler.init_req_max_new_tokens"
    hooked = accepted(
        stock, lambda f: hooks.wrap(name, f), ours(Allocator()), make_request(), **how
    )
    return hooked, accepted(patched, lambda f: f, theirs(Allocator()), make_request(), **how)


@pytest.mark.parametrize(
    ("prompt", "new", "on_device", "streamed"),
    [
        (100, 50, 50, 50),
        (900, 500, 95, 500),
        (4000, 50, 0, 50),
        (4000, 9000, 0, HOST - 4000 - PAGE),
        (4000, None, 0, HOST - 4000 - PAGE),
        (4000, 0, 0, 0),
        (30_000, 50, 0, 0),
    ],
)
def test_hook_and_patch_clip_new_tokens_alike(sglangs, prompt, new, on_device, streamed):
    def make():
        return request("r", prompt, new)

    for streams, expected in [(False, on_device), (True, streamed)]:
        hooked, patched = everywhere(*sglangs, make, streams=streams, context=20_000)
        assert hooked == patched == (expected, 0, None)


def test_hook_and_patch_clip_new_tokens_to_the_context(sglangs):
    hooked, patched = everywhere(*sglangs, lambda: request("r", 4000, 9000), context=5000)
    assert hooked == patched == (998, 0, None)


@pytest.mark.parametrize(
    ("prompt", "others", "reason"),
    [
        (9000, {}, "host memory holds 8192"),
        (4000, {"multimodal_inputs": object()}, "images or other media"),
    ],
)
def test_hook_and_patch_refuse_with_the_same_words(sglangs, monkeypatch, prompt, others, reason):
    monkeypatch.setattr(Req, "release_mm_inputs_on_abort", lambda req: None)
    hooked, patched = everywhere(
        *sglangs, lambda: request("r", prompt, 50, **others), context=20_000
    )
    assert hooked == patched
    assert reason in hooked[2]


@pytest.mark.parametrize(
    ("least", "cap", "expected"), [(10, None, (50, 10, None)), (0, 20, (20, 0, None))]
)
def test_hook_and_patch_keep_other_limits_of_new_tokens(sglangs, least, cap, expected):
    hooked, patched = everywhere(
        *sglangs, lambda: request("r", 4000, 50, least=least), context=20_000, cap=cap
    )
    assert patched == expected
    assert hooked == patched
