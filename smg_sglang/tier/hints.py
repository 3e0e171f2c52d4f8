"""Hints about prefixes of host memory, until they hold for all of the prefix.

A hint comes with a request or after it, when the end of its prefix may still be on its way from the
device. So what host memory did not have yet waits here, and is said again as pages of the path are
published. Each hint counts once, when it is met or will not be.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.protocol import Hinted
from smg_sglang.tier.hint_actions import DEMOTE, RETAIN
from smg_sglang.tree.page_keys import KEY_BYTES

logger = logging.getLogger(__name__)

#: How a hint can end. met: it held for all of the prefix, when it was carried out. partial: for a
#: part, as the rest was not there. absent: nothing was there. share: the tenant's share was used
#: up. unavailable: the memory server was away or late. malformed: its payload. unsupported: its
#: type, its version, or this model.
OUTCOMES = ("met", "partial", "absent", "share", "unavailable", "malformed", "unsupported")
#: What `HostHints` answers where the outcome is not known yet.
PENDING = "pending"
#: How long a demoted prefix is waited for, in seconds: longer than a spill takes.
DEMOTE_S = 30.0
#: Hints that wait; beyond them the oldest is given up.
MOST_WAITING = 1024


def tenant_of(cache_salt: str | None) -> bytes:
    """Who a share of host memory is counted for."""
    return b"" if cache_salt is None else blake2b(cache_salt.encode(), digest_size=16).digest()


@dataclass(eq=False)
class _Wish:
    """until: `time.monotonic()` seconds. known: pages of the path that were there at last."""

    kind: str
    path: bytes
    tenant: bytes
    until: float
    known: int = 0


class HostHints:
    """Scheduler thread, but `published` (the spill thread's, too). None raises; each waits for the
    memory server no longer than it is told to.

    Attributes:
        outcomes: "kind outcome" -> how many.
    """

    def __init__(
        self,
        connection: Callable[[], MemoryConnection | None],
        timeout_s: float,
        *,
        here: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            connection: the scheduler's, or None while the server is away.
            here: False where another rank says it for this one.
        """
        self._connection = connection
        self._timeout_s = timeout_s
        self._here = here
        self._clock = clock
        self._waiting: dict[_Wish, None] = {}
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def count(self, kind: str, outcome: str) -> str:
        """One more hint of that kind has ended so. -> the outcome"""
        if self._here:
            with self._lock:
                self.outcomes[f"{kind} {outcome}"] += 1
        return outcome

    def retain(self, path: bytes, seconds: float, tenant: bytes) -> str:
        """Let the pages of `path` go after others, now and as they come, for so long; 0: no longer.
        -> the outcome, or PENDING"""
        if not seconds > 0:
            return self._say_once(_Wish(RETAIN, path, tenant, 0.0))
        self._end_former(DEMOTE, lambda former: path.startswith(former.path))
        return self._say(_Wish(RETAIN, path, tenant, self._clock() + seconds))

    def demote(self, path: bytes) -> str:
        """Let the pages of `path` go before others. -> the outcome, or PENDING"""
        self._end_former(RETAIN, lambda former: former.path.startswith(path))
        return self._say(_Wish(DEMOTE, path, b"", self._clock() + DEMOTE_S))

    def published(self, connection: MemoryConnection, path: bytes, timeout_s: float) -> None:
        """`path` was published on this connection."""
        if not self._waiting:
            return
        with self._lock:
            wishes = [w for w in self._waiting if w.path[:KEY_BYTES] == path[:KEY_BYTES]]
        for wish in wishes:
            outcome = self._try(wish, connection, timeout_s)
            if outcome != PENDING:
                self._end(wish, outcome)

    def sweep(self) -> None:
        """Give up what was waited for long enough."""
        if self._waiting:
            now = self._clock()
            with self._lock:
                late = [wish for wish in self._waiting if wish.until <= now]
            for wish in late:
                self._give_up(wish)

    def clear(self) -> None:
        """The weights are others, or the memory is empty: nothing that was waited for comes."""
        with self._lock:
            wishes = list(self._waiting)
        for wish in wishes:
            self._give_up(wish)

    def _end_former(self, kind: str, contradicts: Callable[[_Wish], bool]) -> None:
        """The last word counts: hints that say the contrary wait no longer."""
        with self._lock:
            former = [wish for wish in self._waiting if wish.kind == kind and contradicts(wish)]
        for wish in former:
            self._give_up(wish)

    def _say(self, wish: _Wish) -> str:
        self.sweep()
        if not self._here:
            return PENDING
        connection = self._connection()
        if connection is None:
            return self.count(wish.kind, "unavailable")
        with self._lock:
            # First, so that pages which are published meanwhile are not missed.
            self._waiting[wish] = None
            oldest = next(iter(self._waiting)) if len(self._waiting) > MOST_WAITING else None
        if oldest is not None:
            self._give_up(oldest)
        outcome = self._try(wish, connection, self._timeout_s)
        return outcome if outcome == PENDING else self._end(wish, outcome)

    def _say_once(self, wish: _Wish) -> str:
        self._end_former(RETAIN, lambda former: former.path.startswith(wish.path))
        connection = self._connection() if self._here else None
        if connection is None:
            return self.count(wish.kind, "unavailable")
        outcome = self._try(wish, connection, self._timeout_s)
        return self.count(wish.kind, _partly(wish) if outcome == PENDING else outcome)

    def _try(self, wish: _Wish, connection: MemoryConnection, timeout_s: float) -> str:
        try:
            reply = self._ask(wish, connection, timeout_s)
        except MemoryUnavailable as error:
            logger.debug("smg: a hint was not heard: %s", error)
            return "unavailable"
        wish.known = reply.known
        if reply.refused:
            return "share"
        return "met" if reply.known * KEY_BYTES >= len(wish.path) else PENDING

    def _ask(self, wish: _Wish, connection: MemoryConnection, timeout_s: float) -> Hinted:
        if wish.kind == DEMOTE:
            return connection.demote(wish.path, timeout_s)
        seconds = max(0.0, wish.until - self._clock()) if wish.until else 0.0
        return connection.retain(wish.path, seconds, wish.tenant, timeout_s)

    def _give_up(self, wish: _Wish) -> None:
        self._end(wish, _partly(wish))

    def _end(self, wish: _Wish, outcome: str) -> str:
        """The hint waits no more; whichever thread says so first counts it."""
        with self._lock:
            if wish not in self._waiting:
                return outcome
            del self._waiting[wish]
            self.outcomes[f"{wish.kind} {outcome}"] += 1
        return outcome


def _partly(wish: _Wish) -> str:
    return "partial" if wish.known else "absent"
