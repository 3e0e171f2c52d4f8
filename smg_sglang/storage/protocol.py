"""Messages between workers and the storage process: msgspec structs as msgpack.

One ZMQ ROUTER, `storage` in the memory server's private directory; workers are DEALERs. A request
is named by its worker, uniquely for its socket.
"""

from typing import Annotated, TypeAlias

import msgspec
import zmq

from smg_sglang.memory.address import Address
from smg_sglang.memory.namespace import Namespace

#: As long as a path of four million page keys.
MAX_MESSAGE_BYTES = 64 << 20

Count = Annotated[int, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, tag=True):
    """Goes by the name of its class."""


class Fetch(_Message, frozen=True):
    """Bring what storage has of path[start:] to host memory; answered by `Fetched`s."""

    id: Count
    namespace: Namespace
    path: bytes
    start: Count


class Forget(_Message, frozen=True):
    """Nobody waits for this fetch any more."""

    id: Count


class Offer(_Message, frozen=True):
    """Host memory has all pages of this path: write what storage lacks of it."""

    namespace: Namespace
    path: bytes


class GetCounters(_Message, frozen=True):
    """Answered by `CountersReply`."""

    id: Count


class Fetched(_Message, frozen=True):
    """Host memory has path[:end] now (what it was asked for, at least); `done`: no more comes."""

    id: Count
    end: Count
    done: bool


class Counters(msgspec.Struct):
    """Totals since the storage process started; they only grow."""

    pages: dict[str, int] = {}
    """By what became of them; see `EVENTS`."""
    read_bytes: int = 0
    read_seconds: float = 0.0
    written_bytes: int = 0
    write_seconds: float = 0.0
    failures: int = 0
    """Calls of the backend that raised or were late."""

    def count(self, event: str, pages: int) -> None:
        """So many pages more."""
        if pages:
            self.pages[event] = self.pages.get(event, 0) + pages


#: fetched: brought to host memory. corrupt: their bytes were not those that were written, or could
#: not be read. written: kept by the backend. Offered and not written: evicted (from host memory
#: before their turn), queue_full, unavailable (the backend failed or has a pause), refused (by the
#: backend: no room).
EVENTS = ("fetched", "corrupt", "written", "evicted", "queue_full", "unavailable", "refused")


class CountersReply(_Message, frozen=True):
    """As of now."""

    id: Count
    counters: Counters


Message: TypeAlias = Fetch | Forget | Offer | GetCounters
Reply: TypeAlias = Fetched | CountersReply

encode = msgspec.msgpack.Encoder().encode
decode_message = msgspec.msgpack.Decoder(Message).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def connect(address: Address) -> "zmq.Socket[bytes]":
    """A worker's end. Never waits: what cannot be sent now raises zmq.Again; it connects again by
    itself when the process is another."""
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    dealer.connect(f"ipc://{address.storage}")
    return dealer
