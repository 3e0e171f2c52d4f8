"""What orchestrators say of prefixes, read and checked: the actions of SGLang's KV-hint envelope
that we know.

An envelope's `protocol_version` and an action's `action_version` are "1" or "1.x"; the payloads are
described in `docs/hints.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from smg_sglang.memory.hinting import LONGEST_S

RETAIN, DEMOTE, PREFETCH, OTHER = "retain", "demote", "prefetch", "other"
KINDS = (RETAIN, DEMOTE, PREFETCH, OTHER)
#: How long a prefix is retained for a session that does not say so, in seconds.
SESSION_S = 3600.0
#: Actions of one envelope that are read.
MOST_ACTIONS = 16
#: Tokens of an envelope's `input_ids`: they are hashed between two batches.
MOST_IDS = 1 << 18
VERSION = "1"

_Tokens = Annotated[int, msgspec.Meta(ge=1)]
#: A token as SGLang's trees keep it.
TokenId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Ids = Annotated[list[TokenId], msgspec.Meta(min_length=1)]
_Session = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_S)]


class _Prefix(msgspec.Struct, forbid_unknown_fields=True):
    tokens: _Tokens | None = None
    input_ids: _Ids | None = None


class _Retain(_Prefix):
    seconds: _Seconds | None = None
    until: float | None = None
    session: _Session | None = None


class _Demote(_Prefix):
    session: _Session | None = None


_PAYLOADS: Mapping[str, type[_Prefix]] = {RETAIN: _Retain, DEMOTE: _Demote, PREFETCH: _Prefix}


class HintRefused(Exception):
    """A hint that nobody here understands: `outcome` is what it counts as."""

    def __init__(self, kind: str, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.outcome = outcome


@dataclass(frozen=True)
class Hint:
    """One action.

    Attributes:
        tokens: of the prefix, that it is about; None: all.
        input_ids: the prefix; None: the request's own.
        seconds: how long it is to be retained; 0: no longer.
        session: by which it can be named later, with others of the same tenant's.
    """

    kind: str
    tokens: int | None = None
    input_ids: tuple[int, ...] | None = None
    seconds: float = 0.0
    session: str | None = None


def read_envelope(
    protocol_version: str, actions: Sequence[Any], now: Callable[[], float] = time.time
) -> Iterator[Hint | HintRefused]:
    """Each action as a hint, or why it is none. Never raises.

    Args:
        actions: have `action_type`, `action_version` and `payload`.
        now: seconds since 1970.
    """
    ids = 0
    for number, action in enumerate(actions):
        kind = action.action_type if action.action_type in _PAYLOADS else OTHER
        if number >= MOST_ACTIONS:
            yield HintRefused(kind, "malformed", f"more than {MOST_ACTIONS} actions")
            continue
        try:
            _check_version(kind, f"protocol_version {protocol_version!r}", protocol_version)
            hint = _read(kind, action, now())
            ids = _check_ids(hint, ids)
            yield hint
        except HintRefused as refused:
            yield refused


def _read(kind: str, action: Any, now: float) -> Hint:
    if kind == OTHER:
        raise HintRefused(kind, "unsupported", f"no action_type {action.action_type!r} here")
    _check_version(kind, f"action_version {action.action_version!r}", action.action_version)
    try:
        payload: Any = msgspec.convert(action.payload, _PAYLOADS[kind])
    except msgspec.ValidationError as error:
        raise HintRefused(kind, "malformed", f"the payload is none of a {kind}: {error}") from None
    return Hint(
        kind,
        tokens=payload.tokens,
        input_ids=None if payload.input_ids is None else tuple(payload.input_ids),
        seconds=_seconds(payload, now) if kind == RETAIN else 0.0,
        session=getattr(payload, "session", None),
    )


def _check_ids(hint: Hint, before: int) -> int:
    """How many tokens an envelope has named with this hint."""
    ids = before + len(hint.input_ids or ())
    if ids > MOST_IDS:
        raise HintRefused(hint.kind, "malformed", f"more than {MOST_IDS} input_ids in an envelope")
    return ids


def _seconds(payload: _Retain, now: float) -> float:
    if payload.until is not None and payload.seconds is not None:
        raise HintRefused(RETAIN, "malformed", "seconds and until exclude each other")
    if payload.seconds is not None:
        return payload.seconds
    if payload.until is not None:
        # NaN is less than nothing; what has passed already is retained no longer.
        return min(max(0.0, payload.until - now), LONGEST_S)
    if payload.session is None:
        raise HintRefused(RETAIN, "malformed", "it says neither seconds nor until nor session")
    return SESSION_S


def _check_version(kind: str, what: str, version: str) -> None:
    if version.partition(".")[0] != VERSION:
        raise HintRefused(kind, "unsupported", f"{what} is not {VERSION}")
