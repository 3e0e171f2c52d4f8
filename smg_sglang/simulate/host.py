"""The host level: the memory server's own books, without the sockets and the bytes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from smg_sglang.config import MAX_WAITING_SHARE
from smg_sglang.memory.books import Books
from smg_sglang.memory.namespace import Namespace
from smg_sglang.simulate.settings import Settings
from smg_sglang.simulate.storage import StorageLevel
from smg_sglang.tree.page_keys import KEY_BYTES

_CLIENT = b"simulated worker"


@dataclass(frozen=True)
class Spill:
    """A path to copy. `own_pages`: how many of it no waiting spill has."""

    path: bytes
    own_pages: int
    done: Callable[[bool], None]
    """Told whether host memory has all of the path."""


class HostLevel:
    """Lookups and leases at once; spills one after another, each for as long as the link takes.

    Follows `tier/host_tier.py` and `transfer/spills.py`.
    """

    def __init__(
        self, settings: Settings, now: Callable[[], float], at: Callable[..., None]
    ) -> None:
        """`at(time, call, *arguments)` has something called at a time to come."""
        self._settings = settings
        self._now, self._at = now, at
        self.books = Books(settings.host_bytes, clock=now, eviction=settings.eviction)
        self.geometry = self.books.connect(_CLIENT, _namespace(settings))
        self.dropped: Counter[str] = Counter()
        self.spills = self.spilled_pages = 0
        self.spill_s = 0.0
        self._ids = count(1)
        self._waiting: deque[Spill] = deque()
        self._waiting_pages = 0
        self._busy = False
        pages = settings.storage_pages
        self.storage = StorageLevel(pages) if pages else None

    def find(self, path: bytes, start: int) -> tuple[int, int]:
        """(lease, pages found beyond `start`)."""
        lease = next(self._ids)
        return lease, len(self.books.lookup(_CLIENT, lease, path, start))

    def touch(self, path: bytes) -> None:
        """The device has all of it."""
        if path:
            self.books.touch(_CLIENT, path)

    def release(self, lease: int) -> None:
        """The pages of a lease have been read."""
        self.books.release(_CLIENT, lease)

    def spill(self, spill: Spill) -> None:
        """Queue a copy."""
        limit = self._settings.device_pages * MAX_WAITING_SHARE
        if self._waiting_pages and self._waiting_pages + spill.own_pages > limit:
            self.dropped["queue_full"] += spill.own_pages
            spill.done(False)
            return
        self._waiting_pages += spill.own_pages
        self._waiting.append(spill)
        if not self._busy:
            self._start()

    def spill_now(self, path: bytes) -> float:
        """Copy what is lacking of `path` at once; the seconds it takes."""
        reservation = next(self._ids)
        have, pages = self.books.reserve(_CLIENT, reservation, path)
        seconds = self._count(len(pages))
        self._publish(reservation, path[: (have + len(pages)) * KEY_BYTES])
        return seconds

    def bring(self, path: bytes, start: int) -> int:
        """Pages from storage, for `path[start:]`; how many there was room for."""
        reservation = next(self._ids)
        have, pages = self.books.reserve(_CLIENT, reservation, path)
        self.books.publish(_CLIENT, reservation)
        return max(0, have + len(pages) - start)

    def _publish(self, reservation: int, path: bytes) -> None:
        self.books.publish(_CLIENT, reservation)
        if self.storage is not None:
            self.storage.offer(path)

    def _start(self) -> None:
        self._busy = True
        spill = self._waiting.popleft()
        reservation = next(self._ids)
        have, pages = self.books.reserve(_CLIENT, reservation, spill.path)
        short = len(spill.path) // KEY_BYTES - have - len(pages)
        self.dropped["memory_full"] += short
        seconds = self._count(len(pages))
        kept = spill.path[: (have + len(pages)) * KEY_BYTES]
        self._at(self._now() + seconds, self._finish, spill, reservation, kept)

    def _count(self, pages: int) -> float:
        seconds = self._settings.link_s(pages)
        self.spills += 1
        self.spilled_pages += pages
        self.spill_s += seconds
        return seconds

    def _finish(self, spill: Spill, reservation: int, kept: bytes) -> None:
        self._publish(reservation, kept)
        self._waiting_pages -= spill.own_pages
        self._busy = False
        spill.done(kept == spill.path)
        if self._waiting and not self._busy:
            self._start()


def _namespace(settings: Settings) -> Namespace:
    return Namespace(
        model=settings.model.name,
        dtype="",
        layout="simulated",
        page_size=settings.page_size,
        page_bytes=settings.page_bytes,
    )
