"""Calls that may hang, each with a deadline, on a thread of their own."""

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from smg_sglang.errors import SmgError

_T = TypeVar("_T")

_FIRST_PAUSE_S = 0.5
_LAST_PAUSE_S = 30.0


class StorageUnavailable(SmgError):
    """Storage failed, or did not answer in time, or has not recovered from that: it is a miss."""


class Lane:
    """Carries out one call at a time. For one calling thread.

    A call that is late is given up, but goes on: nothing else is called until it has returned, so
    that whatever it still writes to is its own until then. Failures, and calls that were late,
    make a pause, twice as long for each in a row.
    """

    def __init__(
        self, name: str, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._deadline_s = deadline_s
        self._clock = clock
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._returned = threading.Event()
        self._returned.set()
        self._pause_s = 0.0
        self._pause_until = 0.0
        self.failures = 0
        """Calls that raised or were late, or returned a failure."""
        # A daemon: a call that hangs must not keep the process.
        threading.Thread(target=self._run, name=f"smg-storage-{name}", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether a call would be tried now."""
        return self._returned.is_set() and self._clock() >= self._pause_until

    def call(self, function: Callable[[], _T]) -> _T:
        """What `function` returns, within the deadline.

        Raises:
            StorageUnavailable: it raised, was late, or is not tried because others were.
        """
        if not self.is_open:
            raise StorageUnavailable("storage is given a pause")
        outcome: list[_T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                outcome.append(function())
            except BaseException as error:
                failure.append(error)
            self._returned.set()

        self._returned.clear()
        self._work.put(work)
        if not self._returned.wait(self._deadline_s):
            self.failed()
            raise StorageUnavailable(f"storage took longer than {self._deadline_s:g} s")
        if failure:
            self.failed()
            raise StorageUnavailable(f"storage failed: {failure[0]!r}") from failure[0]
        self._pause_s = 0.0
        return outcome[0]

    def failed(self) -> None:
        """What a call returned was a failure, too: make a pause."""
        self.failures += 1
        self._pause_s = min(max(_FIRST_PAUSE_S, 2 * self._pause_s), _LAST_PAUSE_S)
        self._pause_until = self._clock() + self._pause_s

    def _run(self) -> None:
        while True:
            self._work.get()()
