"""Two tensor-parallel ranks: each keeps its shard, and both agree on every hit, on every page that
is loaded ahead, and on contexts larger than the device. Each delays its copies as it likes."""

import random
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.conftest import (
    DISTURBED,
    LONG,
    NEW_TOKENS,
    PROMPTS,
    details,
    memory_process,
    smg_state,
)
from tests.e2e.test_host_tier import answers, ids
from tests.e2e.test_selective import ask_behind
from tests.e2e.test_streams import ask_long

SERVER_ARGS = ("--tp-size", "2", "--smg-prefetch", "--smg-stream-context")
SERVER_ENV = DISTURBED


def test_two_ranks_load_back_what_they_spilled(server):
    server.flush()
    cold = ids(answers(server))
    again = answers(server)
    assert ids(again) == cold
    assert sum(details(result)["host"] for result in again) > 0
    with ThreadPoolExecutor(6) as pool:
        work = list(range(len(PROMPTS))) * 2
        results = pool.map(lambda i: server.generate(PROMPTS[i], NEW_TOKENS), work)
        assert ids(results) == [cold[i] for i in work]
    assert smg_state(server)["namespace"]["tp_size"] == 2


def test_two_ranks_load_ahead_for_requests_that_wait(server):
    server.flush()
    cold = ids([server.generate(prompt, NEW_TOKENS) for prompt in PROMPTS[:4]])
    before = smg_state(server)["prefetched_tokens"]
    for attempt in range(10):
        assert ask_behind(server, 3 * attempt) == cold
        if smg_state(server)["prefetched_tokens"] > before:
            return
    raise AssertionError("nothing was loaded while it waited")


def test_two_ranks_stream_what_no_device_holds(server, long_reference):
    server.flush()
    work = [*range(len(LONG)), 0, 4]
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(3) as pool:
        texts = ids(pool.map(lambda index: ask_long(server, index), work))
    assert texts == [long_reference[index] for index in work]
    again = ask_long(server, 0)
    assert details(again) == {"device": 0, "host": len(LONG[0][0]) // 16 * 16}


def test_a_memory_server_that_dies_costs_two_ranks_no_request(server, long_reference):
    server.flush()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask_long, server, index) for index in (4, 1, 2)]
        memory_process(server).kill()
        assert ids(text.result() for text in asked) == [long_reference[i] for i in (4, 1, 2)]
