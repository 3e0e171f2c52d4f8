"""A server that remembers more than its device holds: same text, whatever is where."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.replay.asks import Selection, asks, infinite_hits
from bench.replay.run import replay, warm_up
from bench.replay.summary import summary
from bench.replay.synthetic import PAGE, chats
from bench.replay.words import words_of
from smg_sglang.simulate.model import model_cost
from smg_sglang.simulate.run import simulate
from smg_sglang.simulate.settings import Settings
from tests.e2e.conftest import (
    NEW_TOKENS,
    POOL_TOKENS,
    PROMPTS,
    details,
    eventually,
    in_host_memory,
    memory_process,
    metric,
    smg_state,
    token_ids,
)


def answers(server, prompts=PROMPTS):
    return [server.generate(prompt, NEW_TOKENS) for prompt in prompts]


def ids(results):
    return [result["output_ids"] for result in results]


def test_texts_are_stocks_cold_and_from_host_memory(server, reference):
    server.flush()
    cold = answers(server)
    assert ids(cold) == reference
    again = answers(server)
    assert ids(again) == reference
    host = sum(details(result)["host"] for result in again)
    reusable = sum(len(prompt) // 16 * 16 for prompt in PROMPTS)
    assert host > POOL_TOKENS, "the working set is larger than the pool, so most comes from host"
    device = sum(details(result)["device"] for result in again)
    assert host + device >= 0.95 * (reusable - 16 * len(PROMPTS))


def test_a_device_hit_stays_on_the_device(server, reference):
    server.generate(PROMPTS[0], NEW_TOKENS)
    result = server.generate(PROMPTS[0], NEW_TOKENS)
    assert result["output_ids"] == reference[0]
    assert details(result)["host"] == 0
    assert details(result)["device"] >= len(PROMPTS[0]) // 16 * 16 - 16


def test_concurrent_requests_get_the_same_texts(server, reference):
    work = [index for _ in range(4) for index in range(len(PROMPTS))]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: server.generate(PROMPTS[i], NEW_TOKENS), work))
    wrong = [
        i for i, result in zip(work, results, strict=True) if result["output_ids"] != reference[i]
    ]
    assert not wrong


def test_flush_empties_both_tiers(server):
    answers(server, PROMPTS[:3])
    in_host_memory(server)
    server.flush()
    assert smg_state(server)["memory"]["pages_ready"] == 0
    result = server.generate(PROMPTS[0], NEW_TOKENS)
    assert details(result) == {"device": 0, "host": 0}


def test_tenants_do_not_share_prefixes(server):
    prompt = token_ids(900, 400)
    server.generate(prompt, 1, extra_key="tenant-a")
    storm(server)
    other = server.generate(prompt, 1, extra_key="tenant-b")
    assert details(other) == {"device": 0, "host": 0}
    same = server.generate(prompt, 1, extra_key="tenant-a")
    assert details(same)["host"] >= 384


def storm(server):
    """Push everything out of the device pool."""
    for seed in range(1000, 1000 + 2 * POOL_TOKENS // 900):
        server.generate(token_ids(seed, 900), 1)


def test_turns_of_a_chat_are_reused_after_an_eviction(server):
    prompt = token_ids(910, 300)
    turn = server.generate(prompt, 64)
    storm(server)
    longer = prompt + turn["output_ids"] + token_ids(911, 40)
    result = server.generate(longer, 4)
    assert details(result)["host"] >= (300 + 63) // 16 * 16


def test_aborted_requests_leave_nothing(server, reference):
    storm(server)
    with ThreadPoolExecutor(8) as pool:
        doomed = [
            pool.submit(server.generate, PROMPTS[i % 10], 400, rid=f"doomed-{i}") for i in range(16)
        ]
        eventually(lambda: metric(server, "sglang:num_running_reqs") > 0, "nothing is running")
        server.post("/abort_request", abort_all=True)
        for future in doomed:
            future.result()
    assert server.generate(PROMPTS[3], NEW_TOKENS)["output_ids"] == reference[3]


def test_metrics_tell_what_happened(server):
    before = metric(server, "smg:hit_tokens_total", tier="host")
    storm(server)
    answers(server, PROMPTS[:4])
    eventually(lambda: metric(server, "smg:hit_tokens_total", tier="host") > before, "no host hit")
    assert metric(server, "smg:spilled_bytes_total") > 0
    assert metric(server, "smg:loaded_bytes_total") > 0
    assert metric(server, "smg:load_seconds_total") > 0
    assert metric(server, "smg:lookup_seconds_count") > 0
    assert metric(server, "smg:host_pages", state="ready") > 0


def test_server_info_shows_the_configuration(server):
    info = server.get("/server_info")
    assert info["unified_cache_external_linker_config"]["linker_extra_config"]["host_gb"] == 0.25
    state = smg_state(server)
    assert state["config"]["write_policy"] == "write_through"
    assert state["memory_connected"]


def test_an_idle_server_sleeps(server):
    def used() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in server.processes())

    server.generate(PROMPTS[0], 1)
    time.sleep(1)
    before, began = used(), time.monotonic()
    time.sleep(4)
    assert used() - before < 0.25 * (time.monotonic() - began), "less than a quarter of a core"


@pytest.mark.parametrize("fields", [{"n": 3}, {"regex": "[0-9]{4}"}])
def test_sampling_features_work_on_a_host_hit(server, fields):
    prompt = token_ids(920, 500)
    server.generate(prompt, 1)
    storm(server)
    result = server.generate(prompt, 8, sampling_params=fields)
    for one in result if isinstance(result, list) else [result]:
        assert one["meta_info"]["completion_tokens"] > 0


def late_or_dropped(server) -> int:
    """Lookups without an answer in time and pages not kept, until now: each may cost a hit."""
    state = smg_state(server)
    return state["lookups"].get("unavailable", 0) + sum(state["dropped_pages"].values())


def replayed_hit_shares(server, sent, words):
    """Of a run in which the memory server was never late, which a simulated one never is."""
    for _ in range(4):
        server.flush()
        before = late_or_dropped(server)
        outcomes, seconds = asyncio.run(replay(server.url, sent, text=words.text, in_flight=1))
        live = summary(outcomes, seconds, infinite_hits(sent, PAGE))
        assert live["failed"] == 0 and live["prompt_tokens_unplanned"] == 0
        if late_or_dropped(server) == before:
            return live["hit_share"]
    return pytest.fail("the box is too busy: the memory server was late in each of four runs")


def test_a_replayed_trace_hits_what_the_simulator_says(server, tiny_model):
    requests, words = chats(count=24, turns=5), words_of(tiny_model)
    asyncio.run(warm_up(server.url, words))
    live = replayed_hit_shares(server, asks(requests, words, Selection(speed=1e6)), words)
    assert live["device"] > 0.05 and live["host"] > 0.2
    settings = Settings(
        model_cost(str(tiny_model)), POOL_TOKENS, host_gb=0.25, chunk_tokens=512, closed=True
    )
    simulated = simulate(requests, settings).hit_share
    print(f"live {live}, simulated {simulated}")
    for tier in ("device", "host"):
        assert simulated[tier] == pytest.approx(live[tier], abs=0.005)


def test_a_memory_server_that_is_killed_costs_no_request(server, reference):
    answers(server, PROMPTS[:4])
    victim = memory_process(server)
    with ThreadPoolExecutor(4) as pool:
        running = pool.map(lambda i: server.generate(PROMPTS[i], NEW_TOKENS), list(range(10)) * 2)
        victim.kill()
        assert ids(running) == reference[:10] * 2
    eventually(lambda: smg_state(server)["memory_connected"], "it did not come back")
    answers(server, PROMPTS[:6])
    in_host_memory(server)
    storm(server)
    again = answers(server, PROMPTS[:6])
    assert ids(again) == reference[:6]
    assert sum(details(result)["host"] for result in again) > 0


def test_a_memory_server_that_hangs_costs_no_request(server, reference):
    hanging = memory_process(server)
    hanging.suspend()
    try:
        assert ids(answers(server, PROMPTS[:10])) == reference[:10]
    finally:
        hanging.resume()
    answers(server, PROMPTS[:6])
    storm(server)
    again = answers(server, PROMPTS[:6])
    assert ids(again) == reference[:6]
    assert sum(details(result)["host"] for result in again) > 0
