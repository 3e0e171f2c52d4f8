"""Small traces and servers to simulate."""

from __future__ import annotations

import random

import numpy as np

from smg_sglang.config import EvictionName
from smg_sglang.simulate.model import model_cost
from smg_sglang.simulate.settings import Settings
from smg_sglang.trace.request import Request, block_ids

PAGE = 16
KV_BYTES = model_cost("smollm2-135m").kv_bytes


def make_settings(device_tokens=2048, host_tokens=0, **changes) -> Settings:
    """A server of the small model, with room for so many tokens on its device and below."""
    return Settings(
        **{
            "model": model_cost("smollm2-135m"),
            "device_tokens": device_tokens,
            "host_gb": host_tokens * KV_BYTES / (1 << 30),
            "eviction": EvictionName.LRU,
            "tflops": 0.1,
            "link_gbps": 10.0,
            "closed": True,
        }
        | changes
    )


def ask(*ids: int, at=0.0, tokens=None, out=1, block=64, number=0) -> Request:
    """A prompt of blocks of 64 tokens."""
    tokens = len(ids) * block if tokens is None else tokens
    return Request(number, at, block_ids(list(ids)), block, tokens, out)


def number(requests) -> list[Request]:
    """The requests in their order, numbered and in time."""
    return [
        Request(i, max(r.arrival_s, 0.0), r.blocks, r.block_tokens, r.input_tokens, r.output_tokens)
        for i, r in enumerate(requests)
    ]


def chats(count: int, turns: int, seed: int = 0, gap_s: float = 0.0) -> list[Request]:
    """Chats that grow by a few blocks a turn, mixed; some begin alike."""
    rng = random.Random(seed)
    fresh = iter(range(10, 1 << 30))
    texts = [[chat % 3] for chat in range(count)]
    left = dict.fromkeys(range(count), turns)
    requests = []
    while left:
        chat = rng.choice(list(left)[:8])
        texts[chat] += [next(fresh) for _ in range(rng.randrange(1, 5))]
        tokens = len(texts[chat]) * 64 - rng.randrange(64)
        arrival_s = len(requests) * gap_s
        blocks = block_ids(texts[chat])
        requests.append(Request(len(requests), arrival_s, blocks, 64, tokens, rng.randrange(40)))
        if tokens % 64:
            texts[chat][-1] = next(fresh)  # the next turn goes on where this one ends
        left[chat] -= 1
        if not left[chat]:
            del left[chat]
    return requests


def to_units(*ids: int) -> bytes:
    """A path of one unit per number."""
    keys = np.zeros((len(ids), 2), np.int64)
    keys[:, 0] = ids
    return keys.tobytes()
