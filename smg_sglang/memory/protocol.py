"""The messages between memory server and clients: msgspec structs as msgpack, never pickle.

Two channels, both in the server's private directory. `life` is a unix SEQPACKET socket: the
client says `Hello`, the server answers `Welcome` together with the arena's file descriptor,
and from then on the open socket *is* the client's life: EOF means it died. `control` is a ZMQ
ROUTER; a client speaks on it under the secret identity it got in `Welcome`.

A lease or a reservation is named by the correlation id of the request that asked for it, so a
client that gave up waiting can release what it never heard of: the release follows the request
on the same ordered channel.
"""

from typing import Annotated, TypeAlias

import msgspec
import numpy as np

from smg_sglang.memory.arena import PageGeometry
from smg_sglang.memory.namespace import Namespace
from smg_sglang.memory.stats import Stats

#: Raised whenever an old client and a new server would misunderstand each other.
VERSION = 5
#: Longest message the server reads: a path of four million page keys.
MAX_MESSAGE_BYTES = 64 << 20

Count = Annotated[int, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, tag=True):
    """Goes by the name of its class."""


class Hello(_Message, frozen=True):
    """First message on `life`."""

    version: int
    namespace: Namespace
    let_go: list[bytes] = []
    """As in `LetGo`, where there is no connection to say it on."""


class Welcome(_Message, frozen=True):
    """Answer to `Hello`; the arena's file descriptor travels with it (SCM_RIGHTS)."""

    identity: bytes
    epoch: str
    arena_bytes: int
    geometry: PageGeometry


class _Numbered(_Message, frozen=True):
    """A question, and its reply under the same id."""

    id: Count


class Ping(_Numbered, frozen=True):
    """Answered by `Ok`: the server is there and has read all that was sent before."""


class Lookup(_Numbered, frozen=True):
    """Lease the pages of `path` from page `start` on, as far as they are in memory. `is_use`: the
    eviction policy and the counters of hits are to know of it."""

    path: bytes
    start: Count
    is_use: bool = True


class Reserve(_Numbered, frozen=True):
    """Pages to write what is not yet in memory of `path`."""

    path: bytes


class LookupLast(_Numbered, frozen=True):
    """Of single pages: lease the last `window` of the longest prefix of `path` that has them."""

    path: bytes
    window: Annotated[int, msgspec.Meta(ge=1)]


class ReserveEach(_Numbered, frozen=True):
    """Of single pages: pages to write those of `path` that are not yet in memory."""

    path: bytes


class Flush(_Numbered, frozen=True):
    """Forget all pages of the namespace; leased ones live until they are released."""


class GetStats(_Numbered, frozen=True):
    """Ask for `StatsReply`."""


class GetChanges(_Numbered, frozen=True):
    """Ask what came into the namespace and left it since change `since`; -1: all there is."""

    since: int


class Retain(_Numbered, frozen=True):
    """Let what is in memory of `path` go after all that nobody retains, for so many seconds; 0: no
    longer. `tenant` is who retains, whose share is bounded."""

    path: bytes
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    tenant: bytes


class Demote(_Numbered, frozen=True):
    """Let `path`, and all that goes on below it, go before all others, until it is used again."""

    path: bytes


class Release(_Message, frozen=True):
    """End the lease of Lookup `lease`; no reply; an unknown lease is not an error."""

    lease: Count


class Touch(_Message, frozen=True):
    """`path` was used elsewhere (a device hit): keep it young; no reply."""

    path: bytes


class _OfReservation(_Message, frozen=True):
    reservation: Count


class Publish(_OfReservation, frozen=True):
    """The pages of reservation `reservation` are written; no reply."""


class Abandon(_OfReservation, frozen=True):
    """Give back reservation `reservation` unwritten; no reply; unknown is not an error."""


class LetGo(_Message, frozen=True):
    """Copies of these former connections of this process have ended: their pages may be given to
    others; no reply; unknown is not an error."""

    identities: list[bytes]


class Goodbye(_Message, frozen=True):
    """The life line will end, and no copy is under way: nothing of this connection is to be kept
    for it; no reply."""


class Leased(_Numbered, frozen=True):
    """`pages` (int64, little-endian) of path[start:start + n]; empty: a miss, nothing leased."""

    pages: bytes


class Reserved(_Numbered, frozen=True):
    """`pages` (int64, little-endian) to write path[have:have + n]; empty: nothing reserved."""

    have: int
    pages: bytes


class Last(_Numbered, frozen=True):
    """`pages` (int64, little-endian) of path[length - n:length]; 0: a miss, nothing leased."""

    length: int
    pages: bytes


class Places(_Numbered, frozen=True):
    """Which keys of the path are `lacking`, and `pages` to write the first of them, both int64,
    little-endian."""

    lacking: bytes
    pages: bytes


class Hinted(_Numbered, frozen=True):
    """Of the path's pages `known` are in memory, the hint holds for `done` (demoted: with those
    below it), and `refused` are beyond the tenant's share."""

    known: Count
    done: Count
    refused: Count


class Ok(_Numbered, frozen=True):
    """Done."""


class StatsReply(_Numbered, frozen=True):
    """The server's counters."""

    stats: Stats


class Changes(_Numbered, frozen=True):
    """`entries`: (whether pages came, their page keys), in order; `next` is the number to ask from
    then. `whole`: they are all pages that are there, and nothing is to be kept of what was known.
    """

    next: int
    whole: bool
    entries: list[tuple[bool, bytes]]


class Refused(_Numbered, frozen=True):
    """The request cannot be served; `reason` is for people. id 0: the connection is refused."""

    reason: str


Question: TypeAlias = (
    Ping
    | Lookup
    | Reserve
    | LookupLast
    | ReserveEach
    | Retain
    | Demote
    | Flush
    | GetStats
    | GetChanges
)
Notice: TypeAlias = Release | Touch | Publish | Abandon | LetGo | Goodbye
Message: TypeAlias = Question | Notice
Reply: TypeAlias = Leased | Reserved | Last | Places | Hinted | Ok | StatsReply | Changes | Refused

encode = msgspec.msgpack.Encoder().encode
decode_message = msgspec.msgpack.Decoder(Message).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_welcome = msgspec.msgpack.Decoder(Welcome | Refused).decode


def pack_pages(pages: np.ndarray) -> bytes:
    """Page numbers (int64[n]) as they travel."""
    return pages.astype("<i8", copy=False).tobytes()


def unpack_pages(data: bytes) -> np.ndarray:
    """The inverse of `pack_pages`; read-only int64[n]."""
    return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)
