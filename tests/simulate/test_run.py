"""The simulated server, scenario by scenario."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.config import EvictionName, WritePolicy
from smg_sglang.simulate import bounds
from smg_sglang.simulate.clock import Clock
from smg_sglang.simulate.model import model_cost
from smg_sglang.simulate.run import simulate
from smg_sglang.simulate.settings import Settings
from smg_sglang.simulate.tally import Tally
from smg_sglang.simulate.worker import Worker
from smg_sglang.trace import load_trace

from ..trace.factories import published
from .factories import KV_BYTES, PAGE, ask, chats, make_settings, number


def hits(requests, **server) -> tuple[int, int]:
    run = simulate(number(requests), make_settings(**server))
    return run.hit_tokens["device"], run.hit_tokens["host"]


def test_a_prompt_asked_again_is_found_on_the_device_but_for_its_last_token():
    assert hits([ask(1, 2, 3), ask(1, 2, 3)]) == (192 - PAGE, 0)
    assert hits([ask(1, 2, 3), ask(1, 2, 3, 4)]) == (192, 0)


def test_without_host_memory_what_the_device_evicts_is_computed_again():
    requests = [ask(1, 2, 3, 4), ask(5, 6, 7, 8), ask(1, 2, 3, 4)]
    assert hits(requests, device_tokens=400) == (0, 0)


def test_with_host_memory_it_is_loaded_back():
    requests = [ask(1, 2, 3, 4), ask(5, 6, 7, 8), ask(1, 2, 3, 4)]
    run = simulate(number(requests), make_settings(400, host_tokens=4096))
    assert run.hit_tokens == {"device": 0, "host": 256 - PAGE, "storage": 0}
    assert (run.loads, run.loaded_tokens) == (1, 256 - PAGE)
    assert run.spilled_tokens == 512
    assert run.saved_prefill_s["host"] > 0


def test_a_prefix_may_lie_in_both_tiers():
    requests = [ask(1, 2, 3, 4), ask(1, 2, 7, 8), ask(1, 2, 9, 8, 7), ask(1, 2, 3, 4)]
    device, host = hits(requests, device_tokens=400, host_tokens=4096)
    assert device == 3 * 128
    assert host == 128 - PAGE


def test_selective_copies_on_the_second_use_only():
    requests = [ask(1, 2, 3, 4), ask(5, 6, 7, 8), ask(1, 2, 3, 4)]
    options = {"device_tokens": 400, "host_tokens": 4096, "write_policy": WritePolicy.SELECTIVE}
    assert hits(requests, **options) == (0, 0)
    twice = [ask(1, 2, 3, 4), ask(1, 2, 3, 4), ask(5, 6, 7, 8), ask(1, 2, 3, 4)]
    assert hits(twice, **options) == (256 - PAGE, 256 - PAGE)


def test_write_back_copies_what_is_evicted_and_no_more():
    requests = [ask(1, 2, 3, 4), ask(5, 6, 7, 8), ask(1, 2, 3, 4)]
    server = make_settings(400, host_tokens=4096, write_policy=WritePolicy.WRITE_BACK)
    run = simulate(number(requests), server)
    assert run.hit_tokens["host"] == 256 - PAGE
    assert run.spilled_tokens == 512
    assert simulate(number(requests[:1]), server).spilled_tokens == 0


def test_two_new_prompts_of_one_step_do_not_share():
    requests = [ask(1, 2, 3, number=0), ask(1, 2, 4, number=1)]
    assert hits(requests, closed=False) == (0, 0)
    assert hits(requests, closed=True) == (128, 0)


def test_chunks_of_a_long_prompt_are_found_while_it_runs():
    long = ask(*range(1, 17), number=0)
    late = ask(1, 2, 3, at=0.001, number=1)
    server = {"closed": False, "chunk_tokens": 256, "tflops": 0.01}
    assert hits([long, late], **server)[0] == 192 - PAGE


def test_timestamps_decide_who_waits():
    requests = [ask(1, 2, 3, out=5), ask(4, 5, 6, at=50.0, out=5)]
    quiet = simulate(number(requests), make_settings(closed=False))
    busy = simulate(number(requests), make_settings(closed=False, time_scale=0.0001))
    assert quiet.simulated_s > 50 > busy.simulated_s
    assert busy.ttft_s["mean"] > quiet.ttft_s["mean"]


def test_a_request_waits_until_the_pool_has_room_for_it():
    requests = [ask(1, 2, 3, 4, out=100), ask(5, 6, 7, 8, out=100)]
    together = simulate(number(requests), make_settings(2048, closed=False))
    in_turn = simulate(number(requests), make_settings(400, closed=False))
    assert in_turn.ttft_s["p99"] > together.ttft_s["p99"] + 1.5


def test_a_request_that_can_never_fit_is_counted_and_left_out():
    requests = [ask(*range(10)), ask(1), ask(*range(10))]
    run = simulate(number(requests), make_settings(400))
    assert (run.requests, run.refused_requests, run.refused_tokens) == (1, 2, 1280)
    assert run.input_tokens == 64


def test_host_memory_that_is_full_evicts():
    requests = [ask(*range(10 * i, 10 * i + 5)) for i in range(20)]
    run = simulate(number(requests), make_settings(512, host_tokens=1600))
    assert run.evicted_tokens["host"] > 0
    assert run.host_pages * PAGE <= 1600


def test_with_room_for_all_every_prefix_is_found():
    requests = chats(20, 6)
    run = simulate(requests, make_settings(1 << 20, host_tokens=0))
    best = bounds.infinite_hits(bounds.page_runs(requests, PAGE))
    assert run.hit_tokens["device"] == best * PAGE


def test_with_host_memory_for_all_a_small_device_loses_nothing():
    requests = chats(20, 6)
    run = simulate(requests, make_settings(3000, host_tokens=1 << 20))
    best = bounds.infinite_hits(bounds.page_runs(requests, PAGE))
    assert sum(run.hit_tokens.values()) == best * PAGE
    assert run.hit_tokens["host"] > 0


@given(
    seed=st.integers(0, 1000),
    device=st.integers(1500, 6000),
    host=st.integers(0, 8000),
    policy=st.sampled_from(list(EvictionName)),
    write_policy=st.sampled_from(list(WritePolicy)),
    chunk=st.sampled_from([16, 100, 512, 8192]),
    gap_s=st.sampled_from([0.0, 0.001, 0.05]),
    closed=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_books_are_right_at_the_end_of_any_run(  # noqa: PLR0917
    seed, device, host, policy, write_policy, chunk, gap_s, closed
):
    requests = chats(5, 3, seed, gap_s)
    server = make_settings(
        device,
        host + 1000,
        eviction=policy,
        write_policy=write_policy,
        chunk_tokens=chunk,
        closed=closed,
        link_gbps=0.05,
    )
    clock, tally = Clock(), Tally(server)
    worker = Worker(server, clock, tally)
    waiting = iter(requests)
    if closed:
        worker.on_finish = lambda: [worker.submit(r) for r in [next(waiting, None)] if r]
        worker.submit(next(waiting))
    else:
        for request in requests:
            clock.at(request.arrival_s, worker.submit, request)
    while clock.step():
        worker.device.tree.check_invariants()
    worker.host.books.check_invariants()
    assert tally.finished + tally.refused == len(requests)
    device_level = worker.device
    assert device_level.tree.num_pinned == 0, "a lock leaked"
    assert device_level.num_free + device_level.tree.num_pages == server.device_pages
    assert device_level.available() == server.device_pages
    stats = worker.host.books.stats(epoch="", uptime_s=0, malformed=0, strays=0, refused=0)
    assert (stats.leases, stats.reservations) == (0, 0)
    best = bounds.infinite_hits(bounds.page_runs(requests, PAGE))
    assert sum(tally.hit_tokens.values()) <= best * PAGE


def test_a_published_hour_of_chats_takes_less_than_a_minute():
    requests = load_trace(published("mooncake/conversation_trace.jsonl.gz"))
    server = Settings(model_cost("llama-3.1-8b"), 400_000, 200.0)
    run = simulate(requests, server)
    assert run.took_s < 60
    assert run.input_tokens == 144_793_823
    assert 0 < run.hit_share["total"] < 0.3737


# ---- storage ----


def with_storage(**changes):
    return make_settings(
        device_tokens=512, host_tokens=1024, **{"storage_gb": 1.0, "storage_gbps": 10.0} | changes
    )


def test_what_host_memory_has_evicted_is_brought_from_storage():
    requests = number([ask(1, 2, 3), *(ask(10 * n, 10 * n + 1, 10 * n + 2) for n in range(1, 9)), ask(1, 2, 3)])  # fmt: skip
    without = simulate(requests, with_storage(storage_gb=0.0))
    assert without.hit_tokens == {"device": 0, "host": 0, "storage": 0}
    run = simulate(requests, with_storage())
    assert run.hit_tokens["storage"] == 3 * 64 - PAGE
    assert run.hit_tokens["device"] == run.hit_tokens["host"] == 0
    assert run.ttft_s["mean"] < without.ttft_s["mean"]


def test_what_comes_too_late_from_storage_is_computed():
    requests = number([ask(1, 2, 3), *(ask(10 * n, 10 * n + 1, 10 * n + 2) for n in range(1, 9)), ask(1, 2, 3)])  # fmt: skip
    settings = with_storage()
    page_s = settings.fetch_s(1)
    late = simulate(requests, with_storage(storage_wait_ms=3.5 * page_s * 1000))
    assert late.hit_tokens["storage"] == 3 * PAGE
    never = simulate(requests, with_storage(storage_wait_ms=0.0))
    assert never.hit_tokens["storage"] == 0


def test_storage_that_is_full_evicts():
    trace = chats(12, 6)
    room = with_storage(storage_gb=2000 * KV_BYTES / (1 << 30))
    small, large = simulate(trace, room), simulate(trace, with_storage())
    assert small.evicted_tokens["storage"] > 0 == large.evicted_tokens["storage"]
    assert small.hit_share["total"] <= large.hit_share["total"]


def test_with_storage_for_all_nothing_is_lost():
    trace = chats(12, 6)
    best = simulate(trace, make_settings(device_tokens=512, host_tokens=1 << 20))
    run = simulate(trace, with_storage(storage_wait_ms=1e6))
    assert run.hit_share["total"] == pytest.approx(best.hit_share["total"], abs=0.02)
