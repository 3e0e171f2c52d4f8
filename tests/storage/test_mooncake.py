"""Two boxes that share one Mooncake Store, with a real master; whoever dies is a miss.

Needs `pip install mooncake-transfer-engine-non-cuda` (or the other of its builds) and Debian's
libibverbs1.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from smg_sglang.config import StorageName
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.process import MemoryProcess
from smg_sglang.storage.client import StorageClient, ask_counters
from tests.memory.world import eventually, make_namespace, make_path

try:
    import mooncake.store
except ImportError as error:
    pytest.skip(f"Mooncake cannot be imported: {error}", allow_module_level=True)

MASTER = Path(mooncake.store.__file__).parent / "mooncake_master"
PAGE_BYTES = 256 << 10
NAMESPACE = make_namespace(page_bytes=PAGE_BYTES)
#: Longer than any call of the backend may take, with the start of what was killed.
SOON_S = 60


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Master:
    def __init__(self):
        self.port = free_port()
        program = shutil.which("mooncake_master") or str(MASTER)
        if not os.access(program, os.X_OK):
            os.chmod(program, 0o755)
        flags = [f"--port={self.port}", f"--metrics_port={free_port()}"]
        self.process = subprocess.Popen(
            [program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self._listens, 20)

    def _listens(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


class Box:
    """A machine with a memory server of its own: host memory of 32 pages, and a worker."""

    def __init__(self, master):
        settings = {
            "master_server_address": f"127.0.0.1:{master.port}",
            "local_hostname": "127.0.0.1",
            "global_segment_size": 256 << 20,
        }
        self.memory = MemoryProcess.start(
            32 * PAGE_BYTES,
            storage=StorageName.MOONCAKE,
            storage_config=json.dumps(settings),
        )
        self.connection = MemoryConnection.open(self.memory.address, NAMESPACE, 5)
        self.client = StorageClient(self.memory.address, NAMESPACE, wait_s=SOON_S)

    def counters(self):
        found = None
        while found is None:
            found = ask_counters(self.memory.address, 5)
        return found

    def keep(self, path, byte):
        """Compute a prefix, and wait until the store has it."""
        before = self.counters().pages.get("written", 0)
        reservation = self.connection.reserve(path, 5)
        for number, offset in enumerate(reservation.offsets):
            self.connection.arena.buffer[offset : offset + PAGE_BYTES] = byte + number
        self.connection.publish(reservation)
        self.connection.ping(5)
        self.client.offer(path)
        wanted = before + len(path) // 16
        eventually(lambda: self.counters().pages.get("written", 0) == wanted, SOON_S)

    def fetch(self, path, rid):
        """How many pages of it come, and the longest that a step of the scheduler stood still."""
        longest, done = 0.0, False
        while not done:
            began = time.monotonic()
            fetch = self.client.fetch(rid, path, 0)
            done, end = fetch.done, fetch.end
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.005)
        self.client.forget(rid)
        return end, longest

    def bytes_of(self, path):
        lease = self.connection.lookup(path, 0, 5)
        pages = [self.connection.arena.buffer[o : o + PAGE_BYTES] for o in lease.offsets]
        assert all((page == page[0]).all() for page in pages)
        self.connection.release(lease)
        return [int(page[0]) for page in pages]

    def storage_process(self):
        children = psutil.Process(self.memory.pid).children()
        (found,) = [child for child in children if "storage" in child.cmdline()]
        return found

    def stop(self):
        self.client.close()
        self.connection.close()
        self.memory.stop()


@pytest.fixture
def boxes():
    master = Master()
    made = []
    try:
        made += [Box(master), Box(master)]
        yield (master, *made)
    finally:
        for box in made:
            box.stop()
        master.stop()


PATH, OTHER = make_path(*range(1, 9)), make_path(*range(20, 28))


def test_what_one_box_computed_another_finds_whoever_dies(boxes):
    """One test, since the processes take half a minute to start."""
    master, a, b = boxes
    a.keep(PATH, 10)
    assert b.fetch(PATH, "hit")[0] == 8
    assert b.bytes_of(PATH) == list(range(10, 18))
    assert b.counters().pages.get("corrupt", 0) == 0
    # What nobody has is a miss at once.
    assert b.fetch(make_path(90, 91), "miss")[0] == 0

    # The box that has the bytes is killed: what does not come any more is a miss.
    b.keep(OTHER, 50)
    b.connection.flush(5)
    a.storage_process().kill()
    b.connection.ping(5)
    fetched, stood_still = b.fetch(PATH, "owner killed")
    if fetched:  # on its way, or moved by now
        assert b.bytes_of(PATH[: 16 * fetched]) == list(range(10, 10 + fetched))
    assert stood_still < 2, "the lookup's time-out, on a busy machine"
    b.connection.ping(5)

    # The master hears nothing, and then is no more.
    master.process.send_signal(signal.SIGSTOP)
    fetched, stood_still = b.fetch(make_path(70, 71), "master stopped")
    assert (fetched, stood_still < 2) == (0, True)
    master.stop()
    fetched, stood_still = b.fetch(make_path(80, 81), "master killed")
    assert (fetched, stood_still < 2) == (0, True)
    b.connection.ping(5)
    assert b.connection.stats(5).pages_writing == 0
