"""Keeps a connection to the memory server open in the background, whatever happens to it."""

import logging
import os
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.arena import ArenaMappings
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.namespace import Namespace

log = logging.getLogger(__name__)

#: Former connections of which a new one is told.
MOST_LET_GO = 256


class MemoryLink:
    """Connects in a thread of its own, watches the life line (no CPU), reconnects with backoff.

    Any thread may call any method; only `wait` waits.
    """

    def __init__(
        self,
        address: str,
        namespace: Namespace,
        *,
        open_timeout_s: float = 2.0,
        first_backoff_s: float = 0.1,
        last_backoff_s: float = 5.0,
        mappings: ArenaMappings | None = None,
        tell: Callable[[int, str], None] = log.log,
    ) -> None:
        """Returns at once; the first connection comes when it comes (see `wait`).

        Args:
            mappings: links that share them share one mapping of the arena.
            tell: takes what people should know, once each time, with its level.
        """
        self.address = address
        self.namespace = namespace
        self.last_error: str | None = None
        """Why there is no connection; None while there is one."""
        self.connects = 0
        """Connections made since the start: 2 or more says that the server went away."""
        self._open_timeout_s = open_timeout_s
        self._backoffs = (first_backoff_s, last_backoff_s)
        self._mappings = mappings or ArenaMappings()
        self._tell = tell
        self._connection: MemoryConnection | None = None
        # Said again to each new connection, since one that dies may not have passed it on.
        self._let_go: deque[bytes] = deque(maxlen=MOST_LET_GO)
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # The collector may call us within any other call of this thread.
        self._waking = threading.RLock()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="smg-memory-link", daemon=True)
        self._thread.start()

    def connection(self) -> MemoryConnection | None:
        """The connection, or None while the server is gone. Never blocks.

        A server that merely does not answer keeps its connection, whose questions then fail at
        once (`MemoryConnection.stalled`).
        """
        connection = self._connection
        return connection if connection is not None and connection.alive else None

    def wait(self, timeout_s: float) -> MemoryConnection | None:
        """Wait for a connection, `timeout_s` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self.connection() or self._closing, timeout_s)
        return self.connection()

    def close(self) -> None:
        """End the thread and the connection; its leases and unpublished pages go."""
        if self._closing:
            return
        with self._waking:
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        backoff_s = self._backoffs[0]
        while not self._closing:
            connection = self._try_open()
            if connection is None:
                self._sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, self._backoffs[1])
                continue
            opened_at = time.monotonic()
            self._set(connection)
            while not self._sleep(None, connection.fileno()) and not self._closing:
                connection.let_go(list(self._let_go))
            self._drop(connection)
            # What copies for it holds a lease, not this name.
            connection = None
            if time.monotonic() - opened_at > self._backoffs[1]:
                backoff_s = self._backoffs[0]
            elif not self._closing:  # it dies young: do not reconnect in a tight loop
                self._sleep(backoff_s)

    def _try_open(self) -> MemoryConnection | None:
        try:
            return MemoryConnection.open(
                self.address,
                self.namespace,
                self._open_timeout_s,
                self._mappings,
                list(self._let_go),
            )
        except MemoryUnavailable as error:
            reason = str(error)
        except Exception as error:  # whatever it is may pass; without this thread nothing would
            reason = repr(error)
        if self.last_error is None:  # once, not at every attempt
            told = f"smg: no memory server for now: {reason}; going on without until it appears"
            self._tell(logging.WARNING, told)
        self.last_error = reason
        return None

    def _set(self, connection: MemoryConnection) -> None:
        with self._changed:
            self._connection = connection
            self.last_error = None
            self.connects += 1
            self._changed.notify_all()
        told = f"smg: connected to the memory server at {self.address} ({connection.epoch})"
        self._tell(logging.INFO, told)

    def _drop(self, connection: MemoryConnection) -> None:
        self._connection = None
        if not self._closing:
            connection.mark_dead()
            connection.when_unused(self._copies_ended)
            self.last_error = f"the memory server at {self.address} went away"
            self._tell(logging.WARNING, f"smg: {self.last_error}; going on without it")
        connection.close()

    def _copies_ended(self, identity: bytes) -> None:
        """Of a former connection. Any thread, and wherever the collector runs."""
        self._let_go.append(identity)
        with self._waking:
            if not self._closing:
                os.eventfd_write(self._wake, 1)

    def _sleep(self, seconds: float | None, fd: int | None = None) -> bool:
        """Until `close`, copies of a former connection have ended, `seconds` are over, or `fd` (a
        life line) ends: whether that was it."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if fd is not None and fd >= 0:
            poll.register(fd, select.POLLIN)
        ready = {found for found, _ in poll.poll(None if seconds is None else seconds * 1000)}
        if self._wake in ready and not self._closing:
            os.eventfd_read(self._wake)
        return fd in ready
