"""Asks a server through streaming `/generate` and notes when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.serving.workloads import Workload

TIMEOUT_S = 600.0


@dataclass
class Answer:
    """One request as its client saw it. Times are seconds from the start of the run.

    Attributes:
        token_s: when each token of the answer arrived.
        cached: prompt tokens by the tier that had them.
    """

    conversation: int
    prompt_tokens: int
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


class Client:
    """Connections to one server; the clock starts when it is made."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._began = time.perf_counter()

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def ask(
        self,
        prompt: Sequence[int] | str,
        answer_tokens: int,
        conversation: int = 0,
        *,
        hints: dict[str, Any] | None = None,
    ) -> Answer:
        """Greedy, of exactly `answer_tokens`. The prompt is token ids or a text; `hints` are an
        envelope of SGLang's `kv_hints`.

        Raises:
            aiohttp.ClientResponseError, RuntimeError: the server did not answer as asked.
        """
        body = {
            **({"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}),
            "sampling_params": {
                "max_new_tokens": answer_tokens,
                "temperature": 0,
                "ignore_eos": True,
            },
            "stream": True,
            **({} if hints is None else {"kv_hints": hints}),
        }
        answer = Answer(conversation, len(prompt), self._now())
        async with self._session.post(f"{self._url}/generate", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                now = self._now()
                if line.startswith(b"data: {"):
                    _note(answer, json.loads(line[6:]), now)
        if len(answer.token_s) != answer_tokens:
            raise RuntimeError(f"{len(answer.token_s)} tokens came, {answer_tokens} were asked")
        return answer


def _note(answer: Answer, event: dict[str, Any], now: float) -> None:
    """Tokens that come together share the time since the last ones evenly."""
    if "error" in event:
        raise RuntimeError(str(event["error"]))
    meta = event["meta_info"]
    new = meta["completion_tokens"] - len(answer.token_s)
    before = answer.token_s[-1] if answer.token_s else now
    answer.token_s += [before + (now - before) * (i + 1) / new for i in range(new)]
    answer.output_ids = event["output_ids"]
    answer.prompt_tokens = meta.get("prompt_tokens", answer.prompt_tokens)
    details = meta.get("cached_tokens_details")
    answer.cached = details or {"device": meta["cached_tokens"]}


async def run_workload(
    url: str, workload: Workload, advance: Callable[[], Any] = lambda: None
) -> tuple[list[Answer], float]:
    """Send all turns in order, `concurrency` at a time; a turn waits for the one before it.

    Returns:
        The answers in the order of the turns, and the seconds it took.
    """
    answers: list[Answer | None] = [None] * len(workload.turns)
    history: dict[int, tuple[int, ...]] = defaultdict(tuple)
    last: dict[int, asyncio.Future[None]] = {}
    loop = asyncio.get_running_loop()
    waiting = iter(enumerate(workload.turns))

    async def user(client: Client) -> None:
        for number, turn in waiting:
            before = last.get(turn.conversation)
            done = last[turn.conversation] = loop.create_future()
            if before is not None:
                await before
            prompt = history[turn.conversation] + turn.added
            answer = await client.ask(prompt, turn.answer_tokens, turn.conversation)
            history[turn.conversation] = prompt + tuple(answer.output_ids)
            answers[number] = answer
            done.set_result(None)
            advance()

    async with Client(url) as client:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as users:
            for _ in range(workload.concurrency):
                users.create_task(user(client))
        seconds = time.perf_counter() - began
    return [answer for answer in answers if answer is not None], seconds
