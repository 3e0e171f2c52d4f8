"""A small trace made up: chats that take turns, some behind a common system prompt."""

from __future__ import annotations

import random

import numpy as np

from smg_sglang.trace import Request

PAGE = 16


def chats(count: int, turns: int, seed: int = 0) -> list[Request]:
    """Blocks of a page. The last one of a prompt may be there in part; some prompts come twice."""
    rng = random.Random(seed)
    ids = iter(range(1, 1 << 30))
    system = [next(ids) for _ in range(9)]
    blocks = [list(system) if chat % 2 else [] for chat in range(count)]
    asked: list[tuple[list[int], int, int]] = []
    for _ in range(turns):
        for chat in rng.sample(range(count), count):
            blocks[chat] += [next(ids) for _ in range(rng.randrange(2, 13))]
            tokens = PAGE * len(blocks[chat]) - rng.randrange(PAGE)
            asked.append((list(blocks[chat]), tokens, rng.randrange(1, 9)))
            if rng.random() < 0.1:
                asked.append(asked[-1])
    return [
        Request(number, float(number), np.array(known, np.int64), PAGE, tokens, answer)
        for number, (known, tokens, answer) in enumerate(asked)
    ]
