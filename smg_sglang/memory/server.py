"""The memory server: a thin shell of sockets around the books."""

import contextlib
import errno
import logging
import os
import secrets
import shutil
import signal
import socket
import time
from dataclasses import dataclass

import msgspec
import zmq

from smg_sglang.box import GIB, check_host_bytes
from smg_sglang.config import DEFAULT_EVICTION, DEFAULT_HINT_SHARE, EvictionName
from smg_sglang.errors import ConfigError
from smg_sglang.memory import protocol
from smg_sglang.memory.address import Address, peer
from smg_sglang.memory.arena import PageGeometry, create_memfd
from smg_sglang.memory.books import Books, PageSizeRefused
from smg_sglang.memory.departed import Departed, has_died, peer_process
from smg_sglang.memory.desk import Desk
from smg_sglang.memory.growth import Growth
from smg_sglang.memory.pretouch import Pretouch
from smg_sglang.memory.rare_log import RareLog
from smg_sglang.memory.sockets import bind, listen
from smg_sglang.memory.stats import Stats
from smg_sglang.memory.storage_process import StorageProcess

log = logging.getLogger(__name__)

_BATCH = 64  # control messages handled before the other sockets get a look
_LAST_WORDS = 10_000
_HELLO_MAX_BYTES = 64 << 10
_MAX_CLIENTS = 4096
#: A process whose ended connections hold more than this part of the arena is not welcome.
_KEPT_SHARE = 4

#: What an embedded server writes to its parent once it accepts connections.
READY = b"ready"


@dataclass(slots=True)
class _Client:
    life: socket.socket
    identity: bytes
    pid: int
    pidfd: int
    said_goodbye: bool = False


class MemoryServer:
    """Owns the arena and the books; `run` blocks in a poller, so an idle server uses no CPU.

    All methods but `stop` belong to the thread that calls `run`.
    """

    def __init__(
        self,
        address: Address,
        host_bytes: int,
        *,
        slab_bytes: int | None = None,
        pretouch: bool = True,
        eviction: EvictionName = DEFAULT_EVICTION,
        hint_share: float = DEFAULT_HINT_SHARE,
    ) -> None:
        """Raises ConfigError if the size cannot be had or the address is taken."""
        check_host_bytes(host_bytes)
        self.address = address
        self.epoch = secrets.token_hex(8)
        self._host_bytes = host_bytes
        self._started = time.monotonic()
        self._malformed = 0
        self._strays = 0
        self._refused = 0
        self._rare = RareLog(log)
        self._running = True
        self._clients: dict[int, _Client] = {}  # by life fd
        self._guests: dict[int, socket.socket] = {}  # accepted, no Hello yet
        self._known: dict[bytes, int] = {}  # identity -> life fd
        try:
            self._open(host_bytes)
        except (OSError, zmq.ZMQError) as error:
            raise ConfigError(f"cannot set up a memory server at {address}: {error}") from error
        self._poller = zmq.Poller()
        for source in (self._control, self._listener.fileno(), self._wake):
            self._poller.register(source, zmq.POLLIN)
        self._stops = {self._wake}
        may_grow = Growth(self._arena_fd).may_grow
        self.books = Books(
            host_bytes, slab_bytes, may_grow=may_grow, eviction=eviction, hint_share=hint_share
        )
        self._pretouch = Pretouch(self._arena_fd, host_bytes, may_grow) if pretouch else None
        self._desk = Desk(self.books, self.stats)
        self._departed = Departed(self.books.connection_lost)

    def _open(self, host_bytes: int) -> None:
        """All that the kernel may refuse; closes what it opened if it does."""
        with contextlib.ExitStack() as undo:
            self._lock = self.address.claim()
            undo.callback(os.close, self._lock)
            self._arena_fd = create_memfd(host_bytes)
            undo.callback(os.close, self._arena_fd)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._wake)
            self._listener = listen(self.address)
            undo.callback(self._listener.close)
            self._context = zmq.Context(1)
            undo.callback(self._context.destroy, 0)
            self._control = bind(self._context, self.address)
            undo.pop_all()

    def watch(self, fd: int) -> None:
        """Stop as soon as `fd` is readable or at EOF: the parent's end is closed."""
        self._stops.add(fd)
        self._poller.register(fd, zmq.POLLIN)

    def run(self) -> None:
        """Serve until `stop`; closes everything before it returns."""
        try:
            if self._pretouch:
                self._pretouch.start()
            while self._running:
                self._step()
        finally:
            self._close()

    def stop(self) -> None:
        """End `run` soon. From any thread or a signal handler."""
        os.eventfd_write(self._wake, 1)

    def stats(self) -> Stats:
        """The books' and the shell's counters."""
        uptime_s = time.monotonic() - self._started
        return self.books.stats(
            epoch=self.epoch,
            uptime_s=uptime_s,
            malformed=self._malformed,
            strays=self._strays,
            refused=self._refused,
            quarantined=sum(map(self.books.held_pages, self._departed.identities())),
        )

    def _step(self) -> None:
        for source, _ in self._poller.poll():
            if source is self._control:
                self._serve(_BATCH)
            elif source == self._listener.fileno():
                self._accept()
            elif source in self._clients:
                self._end(source)
            elif source in self._guests:
                self._welcome(source)
            elif source in self._departed:
                self._end_departed(source)
            elif source in self._stops:
                self._running = False

    # Life lines.

    def _accept(self) -> None:
        try:
            guest, _ = self._listener.accept()
        except OSError as error:  # it gave up again, or we are out of file descriptors
            self._rare.warn(f"could not accept a connection: {error}")
            time.sleep(0.01 if error.errno in (errno.EMFILE, errno.ENFILE) else 0)
            return
        guest.setblocking(False)
        if peer(guest).uid != os.getuid():
            self._refuse(guest, f"user {peer(guest).uid} may not connect")
        elif len(self._clients) + len(self._guests) >= _MAX_CLIENTS:
            self._refuse(guest, f"{_MAX_CLIENTS} clients are connected already")
        else:
            self._guests[guest.fileno()] = guest
            self._poller.register(guest.fileno(), zmq.POLLIN)

    def _welcome(self, fd: int) -> None:
        guest = self._guests.pop(fd)
        self._poller.unregister(fd)
        try:
            client, geometry = self._admit(guest)
        except (msgspec.MsgspecError, OSError, ConfigError, PageSizeRefused) as error:
            self._refuse(guest, str(error))
            return
        except Exception as error:
            self._rare.warn("could not welcome a client", trace=True)
            self._refuse(guest, f"internal error: {error!r}")
            return
        self._clients[fd] = client
        self._known[client.identity] = fd
        self._poller.register(fd, zmq.POLLIN)
        welcome = protocol.Welcome(client.identity, self.epoch, self._host_bytes, geometry)
        try:
            socket.send_fds(guest, [protocol.encode(welcome)], [self._arena_fd])
        except OSError:
            self._end(fd)

    def _admit(self, guest: socket.socket) -> tuple["_Client", PageGeometry]:
        hello = protocol.decode_hello(guest.recv(_HELLO_MAX_BYTES))
        _check_version(hello.version)
        self._let_go(hello.let_go)
        pid, pidfd = peer_process(guest)
        try:
            self._check_kept(pid)
            identity = b"c" + secrets.token_bytes(16)
            geometry = self.books.connect(identity, hello.namespace)
        except BaseException:
            os.close(pidfd)
            raise
        return _Client(guest, identity, pid, pidfd), geometry

    def _check_kept(self, pid: int) -> None:
        kept = sum(map(self.books.held_bytes, self._departed.identities(pid)))
        if kept > self._host_bytes // _KEPT_SHARE:
            raise ConfigError(
                f"process {pid} holds {kept} bytes of connections that ended; it is welcome when "
                "its copies have"
            )

    def _refuse(self, guest: socket.socket, reason: str) -> None:
        self._refused += 1
        self._rare.warn(f"refused a connection: {reason}")
        with contextlib.suppress(OSError):
            guest.send(protocol.encode(protocol.Refused(0, reason)))
        guest.close()

    def _end(self, fd: int) -> None:
        """The life line ended (or broke the silence it promised)."""
        # What the client sent before it went comes first, as far as it has arrived.
        self._serve(_LAST_WORDS)
        client = self._clients.pop(fd)
        self._poller.unregister(fd)
        del self._known[client.identity]
        client.life.close()
        self._departed.add(client.identity, client.pid, client.pidfd)
        holds = self.books.held_pages(client.identity)
        if client.said_goodbye or not holds or has_died(client.pidfd):
            self._departed.end(client.pidfd)
        else:
            self._rare.warn(
                f"process {client.pid} lives without its connection: {holds} pages stay its own"
            )
            self._poller.register(client.pidfd, zmq.POLLIN)

    def _end_departed(self, pidfd: int) -> None:
        self._poller.unregister(pidfd)
        self._departed.end(pidfd)

    def _let_go(self, identities: list[bytes]) -> None:
        for pidfd in self._departed.named(identities):
            self._end_departed(pidfd)

    # Control messages.

    def _serve(self, limit: int) -> None:
        """Handle up to `limit` messages that are here."""
        for _ in range(limit):
            try:
                frames = self._control.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._handle(frames)

    def _handle(self, frames: list[bytes]) -> None:
        identity, data = frames[0], frames[-1]
        if identity not in self._known:
            self._strays += 1  # of a client whose life line ended, or of nobody we know
            return
        try:
            message = protocol.decode_message(_only_payload(frames))
        except (msgspec.MsgspecError, ValueError) as error:
            self._drop(str(error), data)
            return
        if isinstance(message, protocol.LetGo):
            self._let_go(message.identities)
            return
        if isinstance(message, protocol.Goodbye):
            self._clients[self._known[identity]].said_goodbye = True
            return
        reply = self._answer(identity, message)
        if reply is not None:
            with contextlib.suppress(zmq.ZMQError):
                self._control.send_multipart([identity, protocol.encode(reply)], zmq.DONTWAIT)
        if self._pretouch:
            self._pretouch.advance(self.books.high_water_bytes)

    def _answer(self, identity: bytes, message: protocol.Message) -> protocol.Reply | None:
        try:
            return self._desk.answer(identity, message)
        except ValueError as error:
            self._drop(str(error), protocol.encode(message))
            reason = str(error)
        except Exception as error:
            # A bug of ours must not take everybody's memory down; it is counted and told.
            self._rare.warn(f"could not handle a {type(message).__name__}", trace=True)
            self._malformed += 1
            reason = f"internal error: {error!r}"
        id_ = getattr(message, "id", None)
        return None if id_ is None else protocol.Refused(id_, reason)

    def _drop(self, reason: str, data: bytes) -> None:
        self._malformed += 1
        self._rare.warn("dropped a malformed message", f"{reason}: {data[:32]!r}")

    def _close(self) -> None:
        if self._pretouch:
            self._pretouch.stop()
        for client in self._clients.values():
            client.life.close()
            os.close(client.pidfd)
        self._departed.close()
        for guest in self._guests.values():
            guest.close()
        self._listener.close()
        self._context.destroy(linger=0)
        self.address.remove_sockets()
        os.close(self._arena_fd)
        os.close(self._wake)
        os.close(self._lock)


def run_server(
    address: Address,
    host_bytes: int,
    *,
    pretouch: bool = True,
    eviction: EvictionName = DEFAULT_EVICTION,
    hint_share: float = DEFAULT_HINT_SHARE,
    storage: tuple[str, str | None] | None = None,
    parent_fd: int | None = None,
) -> None:
    """Serve in this process until SIGTERM or SIGINT; blocks. Main thread only.

    `storage` is a backend's name and configuration, which a process of its own drives.

    With `parent_fd`, one end of the parent's socket pair: tell it when the server is ready, live
    until its other end closes (however the parent dies), leave SIGINT to the parent (Ctrl-C
    reaches the whole group) and remove the directory at the end.
    """
    server = MemoryServer(
        address, host_bytes, pretouch=pretouch, eviction=eviction, hint_share=hint_share
    )
    _stop_at_signals(server, signal.SIGTERM, *([signal.SIGINT] if parent_fd is None else []))
    if parent_fd is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.watch(parent_fd)
    else:
        log.info(
            "%.2f GiB of host memory, evicted by %s, address %s",
            host_bytes / GIB,
            eviction,
            address,
        )
    if storage is None:
        _tell_ready(parent_fd)
        server.run()
    else:
        _run_beside_storage(server, storage, parent_fd)
    if parent_fd is not None:
        shutil.rmtree(address.directory, ignore_errors=True)


def _tell_ready(parent_fd: int | None) -> None:
    if parent_fd is not None:
        with contextlib.suppress(OSError):
            os.write(parent_fd, READY)


def _run_beside_storage(
    server: MemoryServer, storage: tuple[str, str | None], parent_fd: int | None
) -> None:
    """Serve from now on; who started us hears that all is well once storage is there, too. Raises
    ConfigError where it cannot be."""
    failures: list[ConfigError] = []

    def started(failure: ConfigError | None) -> None:
        if failure is None:
            _tell_ready(parent_fd)
        else:
            failures.append(failure)
            with contextlib.suppress(OSError):  # it has ended by itself
                server.stop()

    process = StorageProcess(server.address, *storage, started)
    try:
        process.start()
        server.run()
    finally:
        process.stop()
    for failure in failures:
        raise failure


def _stop_at_signals(server: MemoryServer, *signals: int) -> None:
    """End `run` at one of these. A handler in Python alone would not do: a signal that comes just
    before the poll blocks is handled when the poll returns, which may be never."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    server.watch(reader)
    signal.set_wakeup_fd(writer)
    for number in signals:
        signal.signal(number, lambda *_: server.stop())


def _check_version(version: int) -> None:
    if version != protocol.VERSION:
        raise ConfigError(
            f"the client speaks protocol version {version}, this server {protocol.VERSION}: "
            "use the same smg_sglang on both sides"
        )


def _only_payload(frames: list[bytes]) -> bytes:
    if len(frames) != 2:
        raise ValueError(f"{len(frames)} frames instead of 2")
    return frames[1]
