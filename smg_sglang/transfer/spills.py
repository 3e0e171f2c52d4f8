"""Spills: copies of device pages into the memory tier, in the background and in order."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.transfer.mover import BeforeCopy, Mover

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
"""What names a job to the callbacks, e.g. its path; opaque here."""
Handle = TypeVar("Handle")
"""What `reserve` returned to be published or abandoned; opaque here."""


class Event(Protocol):
    """A point on a device stream, such as torch.cuda.Event."""

    def synchronize(self) -> None: ...


class SpillDropped(Exception):
    """A job, or its last ``pages``, is not to be spilled; ``reason`` is what it is counted by.

    Raised by `reserve` without ``pages``: all that the job adds.
    """

    def __init__(self, reason: str, pages: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pages = pages


@dataclass(frozen=True)
class SpillTarget(Generic[Handle]):
    """Where pages of a job go.

    Attributes:
        handle: passed to `publish` or `abandon`.
        arena: uint8, the whole mapping.
        offsets: int64 [m], byte offset of the host page for pages first..first+m of the job.
            Empty when all of the job is in memory already.
        first: number of leading pages of the job that are in memory already.
        which: int64 [m], the job's pages that go there, where they are not consecutive; the others
            are in memory already, or there is no room for them (``missing``).
        missing: pages that there is no room for.
    """

    handle: Handle
    arena: np.ndarray
    offsets: np.ndarray
    first: int = 0
    which: np.ndarray | None = None
    missing: int = 0

    def of(self, slots: torch.Tensor, page_size: int) -> torch.Tensor:
        """The slots of the job's pages that go there."""
        if self.which is None:
            end = self.first + len(self.offsets)
            return slots[self.first * page_size : end * page_size]
        which = torch.tensor(self.which, device=slots.device)
        return slots.view(-1, page_size)[which].reshape(-1)


@dataclass
class SpillCounters:
    """Totals since start. ``seconds``: time spent copying, without reserve and publish.
    ``dropped``: pages that were not copied, by reason."""

    jobs: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Job(Generic[Key]):
    key: Key
    slots: torch.Tensor
    ready: tuple[Event, ...]
    new_slots: int
    dropped: str | None = None

    @property
    def num_slots(self) -> int:
        return self.slots.numel()


class SpillQueue(Generic[Key, Handle]):
    """A thread that spills jobs one after another; it sleeps when there are none.

    For each job: wait for its ``ready`` events, `reserve`, copy, `publish`. The three callbacks
    run on this thread only, so a connection that serves one thread may belong to it.

    The caller keeps the job's slots from being reused until it has popped its completion.
    `submit`, `num_completed`, `pop_completed` are for the scheduler thread and do not block.
    """

    def __init__(
        self,
        mover: Mover,
        *,
        reserve: Callable[[Key], SpillTarget[Handle]],
        publish: Callable[[Handle], None],
        abandon: Callable[[Handle], None],
        max_waiting_pages: int | None = None,
        before_copy: BeforeCopy | None = None,
    ) -> None:
        """
        Args:
            reserve: places for the pages of a job. May raise `MemoryUnavailable` or
                `SpillDropped`: the job then completes with False.
            publish: the bytes of a target are there.
            abandon: the target will not be written (the copy failed).
            max_waiting_pages: jobs submitted while this many pages wait complete with False
                (reason ``queue_full``), so that locked slots stay bounded.
            before_copy: test hook, called before each copy.
        """
        self.counters = SpillCounters()
        self._mover = mover
        self._reserve, self._publish, self._abandon = reserve, publish, abandon
        self._max_waiting_pages = max_waiting_pages
        self._before_copy = before_copy
        self._jobs: deque[_Job[Key]] = deque()
        self._completed: deque[bool] = deque()
        self._waiting_slots = 0
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="smg-spill", daemon=True)
        self._thread.start()

    def submit(
        self,
        key: Key,
        slots: torch.Tensor,
        ready: Sequence[Event] = (),
        new_slots: int | None = None,
    ) -> None:
        """Queue a job; every submitted job completes, in this order.

        Args:
            key: passed to `reserve`.
            slots: int64 [n * page_size] on the pool's device.
            ready: events after which the slots hold the KV.
            new_slots: how many of them no waiting job has (default: all). Jobs that share a prefix
                lock it once, so this is what counts against ``max_waiting_pages``.
        """
        new_slots = slots.numel() if new_slots is None else new_slots
        with self._changed:
            if self._closed:
                self.counters.dropped["closed"] += new_slots // self._mover.layout.page_size
                self._completed.append(False)
                return
            refused = None if self._has_room(new_slots) else "queue_full"
            self._jobs.append(_Job(key, slots, tuple(ready), new_slots, refused))
            self._waiting_slots += new_slots
            self._changed.notify_all()

    @property
    def waiting_slots(self) -> int:
        """Slots of jobs that have not completed."""
        return self._waiting_slots

    def num_completed(self) -> int:
        """Completions waiting to be popped."""
        return len(self._completed)

    def pop_completed(self) -> bool:
        """Oldest completion: True when all pages of the job are in memory.

        Raises:
            IndexError: there is none.
        """
        return self._completed.popleft()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until every submitted job has completed; False on timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def close(self) -> None:
        """Complete waiting jobs with False, finish the running one, end the thread. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _has_room(self, num_slots: int) -> bool:
        # A job that is larger than the limit by itself must not be refused for ever.
        if self._max_waiting_pages is None or not self._waiting_slots:
            return True
        limit = self._max_waiting_pages * self._mover.layout.page_size
        return self._waiting_slots + num_slots <= limit

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                self._spill(job)
                success = True
            except SpillDropped as dropped:
                success = self._drop(job, dropped.reason, dropped.pages)
            except MemoryUnavailable:
                success = self._drop(job, "unavailable")
            except Exception:
                logger.exception("a spill failed; its pages stay on the device only")
                success = self._drop(job, "error")
            self._complete(job, success)

    def _next_job(self) -> _Job[Key] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            self._busy = True
            return self._jobs.popleft()

    def _complete(self, job: _Job[Key], success: bool) -> None:
        with self._changed:
            self.counters.jobs += 1
            self._waiting_slots -= job.new_slots
            self._completed.append(success)
            self._busy = False
            self._changed.notify_all()

    def _drop(self, job: _Job[Key], reason: str, pages: int | None = None) -> bool:
        new_pages = job.new_slots // self._mover.layout.page_size
        self.counters.dropped[reason] += new_pages if pages is None else pages
        return False

    def _spill(self, job: _Job[Key]) -> None:
        """Raises what drops the job."""
        if job.dropped or self._closed:
            raise SpillDropped(job.dropped or "closed")
        for event in job.ready:
            event.synchronize()
        target = self._reserve(job.key)
        page_size = self._mover.layout.page_size
        try:
            self._copy(target.of(job.slots, page_size), target)
        except BaseException:
            self._abandon(target.handle)
            raise
        self._publish(target.handle)
        missing = target.missing
        if target.which is None:
            missing = job.num_slots // page_size - target.first - len(target.offsets)
        if missing > 0:
            raise SpillDropped("memory_full", missing)

    def _copy(self, slots: torch.Tensor, target: SpillTarget[Handle]) -> None:
        if not len(target.offsets):
            return
        if self._before_copy is not None:
            self._before_copy()
        started = time.perf_counter()
        move = self._mover.prepare(slots, target.arena, target.offsets)
        self._mover.spill(move)
        self.counters.seconds += time.perf_counter() - started
        self.counters.pages += move.num_pages
        self.counters.bytes += move.num_pages * self._mover.layout.page_bytes
