"""Links and processes: what happens to clients when servers die, stop and come back."""

import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from smg_sglang.errors import ConfigError, MemoryUnavailable
from smg_sglang.memory import handshake
from smg_sglang.memory import process as process_module
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.link import MemoryLink
from smg_sglang.memory.process import MemoryProcess

from .conftest import RunningServer
from .world import eventually, fresh_path, is_gone, make_namespace, make_path

SIZE = 4 << 20


@pytest.fixture
def process():
    running = MemoryProcess.start(SIZE)
    yield running
    running.stop()


@pytest.fixture
def link(process):
    opened = MemoryLink(process.address, make_namespace(), first_backoff_s=0.02)
    assert opened.wait(10)
    yield opened
    opened.close()


def test_a_link_finds_a_server_that_starts_later(directory):
    link = MemoryLink(directory, make_namespace(), first_backoff_s=0.01)
    eventually(lambda: link.last_error)
    assert link.connection() is None
    server = RunningServer(directory)
    assert link.wait(5) is not None
    assert link.last_error is None
    link.close()
    server.stop()


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "too many"), ConfigError("no"), MemoryError(), ValueError()]
)
def test_a_link_outlives_any_error_and_says_it_once(running, error, monkeypatch, caplog):
    attempts = []
    real = MemoryConnection.open

    def open_(*arguments):
        attempts.append(1)
        if len(attempts) < 5:
            raise type(error)(*error.args)  # new: its traceback keeps frames alive
        return real(*arguments)

    monkeypatch.setattr(MemoryConnection, "open", open_)
    with caplog.at_level(logging.WARNING):
        link = MemoryLink(running.address, make_namespace(), first_backoff_s=0.001)
        assert link.wait(5) is not None
    link.close()
    assert caplog.text.count("no memory server for now") == 1


def test_no_descriptor_for_the_life_line_is_memory_unavailable(running, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(handshake.socket, "socket", refuse)
    with pytest.raises(MemoryUnavailable, match="too many open files"):
        running.open()


def test_a_restart_that_fails_is_tried_again_and_told_once(process, monkeypatch, caplog):
    real = subprocess.Popen
    attempts = []

    def popen(*arguments, **options):
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError(errno.ENOMEM, "cannot allocate memory")
        return real(*arguments, **options)

    monkeypatch.setattr(process_module, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(process_module.subprocess, "Popen", popen)
    before = psutil.Process().num_fds()
    with caplog.at_level(logging.WARNING):
        os.kill(process.pid, signal.SIGKILL)
        eventually(lambda: process.restarts == 1)
    assert len(attempts) == 3
    assert caplog.text.count("cannot start a memory server now") == 1
    assert psutil.Process().num_fds() == before


def test_a_link_comes_back_after_the_server_was_killed(process, link):
    old = link.connection()
    path = make_path(1, 2)
    reservation = old.reserve(path, 5)
    old.arena.buffer[reservation.offsets[0]] = 77
    old.publish(reservation)
    lease = old.lookup(path, 0, 5)
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: link.connection() is not old)
    with pytest.raises(MemoryUnavailable):
        old.lookup(path, 0, 5)
    new = link.wait(10)
    assert new is not None and new.epoch != old.epoch
    assert new.lookup(path, 0, 5) is None
    assert not lease.held
    assert lease.arena.buffer[lease.offsets[0]] == 77, "a lease keeps the old mapping"
    new.release(lease)
    assert new.stats(5).leases == 0
    assert process.restarts == 1


def test_a_stopped_server_costs_one_timeout_and_leaks_no_lease(process, link):
    connection = link.connection()
    connection.publish(connection.reserve(make_path(1), 5))
    connection.ping(5)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(MemoryUnavailable, match="50 ms"):
            connection.lookup(make_path(1), 0, 0.05)
        for _ in range(20):
            assert link.connection() is connection and connection.stalled
            with pytest.raises(MemoryUnavailable):
                connection.lookup(make_path(1), 0, 5)
            with pytest.raises(MemoryUnavailable):
                connection.reserve(fresh_path(1), 5)
            connection.touch(make_path(1))
        assert time.monotonic() - began < 1
    finally:
        os.kill(process.pid, signal.SIGCONT)
    eventually(lambda: not connection.stalled)
    stats = connection.stats(5)
    assert (stats.leases, stats.reservations) == (0, 0)
    assert stats.total.hits == 1, "the late lookup did lease, and was released"
    assert connection.lookup(make_path(1), 0, 5) is not None


def test_a_late_reservation_is_given_back(process, link):
    connection = link.connection()
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(MemoryUnavailable):
            connection.reserve(fresh_path(3), 0.02)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    eventually(lambda: not connection.stalled)
    stats = connection.stats(5)
    assert (stats.pages_writing, stats.total.dropped) == (0, {"abandoned": 3})


def test_opening_a_stopped_server_is_bounded(process):
    os.kill(process.pid, signal.SIGSTOP)
    link = MemoryLink(process.address, make_namespace(), open_timeout_s=0.1)
    try:
        began = time.monotonic()
        assert link.connection() is None
        assert time.monotonic() - began < 0.05
        eventually(lambda: link.last_error)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert link.wait(10) is not None
    link.close()


CLIENT = """
import sys, time
from smg_sglang.memory.client import MemoryConnection
from tests.memory.world import make_namespace, make_path
connection = MemoryConnection.open(sys.argv[1], make_namespace(), 10)
path = make_path(1, 2, 3)
for step in sys.argv[2].split():
    if step == "reserve":
        reservation = connection.reserve(path, 10)
    if step == "publish":
        connection.publish(reservation)
    if step == "lookup":
        assert connection.lookup(path, 0, 10)
    connection.ping(10)
print("done", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("steps", ["", "reserve", "reserve publish lookup"])
def test_a_client_killed_at_any_step_leaks_nothing(process, link, steps):
    command = [sys.executable, "-c", CLIENT, process.address, steps]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as client:
        assert client.stdout.readline() == b"done\n"
        client.kill()
    connection = link.connection()
    eventually(lambda: connection.stats(5).connections == 1)
    stats = connection.stats(5)
    assert (stats.leases, stats.reservations, stats.pages_writing) == (0, 0, 0)
    assert stats.pages_ready == (3 if "publish" in steps else 0)


PARENT = """
import sys, time
from smg_sglang.memory.process import MemoryProcess
process = MemoryProcess.start(4 << 20)
print(process.pid, process.address, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_embedded_server_does_not_outlive_its_parent(number):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        pid, address = parent.stdout.readline().decode().split()
        parent.send_signal(number)
    eventually(lambda: is_gone(int(pid)))
    eventually(lambda: not os.path.exists(address))


def test_stopping_an_embedded_server_leaves_nothing_behind():
    process = MemoryProcess.start(SIZE)
    pid = process.pid
    process.stop()
    process.stop()
    assert not psutil.pid_exists(pid)
    assert not os.path.exists(process.address)


def test_an_embedded_server_that_cannot_start_says_so():
    with pytest.raises(ConfigError, match="lower --host-gb"):
        MemoryProcess.start(1 << 60)


def test_reconnecting_leaks_no_descriptor_and_no_mapping(directory):
    me = psutil.Process()

    def arenas() -> int:
        with open("/proc/self/maps") as maps:
            return sum("smg-arena" in line for line in maps)

    def cycle() -> None:
        server = RunningServer(directory)
        link = MemoryLink(directory, make_namespace(), first_backoff_s=0.01)
        connection = link.wait(5)
        connection.publish(connection.reserve(fresh_path(3), 5))
        connection.lookup(fresh_path(1), 0, 5)
        view = np.asarray(connection.arena.buffer[:10])
        server.stop()
        eventually(lambda: link.connection() is None)
        assert len(view) == 10
        link.close()

    cycle()  # libzmq opens a few descriptors once
    gc.collect()
    before = me.num_fds(), me.num_threads()
    for _ in range(3):
        cycle()
    gc.collect()
    eventually(lambda: (me.num_fds(), me.num_threads()) == before)
    assert arenas() == 0


def test_a_server_leaks_no_descriptor_over_its_clients(process, link):
    server = psutil.Process(process.pid)
    other = MemoryLink(process.address, make_namespace("x"))
    assert other.wait(10)
    other.close()
    eventually(lambda: link.connection().stats(5).connections == 1)
    before = server.num_fds()
    for _ in range(5):
        other = MemoryLink(process.address, make_namespace("x"))
        assert other.wait(10)
        other.close()
    eventually(lambda: server.num_fds() <= before)


def test_an_idle_server_process_sleeps(process, link):
    server = psutil.Process(process.pid)

    def used(interval_s: float) -> float:
        before = sum(server.cpu_times()[:2])
        time.sleep(interval_s)  # an interval to measure, not a wait for something to happen
        return sum(server.cpu_times()[:2]) - before

    eventually(lambda: used(0.2) == 0)  # start-up may still be booked
    assert used(0.5) <= 0.01
