"""The server behind its sockets, in a thread of the test."""

import logging
import os
import socket
import stat
import threading

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smg_sglang.errors import ConfigError, MemoryUnavailable
from smg_sglang.memory import protocol
from smg_sglang.memory.address import Address
from smg_sglang.memory.arena import ArenaMappings
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.handshake import shake_hands
from smg_sglang.memory.server import MemoryServer

from .conftest import RunningServer
from .world import eventually, fresh_path, make_namespace, make_path


def write(connection: MemoryConnection, path: bytes, byte: int = 1) -> int:
    reservation = connection.reserve(path, 5)
    page_bytes = connection.geometry.page_bytes
    for offset in reservation.offsets:
        connection.arena.buffer[offset : offset + page_bytes] = byte
    connection.publish(reservation)
    return len(reservation.pages)


def found(connection: MemoryConnection, path: bytes) -> int:
    lease = connection.lookup(path, 0, 5)
    if lease is None:
        return 0
    connection.release(lease)
    return len(lease.pages)


class RawClient:
    """Speaks to the server's sockets without our client's manners."""

    def __init__(self, running: RunningServer) -> None:
        where = Address.parse(running.address)
        self.life, welcome, arena = shake_hands(where, make_namespace(), 5)
        os.close(arena)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, welcome.identity)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(where.control)

    def ask(self, message) -> protocol.Reply:
        self.socket.send(protocol.encode(message))
        return protocol.decode_reply(self.socket.recv())

    def close(self) -> None:
        self.life.close()
        self.socket.close()


@pytest.fixture
def raw(running):
    client = RawClient(running)
    yield client
    client.close()


def test_bytes_written_by_one_client_are_read_by_another(running):
    writer, reader = running.open(), running.open()
    assert write(writer, make_path(1, 2, 3), byte=42) == 3
    writer.ping(5)
    lease = reader.lookup(make_path(1, 2, 3, 4), 1, 5)
    assert lease is not None and lease.start == 1 and len(lease.pages) == 2
    assert lease.pages.dtype == np.int64
    assert lease.epoch == reader.epoch == writer.epoch
    for offset in lease.offsets:
        assert (lease.arena.buffer[offset : offset + 1024] == 42).all()
    for connection in (writer, reader):
        connection.close()


def test_a_warm_restart_of_a_client_finds_its_pages(running):
    first = running.open()
    write(first, make_path(1, 2))
    first.close()  # what was published just before is not lost
    second = running.open()
    assert found(second, make_path(1, 2)) == 2
    second.close()


def test_one_of_two_clients_flushes(running):
    a, b, other = running.open(), running.open(), running.open(make_namespace("other"))
    write(a, make_path(1, 2))
    write(other, make_path(1, 2))
    lease = a.lookup(make_path(1, 2), 0, 5)
    b.flush(5)
    assert found(a, make_path(1, 2)) == 0
    assert found(other, make_path(1, 2)) == 2
    assert b.stats(5).leases == 1
    a.release(lease)
    a.ping(5)
    assert b.stats(5).pages_ready == 2
    for connection in (a, b, other):
        connection.close()


def test_a_client_that_is_gone_leaves_no_lease_and_no_page_behind(running, connection):
    write(connection, make_path(1))
    connection.ping(5)
    doomed = running.open()
    doomed.lookup(make_path(1), 0, 5)
    doomed.reserve(fresh_path(5), 5)
    assert connection.stats(5).pages_writing == 5
    doomed.close()
    eventually(lambda: connection.stats(5).connections == 1)
    stats = connection.stats(5)
    assert (stats.leases, stats.reservations, stats.pages_writing) == (0, 0, 0)
    assert stats.total.dropped == {"connection_lost": 5}
    running.books.check_invariants()


def test_a_lease_of_another_connection_is_not_released(running, connection):
    write(connection, make_path(1))
    other = running.open()
    connection.ping(5)
    lease = connection.lookup(make_path(1), 0, 5)
    theirs = other.lookup(make_path(1), 0, 5)
    other.release(lease)
    assert other.stats(5).leases == 2
    other.release(theirs)
    connection.release(lease)
    connection.ping(5)
    assert other.stats(5).leases == 0
    other.close()


def test_links_with_the_same_mappings_share_one_mapping(running):
    mappings = ArenaMappings()
    a, b = running.open(mappings=mappings), running.open(mappings=mappings)
    assert a.arena is b.arena
    a.close()
    b.close()


def test_touched_paths_outlive_others(running, connection):
    old, young = fresh_path(500), fresh_path(400)
    write(connection, old)
    write(connection, young)
    connection.touch(old)
    write(connection, fresh_path(300))
    assert found(connection, old) == 500
    assert found(connection, young) < 400


def test_stats_travel(connection):
    write(connection, make_path(1))
    found(connection, make_path(1))
    found(connection, make_path(2))
    stats = connection.stats(5)
    assert (stats.total.lookups, stats.total.hits, stats.total.hit_pages) == (2, 1, 1)
    assert stats.arena_bytes == 1 << 20
    assert stats.bytes_ready == 1024
    assert stats.epoch == connection.epoch
    assert stats.namespaces[0].namespace == make_namespace()


def test_files_are_private(running, directory):
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    for name in ("life", "control", "lock"):
        assert stat.S_IMODE(os.stat(f"{directory}/{name}").st_mode) == 0o600


def test_the_arena_cannot_be_shrunk_or_grown(running):
    life, welcome, arena = shake_hands(Address.parse(running.address), make_namespace(), 5)
    for size in (0, welcome.arena_bytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(arena, size)
    os.close(arena)
    life.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_another_user_is_turned_away_even_when_the_directory_is_open(running, directory):
    os.chmod(directory, 0o755)
    os.chmod(f"{directory}/life", 0o666)
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(65534)
            life = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            life.settimeout(5)
            life.connect(f"{directory}/life")
            reply = protocol.decode_welcome(life.recv(4096))
            os._exit(0 if isinstance(reply, protocol.Refused) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert running.server.stats().refused == 1


def test_an_open_directory_is_refused(directory):
    os.chmod(directory, 0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        MemoryServer(Address.parse(directory), 1 << 20)


def test_a_second_server_at_the_same_address_is_refused(running, connection):
    with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        RunningServer(running.address)
    connection.ping(5)


def test_sockets_of_a_dead_server_are_taken_over(directory):
    for name in ("life", "control"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(f"{directory}/{name}")
    server = RunningServer(directory)
    server.open().close()
    server.stop()
    assert os.listdir(directory) == ["lock"]


def test_too_much_memory_is_refused_in_one_sentence(directory):
    with pytest.raises(ConfigError, match="lower --host-gb"):
        MemoryServer(Address.parse(directory), 1 << 60)
    with pytest.raises(ConfigError, match="too small"):
        MemoryServer(Address.parse(directory), 1)


def test_a_page_that_does_not_fit_is_refused_in_one_sentence(running):
    with pytest.raises(MemoryUnavailable, match="does not fit in host memory"):
        running.open(make_namespace(page_bytes=2 << 20))


def test_another_protocol_version_is_refused(running):
    life = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    life.connect(Address.parse(running.address).life)
    life.send(protocol.encode(protocol.Hello(99, make_namespace())))
    reply = protocol.decode_welcome(life.recv(4096))
    assert isinstance(reply, protocol.Refused) and "version 99" in reply.reason
    life.close()


def test_a_client_that_is_refused_for_ever_does_not_fill_the_log(running, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            with pytest.raises(MemoryUnavailable):
                running.open(make_namespace(page_bytes=2 << 20))
    assert running.server.stats().refused == 40
    assert caplog.text.count("refused a connection") == 6


def test_connections_that_cannot_be_accepted_do_not_fill_the_log(directory, caplog):
    server = MemoryServer(Address.parse(directory), 1 << 20, pretouch=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            server._accept()  # nobody is there: the listener never blocks
    assert caplog.text.count("could not accept") == 6
    server.stop()
    server.run()


def test_nobody_there_is_memory_unavailable(directory):
    with pytest.raises(MemoryUnavailable, match="no memory server"):
        MemoryConnection.open(directory, make_namespace(), 1)


MALFORMED = [
    b"",
    b"\x00" * 100,
    b"\xc1",
    msgspec.msgpack.encode({"type": "Nonsense"}),
    msgspec.msgpack.encode({"type": "Lookup", "id": -1, "path": b"", "start": 0}),
    msgspec.msgpack.encode({"type": "Lookup", "id": 1, "path": "x", "start": 0}),
    msgspec.msgpack.encode({"type": "Lookup", "id": 1}),
    protocol.encode(protocol.Touch(b"not a whole key")),
]


@pytest.mark.parametrize("data", MALFORMED)
def test_a_malformed_message_is_dropped_logged_and_counted(running, raw, data, caplog):
    with caplog.at_level(logging.WARNING):
        raw.socket.send(data)
        assert raw.ask(protocol.Ping(1)) == protocol.Ok(1)
    assert running.server.stats().malformed == 1
    assert "malformed" in caplog.text


def test_a_question_that_breaks_the_rules_is_refused_with_the_reason(running, raw):
    reply = raw.ask(protocol.Lookup(1, b"not a whole key", 0))
    assert isinstance(reply, protocol.Refused) and "16 bytes" in reply.reason
    raw.ask(protocol.Reserve(2, make_path(1)))
    assert isinstance(raw.ask(protocol.Reserve(2, make_path(1))), protocol.Refused)
    running.books.check_invariants()


def test_a_message_of_several_frames_is_dropped(running, raw):
    raw.socket.send_multipart([b"", protocol.encode(protocol.Ping(1))])
    assert raw.ask(protocol.Ping(2)) == protocol.Ok(2)
    assert running.server.stats().malformed == 1


def test_a_stranger_is_not_heard(running, connection):
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(Address.parse(running.address).control)
    stranger.send(protocol.encode(protocol.Flush(1)))
    eventually(lambda: connection.stats(5).strays == 1)
    assert stranger.poll(0) == 0
    stranger.close()


@pytest.mark.parametrize("data", [b"", b"junk", b"\xc1" * 5000])
def test_a_bad_greeting_is_turned_away(running, connection, data):
    life = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    life.settimeout(5)
    life.connect(Address.parse(running.address).life)
    life.send(data)
    assert isinstance(protocol.decode_welcome(life.recv(4096)), protocol.Refused)
    life.close()
    connection.ping(5)


def test_a_guest_who_says_nothing_holds_up_nobody(running):
    life = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    life.connect(Address.parse(running.address).life)
    running.open().close()
    life.close()
    running.open().close()


def test_talking_on_the_life_line_ends_it(running, raw):
    raw.life.send(b"hello again")
    eventually(lambda: running.server.stats().connections == 0)
    raw.socket.send(protocol.encode(protocol.Flush(1)))
    eventually(lambda: running.server.stats().strays == 1)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.binary(max_size=200)
    | st.tuples(st.sampled_from(MALFORMED[3:]), st.integers(0, 40), st.integers(0, 255)).map(
        lambda t: t[0][: t[1]] + bytes([t[2]]) + t[0][t[1] + 1 :]
    )
)
def test_random_bytes_do_not_harm_the_server(running, raw, data):
    raw.socket.send(data)
    raw.socket.send(protocol.encode(protocol.Ping(7)))
    while True:  # what happens to be a question is answered first
        if protocol.decode_reply(raw.socket.recv()) == protocol.Ok(7):
            break
    running.books.check_invariants()


def test_an_error_of_ours_costs_one_answer_only(running, raw, monkeypatch):
    monkeypatch.setattr(running.books, "flush", lambda client: 1 / 0)
    reply = raw.ask(protocol.Flush(1))
    assert isinstance(reply, protocol.Refused) and "internal error" in reply.reason
    assert raw.ask(protocol.Ping(2)) == protocol.Ok(2)


def test_a_path_longer_than_any_message_is_refused_by_the_client(connection):
    path = bytes(protocol.MAX_MESSAGE_BYTES + 16)
    with pytest.raises(MemoryUnavailable, match="this long"):
        connection.lookup(path, 0, 5)
    connection.touch(path)
    connection.ping(5)


def test_many_threads_share_a_connection(running, connection):
    failures = []

    def work(n: int) -> None:
        try:
            for _ in range(30):
                path = make_path(n % 2, n) + fresh_path(1)
                write(connection, path)
                assert found(connection, path) == 3
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = connection.stats(5)
    assert (stats.leases, stats.reservations) == (0, 0)
    running.books.check_invariants()
