"""The simulator finds on the device and in host memory what a real server finds."""

import json
import os
import random
import time
from dataclasses import replace

import pytest

from smg_sglang.config import EvictionName, WritePolicy
from smg_sglang.simulate.model import model_cost
from smg_sglang.simulate.run import simulate
from smg_sglang.simulate.settings import Settings
from smg_sglang.trace.request import Request, block_ids
from tools.sglang_server import running_server

from .conftest import BASE, POOL_TOKENS, details, smg_state, token_ids

HOST_GB = 0.0625
"""1,024 pages of the tiny model: an eighth of them is a slab."""


def chats(count: int, turns: int, seed: int = 0, at_a_time: int = 12) -> list[Request]:
    """Chats that grow by a message a turn, their turns mixed, some with a system prompt in common."""
    rng = random.Random(seed)
    systems = [token_ids(seed + 7 * i, 200) for i in range(3)]
    texts = [list(systems[i % 4]) if i % 4 < 3 else [] for i in range(count)]
    left = {chat: turns for chat in range(count)}
    requests = []
    while left:
        # Some chats at a time, so that there is something to find.
        chat = rng.choice(list(left)[:at_a_time])
        texts[chat] += token_ids(rng.randrange(1 << 30), rng.randrange(20, 160))
        text = block_ids(texts[chat])
        requests.append(Request(len(requests), 0.0, text, 1, len(text), rng.randrange(1, 40)))
        left[chat] -= 1
        if not left[chat]:
            del left[chat]
    return requests


def settled(server):
    """Storage has been given all that was published: nothing is written any more."""
    before = -1
    while before != (now := smg_state(server)["storage"]["pages"].get("written", 0)):
        before = now
        time.sleep(0.03)


@pytest.mark.parametrize(
    ("write_policy", "eviction", "storage_gb"),
    [
        ("write_through", "cost", 0),
        ("write_back", "lru", 0),
        # Two minutes more: `make test-models`.
        *([("write_through", "cost", 1)] if os.environ.get("SMG_TEST_MODELS") else []),
    ],
)
def test_hits_by_tier_agree_with_a_real_server(
    tiny_model, tmp_path, write_policy, eviction, storage_gb
):
    # With storage all of them, so that turns come back when host memory has lost them.
    requests = chats(50, 5, at_a_time=50 if storage_gb else 12)
    args = ("--enable-smg", "--smg-host-gb", str(HOST_GB), "--log-level", "warning")
    # On a busy box a lookup may take longer than 20 ms, which is a miss; the simulator knows none.
    args += ("--smg-lookup-timeout-ms", "5000")
    policy = ("--smg-write-policy", write_policy, "--smg-eviction-policy", eviction)
    found = {"device": 0, "host": 0, "storage": 0}
    if storage_gb:
        config = {"file_storage_path": str(tmp_path), "max_size": f"{storage_gb}G"}
        args += ("--smg-storage", "file", "--smg-storage-config", json.dumps(config))
        args += ("--smg-storage-wait-ms", "30000")
    with running_server(tiny_model, (*BASE, *args, *policy)) as server:
        server.flush()
        for request in requests:
            answer = server.generate(request.blocks.tolist(), request.output_tokens)
            for tier, tokens in details(answer).items():
                found[tier] += tokens
            if storage_gb:
                settled(server)
    settings = Settings(
        model_cost(str(tiny_model)),
        device_tokens=POOL_TOKENS,
        host_gb=HOST_GB,
        eviction=EvictionName(eviction),
        write_policy=WritePolicy(write_policy),
        chunk_tokens=512,
        # Slow enough that a copy has always ended before the next request.
        tflops=0.01,
        closed=True,
        storage_gb=storage_gb,
        storage_wait_ms=30000.0,
    )
    run = simulate(requests, settings)
    live = {tier: tokens / run.input_tokens for tier, tokens in found.items()}
    assert run.evicted_tokens["host"] > 0, "host memory was never full: the test shows little"
    assert run.hit_share["device"] == pytest.approx(live["device"], abs=0.005)
    assert run.hit_share["host"] == pytest.approx(live["host"], abs=0.005)
    assert run.hit_share["storage"] == pytest.approx(live["storage"], abs=0.005)
    if storage_gb:
        assert run.hit_share["storage"] > 0.02, "host memory had it all: the test shows little"
    smaller = simulate(requests, replace(settings, host_gb=0.0))
    assert smaller.hit_share["total"] < run.hit_share["total"] - 0.05
