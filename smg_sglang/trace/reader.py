"""Reads a trace, whatever published format it has."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from itertools import chain
from pathlib import Path

import msgspec

from smg_sglang.errors import TraceError
from smg_sglang.trace import files
from smg_sglang.trace.agents import read_sessions
from smg_sglang.trace.request import Request
from smg_sglang.trace.rows import Bailian, Mooncake, RowReader, Tokens, read_rows


class TraceFormat(StrEnum):
    """Published formats; see `rows` and `agents`."""

    MOONCAKE = "mooncake"
    BAILIAN = "bailian"
    AGENTS = "agents"
    TOKENS = "tokens"


def read_trace(
    path: str | Path,
    format: TraceFormat | str | None = None,
    *,
    block_tokens: int | None = None,
    scale_to: int | None = None,
    session_gap_s: float = 0.0,
) -> Iterator[Request]:
    """The requests of a trace in the order of their arrival, as they are read.

    Args:
        path: a file (plain, gzip, tar) or a directory of agent sessions.
        format: None to tell it from the first document.
        block_tokens: tokens a block, where a Mooncake or Bailian trace has not its usual 512 or 16.
        scale_to: map each block to so many tokens (`Request.scaled`).
        session_gap_s: seconds between the beginnings of agent sessions.

    Raises:
        TraceError: at the first thing that is wrong; nothing is left out.
        ValueError: `block_tokens` or `scale_to` is below 1.
    """
    for name, tokens in (("block_tokens", block_tokens), ("scale_to", scale_to)):
        if tokens is not None and tokens < 1:
            raise ValueError(f"{name} must be 1 at least, not {tokens}")
    path = Path(path)
    if not path.exists():
        raise TraceError(str(path), None, "there is no such file")
    requests = _read(path, TraceFormat(format or sniff(path)), block_tokens, session_gap_s)
    first = next(requests, None)
    if first is None:
        raise TraceError(str(path), None, "holds no request")
    if scale_to is not None and first.block_tokens == 1:
        raise TraceError(str(path), None, "a trace of tokens cannot be scaled")
    for request in chain([first], requests):
        yield request if scale_to is None else request.scaled(scale_to)


def load_trace(
    path: str | Path,
    format: TraceFormat | str | None = None,
    *,
    block_tokens: int | None = None,
    scale_to: int | None = None,
    session_gap_s: float = 0.0,
) -> list[Request]:
    """All of `read_trace` at once."""
    return list(
        read_trace(
            path,
            format,
            block_tokens=block_tokens,
            scale_to=scale_to,
            session_gap_s=session_gap_s,
        )
    )


def sniff(path: Path) -> TraceFormat:
    """The format, told from the fields of the first document. Raises TraceError."""
    if files.is_collection(path):
        return TraceFormat.AGENTS
    first = next(files.lines(path), None)
    if first is None:
        raise TraceError(str(path), None, "is empty")
    try:
        fields = msgspec.json.decode(first.data, type=dict[str, msgspec.Raw]).keys()
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # A session may be printed over several lines.
        if first.data.strip() in (b"{", b"["):
            return TraceFormat.AGENTS
        raise first.error("is no JSON object, so the format cannot be told") from None
    if "requests" in fields:
        return TraceFormat.AGENTS
    if "chat_id" in fields:
        return TraceFormat.BAILIAN
    if "hash_ids" in fields:
        return TraceFormat.MOONCAKE
    if fields & {"tokens", "input_ids"}:
        return TraceFormat.TOKENS
    known = ", ".join(TraceFormat)
    raise first.error(f"has the fields {', '.join(fields)}, which none of {known} has")


def _read(
    path: Path, format: TraceFormat, block_tokens: int | None, session_gap_s: float
) -> Iterator[Request]:
    if block_tokens is not None and format in (TraceFormat.AGENTS, TraceFormat.TOKENS):
        raise TraceError(str(path), None, f"a trace of {format} says itself how large blocks are")
    if format is TraceFormat.AGENTS:
        pieces = files.members(path) if files.is_collection(path) else iter([files.whole(path)])
        return iter(read_sessions(pieces, session_gap_s))
    return read_rows(files.lines(path), _row_reader(format, block_tokens))


def _row_reader(format: TraceFormat, block_tokens: int | None) -> RowReader:
    given = {} if block_tokens is None else {"block_tokens": block_tokens}
    match format:
        case TraceFormat.MOONCAKE:
            return Mooncake(**given)
        case TraceFormat.BAILIAN:
            return Bailian(**given)
        case _:
            return Tokens()
