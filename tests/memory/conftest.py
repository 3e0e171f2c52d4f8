import shutil
import tempfile
import threading
from collections.abc import Iterator

import pytest

from smg_sglang.memory.address import Address
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.server import MemoryServer

from .world import make_namespace


class RunningServer:
    """A memory server in a thread of this process."""

    def __init__(self, directory: str, host_bytes: int = 1 << 20, **options) -> None:
        self.server = MemoryServer(Address.parse(directory), host_bytes, **options)
        self.books = self.server.books
        self.address = directory
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def open(self, namespace=None, timeout_s: float = 5.0, mappings=None) -> MemoryConnection:
        return MemoryConnection.open(
            self.address, namespace or make_namespace(), timeout_s, mappings
        )

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def directory() -> Iterator[str]:
    """A private directory whose path is short enough for sockets."""
    path = tempfile.mkdtemp(prefix="smg-t-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def running(directory) -> Iterator[RunningServer]:
    server = RunningServer(directory)
    yield server
    server.stop()


@pytest.fixture
def connection(running) -> Iterator[MemoryConnection]:
    opened = running.open()
    yield opened
    opened.close()
