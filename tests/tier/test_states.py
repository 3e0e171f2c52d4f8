"""A model with states (Mamba): a hit ends at the deepest checkpoint that host memory has."""

import shutil
import tempfile

import numpy as np
import pytest
import torch

from smg_sglang.config import HostDtype, SmgConfig
from smg_sglang.tier.ends import EndLayers
from smg_sglang.tier.host_tier import HostTier
from smg_sglang.tier.ranks import ALONE, Ranks
from smg_sglang.transfer.layout import DevicePool
from tests.engine.caches import namespace_of
from tests.memory.conftest import RunningServer
from tests.tier.test_host_tier import PAGE, path_of, slots_at, until
from tests.transfer import worlds

KEY = 16


class World:
    """Two attention layers and two with states, 0 of these in a layer of its own and the other
    beside attention, on a real memory server."""

    def __init__(self, directory, **options):
        self.server = RunningServer(directory, 4 << 20)
        rows = [torch.rand(256, 2, 8) for _ in range(4)]
        self.full = DevicePool.mha(rows[:2], rows[2:], PAGE)
        self.states = worlds.make_states(layers=2, slots=16)
        self.tiers = []
        self.directory = directory
        self.tier = self.another(**options)

    def another(self, ranks=ALONE, **options):
        config = SmgConfig(memory_address=self.directory, lookup_timeout_ms=500, **options)
        tier = HostTier(
            config,
            self.directory,
            namespace_of(self.full.layout),
            self.full,
            layers=[1, 2],
            ends=[EndLayers(self.states, [0, 2], 1, kind="state")],
            ranks=ranks,
        )
        for connections in tier._all_connections:
            assert connections._pair.scheduler.wait(5)
            assert connections._pair.background.wait(5)
        self.tiers.append(tier)
        return tier

    def spill(self, path, state=None):
        """Spill a path; `state` is the slot of its end's, where it has one."""
        slots = slots_at(0, len(path) // KEY * PAGE)
        ends = {} if state is None else {1: (path[-KEY:], torch.tensor([state]))}
        self.tier.spills.submit(path, slots, own_slots=len(slots), ends=ends)
        until(lambda: self.tier.spills.num_completed() == 1)
        return self.tier.spills.pop_completed()

    def find(self, rid, path, tier=None):
        tier = tier or self.tier
        return tier.fitting(rid, path, tier.lookups.find(rid, path, 0))

    def state_bytes(self, slot):
        return worlds.gathered(self.states, torch.tensor([slot]))

    def close(self):
        for tier in self.tiers:
            tier.close()
        self.server.stop()


@pytest.fixture
def make_world():
    made = []

    def make(**options):
        directory = tempfile.mkdtemp(prefix="smg-s-", dir="/tmp")
        made.append(World(directory, **options))
        return made[-1]

    yield make
    for world in made:
        world.close()
        shutil.rmtree(world.directory, ignore_errors=True)


@pytest.fixture
def world(make_world):
    return make_world()


def test_a_hit_brings_all_pages_and_one_state(world):
    path = path_of(1, 8 * PAGE)
    assert world.spill(path, state=3)
    kept, pages = world.state_bytes(3), world.full.rows[1][0][:32].clone()
    assert world.find("r", path) == 8
    assert world.tier.load("r", slots_at(100, 8 * PAGE), {1: torch.tensor([9])})
    assert world.tier.load_backs.finish(world.tier.load_backs.start())
    np.testing.assert_array_equal(world.full.rows[1][0][100:132], pages)
    for have, want in zip(world.state_bytes(9), kept, strict=True):
        np.testing.assert_array_equal(have, want)
    until(lambda: world.tier.state()["memory"]["leases"] == 0)


def test_a_hit_ends_at_the_deepest_checkpoint(world):
    path = path_of(1, 8 * PAGE)
    world.spill(path[: 3 * KEY], state=3)
    world.spill(path[: 5 * KEY], state=5)
    world.spill(path)
    assert world.find("r", path) == 5
    assert world.find("s", path[: 4 * KEY]) == 3
    assert world.find("t", path[: 2 * KEY]) == 0


def test_prompts_that_part_go_on_from_the_checkpoint_where_they_part(world):
    head, tails = path_of(1, 4 * PAGE), [path_of(2, 2 * PAGE), path_of(3, 2 * PAGE)]
    world.spill(head + tails[0], state=2)
    assert world.find("r", head + tails[1]) == 0, "the pages are there, and no state"
    world.spill(head, state=7)
    assert world.find("s", head + tails[1]) == 4
    assert world.find("t", head + tails[0]) == 6


def test_without_its_state_nothing_is_loaded(world):
    path = path_of(1, 8 * PAGE)
    world.spill(path, state=3)
    world.find("r", path)
    world.tier.trails[0].found.forget("r")
    assert not world.tier.load("r", slots_at(100, 32), {1: torch.tensor([9])})
    assert world.tier.state()["leases_held"] == 0


def test_states_are_told_by_checkpoint(world):
    assert world.tier.state()["layers"]["state"] == {
        "layers": 2,
        "bytes_a_checkpoint": world.states.layout.page_bytes,
    }


def test_states_are_never_rounded(make_world):
    world = make_world(host_dtype=HostDtype.FP8)
    path = path_of(1, 8 * PAGE)
    world.spill(path, state=3)
    kept = world.state_bytes(3)
    assert world.find("r", path) == 8
    assert world.tier.load("r", slots_at(100, 8 * PAGE), {1: torch.tensor([9])})
    assert world.tier.load_backs.finish(world.tier.load_backs.start())
    for have, want in zip(world.state_bytes(9), kept, strict=True):
        np.testing.assert_array_equal(have, want)


def test_ranks_whose_latents_are_alike_have_states_of_their_own(world):
    first, second = (world.another(Ranks(rank, 2, alike=True)) for rank in range(2))
    names = [tier.trails[0].connections.namespace for tier in (first, second)]
    assert [name.tp_rank for name in names] == [0, 1]
    assert first.connections.namespace == second.connections.namespace
