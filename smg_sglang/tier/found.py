"""What lookups have found for requests that still wait: leases, kept until load or forgetting."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

L = TypeVar("L")
"""A lease; opaque here."""


@dataclass(frozen=True)
class Found(Generic[L]):
    """The answer to one lookup.

    Attributes:
        question: (first page asked for, pages of the whole path, last key of the path).
        lease: pins the host pages found, or None for a miss.
        asked_at: `time.monotonic()` seconds; a miss is asked again after `RETRY_MISS_S`.
    """

    question: tuple[int, int, bytes]
    lease: L | None
    asked_at: float


#: A miss may turn into a hit while the request waits, since another one publishes its prefix.
RETRY_MISS_S = 0.05
#: Requests in the queue pin what they found. Beyond this many the oldest is let go, and its request
#: is computed. Twice what SGLang's `lpm` policy matches ahead (128 requests); `fcfs` matches only
#: the requests it is about to admit.
MAX_HELD = 256


class FoundLeases(Generic[L]):
    """Leases by request id. Scheduler thread only.

    SGLang matches every waiting request again in every step; the memory server is asked only when
    the question has changed, so that a request waiting a thousand steps costs one lookup.
    """

    def __init__(
        self,
        release: Callable[[L], None],
        max_held: int = MAX_HELD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._release = release
        self._max_held = max_held
        self._clock = clock
        self._by_rid: OrderedDict[str, Found[L]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_rid)

    @property
    def num_leases(self) -> int:
        """Leases held; misses are remembered too, and hold nothing."""
        return sum(found.lease is not None for found in self._by_rid.values())

    def get(self, rid: str, question: tuple[int, int, bytes]) -> Found[L] | None:
        """The answer already held for this very question, unless it is a miss grown old."""
        found = self._by_rid.get(rid)
        if found is None or found.question != question:
            return None
        if found.lease is None and self._clock() - found.asked_at > RETRY_MISS_S:
            return None
        return found

    def put(self, rid: str, question: tuple[int, int, bytes], lease: L | None) -> None:
        """Keep an answer, in place of the request's former one."""
        self.forget(rid)
        self._by_rid[rid] = Found(question, lease, self._clock())
        while len(self._by_rid) > self._max_held:
            self.forget(next(iter(self._by_rid)))

    def take(self, rid: str) -> L | None:
        """Hand the request's lease to the caller, who releases it."""
        found = self._by_rid.pop(rid, None)
        return found.lease if found else None

    def forget(self, rid: str) -> None:
        """Release what the request holds; nothing happens where it holds nothing."""
        lease = self.take(rid)
        if lease is not None:
            self._release(lease)

    def clear(self) -> None:
        """Release everything."""
        for rid in list(self._by_rid):
            self.forget(rid)
