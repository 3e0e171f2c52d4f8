"""Coding-agent sessions: a JSON document each, with ids of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Literal

import msgspec

from smg_sglang.trace.checks import PrefixIds, check_count, check_time
from smg_sglang.trace.files import Piece
from smg_sglang.trace.request import Request, block_ids
from smg_sglang.trace.rows import Count, CountOrNone, Time

#: Ids of one session; those of the next start above.
_LOCAL_BITS = 32

LocalId = Annotated[int, msgspec.Meta(ge=0, lt=1 << _LOCAL_BITS)]


class Call(msgspec.Struct, frozen=True, rename={"input": "in", "output": "out"}):
    t: Time
    """Seconds since the session began."""
    input: Count
    output: CountOrNone
    hash_ids: list[LocalId]


class Session(msgspec.Struct, frozen=True):
    requests: list[msgspec.Raw]
    block_size: Count = 64
    id: str = ""
    hash_id_scope: Literal["local", "global"] = "local"


def read_sessions(pieces: Iterable[Piece], gap_s: float = 0.0) -> list[Request]:
    """All requests of callanjfox/kv-cache-tester sessions (`traces/*.json`), by arrival.

    Each session begins `gap_s` seconds after the one before it; the traces do not tell. The ids
    cover whole blocks (an id for a partial last one is taken, too) and stand for their block and
    all before it.

    Raises TraceError, naming the member and its request (from 0).
    """
    found: list[Request] = []
    for index, piece in enumerate(pieces):
        found.extend(_session(piece, index, index * gap_s))
    found.sort(key=lambda request: request.arrival_s)
    return [replace(request, number=number) for number, request in enumerate(found)]


def _session(piece: Piece, index: int, start_s: float) -> Iterator[Request]:
    try:
        session = msgspec.json.decode(piece.data, type=Session)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise piece.error(f"is no session: {error}") from error
    offset = index << _LOCAL_BITS if session.hash_id_scope == "local" else 0
    name = session.id or f"session {index}"
    prefixes = PrefixIds(session.block_size)
    before_s = 0.0
    for place, raw in enumerate(session.requests):
        try:
            call = msgspec.json.decode(raw, type=Call)
            check_time(call.t, before_s)
            check_count(len(call.hash_ids), call.input, session.block_size, partial=None)
            prefixes.check(call.hash_ids, call.input)
        except ValueError as error:
            raise piece.error(str(error), f"request {place}") from error
        before_s = call.t
        blocks = block_ids(call.hash_ids, offset)
        arrival_s = start_s + call.t
        yield Request(0, arrival_s, blocks, session.block_size, call.input, call.output, name)
