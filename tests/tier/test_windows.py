"""A model with window layers: a hit is as long as both kinds of layers have it."""

import numpy as np
import pytest
import torch

from smg_sglang.config import SmgConfig
from smg_sglang.tier.ends import EndLayers
from smg_sglang.tier.host_tier import HostTier
from smg_sglang.transfer.layout import DevicePool
from tests.engine.caches import namespace_of
from tests.memory.conftest import RunningServer
from tests.tier.test_host_tier import PAGE, path_of, slots_at, until

WINDOW = 2


class World:
    """Two layers that attend all and one with a window of two pages, on a real memory server."""

    def __init__(self, directory):
        self.server = RunningServer(directory, 4 << 20)
        self.full = self._pool(2, 256)
        self.window = self._pool(1, 64)
        config = SmgConfig(memory_address=directory, lookup_timeout_ms=500)
        self.tier = HostTier(
            config,
            directory,
            namespace_of(self.full.layout),
            self.full,
            layers=[0, 2],
            ends=[EndLayers(self.window, [1], WINDOW)],
        )
        for connections in self.tier._all_connections:
            assert connections._pair.scheduler.wait(5)
            assert connections._pair.background.wait(5)

    @staticmethod
    def _pool(layers, slots):
        rows = [torch.rand(slots, 2, 8) for _ in range(2 * layers)]
        return DevicePool.mha(rows[:layers], rows[layers:], PAGE)

    def spill(self, path, window_pages, full_at=0, window_at=0):
        """Spill a path whose last pages, so many, have their window on the device."""
        pages = len(path) // 16
        keys = path[(pages - window_pages) * 16 :]
        ends = {1: (keys, slots_at(window_at, window_pages * PAGE))}
        slots = slots_at(full_at, pages * PAGE)
        self.tier.spills.submit(path, slots, own_slots=len(slots), ends=ends)
        until(lambda: self.tier.spills.num_completed() == 1)
        return self.tier.spills.pop_completed()

    def find(self, rid, path):
        pages = self.tier.lookups.find(rid, path, 0)
        return self.tier.fitting(rid, path, pages)

    def close(self):
        self.tier.close()
        self.server.stop()


@pytest.fixture
def world(tmp_path_factory):
    import shutil
    import tempfile

    directory = tempfile.mkdtemp(prefix="smg-w-", dir="/tmp")
    made = World(directory)
    yield made
    made.close()
    shutil.rmtree(directory, ignore_errors=True)


def test_a_hit_brings_all_of_the_others_and_the_end_of_the_window(world):
    path = path_of(1, 8 * PAGE)
    assert world.spill(path, WINDOW)
    rows = [world.full.rows[0][0][:32].clone(), world.window.rows[0][1][: WINDOW * PAGE].clone()]
    assert world.find("r", path) == 8
    slots = slots_at(100, 8 * PAGE)
    assert world.tier.load("r", slots, {1: slots_at(40, WINDOW * PAGE)})
    assert world.tier.load_backs.finish(world.tier.load_backs.start())
    np.testing.assert_array_equal(world.full.rows[0][0][100:132], rows[0])
    np.testing.assert_array_equal(world.window.rows[0][1][40:48], rows[1])
    until(lambda: world.tier.state()["memory"]["leases"] == 0)


def test_a_longer_prompt_ends_where_its_window_is(world):
    path = path_of(1, 8 * PAGE)
    world.spill(path[: 4 * 16], WINDOW)
    world.spill(path, 1)  # the newest page alone: a window of two is not complete there
    assert world.find("r", path) == 4
    world.tier.forget("r")


def test_a_prompt_whose_window_is_gone_is_a_miss(world):
    path = path_of(1, 8 * PAGE)
    world.spill(path, 0)
    assert world.find("r", path) == 0


def test_a_prompt_shorter_than_the_window_needs_all_of_it(world):
    path = path_of(1, 1 * PAGE)
    world.spill(path, 1)
    assert world.find("r", path) == 1
    world.tier.forget("r")


def test_what_was_found_is_given_back(world):
    path = path_of(1, 8 * PAGE)
    world.spill(path, WINDOW)
    assert world.find("r", path) == 8
    assert world.tier.state()["leases_held"] == 2
    world.tier.forget("r")
    assert world.tier.state()["leases_held"] == 0
    assert world.find("s", path) == 8
    world.tier.flush()
    assert world.tier.state()["leases_held"] == 0
    assert world.find("s", path) == 0


def test_windows_of_former_weights_are_not_found(world):
    path = path_of(1, 8 * PAGE)
    world.spill(path, WINDOW)
    world.tier.weights_changed("new")
    for connections in world.tier._all_connections:
        assert connections._pair.scheduler.wait(5)
    assert world.tier.trails[0].find("r", path) == 0


def test_a_load_for_which_a_window_is_missing_loads_nothing(world):
    path = path_of(1, 8 * PAGE)
    world.spill(path, WINDOW)
    world.find("r", path)
    world.tier.trails[0].found.forget("r")
    assert not world.tier.load("r", slots_at(100, 32), {1: slots_at(40, 8)})
    assert world.tier.state()["leases_held"] == 0
    assert world.tier.load_backs.start() == -1


def test_a_window_is_spilled_before_a_request_loses_its_slots(world):
    path = path_of(1, 8 * PAGE)
    world.tier.spills.spill_now(path, slots_at(0, 32))
    world.tier.trails[0].spill_now(path[6 * 16 :], slots_at(8, WINDOW * PAGE))
    assert world.find("r", path) == 8
    world.tier.forget("r")


def test_bytes_are_told_by_kind_of_layer(world):
    assert world.tier.state()["layers"] == {
        "full": {"layers": 2, "bytes_a_token": 2 * 2 * 2 * 8 * 4},
        "window": {"layers": 1, "bytes_a_token": 2 * 2 * 8 * 4, "window_tokens": WINDOW * PAGE},
    }
