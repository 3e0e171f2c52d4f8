"""A simulated server hits what a real one hits, on the same trace with the same sizes."""

import asyncio
import random

import numpy as np
import pytest

from bench.replay.asks import Selection, asks, infinite_hits
from bench.replay.run import replay, warm_up
from bench.replay.summary import summary
from bench.replay.words import words_of
from smg_sglang.simulate.model import model_cost
from smg_sglang.simulate.run import simulate
from smg_sglang.simulate.settings import Settings
from smg_sglang.trace import Request
from tests.e2e.conftest import POOL_TOKENS, smg_state

PAGE = 16
#: Three times the device pool, and less than the trace's working set: both levels evict.
HOST_GB = 0.0235
SERVER_ARGS = ("--smg-host-gb", str(HOST_GB))


def chats(count, turns, seed=0):
    """Chats that take turns in a random order, half of them behind a common system prompt."""
    rng = random.Random(seed)
    ids = iter(range(1, 1 << 20))
    system = [next(ids) for _ in range(9)]
    blocks = [list(system) if chat % 2 else [] for chat in range(count)]
    requests = []
    for _ in range(turns):
        for chat in rng.sample(range(count), count):
            blocks[chat] += [next(ids) for _ in range(rng.randrange(2, 13))]
            tokens = PAGE * len(blocks[chat]) - rng.randrange(PAGE)
            requests.append((list(blocks[chat]), tokens, rng.randrange(1, 9)))
            if rng.random() < 0.1:
                requests.append(requests[-1])  # asked again at once
    return [
        Request(number, float(number), np.array(ids, np.int64), PAGE, tokens, answer)
        for number, (ids, tokens, answer) in enumerate(requests)
    ]


def live_shares(server, requests):
    """Hit shares by tier of the running server, asked in order."""
    words = words_of(server.get("/model_info")["model_path"])
    sent = asks(requests, words, Selection())
    sent = [type(ask)(ask.number, 0.0, ask.prompt, ask.answer_tokens) for ask in sent]
    asyncio.run(warm_up(server.url, words))
    server.flush()
    outcomes, seconds = asyncio.run(replay(server.url, sent, text=words.text, in_flight=1))
    found = summary(outcomes, seconds, infinite_hits(sent, PAGE))
    assert found["failed"] == 0 and found["prompt_tokens_unplanned"] == 0
    return found["hit_share"]


def test_the_simulators_hit_shares_are_the_servers(server, tiny_model):
    requests = chats(count=24, turns=5)
    live = live_shares(server, requests)
    settings = Settings(
        model=model_cost(str(tiny_model)),
        device_tokens=POOL_TOKENS,
        host_gb=HOST_GB,
        page_size=PAGE,
        chunk_tokens=512,
        closed=True,
    )
    simulated = simulate(requests, settings).hit_share
    evicted = smg_state(server)["memory"]["pages_evicted"]
    assert evicted > 0 and live["device"] > 0.05 and live["host"] > 0.2, (live, evicted)
    for tier in ("device", "host"):
        assert simulated[tier] == pytest.approx(live[tier], abs=0.005), (tier, simulated, live)
