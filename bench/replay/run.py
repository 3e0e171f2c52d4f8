"""Send a trace: at its times, whatever the server makes of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.replay.asks import Ask
from bench.replay.words import Words
from bench.serving.client import Answer, Client

WARM_UP_TOKENS, WARM_UP_REQUESTS = 256, 3


@dataclass
class Outcome:
    """One request: its answer, or what went wrong; `late_s`: sent so much after its time."""

    ask: Ask
    late_s: float
    answer: Answer | None = None
    error: str = ""


async def warm_up(url: str, words: Words, seed: int = 0) -> None:
    """Requests of words that no trace has; nothing of them is measured."""
    rng = random.Random(seed)
    async with Client(url) as client:
        for _ in range(WARM_UP_REQUESTS):
            await client.ask(rng.choices(words.for_warm_up, k=WARM_UP_TOKENS), 4)


async def replay(
    url: str,
    asks: Sequence[Ask],
    *,
    text: Callable[[Sequence[int]], str] | None = None,
    in_flight: int | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> tuple[list[Outcome], float]:
    """Send each ask at its time, without waiting for the ones before (an open loop).

    Args:
        text: makes a prompt of token ids a text; None sends the ids.
        in_flight: at most so many at once (then it is no open loop); 1 keeps the order.

    Returns:
        An outcome for each ask, and the seconds from the first to the last token.
    """
    gate = asyncio.Semaphore(len(asks) + 1 if in_flight is None else in_flight)
    outcomes: list[Outcome] = []
    async with Client(url) as client, asyncio.TaskGroup() as tasks:
        began = time.perf_counter()
        for ask in asks:
            await asyncio.sleep(max(0.0, began + ask.at_s - time.perf_counter()))
            await gate.acquire()
            outcome = Outcome(ask, time.perf_counter() - began - ask.at_s)
            outcomes.append(outcome)
            sent = tasks.create_task(_send(client, outcome, text))
            sent.add_done_callback(lambda _: (gate.release(), advance()))
    return outcomes, time.perf_counter() - began


async def _send(
    client: Client, outcome: Outcome, text: Callable[[Sequence[int]], str] | None
) -> None:
    ask = outcome.ask
    prompt = ask.prompt if text is None else text(ask.prompt)
    try:
        outcome.answer = await client.ask(prompt, ask.answer_tokens, ask.number)
    except (aiohttp.ClientError, RuntimeError, TimeoutError) as error:
        outcome.error = repr(error)
