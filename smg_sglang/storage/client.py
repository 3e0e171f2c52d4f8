"""A worker's view of storage: pages offered, prefixes fetched while their requests wait."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from smg_sglang.memory.address import Address
from smg_sglang.memory.breaker import Breaker
from smg_sglang.memory.namespace import Namespace
from smg_sglang.storage import protocol
from smg_sglang.tree.page_keys import KEY_BYTES

log = logging.getLogger(__name__)


@dataclass
class Fetch:
    """What storage brings for one request.

    Attributes:
        start, end: pages of its path that host memory had, and has now. They only grow.
        deadline: `time.monotonic()` seconds; the request waits no longer.
        done: no more comes, or nobody waits for it.
    """

    id: int
    start: int
    end: int
    deadline: float
    done: bool = False


def has_storage(address: str) -> bool:
    """Whether the memory server at this directory has a storage process, dead or alive."""
    return os.path.exists(Address.parse(address).storage)


class StorageClient:
    """Never raises, and but for `fetch` never waits: what storage cannot do is not there.

    Scheduler thread only, but `offer` (the spill thread's, too).
    """

    def __init__(
        self,
        address: str,
        namespace: Namespace,
        wait_s: float,
        word_s: float = 0.02,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            address: directory of the memory server's sockets.
            wait_s: how long a request waits at most.
            word_s: how long `fetch` itself waits for the word whether there is anything, so that a
                miss costs no step of the scheduler. Not where the last word took longer.
        """
        self._namespace = namespace
        self._wait_s, self._word_s = wait_s, word_s
        self._is_prompt = True
        self._heard_of = 0  # the newest fetch, by id, that was answered at all
        self._clock = clock
        self._socket = protocol.connect(Address.parse(address))
        self._lock = threading.Lock()  # ZMQ's sockets are one thread's at a time
        self._ids = itertools.count(1)
        self._fetches: dict[str, Fetch] = {}  # by rid
        self._waiting: dict[int, Fetch] = {}  # by id
        self._breaker = Breaker(clock)
        self._closed = False
        self.late = 0
        """Fetches that were not done when their request would not wait longer."""

    def fetch(self, rid: str, path: bytes, start: int) -> Fetch:
        """The request's fetch of `path[start:]` (in pages), begun when first asked for."""
        self.poll()
        fetch = self._fetches.get(rid)
        if fetch is None:
            deadline = self._clock() + self._wait_s
            fetch = self._fetches[rid] = Fetch(next(self._ids), start, start, deadline)
            self._begin(fetch, path, start)
        elif not fetch.done and self._clock() >= fetch.deadline:
            self._give_up(fetch)
        return fetch

    def _begin(self, fetch: Fetch, path: bytes, start: int) -> None:
        if start * KEY_BYTES >= len(path) or not self._may_ask():
            fetch.done = True
            return
        message = protocol.Fetch(fetch.id, self._namespace, path, start)
        self._waiting[fetch.id] = fetch
        if not self._send(message):
            del self._waiting[fetch.id]
            fetch.done = True
        elif self._is_prompt:
            self._await_word(fetch)

    def _await_word(self, fetch: Fetch) -> None:
        deadline = self._clock() + self._word_s
        while self._heard_of < fetch.id:
            left_ms = math.ceil((deadline - self._clock()) * 1000)
            if left_ms <= 0:
                self._is_prompt = False
                return
            with self._lock, contextlib.suppress(zmq.ZMQError):
                self._socket.poll(left_ms)
            self.poll()

    def _may_ask(self) -> bool:
        if self._closed or self._breaker.try_close():
            return not self._closed
        if self._breaker.take_ping():
            self._send(protocol.GetCounters(0))
        return False

    def _give_up(self, fetch: Fetch) -> None:
        fetch.done = True
        self.late += 1
        self._waiting.pop(fetch.id, None)
        self._breaker.timed_out()
        self._send(protocol.Forget(fetch.id))

    def fetched(self, rid: str) -> Fetch | None:
        """What has been fetched for the request, or is on its way."""
        return self._fetches.get(rid)

    def forget(self, rid: str) -> None:
        """The request waits for nothing; idempotent."""
        fetch = self._fetches.pop(rid, None)
        if fetch is not None and self._waiting.pop(fetch.id, None) is not None:
            self._send(protocol.Forget(fetch.id))

    def offer(self, path: bytes) -> None:
        """Host memory has all pages of `path` now."""
        if path and not self._closed:
            self._send(protocol.Offer(self._namespace, path))

    def poll(self) -> None:
        """Take in what has been fetched; never waits."""
        with self._lock, contextlib.suppress(zmq.ZMQError):
            while not self._closed and self._socket.poll(0):
                self._note(self._socket.recv(zmq.DONTWAIT))
            if self._waiting and not self._closed and not self._socket.poll(0, zmq.POLLOUT):
                # There is nobody at the other end any more, and the next one knows of nothing.
                for fetch in self._waiting.values():
                    fetch.done = True
                self._waiting.clear()

    def _note(self, data: bytes) -> None:
        self._breaker.heard()
        try:
            reply = protocol.decode_reply(data)
        except msgspec.MsgspecError as error:
            log.debug("unreadable reply from storage: %s", error)
            return
        if not isinstance(reply, protocol.Fetched):
            return
        self._is_prompt, self._heard_of = True, max(self._heard_of, reply.id)
        if reply.id in self._waiting:
            self._breaker.answered()
            fetch = self._waiting[reply.id]
            fetch.end = max(fetch.end, reply.end)
            if reply.done:
                fetch.done = True
                del self._waiting[reply.id]

    def _send(self, message: protocol.Message) -> bool:
        """Whether it is on its way; False while there is no storage process."""
        data = protocol.encode(message)
        if len(data) > protocol.MAX_MESSAGE_BYTES:
            return False
        with self._lock:
            if self._closed:
                return False
            try:
                self._socket.send(data, zmq.DONTWAIT)
            except zmq.ZMQError:
                return False
        return True

    def close(self) -> None:
        """Nothing is fetched or offered any more; idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._socket.close(linger=0)
        for fetch in self._fetches.values():
            fetch.done = True
        self._waiting.clear()


def ask_counters(address: str, timeout_s: float) -> protocol.Counters | None:
    """What the storage process has counted; None where it does not answer. Any thread; waits."""
    dealer = protocol.connect(Address.parse(address))
    try:
        if not dealer.poll(int(timeout_s * 1000), zmq.POLLOUT):
            return None
        dealer.send(protocol.encode(protocol.GetCounters(1)), zmq.DONTWAIT)
        if not dealer.poll(int(timeout_s * 1000)):
            return None
        reply = protocol.decode_reply(dealer.recv(zmq.DONTWAIT))
    except (zmq.ZMQError, msgspec.MsgspecError):
        return None
    finally:
        dealer.close(linger=0)
    return reply.counters if isinstance(reply, protocol.CountersReply) else None
