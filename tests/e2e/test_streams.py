"""Contexts larger than the device pool: the text of a pool that holds all, whatever happens.

Every copy is delayed at random, and SGLang's own test switch retracts requests.
"""

import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import requests

from tests.e2e.conftest import (
    DISTURBED,
    LONG,
    NEW_TOKENS,
    POOL_TOKENS,
    PROMPTS,
    details,
    memory_process,
    smg_state,
    token_ids,
)

SERVER_ARGS = ("--smg-stream-context", "--smg-host-gb", "0.0625", "--smg-prefetch")
SERVER_ENV = DISTURBED


def ask_long(server, index):
    prompt, new = LONG[index]
    return server.generate(prompt, new)


def test_texts_are_those_of_a_pool_that_holds_all(server, long_reference):
    server.flush()
    for index, expected in enumerate(long_reference):
        assert ask_long(server, index)["output_ids"] == expected, index


def test_what_was_streamed_is_found_again_and_not_computed(server, long_reference):
    ask_long(server, 0)
    again = ask_long(server, 0)
    assert again["output_ids"] == long_reference[0]
    assert details(again) == {"device": 0, "host": len(LONG[0][0]) // 16 * 16}


def test_a_prefix_on_the_device_is_not_computed_again(server):
    prompt = token_ids(500, 1500)
    server.generate(prompt, 1)
    longer = server.generate(prompt + token_ids(501, 1500), 1)
    assert details(longer)["host"] >= len(prompt) // 16 * 16


def test_several_streams_and_ordinary_requests_share_the_device(server, reference, long_reference):
    """Host memory holds two of the largest: the others wait for theirs."""
    server.flush()
    work = [("long", index) for index in (0, 0, 0, 1, 2, 3, 4)]
    work += [("short", index) for index in range(len(PROMPTS))]
    random.Random(1).shuffle(work)

    def run(item):
        kind, index = item
        if kind == "long":
            return ask_long(server, index)["output_ids"] == long_reference[index]
        return server.generate(PROMPTS[index], NEW_TOKENS)["output_ids"] == reference[index]

    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(run, work))
    assert [item for item, ok in zip(work, right, strict=True) if not ok] == []


def test_a_memory_server_that_dies_costs_no_request(server, long_reference):
    server.flush()
    stop = threading.Event()

    def kill():
        while not stop.wait(1.5):
            with contextlib.suppress(StopIteration):  # none where it is being started again
                memory_process(server).kill()
            stop.wait(3)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(lambda index: ask_long(server, index), [0, 4, 1, 4, 2]))
    finally:
        stop.set()
        killer.join()
    assert [r["output_ids"] for r in results] == [long_reference[i] for i in (0, 4, 1, 4, 2)]


def test_aborts_at_any_time_leave_nothing(server, long_reference):
    rng = random.Random(2)

    def ask_and_leave(index):
        prompt, new = LONG[index % len(LONG)]
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new + 50, "ignore_eos": True},
            "stream": True,
        }
        try:
            requests.post(f"{server.url}/generate", json=body, timeout=rng.uniform(0.05, 2.5))
        except requests.exceptions.RequestException:
            return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask_and_leave, range(16)))
    time.sleep(0.5)
    assert ask_long(server, 0)["output_ids"] == long_reference[0]
    assert smg_state(server)["streams"] == 0


def test_an_answer_is_clipped_to_host_memory_and_the_model_not_to_the_device(server):
    answer = server.generate(token_ids(600, 1900), 1000)
    assert answer["meta_info"]["completion_tokens"] == 1000 > POOL_TOKENS - 1900


def test_a_prompt_longer_than_the_model_is_refused_with_the_numbers(server):
    response = requests.post(
        f"{server.url}/generate",
        json={"input_ids": token_ids(700, 9000), "sampling_params": {"max_new_tokens": 1}},
        timeout=60,
    )
    assert response.status_code == 400
    assert "9000" in response.text and "8192" in response.text
