"""A page is never another's while somebody may still copy to it or from it."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.departed import has_died, peer_process
from smg_sglang.memory.link import MemoryLink

from .conftest import RunningServer
from .world import eventually, fresh_path, make_namespace

CHILD = """
import json, os, sys
import tests.memory.world as world
from smg_sglang.memory.client import MemoryConnection

connection = MemoryConnection.open(sys.argv[1], world.make_namespace(), 5)
reservation = connection.reserve(world.fresh_path(4), 5)
if sys.argv[2] == "drop":
    connection._channel._life.close()
print(json.dumps(reservation.pages.tolist()), flush=True)
sys.stdin.readline()
for offset in reservation.offsets:
    reservation.arena.buffer[offset : offset + reservation.geometry.page_bytes] = 77
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def start(running):
    """A client in a process of its own that has reserved four pages: the process, the pages."""
    children = []

    def start(how):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, running.address, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child, json.loads(child.stdout.readline())

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def drop(connection):
    """Its life line ends, as by an error of the system; copies may be under way."""
    connection._channel._life.shutdown(socket.SHUT_RDWR)


def quarantined(connection):
    return connection.stats(5).quarantined_pages


def fill(running, connection):
    """Pages that are to be had: all but those of others."""
    taken = []
    while len(pages := connection.reserve(fresh_path(32), 5).pages):
        taken += pages.tolist()
    running.books.check_invariants()
    return taken


def test_a_stopped_process_that_was_disconnected_writes_over_nobody(running, connection, start):
    child, pages = start("drop")
    os.kill(child.pid, signal.SIGSTOP)
    eventually(lambda: quarantined(connection) == 4)
    mine = fill(running, connection)
    assert not set(mine) & set(pages)
    connection.arena.buffer.fill(1)  # as far as it is concerned, all others are its own
    os.kill(child.pid, signal.SIGCONT)
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "written\n"
    for offset in connection.geometry.offsets(running_pages(mine)).tolist():
        assert (connection.arena.buffer[offset : offset + 64] == 1).all()
    child.kill()
    child.wait()
    eventually(lambda: quarantined(connection) == 0)
    assert set(fill(running, connection)) >= set(pages)


def running_pages(pages):
    import numpy as np

    return np.array(pages, np.int64)


def test_a_process_that_dies_leaves_nothing(running, connection, start):
    child, pages = start("stay")
    assert connection.stats(5).pages_writing == 4
    child.kill()
    child.wait()
    eventually(lambda: connection.stats(5).pages_writing == 0)
    assert quarantined(connection) == 0
    assert set(fill(running, connection)) >= set(pages)


def test_a_delayed_copy_keeps_its_page_until_it_has_ended(running, connection):
    other = running.open()
    path = fresh_path(3)
    written = connection.reserve(path, 5)
    connection.publish(written)
    lease = other.lookup(path, 0, 5)
    reservation = other.reserve(fresh_path(2), 5)
    drop(other)
    eventually(lambda: quarantined(connection) == 5)
    mine = fill(running, connection)
    assert not set(mine) & {*lease.pages.tolist(), *reservation.pages.tolist()}
    assert connection.lookup(path, 0, 5) is not None, "others may read it meanwhile"
    connection.let_go([other._channel.identity])
    eventually(lambda: quarantined(connection) == 0)
    assert fill(running, connection)


def test_a_link_says_by_itself_when_its_last_copy_has_ended(running, connection):
    link = MemoryLink(running.address, make_namespace(), first_backoff_s=0.01, last_backoff_s=0.02)
    former = link.wait(5)
    reservation = former.reserve(fresh_path(2), 5)
    drop(former)
    del former
    eventually(lambda: link.connects == 2)
    gc.collect()
    assert quarantined(connection) == 2
    del reservation  # the copy has ended
    eventually(lambda: gc.collect() or quarantined(connection) == 0)
    link.close()


def test_who_keeps_too_much_is_not_welcome_until_it_lets_go(running, connection):
    other = running.open()
    most = running.server._host_bytes // 4 // other.geometry.page_bytes
    kept = [other.reserve(fresh_path(32), 5) for _ in range(most // 32 + 1)]
    drop(other)
    eventually(lambda: quarantined(connection) == sum(len(each.pages) for each in kept))
    with pytest.raises(MemoryUnavailable, match="welcome when its copies have"):
        running.open()
    with MemoryConnectionOf(running, let_go=[other._channel.identity]) as again:
        assert again.stats(5).quarantined_pages == 0


class MemoryConnectionOf:
    def __init__(self, running, let_go):
        from smg_sglang.memory.client import MemoryConnection

        self._opened = MemoryConnection.open(running.address, make_namespace(), 5, None, let_go)

    def __enter__(self):
        return self._opened

    def __exit__(self, *_):
        self._opened.close()


def test_a_goodbye_gives_all_back_at_once(running, connection):
    other = running.open()
    other.reserve(fresh_path(2), 5)
    other.close()
    eventually(lambda: connection.stats(5).pages_writing == 0)
    assert quarantined(connection) == 0


def test_what_another_server_gave_is_nothing_to_this_one(running, connection):
    connection.let_go([b"unknown"])
    connection.ping(5)
    assert connection.stats(5).malformed == 0


def test_a_server_that_ends_closes_what_it_watches(directory):
    before = len(os.listdir("/proc/self/fd"))
    server = RunningServer(directory)
    kept, stays = server.open(), server.open()
    kept.reserve(fresh_path(2), 5)
    drop(kept)
    eventually(lambda: stays.stats(5).quarantined_pages == 2)
    server.stop()
    for connection in (kept, stays):
        connection.close()
    eventually(lambda: gc.collect() or len(os.listdir("/proc/self/fd")) <= before + 3)


def test_a_process_is_known_by_more_than_its_number():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pidfd = os.pidfd_open(child.pid)
    assert not has_died(pidfd)
    child.kill()
    child.wait()  # the number may be another's now
    assert has_died(pidfd)
    pid, mine = peer_process(ours)
    assert pid == os.getpid() and not has_died(mine)
    for fd in (pidfd, mine):
        os.close(fd)
    for end in (ours, theirs, child.stdin):
        end.close()
