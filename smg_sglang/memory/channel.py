"""A client's two sockets to the memory server: questions with bounded waits, notices without."""

import itertools
import logging
import math
import select
import socket
import threading
import time
from collections import deque

import msgspec
import zmq

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory import protocol
from smg_sglang.memory.breaker import Breaker

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.05  # how often `alive` asks the kernel


class Channel:
    """Speaks to one server instance, under the `identity` it gave, until either side is gone.

    Any thread may call; questions of several threads take turns, notices never wait. After a
    question timed out the channel is *stalled*: further questions fail at once, until a reply
    (be it late) shows that the server lives. Timeouts in a row lengthen the pause.
    """

    def __init__(self, endpoint: str, identity: bytes, life: socket.socket) -> None:
        self.identity = identity
        self._life = life
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A notice must not block, and what is lost here is a lease: unlimited. It stays small,
        # since a stalled channel asks for no new leases.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a new server would not know us
        self._socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(life.fileno(), zmq.POLLIN)
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._ids = itertools.count(1)
        self._dead = False
        self._closed = False
        self._looked_at = 0.0
        self._breaker = Breaker()

    @property
    def alive(self) -> bool:
        """False once the server (or this end) closed; asks the kernel at most every 50 ms."""
        now = time.monotonic()
        if not self._dead and now - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = now
            if _has_ended(self._life):
                self._dead = True
        return not self._dead

    @property
    def stalled(self) -> bool:
        """True from a timeout until the server is heard again: a question would fail at once.

        Cheap while all is well; looks for a late reply (without waiting) while not.
        """
        if self._breaker.stalled and not self._dead and self._lock.acquire(blocking=False):
            try:
                self._recovers()
            except zmq.ZMQError as error:
                log.debug("cannot listen to the memory server: %s", error)
            finally:
                self._lock.release()
                self._flush()
        return self._breaker.stalled

    def fileno(self) -> int:
        """The life line's file descriptor: readable (EOF) when the server is gone; -1 if closed."""
        return self._life.fileno()

    def next_id(self) -> int:
        """A fresh correlation id, unique on this channel."""
        return next(self._ids)

    def mark_dead(self) -> None:
        """The server is gone: fail all questions from now on."""
        self._dead = True

    def ask(self, question: protocol.Question, timeout_s: float) -> protocol.Reply:
        """Send and wait for the reply, `timeout_s` at most; MemoryUnavailable otherwise."""
        deadline = time.monotonic() + timeout_s
        data = protocol.encode(question)
        if len(data) > protocol.MAX_MESSAGE_BYTES:  # the server would hang up
            raise MemoryUnavailable("a path this long cannot be asked for")
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            raise MemoryUnavailable("the connection to the memory server is busy")
        try:
            self._admit()
            self._send_outbox()
            # Without a peer ZMQ would wait for one, and there will be none.
            self._socket.send(data, zmq.DONTWAIT)
            reply = self._await(question.id, deadline, timeout_s)
        except zmq.ZMQError as error:
            self._dead = True
            raise MemoryUnavailable(f"the memory server's socket failed: {error}") from error
        finally:
            self._lock.release()
            self._flush()
        if isinstance(reply, protocol.Refused):
            raise MemoryUnavailable(f"the memory server refused: {reply.reason}")
        return reply

    def tell(self, notice: protocol.Notice) -> None:
        """Send without waiting for anything; never raises. Order among calls is kept."""
        data = protocol.encode(notice)
        if not self._dead and len(data) <= protocol.MAX_MESSAGE_BYTES:
            self._outbox.append(data)
            self._flush()

    def close(self) -> None:
        """Close both sockets; waits for a question that is under way in another thread."""
        self._dead = True
        with self._lock:
            if not self._closed:
                self._closed = True
                self._outbox.clear()
                self._socket.close(linger=0)
                self._life.close()

    def _flush(self) -> None:
        # Whoever holds the lock looks again after releasing it, so nothing is left behind.
        while self._outbox and self._lock.acquire(blocking=False):
            try:
                self._send_outbox()
            finally:
                self._lock.release()

    def _send_outbox(self) -> None:
        while self._outbox:
            data = self._outbox.popleft()
            if not self._dead:
                try:
                    self._socket.send(data, zmq.DONTWAIT)
                except zmq.ZMQError as error:
                    log.debug("notice to the memory server lost: %s", error)

    def _admit(self) -> None:
        if self._dead:
            raise MemoryUnavailable("the memory server is gone")
        if self._breaker.stalled and not self._recovers():
            raise MemoryUnavailable("the memory server does not answer")

    def _recovers(self) -> bool:
        """Whether a stalled server may be asked again; with the lock held. Never waits."""
        while self._socket.poll(0):
            self._receive()
        if self._breaker.try_close():
            return True
        if self._breaker.take_ping():
            self._socket.send(protocol.encode(protocol.Ping(self.next_id())), zmq.DONTWAIT)
        return False

    def _await(self, wanted: int, deadline: float, timeout_s: float) -> protocol.Reply:
        while True:
            left_ms = max(0, math.ceil((deadline - time.monotonic()) * 1000))
            events = {source for source, _ in self._poller.poll(left_ms)}
            if self._socket in events:
                reply = self._receive()
                if reply is not None and reply.id == wanted:
                    self._breaker.answered()
                    return reply
            elif events:
                self._dead = True
                raise MemoryUnavailable("the memory server went away")
            else:
                self._breaker.timed_out()
                raise MemoryUnavailable(
                    f"the memory server did not answer within {timeout_s * 1000:.0f} ms"
                )

    def _receive(self) -> protocol.Reply | None:
        data: bytes = self._socket.recv()
        self._breaker.heard()
        try:
            reply: protocol.Reply = protocol.decode_reply(data)
        except msgspec.MsgspecError as error:
            log.warning("unreadable reply from the memory server: %s", error)
            return None
        return reply


def _has_ended(life: socket.socket) -> bool:
    """Whether the peer closed. The server never writes to `life` after the welcome."""
    fd = life.fileno()
    if fd < 0:
        return True
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
