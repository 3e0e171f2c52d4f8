"""Ranks that have the same KV: host memory has it once, the first rank writes it, all read it."""

import gc
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch

from smg_sglang.tier.ranks import Ranks
from tests.memory.conftest import RunningServer
from tests.tier import test_host_tier
from tests.tier.test_host_pages import bytes_of
from tests.tier.test_host_tier import PAGE, leases, path_of, slots_at, until


class World:
    """Two ranks of one worker, each with a pool of its own, on one memory server."""

    def __init__(self, directory, host_bytes=1 << 20, *, before_copy=None) -> None:
        pair = [Ranks(rank, 2, alike=True) for rank in range(2)]
        self.first = test_host_tier.World(
            directory, host_bytes, ranks=pair[0], before_copy=before_copy
        )
        self.second = test_host_tier.World(directory, ranks=pair[1], server=self.first.server)
        # The second goes first: what it did would stand, were it to write.
        self.ranks = (self.second, self.first)
        together = Barrier(2, timeout=10)
        for rank in self.ranks:
            rank.tier.pages.wait_for_ranks = together.wait

    def each(self, what):
        """What each rank returns, who do it at the same time."""
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(what, self.ranks))

    def compute(self, seed, tokens):
        """Each rank computes the same KV into slots of its own; which it is to have then."""
        for world, slots in zip(self.ranks, self.slots(tokens), strict=True):
            world.write(seed, slots)
        return self.first.read(self.slots(tokens)[1])

    @staticmethod
    def slots(tokens):
        return slots_at(100, tokens), slots_at(0, tokens)

    def close(self):
        self.second.tier.close()
        self.first.close()


def copied(world):
    """Whether each rank has copied anything to host memory."""
    return [rank.tier.read_metrics()["smg:spilled_bytes"] > 0 for rank in world.ranks]


def test_a_rank_of_many_has_a_shard_unless_all_are_alike():
    shards = [Ranks(rank, 4) for rank in range(4)]
    assert [(rank.shard, rank.shards) for rank in shards] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert all(rank.writes for rank in shards)
    alike = [Ranks(rank, 4, alike=True) for rank in range(4)]
    assert {(rank.shard, rank.shards) for rank in alike} == {(0, 1)}
    assert [rank.writes for rank in alike] == [True, False, False, False]


def test_what_both_ranks_spill_is_in_memory_once_and_read_by_both(make_world):
    world = make_world()
    before = world.compute(1, 32)
    for rank, slots in zip(world.ranks, world.slots(32), strict=True):
        rank.tier.spills.submit(path_of(1, 32), slots, own_slots=32)
        assert rank.completed() == [True]
    assert world.first.tier.state()["memory"]["pages_ready"] == 8
    assert copied(world) == [False, True]
    for rank in world.ranks:
        assert rank.tier.lookups.find("r", path_of(1, 40), 0) == 8
    assert leases(world.first) == 2, "each rank keeps what it reads"
    for rank in world.ranks:
        assert rank.load("r", slots_at(200, 32))
        assert torch.equal(rank.read(slots_at(200, 32)), before)
    assert leases(world.first) == 0


def test_what_leaves_the_device_at_once_is_written_once(make_world):
    """Write-back, and requests that are retracted."""
    world = make_world()
    before = world.compute(1, 32)
    for rank, slots in zip(world.ranks, world.slots(32), strict=True):
        assert rank.tier.spills.spill_now(path_of(1, 32), slots)
        rank.write(2, slots)
    assert copied(world) == [False, True]
    assert world.first.tier.state()["memory"]["pages_ready"] == 8
    for rank in world.ranks:
        assert rank.tier.lookups.find("r", path_of(1, 32), 0) == 8
        assert rank.load("r", slots_at(200, 32))
        assert torch.equal(rank.read(slots_at(200, 32)), before)


def test_a_slower_rank_reads_on_after_the_other_is_done(make_world):
    """A full server gives away what only the first has finished with, if the second does not hold
    it."""
    world = make_world()
    before = world.compute(0, 16)
    world.first.tier.spills.spill_now(path_of(0, 16), world.slots(16)[1])
    for rank in world.ranks:
        assert rank.tier.lookups.find("r", path_of(0, 16), 0) == 4
    assert world.first.load("r", slots_at(200, 16))
    others = (1 << 20) // (16 * test_host_tier.LAYERS * 2 * 2 * 8 * 4) + 1
    for seed in range(1, others):
        assert world.first.spill(seed, 16, slots_at(16, 16)) == [True]
    assert world.second.load("r", slots_at(200, 16))
    assert torch.equal(world.second.read(slots_at(200, 16)), before)
    assert world.first.tier.lookups.find("old", path_of(1, 16), 0) == 0, "memory was full"


def test_a_writer_that_is_cut_off_leaves_nothing_half_written(make_world):
    begun, go = Event(), Event()

    def hold():
        begun.set()
        assert go.wait(10)

    world = make_world(before_copy=hold)
    world.compute(1, 16)
    spills = world.first.tier.spills
    spills.submit(path_of(1, 16), world.slots(16)[1], own_slots=16)
    assert begun.wait(10)
    assert world.second.tier.state()["memory"]["pages_writing"] == 4
    connection = world.first.tier.connections.background()
    connection._channel._life.shutdown(socket.SHUT_RDWR)
    del connection
    until(lambda: world.first.tier.connections.background() is not None)
    assert world.second.tier.state()["memory"]["pages_writing"] == 4, "its copy is under way"
    go.set()
    spills.queue.drain()
    until(lambda: gc.collect() or world.second.tier.state()["memory"]["pages_writing"] == 0)
    assert world.second.tier.lookups.find("r", path_of(1, 16), 0) == 0
    assert world.second.tier.state()["memory"]["pages_ready"] == 0


def test_after_new_weights_both_ranks_have_the_same_namespace_again(make_world):
    world = make_world()
    world.compute(1, 16)
    world.first.tier.spills.spill_now(path_of(1, 16), world.slots(16)[1])
    for rank in world.ranks:
        rank.tier.weights_changed("new")
        rank.connected()
        assert rank.tier.lookups.find("r", path_of(1, 16), 0) == 0
    before = world.compute(2, 16)
    world.first.tier.spills.spill_now(path_of(2, 16), world.slots(16)[1])
    assert world.second.tier.lookups.find("s", path_of(2, 16), 0) == 4
    assert world.second.load("s", slots_at(200, 16))
    assert torch.equal(world.second.read(slots_at(200, 16)), before)


# ---- pages that are held while they are attended ----


def keep(world, tokens=40):
    """Both ranks move the same chunk of a stream to host memory."""
    slots = dict(zip(world.ranks, world.slots(tokens), strict=True))
    return world.each(lambda rank: rank.tier.pages.keep(path_of(1, tokens), 0, slots[rank]))


def test_a_chunk_is_kept_once_for_both_however_long_its_copy_takes(make_world):
    world = make_world(before_copy=lambda: time.sleep(0.05))
    before = world.compute(1, 40)
    kept = keep(world)
    for rank, held in zip(world.ranks, kept, strict=True):
        assert [part.lease is not None for part in held] == [True], "memory of its own"
        assert torch.equal(bytes_of(held, rank), before)
    assert world.first.tier.state()["memory"]["pages_ready"] == 10
    again = world.each(lambda rank: rank.tier.pages.find(path_of(1, 40)))
    assert [sum(part.num_pages for part in held) for held in again] == [10, 10]


def test_what_one_rank_finds_too_late_it_keeps_to_itself(make_world, monkeypatch):
    world = make_world()
    before = world.compute(1, 40)
    monkeypatch.setattr(world.second.tier.pages, "_connection", lambda: None)
    kept = keep(world)
    assert [held[0].lease is None for held in kept] == [True, False]
    for rank, held in zip(world.ranks, kept, strict=True):
        assert torch.equal(bytes_of(held, rank), before)


@pytest.mark.parametrize("tokens", [40, PAGE])
def test_without_a_server_each_rank_keeps_its_own(make_world, tokens):
    world = make_world()
    before = world.compute(1, tokens)
    world.first.server.stop()
    for rank in world.ranks:
        until(lambda rank=rank: rank.tier.connections.connection() is None)
    for rank, held in zip(world.ranks, keep(world, tokens), strict=True):
        assert [part.lease for part in held] == [None]
        assert torch.equal(bytes_of(held, rank), before)
    world.first.server = RunningServer(world.first.directory)
