"""The worker's view of storage: what was spilled and lost in host memory is found again."""

import os
import threading

import pytest
import torch

from smg_sglang.memory.address import Address
from smg_sglang.metrics import _SERIES
from smg_sglang.storage.service import StorageService
from tests.memory.conftest import RunningServer
from tests.storage.world import DictBackend
from tests.tier.test_host_tier import World as HostWorld
from tests.tier.test_host_tier import path_of, slots_at, until


class World(HostWorld):
    """With a storage service, which has to be there before the worker."""

    def __init__(self, directory, **options):
        server = RunningServer(directory)
        self.backend = DictBackend()
        reader, self.end = os.pipe()
        service = StorageService(Address.parse(directory), self.backend)
        self.thread = threading.Thread(target=service.run, args=(reader,))
        self.thread.start()
        super().__init__(directory, server=server, **options)

    def close(self):
        self.backend.gate.set()
        os.close(self.end)
        self.thread.join(10)
        super().close()

    @property
    def stored(self):
        assert self.tier.stored is not None
        return self.tier.stored

    def keep(self, seed, tokens, slots, pages):
        """Spill, and wait until storage has so many pages. (The first offer may come before the
        worker is connected to storage; each spill of a prompt offers all of it.)"""

        def is_kept():
            assert self.spill(seed, tokens, slots) == [True]
            connection = self.tier.connections.background()
            self.stored.offer(connection, path_of(seed, tokens), 5)
            return len(self.backend.objects) >= pages

        until(is_kept)


@pytest.fixture
def world(make_world):
    return make_world()


def test_what_storage_brings_is_loaded_byte_for_byte_and_counted(world):
    world.keep(1, 32, slots_at(0, 32), pages=8)
    before = world.read(slots_at(0, 32))
    world.tier.flush()
    path = path_of(1, 40)
    assert world.tier.lookups.find("r", path, 0) == 0
    until(lambda: not world.stored.waits("r", path, 0))
    assert world.stored.has_come("r") and not world.stored.has_come("r")
    assert world.stored.span("r") == (0, 32)
    world.tier.lookups.forget("r")
    assert world.tier.lookups.find("r", path, 0) == 8
    assert world.tier.load("r", slots_at(100, 32), {})
    assert world.tier.load_backs.finish(world.tier.load_backs.start())
    assert torch.equal(world.read(slots_at(100, 32)), before)
    assert dict(world.tier.counters.hit_tokens) == {"host": 0, "storage": 32}
    world.tier.forget("r")
    assert world.stored.span("r") == (0, 0)


def test_a_prompt_that_is_nowhere_does_not_wait(world):
    until(lambda: world.tier.stored.counters() is not None)
    until(lambda: not world.stored.waits("r", path_of(9, 32), 0))
    assert not world.stored.has_come("r")


def test_after_a_change_of_weights_nothing_old_is_found_or_written(world):
    world.keep(1, 32, slots_at(0, 32), pages=8)
    world.tier.weights_changed("other")
    world.connected()
    world.spill(2, 32, slots_at(0, 32))
    assert not world.stored.waits("r", path_of(1, 32), 0)
    assert not world.stored.has_come("r")
    assert len(world.backend.objects) == 8


def test_every_series_of_storage_is_read(world):
    world.keep(1, 32, slots_at(0, 32), pages=8)
    reading = world.tier.read_metrics()
    assert {name for name in _SERIES if "stor" in name} <= reading.keys()
    assert reading["smg:stored_pages"]["written"] == 8
    assert reading["smg:storage_connected"] == 1
    assert reading["smg:late_fetches"] == 0
    state = world.tier.state()["storage"]
    assert state["connected"] and state["pages"]["written"] == 8
