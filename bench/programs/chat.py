"""Chats of two turns, streamed: all users have their first turn before any has the second.

Uses roles and streaming; the questions are MT-bench's where its file is. Each user's system
prompt has notes of their own, so that a small device has forgotten them by the second turn.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import sglang as sgl

from bench.programs.endpoint import CountingEndpoint
from bench.programs.texts import essay, questions

USERS_AT_ONCE = 4


@sgl.function
def turn(s, history: str, question: str):
    """One more question and its answer, after what was said."""
    s += history
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=24))


def opening(backend: CountingEndpoint, user: int) -> str:
    """A chat before its first question: the system prompt, in the model's template."""
    notes = essay(random.Random(user), 9)
    prompt = f"You are a helpful assistant. Answer in one sentence. Notes on the user: {notes}"
    return backend.get_chat_template().get_prompt([{"role": "system", "content": prompt}])


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
    """`8 * size` users; their answers, turn by turn."""
    users = questions(path, 8 * size)
    histories, answers = [opening(backend, user) for user in range(len(users))], []
    with ThreadPoolExecutor(USERS_AT_ONCE) as pool:
        for number in range(2):
            work = [(h, user[number]) for h, user in zip(histories, users, strict=True)]
            done = list(pool.map(partial(stream, backend), work))
            histories = [history for history, _ in done]
            answers += [answer for _, answer in done]
    return answers
