"""The storage process of a memory server of its own: started, killed, refused."""

import contextlib
import json
import os
import subprocess
import sys

import psutil
import pytest

from smg_sglang.config import StorageName
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.process import MemoryProcess
from smg_sglang.storage.client import StorageClient, ask_counters
from tests.memory.world import eventually, make_namespace, make_path

COMMAND = [sys.executable, "-m", "smg_sglang", "memory", "--host-gb", "0.0625", "--no-pretouch"]
PATH = make_path(*range(1, 40))
BUSY_S = 120  # importing SGLang on a busy machine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", raising=False)
    return tmp_path


def with_storage(folder, address):
    config = json.dumps({"file_storage_path": f"{folder}/pages"})
    return [*COMMAND, "--address", str(address), "--storage", "file", "--storage-config", config]


@contextlib.contextmanager
def started(command):
    with subprocess.Popen(command) as server:
        try:
            yield server
        finally:
            server.kill()


def children(process):
    return psutil.Process(process.pid).children()


def test_it_keeps_pages_is_started_again_and_ends_with_its_server(folder):
    address, storm = folder / "m", make_path(*range(1000, 1040))
    with started(with_storage(folder, address)) as server:
        eventually((address / "storage").exists, BUSY_S)
        connection = MemoryConnection.open(str(address), make_namespace(), 10)
        client = StorageClient(str(address), make_namespace(), wait_s=BUSY_S)
        write(str(address), connection, client, PATH)
        (child,) = children(server)
        child.kill()
        eventually(lambda: [c for c in children(server) if c.pid != child.pid], BUSY_S)
        write(str(address), connection, client, storm)
        connection.flush(5)
        # On a busy machine a call may be late, which is a miss: the next one asks again.
        names = (f"r{number}" for number in range(1_000_000))
        eventually(lambda: fetched(client, next(names)) == len(PATH) // 16, BUSY_S)
        lease = connection.lookup(PATH, 0, 5)
        assert lease is not None and (lease.arena.buffer[lease.offsets[3]] == 3)
        client.close()
        connection.close()
        (child,) = children(server)
        server.terminate()
        assert server.wait(20) == 0
        eventually(lambda: not child.is_running(), 20)


def fetched(client, rid):
    eventually(lambda: client.fetch(rid, PATH, 0).done, BUSY_S)
    return client.fetch(rid, PATH, 0).end


def write(address, connection, client, path):
    reservation = connection.reserve(path, 5)
    for number, offset in enumerate(reservation.offsets):
        connection.arena.buffer[offset : offset + 1024] = number
    connection.publish(reservation)
    connection.ping(5)

    def is_written():
        client.offer(path)
        counters = ask_counters(address, 5)
        return counters is not None and counters.pages.get("written", 0) >= len(path) // 16

    eventually(is_written, BUSY_S)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "needs a directory"),
        ("{", "no JSON"),
        ("[1]", "must be a JSON object"),
        ('{"file_storage_path": "relative"}', "needs a directory"),
        ('{"file_storage_path": "/proc/1/pages"}', "cannot write to /proc/1/pages"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_code_2(config, told, folder):
    more = [] if config is None else ["--storage-config", config]
    ran = subprocess.run(
        [*COMMAND, "--address", str(folder / "m"), "--storage", "file", *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2 and told in ran.stderr and ran.stderr.count("\n") == 1


def test_a_backend_that_was_not_tried_is_refused_by_name(folder):
    ran = subprocess.run(
        [*COMMAND, "--storage", "nixl"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2 and "nixl" in ran.stderr and "file" in ran.stderr


def test_a_storage_process_that_cannot_start_ends_its_memory_server(folder):
    config = {"backend_name": "own", "module_path": "no.such.module", "class_name": "Nothing"}
    more = ["--storage", "dynamic", "--storage-config", json.dumps(config)]
    ran = subprocess.run(
        [*COMMAND, "--address", str(folder / "m"), *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=BUSY_S,
    )
    assert ran.returncode == 2
    assert "SGLang's storage backend 'dynamic' cannot be opened: Failed to import" in ran.stderr
    assert "the storage process did not start" in ran.stderr


def test_an_embedded_memory_server_has_one_too_and_leaves_nothing(folder):
    config = json.dumps({"file_storage_path": f"{folder}/pages"})
    process = MemoryProcess.start(
        64 << 20, pretouch=False, storage=StorageName.FILE, storage_config=config
    )
    (child,) = psutil.Process(process.pid).children()
    assert ask_counters(process.address, 30) is not None
    process.stop()
    eventually(lambda: not child.is_running(), 20)
    assert not os.path.exists(process.address)
