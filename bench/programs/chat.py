"""Chats of two turns, streamed: all users have their first turn before any has the second.

Uses roles and streaming; the questions are MT-bench's where its file is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import sglang as sgl

from bench.programs.endpoint import CountingEndpoint
from bench.programs.texts import questions

USERS_AT_ONCE = 4


@sgl.function
def turn(s, history: str, question: str):
    """One more question and its answer, after what was said."""
    s += history or sgl.system("You are a helpful assistant. Answer in one or two sentences.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=24))


def stream(backend: CountingEndpoint, said: tuple[str, str]) -> tuple[str, str]:
    """A turn, streamed; (what was said until now, the answer)."""
    history, question = said
    state = turn.run(
        history=history, question=question, temperature=0, backend=backend, stream=True
    )
    for _ in state.text_iter():
        pass  # a person would read along; what was said before the first look may be skipped
    return state.text(), state["answer"]


def run(backend: CountingEndpoint, size: int, path: Path | None = None) -> list[str]:
    """`6 * size` users; their answers, turn by turn."""
    users = questions(path, 6 * size)
    histories, answers = [""] * len(users), []
    with ThreadPoolExecutor(USERS_AT_ONCE) as pool:
        for number in range(2):
            work = [(h, user[number]) for h, user in zip(histories, users, strict=True)]
            done = list(pool.map(partial(stream, backend), work))
            histories = [history for history, _ in done]
            answers += [answer for _, answer in done]
    return answers
