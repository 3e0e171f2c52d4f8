"""A trace as what is sent when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.replay.words import Words
from bench.serving.infinite_cache import InfiniteCache
from smg_sglang.trace import Request, TraceFormat, load_trace


@dataclass(frozen=True)
class Ask:
    """One request to a server.

    Attributes:
        at_s: when to send it, in seconds from the start.
    """

    number: int
    at_s: float
    prompt: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Selection:
    """Which part of a trace, and how much smaller.

    Attributes:
        block_tokens: tokens a block becomes; 0 for what fits (see `fitting_block`).
        context: tokens that prompt and answer may have together.
    """

    limit: int | None = None
    sessions: int | None = None
    block_tokens: int = 0
    speed: float = 1.0
    context: int = 8192
    max_answer: int = 64


def select(
    path: Path, selection: Selection, format: TraceFormat | None = None
) -> tuple[list[Request], int]:
    """The requests that are replayed, scaled, and how many are dropped as too long."""
    requests = _first_sessions(load_trace(path, format), selection.sessions)[: selection.limit]
    block = selection.block_tokens or fitting_block(requests, selection.context)
    if block and requests and block != requests[0].block_tokens:
        requests = [request.scaled(block) for request in requests]
    fitting = [request for request in requests if fits(request, selection)]
    return fitting, len(requests) - len(fitting)


def _first_sessions(requests: list[Request], count: int | None) -> list[Request]:
    if count is None:
        return requests
    first = list(dict.fromkeys(request.session for request in requests))[:count]
    return [request for request in requests if request.session in set(first)]


def fitting_block(requests: Sequence[Request], context: int) -> int:
    """Tokens a block has to become so that all but the longest 1% of prompts fill half a context.

    A power of two, at most 16 (a page): blocks of a page keep what is shared, page by page. 0 for
    a trace of tokens, which cannot be scaled.
    """
    if not requests or requests[0].block_tokens == 1:
        return 0
    blocks = sorted(-(-r.input_tokens // r.block_tokens) for r in requests)
    longest = blocks[int(0.99 * (len(blocks) - 1))]
    return next((b for b in (16, 8, 4, 2) if longest * b <= context // 2), 1)


def fits(request: Request, selection: Selection) -> bool:
    """Whether a model takes it."""
    return request.input_tokens + answer_tokens(request, selection) < selection.context


def answer_tokens(request: Request, selection: Selection) -> int:
    return max(1, min(request.output_tokens, selection.max_answer))


def prompt(request: Request, words: Words) -> tuple[int, ...]:
    """Equal ids give equal tokens; what no id covers is the request's own."""
    known, size = request.known_tokens, request.block_tokens
    tokens: list[int] = []
    for block in request.blocks.tolist():
        if len(tokens) >= known:
            break
        tokens += words.of(block, min(size, known - len(tokens)))
    own = request.input_tokens - known
    return (*tokens, *words.of(("own", request.number), own))


def asks(requests: Iterable[Request], words: Words, selection: Selection) -> list[Ask]:
    """What is sent when, `speed` times as fast as it was."""
    requests = list(requests)
    start = requests[0].arrival_s if requests else 0.0
    return [
        Ask(
            request.number,
            (request.arrival_s - start) / selection.speed,
            prompt(request, words),
            answer_tokens(request, selection),
        )
        for request in requests
    ]


def infinite_hits(sent: Sequence[Ask], page_size: int) -> list[int]:
    """Prompt tokens of each that a cache without an end has, if each is answered in its turn.

    Answers do not count: a trace's next prompt has the trace's answer, not this model's.
    """
    cache = InfiniteCache(page_size)
    return [cache.ask(ask.prompt) for ask in sent]
