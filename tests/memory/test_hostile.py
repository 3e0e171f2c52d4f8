"""Peers that are broken or mean: the server goes on answering others, and does not grow."""

import contextlib
import os
import random
import resource
import socket
import subprocess
import sys
import time

import psutil
import pytest
import zmq

from smg_sglang.errors import ConfigError
from smg_sglang.memory import protocol
from smg_sglang.memory.address import Address
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.process import MemoryProcess
from smg_sglang.memory.server import MemoryServer

from .world import eventually, fresh_path, make_namespace

MIB = 1 << 20


@pytest.fixture
def process():
    """The server in a process of its own, so that its memory can be measured."""
    running = MemoryProcess.start(4 * MIB)
    yield running
    running.stop()


@pytest.fixture
def other(process):
    """A client that is well, and must not suffer."""
    opened = MemoryConnection.open(process.address, make_namespace(), 5)
    yield opened
    opened.close()


@pytest.fixture
def calm(process, other):
    """Afterwards the server is as before: it answers, has its memory, and nothing is left over."""
    it = psutil.Process(process.pid)
    other.ping(5)
    rss, fds = it.memory_info().rss, it.num_fds()
    yield
    connection = other.reserve(fresh_path(2), 5)
    other.publish(connection)
    eventually(lambda: other.stats(5).connections == 1)
    eventually(lambda: it.num_fds() <= fds + 2)
    assert it.memory_info().rss - rss < 24 * MIB


def control(process, identity=None):
    """A raw socket to the control endpoint; not known to the server without an identity of it."""
    socket_ = zmq.Context.instance().socket(zmq.DEALER)
    socket_.setsockopt(zmq.LINGER, 0)
    if identity is not None:
        socket_.setsockopt(zmq.IDENTITY, identity)
    socket_.connect(Address.parse(process.address).control)
    return socket_


def guest(process):
    life = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    life.settimeout(5)
    life.connect(Address.parse(process.address).life)
    return life


def known(process):
    """(life line, control socket) of a client that the server knows, to misuse."""
    life = guest(process)
    life.send(protocol.encode(protocol.Hello(protocol.VERSION, make_namespace())))
    data, fds, _, _ = socket.recv_fds(life, 64 << 10, 1)
    for fd in fds:
        os.close(fd)
    return life, control(process, protocol.decode_welcome(data).identity)


def test_a_thousand_idle_connections(process, other, calm):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    guests = []
    try:
        for _ in range(1000):
            try:
                guests.append(guest(process))
            except OSError:  # its queue is full, or it has no more descriptors
                time.sleep(0.005)
        assert len(guests) > 200
        other.ping(5)
    finally:
        for life in guests:
            life.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_out_of_descriptors_goes_on_with_those_it_has(process, other, calm):
    resource.prlimit(
        process.pid, resource.RLIMIT_NOFILE, (psutil.Process(process.pid).num_fds(),) * 2
    )
    guests = [guest(process) for _ in range(20)]
    for _ in range(5):
        other.ping(5)
    for life in guests:
        life.close()


def test_messages_far_too_long(process, other, calm):
    life, mean = known(process)
    for _ in range(2):
        mean.send(bytes(256 * MIB))  # ZMQ hangs up where its size is read
        other.ping(5)
    mean.close()
    life.close()


def test_a_megabyte_of_garbage_on_every_socket(process, other, calm):
    rng = random.Random(0)
    life, mean = known(process)
    stranger = control(process)
    left = MIB
    while left > 0:
        data = rng.randbytes(rng.choice([0, 1, 17, 300, 5000]))
        mean.send_multipart([data] * rng.choice([1, 1, 2, 3]))
        stranger.send(data)
        left -= 2 * len(data) + 1
    for size in (1, 100, 60_000):
        life_too = guest(process)
        life_too.send(rng.randbytes(size))
        assert isinstance(protocol.decode_welcome(life_too.recv(64 << 10)), protocol.Refused)
        life_too.close()
    other.ping(5)
    assert other.stats(5).malformed > 0
    for each in (mean, stranger, life):
        each.close()


def test_half_messages_of_a_client(process, other, calm):
    """Every message cut short at every byte."""
    life, mean = known(process)
    whole = [
        protocol.Lookup(1, bytes(32), 0),
        protocol.Reserve(2, bytes(range(32))),
        protocol.LetGo([b"a", b"b"]),
        protocol.Abandon(2),
        protocol.GetChanges(3, -1),
    ]
    for message in whole:
        data = protocol.encode(message)
        for end in range(len(data)):
            mean.send(data[:end])
    mean.send(protocol.encode(protocol.Ping(9)))
    replies = iter(lambda: protocol.decode_reply(mean.recv()), None)
    assert any(reply == protocol.Ok(9) for reply in replies)
    mean.close()
    life.close()


def test_a_client_that_never_reads(process, other, calm):
    life, mean = known(process)
    mean.setsockopt(zmq.SNDHWM, 0)
    question = protocol.encode(protocol.GetStats(1))
    for _ in range(20_000):
        mean.send(question)
    other.ping(10)
    mean.close()
    life.close()


def test_a_raw_stream_that_is_no_zmq(process, other, calm):
    path = Address.parse(process.address).control.removeprefix("ipc://")
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", random.Random(1).randbytes(100_000)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.connect(path)
            with contextlib.suppress(OSError):
                stream.sendall(data)
            other.ping(5)


@pytest.mark.parametrize("kind", ["symlink", "file"])
def test_an_address_that_is_something_else_is_refused(tmp_path, directory, kind):
    path = os.path.join(directory, "memory")
    if kind == "symlink":
        os.symlink(tmp_path, path)
    else:
        open(path, "w").close()
    with pytest.raises(ConfigError, match="is not a directory"):
        MemoryServer(Address.parse(path), MIB)
    assert not list(tmp_path.iterdir())


def test_a_socket_that_is_a_symlink_is_not_followed(tmp_path, directory):
    """What lies in the place of our sockets goes, not what it points at."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    os.symlink(precious, os.path.join(directory, "life"))
    os.symlink(precious, os.path.join(directory, "control"))
    server = MemoryServer(Address.parse(directory), MIB, pretouch=False)
    server.stop()
    server.run()
    assert precious.read_text() == "kept"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_somebody_elses_directory_is_refused(directory):
    os.chown(directory, 65534, 65534)
    with pytest.raises(ConfigError, match="open to other users"):
        MemoryServer(Address.parse(directory), MIB)


def test_no_memory_for_the_arena_is_one_sentence(directory):
    """The kernel says no to a file of that size."""
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from smg_sglang.errors import ConfigError\n"
        "from smg_sglang.memory.address import Address\n"
        "from smg_sglang.memory.server import MemoryServer\n"
        "try:\n"
        "    MemoryServer(Address.parse(sys.argv[1]), 64 << 20)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, directory], capture_output=True, text=True, check=True
    )
    assert "cannot set up a memory server" in done.stdout
    assert not os.path.exists(os.path.join(directory, "life"))
