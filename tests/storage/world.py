"""A memory server, its storage service and a worker's client, in threads of the test."""

import os
import threading

import numpy as np

from smg_sglang.memory.address import Address
from smg_sglang.storage.client import Fetch, StorageClient, ask_counters
from smg_sglang.storage.protocol import Counters
from smg_sglang.storage.sealed import object_names, object_suffix
from smg_sglang.storage.service import StorageService
from tests.memory.conftest import RunningServer
from tests.memory.world import eventually, make_namespace

PAGE_BYTES = 1024


class DictBackend:
    """The simplest backend there is; `broken` raises, `gate` lets calls hang."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.broken: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.room = 1 << 30
        self.calls: list[str] = []

    def _enter(self, what):
        self.calls.append(what)
        self.gate.wait()
        if self.broken is not None:
            raise self.broken

    def exists(self, names):
        self._enter("exists")
        return next((i for i, name in enumerate(names) if name not in self.objects), len(names))

    def get(self, names, into):
        self._enter("get")
        for name, row in zip(names, into, strict=True):
            if name in self.objects:
                row[:] = np.frombuffer(self.objects[name], np.uint8)
        return [name in self.objects for name in names]

    def put(self, names, rows):
        self._enter("put")
        kept = []
        for name, row in zip(names, rows, strict=True):
            kept.append(len(self.objects) < self.room)
            if kept[-1]:
                self.objects[name] = row.tobytes()
        return kept

    def discard(self, name):
        self.objects.pop(name, None)


class World:
    def __init__(self, running: RunningServer, backend=None) -> None:
        self.running = running
        self.backend = backend or DictBackend()
        self.namespace = make_namespace()
        self.connection = running.open(self.namespace)
        self.clients: list[StorageClient] = []
        self.start_service()

    def start_service(self):
        self.stop_fd, self.stop_end = os.pipe()
        service = StorageService(Address.parse(self.running.address), self.backend)
        self.service = service
        self.thread = threading.Thread(target=service.run, args=(self.stop_fd,))
        self.thread.start()

    def stop_service(self):
        os.close(self.stop_end)
        self.thread.join(20)
        os.close(self.stop_fd)

    def client(self, namespace=None, wait_s: float = 20.0) -> StorageClient:
        made = StorageClient(self.running.address, namespace or self.namespace, wait_s)
        self.clients.append(made)
        return made

    def compute(self, path: bytes, byte: int = 7) -> None:
        """What a worker does with a prefix it has computed."""
        reservation = self.connection.reserve(path, 5)
        for number, offset in enumerate(reservation.offsets, reservation.have):
            self.connection.arena.buffer[offset : offset + PAGE_BYTES] = (byte + number) % 256
        self.connection.publish(reservation)
        self.connection.ping(5)

    def keep(self, client: StorageClient, path: bytes, byte: int = 7) -> None:
        """Compute a prefix, and wait until storage has it."""
        self.compute(path, byte)
        names = set(object_names(path, object_suffix(self.namespace)))
        eventually(lambda: client.offer(path) or names <= self.backend.objects.keys())
        eventually(lambda: self.written() == len(self.backend.objects))

    def written(self) -> int:
        return self.counters().pages.get("written", 0)

    def counters(self) -> Counters:
        found = None
        for _ in range(3):
            found = found or ask_counters(self.running.address, 5)
        assert found is not None, "no answer"
        return found

    def lose(self) -> None:
        """Host memory forgets everything."""
        self.connection.flush(5)

    def fetch(self, client: StorageClient, path: bytes, rid: str = "r", start: int = 0) -> Fetch:
        """Ask until it has come, or will not."""
        eventually(lambda: client.fetch(rid, path, start).done)
        return client.fetch(rid, path, start)

    def found(self, path: bytes) -> list[int]:
        """The first byte of each page of the path that host memory has, all bytes being equal."""
        lease = self.connection.lookup(path, 0, 5)
        if lease is None:
            return []
        pages = [self.connection.arena.buffer[o : o + PAGE_BYTES] for o in lease.offsets]
        assert all((page == page[0]).all() for page in pages)
        self.connection.release(lease)
        return [int(page[0]) for page in pages]

    def close(self) -> None:
        self.backend.gate.set()
        for client in self.clients:
            client.close()
        self.stop_service()
        self.connection.close()
        self.running.stop()
