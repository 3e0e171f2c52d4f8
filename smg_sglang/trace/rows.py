"""Traces with a request a line: Mooncake, Qwen-Bailian, plain tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Protocol

import msgspec

from smg_sglang.trace.checks import PrefixIds, check_count, check_time
from smg_sglang.trace.files import Piece
from smg_sglang.trace.request import Request, block_ids

Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0)]
Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Time = Annotated[float, msgspec.Meta(ge=0)]


class RowReader(Protocol):
    """Turns the lines of one trace, in their order, into requests."""

    def request(self, number: int, data: bytes) -> Request:
        """Raises ValueError (msgspec's errors are some) with the reason."""


class MooncakeRow(msgspec.Struct, frozen=True):
    timestamp: Time
    """Milliseconds."""
    input_length: Count
    output_length: CountOrNone
    hash_ids: list[Id]


class Mooncake:
    """kvcache-ai/Mooncake, `FAST25-release/traces/*.jsonl`: ids of 512-token blocks, a partial
    last one included; an id stands for its block and all before it."""

    def __init__(self, block_tokens: int = 512) -> None:
        self._block_tokens = block_tokens
        self._ids = PrefixIds(block_tokens)
        self._decoder = msgspec.json.Decoder(MooncakeRow)

    def request(self, number: int, data: bytes) -> Request:
        row = self._decoder.decode(data)
        check_count(len(row.hash_ids), row.input_length, self._block_tokens, partial=True)
        self._ids.check(row.hash_ids, row.input_length)
        return Request(
            number,
            row.timestamp / 1000,
            block_ids(row.hash_ids),
            self._block_tokens,
            row.input_length,
            row.output_length,
        )


class BailianRow(msgspec.Struct, frozen=True):
    chat_id: int
    timestamp: Time
    """Seconds."""
    input_length: Count
    output_length: CountOrNone
    hash_ids: list[Id]
    parent_chat_id: int = -1
    type: str = ""
    turn: int = 1


class Bailian:
    """alibaba-edu/qwen-bailian-usagetraces-anon: ids of 16-token blocks, each of its own tokens
    only. A turn has an id of its own and names its parent; its chat is the first ancestor."""

    def __init__(self, block_tokens: int = 16) -> None:
        self._block_tokens = block_tokens
        self._chats: dict[int, int] = {}
        self._decoder = msgspec.json.Decoder(BailianRow)

    def request(self, number: int, data: bytes) -> Request:
        row = self._decoder.decode(data)
        check_count(len(row.hash_ids), row.input_length, self._block_tokens, partial=None)
        chat = self._chats.get(row.parent_chat_id, row.chat_id)
        self._chats[row.chat_id] = chat
        return Request(
            number,
            row.timestamp,
            block_ids(row.hash_ids),
            self._block_tokens,
            row.input_length,
            row.output_length,
            str(chat),
        )


class TokenRow(msgspec.Struct, frozen=True):
    tokens: list[Id] | None = None
    input_ids: list[Id] | None = None
    timestamp: Time | None = None
    """Milliseconds; in every line or in none, and then all arrive at once."""
    output_length: CountOrNone = 1


class Tokens:
    """Token ids themselves, as `tokens` or `input_ids`."""

    def __init__(self) -> None:
        self._timed: bool | None = None
        self._decoder = msgspec.json.Decoder(TokenRow)

    def request(self, number: int, data: bytes) -> Request:
        row = self._decoder.decode(data)
        tokens = _only_tokens(row)
        timed = row.timestamp is not None
        if self._timed not in (None, timed):
            raise ValueError("some lines have a `timestamp` and some have none")
        self._timed = timed
        arrival_s = (row.timestamp or 0.0) / 1000
        return Request(number, arrival_s, block_ids(tokens), 1, len(tokens), row.output_length)


def _only_tokens(row: TokenRow) -> list[int]:
    if (row.tokens is None) == (row.input_ids is None):
        raise ValueError("a line needs either `tokens` or `input_ids`")
    tokens = row.tokens if row.tokens is not None else row.input_ids
    if not tokens:
        raise ValueError("a prompt needs at least one token")
    return tokens


def read_rows(pieces: Iterable[Piece], reader: RowReader) -> Iterator[Request]:
    """The requests of the lines, checked. Raises TraceError at the first line that is wrong."""
    before_s = 0.0
    for number, piece in enumerate(pieces):
        try:
            request = reader.request(number, piece.data)
            check_time(request.arrival_s, before_s)
        except ValueError as error:
            raise piece.error(_reason(piece, error)) from error
        before_s = request.arrival_s
        yield request


def _reason(piece: Piece, error: Exception) -> str:
    if not piece.data.strip():
        return "the line is empty"
    if isinstance(error, msgspec.ValidationError) or not isinstance(error, msgspec.DecodeError):
        return str(error)
    cut = "" if piece.data.endswith(b"\n") else ", and ends without a newline: was the file cut?"
    return f"is no JSON ({error}){cut}"
