"""What the controller wants done. The shell does it, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class SendCopy:
    """Send a copy of the request, named `copy_rid`, that ends after its first token."""

    payload: object
    copy_rid: str
    worker: int


@dataclass(frozen=True, slots=True)
class SendOriginal:
    """Send the request as it came."""

    payload: object
    rid: str
    worker: int


@dataclass(frozen=True, slots=True)
class AbortAt:
    """Tell a worker to abort a request or a copy; its own answer ends it."""

    rid: str
    worker: int


@dataclass(frozen=True, slots=True)
class TellAborted:
    """Tell the client that its request was aborted; no worker has it."""

    rid: str


@dataclass(frozen=True, slots=True)
class TellFailed:
    """Tell the client, with a reason for people, that its request ended with an error."""

    rid: str
    message: str


Action: TypeAlias = SendCopy | SendOriginal | AbortAt | TellAborted | TellFailed
