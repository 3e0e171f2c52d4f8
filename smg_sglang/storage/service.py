"""The storage process: what workers ask on one socket, and three threads that wait for storage.

One looks what is there, one reads, one writes, each through a lane of its own: a miss is told at
once whatever is being read, and a write is never in the way of a read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import zmq

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.address import Address
from smg_sglang.memory.arena import ArenaMappings
from smg_sglang.memory.namespace import Namespace
from smg_sglang.memory.rare_log import RareLog
from smg_sglang.storage import protocol
from smg_sglang.storage.backend import Backend
from smg_sglang.storage.host import IDLE_S, Host
from smg_sglang.storage.lane import Lane, StorageUnavailable
from smg_sglang.storage.reading import Reader, Wanted
from smg_sglang.storage.sealed import object_names, object_suffix
from smg_sglang.storage.writing import Known, Writer
from smg_sglang.tree.page_keys import KEY_BYTES

log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: A call of the backend is for 64 pages or 16 MiB at most.
LOOK_DEADLINE_S = 1.0
READ_DEADLINE_S = 5.0
WRITE_DEADLINE_S = 30.0
#: Offers that wait, each of a path; beyond it they are dropped.
_MOST_OFFERS = 512
_MOST_WANTED = 1024
_GOODBYE_S = 0.2


class _Worker(Generic[_T]):
    """A thread that does one thing after another, and goes on whatever becomes of each."""

    def __init__(
        self, name: str, most: int, do: Callable[[_T], None], idle: Callable[[float], None]
    ) -> None:
        self._queue: queue.Queue[_T | None] = queue.Queue(most)
        self._do, self._idle = do, idle
        self._rare = RareLog(log)
        self._thread = threading.Thread(target=self._run, name=f"smg-{name}", daemon=True)
        self._thread.start()

    def put(self, item: _T) -> bool:
        """False where too many wait."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            return False
        return True

    def stop(self) -> None:
        """After what it is at, if that is soon; a daemon thread that hangs is left."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)
        self._thread.join(_GOODBYE_S)

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=IDLE_S)
            except queue.Empty:
                self._idle(IDLE_S)
                continue
            if item is None:
                self._idle(0.0)
                return
            try:
                self._do(item)
            except StorageUnavailable as error:
                self._rare.warn("storage does without what failed", str(error))
            except MemoryUnavailable as error:
                log.debug("host memory is away: %s", error)
            except Exception as error:
                self._rare.warn(f"could not handle pages of storage: {error!r}", trace=True)


class StorageService:
    """`run` and all it calls are one thread's; `stop` is anybody's."""

    def __init__(self, address: Address, backend: Backend) -> None:
        self.counters = protocol.Counters()
        self._backend = backend
        self._known = Known()
        self._wanted: dict[tuple[bytes, int], Wanted] = {}
        self._context = zmq.Context(1)
        self._replies = _Replies(self._context)
        self._socket = _bind(self._context, address)
        mappings, where = ArenaMappings(), address.directory
        read_host, write_host = Host(where, mappings), Host(where, mappings)
        self._look_lane = Lane("look", LOOK_DEADLINE_S)
        read_lane, write_lane = Lane("read", READ_DEADLINE_S), Lane("write", WRITE_DEADLINE_S)
        self._lanes = (self._look_lane, read_lane, write_lane)
        reader = Reader(backend, read_lane, read_host, self.counters)
        writer = Writer(backend, write_lane, write_host, self.counters, self._known)
        self._lookers = _Worker[tuple[bytes, protocol.Fetch]](
            "look", _MOST_WANTED, lambda item: self._look(*item), lambda seconds: None
        )
        self._readers = _Worker[tuple[tuple[bytes, int], Wanted]](
            "read", _MOST_WANTED, lambda item: self._bring(reader, *item), read_host.close_idle
        )
        self._writers = _Worker[tuple[Namespace, bytes]](
            "write", _MOST_OFFERS, lambda item: writer.write(*item), write_host.close_idle
        )

    def run(self, stop_fd: int) -> None:
        """Serve until `stop_fd` is readable; closes everything before it returns."""
        poller = zmq.Poller()
        for source in (self._socket, self._replies.inlet, stop_fd):
            poller.register(source, zmq.POLLIN)
        try:
            while True:
                for source, _ in poller.poll():
                    if source is self._socket:
                        self._handle(self._socket.recv_multipart())
                    elif source is self._replies.inlet:
                        self._send(*self._replies.inlet.recv_multipart())
                    else:
                        return
        finally:
            self._close()

    def _handle(self, frames: list[bytes]) -> None:
        sender = frames[0]
        try:
            message = protocol.decode_message(frames[-1])
        except msgspec.MsgspecError as error:
            log.debug("dropped a malformed message: %s", error)
            return
        match message:
            case protocol.Fetch(id_, _, path, start):
                fits = len(path) % KEY_BYTES == 0 and start * KEY_BYTES < len(path)
                if not fits or not self._lookers.put((sender, message)):
                    self._send(sender, protocol.encode(protocol.Fetched(id_, start, True)))
            case protocol.Forget(id_):
                if (wanted := self._wanted.get((sender, id_))) is not None:
                    wanted.forgotten = True
            case protocol.Offer(namespace, path):
                if len(path) % KEY_BYTES == 0 and not self._writers.put((namespace, path)):
                    self.counters.count("queue_full", len(path) // KEY_BYTES)
            case protocol.GetCounters(id_):
                self.counters.failures = sum(lane.failures for lane in self._lanes)
                reply = protocol.CountersReply(id_, self.counters)
                self._send(sender, protocol.encode(reply))

    def _send(self, receiver: bytes, data: bytes) -> None:
        try:
            self._socket.send_multipart([receiver, data], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            log.debug("a reply of storage was lost: %s", error)

    # ---- on the looking and on the reading thread ----

    def _look(self, sender: bytes, fetch: protocol.Fetch) -> None:
        found = 0
        name = (sender, fetch.id)
        names = object_names(fetch.path[fetch.start * KEY_BYTES :], object_suffix(fetch.namespace))
        try:
            found = self._look_lane.call(lambda: self._backend.exists(names))
        finally:
            end = fetch.start + found
            if found < len(names):
                self._known.forget(names[found])
            wanted = Wanted(
                fetch.namespace, fetch.path[: end * KEY_BYTES], end, self._teller(name, False)
            )
            self._wanted[name] = wanted
            if found:
                wanted.tell(fetch.start)  # there is something, it may take a while
            if not found or not self._readers.put((name, wanted)):
                self._end(name, fetch.start)

    def _bring(self, reader: Reader, name: tuple[bytes, int], wanted: Wanted) -> None:
        try:
            reader.bring(wanted)
        finally:
            self._end(name, 0)

    def _end(self, name: tuple[bytes, int], end: int) -> None:
        self._wanted.pop(name, None)
        self._teller(name, True)(end)

    def _teller(self, name: tuple[bytes, int], done: bool) -> Callable[[int], None]:
        sender, id_ = name
        return lambda end: self._replies.put(
            sender, protocol.encode(protocol.Fetched(id_, end, done))
        )

    def _close(self) -> None:
        for worker in (self._lookers, self._readers, self._writers):
            worker.stop()
        self._context.destroy(linger=0)


class _Replies:
    """What other threads have to say, on its way to the thread that has the socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._outlets = threading.local()
        self.inlet: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self._where = f"inproc://replies-{id(self)}"
        self.inlet.bind(self._where)

    def put(self, receiver: bytes, data: bytes) -> None:
        """From any thread; each has a socket of its own."""
        if not hasattr(self._outlets, "socket"):
            self._outlets.socket = self._context.socket(zmq.PUSH)
            self._outlets.socket.connect(self._where)
        self._outlets.socket.send_multipart([receiver, data])


def _bind(context: zmq.Context[zmq.Socket[bytes]], address: Address) -> zmq.Socket[bytes]:
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
    router.bind(f"ipc://{address.storage}")
    os.chmod(address.storage, 0o600)
    return router
