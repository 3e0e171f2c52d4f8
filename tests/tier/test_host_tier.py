"""The worker's view of the host tier, on a real memory server and a small CPU pool."""

import random
import time

import numpy as np
import torch

from smg_sglang.config import SmgConfig, WritePolicy
from smg_sglang.metrics import _SERIES
from smg_sglang.tier import host_tier
from smg_sglang.tier.host_tier import HostTier
from smg_sglang.tier.ranks import ALONE, Ranks
from smg_sglang.transfer.copy_rates import CopyRates
from smg_sglang.transfer.cpu import CpuMover
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import random_delay
from smg_sglang.tree.page_keys import page_keys
from tests.engine.caches import namespace_of
from tests.memory.conftest import RunningServer

PAGE, LAYERS, SLOTS = 4, 3, 256


class World:
    """A pool, a tier over it, and a memory server that can be replaced."""

    def __init__(self, directory, host_bytes=1 << 20, *, ranks=ALONE, server=None, **options):
        self.directory = directory
        self.server = server or RunningServer(directory, host_bytes)
        rows = [torch.zeros(SLOTS, 2, 8) for _ in range(2 * LAYERS)]
        self.k, self.v = rows[:LAYERS], rows[LAYERS:]
        pool = DevicePool.mha(self.k, self.v, PAGE)
        namespace = namespace_of(pool.layout, tp_rank=ranks.shard, tp_size=ranks.shards)
        config = SmgConfig(
            memory_address=directory,
            write_policy=WritePolicy.WRITE_THROUGH,
            lookup_timeout_ms=200,
        )
        self.tier = HostTier(config, directory, namespace, pool, ranks=ranks, **options)
        self.connected()

    def connected(self):
        assert self.tier.connections._pair.scheduler.wait(5)
        assert self.tier.connections._pair.background.wait(5)

    def restart(self):
        self.server.stop()
        self.server = RunningServer(self.directory)
        self.connected()

    def close(self):
        self.tier.close()
        self.server.stop()

    # ---- a prompt and its KV ----

    def write(self, seed, slots):
        """KV of a prompt that depends on `seed` and position only."""
        generator = torch.Generator().manual_seed(seed)
        for buffer in (*self.k, *self.v):
            buffer[slots] = torch.rand(len(slots), 2, 8, generator=generator)

    def read(self, slots):
        return torch.stack([buffer[slots] for buffer in (*self.k, *self.v)])

    def spill(self, seed, tokens, slots):
        self.write(seed, slots)
        self.tier.spills.submit(path_of(seed, tokens), slots, own_slots=len(slots))
        return self.completed()

    def completed(self):
        self.tier.spills.drain()
        return [self.tier.spills.pop_completed() for _ in range(self.tier.spills.num_completed())]

    def load(self, rid, slots):
        if not self.tier.load_backs.load(rid, slots):
            return False
        return self.tier.load_backs.finish(self.tier.load_backs.start())


def path_of(seed, tokens):
    return page_keys(np.arange(seed * 1000, seed * 1000 + tokens), PAGE)


def slots_at(first, count):
    return torch.arange(first, first + count, dtype=torch.int64)


def leases(world):
    return world.tier.state()["memory"]["leases"]


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_was_spilled_is_found_and_loaded_byte_for_byte(make_world):
    world = make_world()
    assert world.spill(1, 32, slots_at(8, 32)) == [True]
    before = world.read(slots_at(8, 32))
    assert world.tier.lookups.find("r", path_of(1, 40), 0) == 8
    assert world.load("r", slots_at(100, 32))
    assert torch.equal(world.read(slots_at(100, 32)), before)
    assert world.tier.counters.hit_tokens["host"] == 32
    assert leases(world) == 0


def test_only_what_the_device_lacks_is_loaded(make_world):
    world = make_world()
    world.spill(1, 32, slots_at(0, 32))
    before = world.read(slots_at(12, 20))
    assert world.tier.lookups.find("r", path_of(1, 32), 3) == 5
    assert world.load("r", slots_at(200, 20))
    assert torch.equal(world.read(slots_at(200, 20)), before)


def test_a_hit_may_be_cut_short(make_world):
    world = make_world()
    world.spill(1, 32, slots_at(0, 32))
    world.tier.lookups.find("r", path_of(1, 32), 0)
    assert world.load("r", slots_at(200, 8))
    assert torch.equal(world.read(slots_at(200, 8)), world.read(slots_at(0, 8)))
    assert leases(world) == 0


def test_a_load_without_a_lease_is_refused(make_world):
    world = make_world()
    assert not world.tier.load_backs.load("nobody", slots_at(0, 4))
    world.spill(1, 8, slots_at(0, 8))
    world.tier.lookups.find("r", path_of(1, 8), 0)
    assert not world.tier.load_backs.load("r", slots_at(0, 12)), "more than was found"
    assert leases(world) == 0


def test_cancelled_and_forgotten_requests_hold_nothing(make_world):
    world = make_world()
    world.spill(1, 32, slots_at(0, 32))
    for rid in ("cancelled", "forgotten"):
        world.tier.lookups.find(rid, path_of(1, 32), 0)
    assert leases(world) == 2
    assert world.tier.load_backs.load("cancelled", slots_at(100, 32))
    assert world.tier.load_backs.cancel("cancelled")
    world.tier.lookups.forget("forgotten")
    assert world.tier.load_backs.start() == -1
    assert leases(world) == 0
    assert not world.read(slots_at(100, 32)).any()


def test_a_prefix_that_the_host_lost_is_written_again_with_what_follows(make_world):
    world = make_world()
    world.spill(1, 16, slots_at(0, 16))
    world.tier.flush()
    world.write(1, slots_at(0, 32))
    world.tier.spills.submit(path_of(1, 32), slots_at(0, 32), own_slots=16)
    assert world.completed() == [True]
    assert world.tier.lookups.find("r", path_of(1, 32), 0) == 8


def test_a_full_tier_forgets_the_oldest_prefix(make_world):
    world = make_world(host_bytes=1 << 20)
    prompts = (1 << 20) // (16 * LAYERS * 2 * 2 * 8 * 4) + 1
    for seed in range(prompts):
        assert world.spill(seed, 16, slots_at(0, 16)) == [True]
    assert world.tier.lookups.find("old", path_of(0, 16), 0) == 0
    assert world.tier.lookups.find("new", path_of(prompts - 1, 16), 0) == 4


def test_a_prefix_that_is_hot_on_the_device_does_not_age_in_memory(make_world):
    world = make_world(host_bytes=1 << 20)
    prompts = (1 << 20) // (16 * LAYERS * 2 * 2 * 8 * 4) + 1
    world.spill(0, 16, slots_at(0, 16))
    for seed in range(1, prompts):
        world.tier.lookups.touch(f"r{seed}", path_of(0, 16))
        world.tier.state()  # the same connection, so the touch has been handled
        assert world.spill(seed, 16, slots_at(0, 16)) == [True]
    assert world.tier.lookups.find("hot", path_of(0, 16), 0) == 4
    assert world.tier.lookups.find("cold", path_of(1, 16), 0) == 0


def test_flush_forgets_everything(make_world):
    world = make_world()
    world.spill(1, 16, slots_at(0, 16))
    world.tier.flush()
    assert world.tier.lookups.find("r", path_of(1, 16), 0) == 0
    assert world.tier.state()["memory"]["pages_ready"] == 0


def test_a_flush_that_the_server_missed_is_made_up_before_the_next_lookup(make_world):
    world = make_world()
    world.spill(1, 16, slots_at(0, 16))
    real = world.tier.connections._pair.scheduler.connection()
    stalled = type(real).stalled
    try:
        type(real).stalled = property(lambda self: True)
        world.tier.flush()
        assert world.tier.lookups.find("a", path_of(1, 16), 0) == 0
    finally:
        type(real).stalled = stalled
    assert world.tier.lookups.find("b", path_of(1, 16), 0) == 0
    assert world.tier.state()["memory"]["pages_ready"] == 0


def test_other_weights_are_another_namespace(make_world):
    world = make_world()
    world.spill(1, 16, slots_at(0, 16))
    world.tier.weights_changed("new")
    world.connected()
    assert world.tier.lookups.find("r", path_of(1, 16), 0) == 0
    assert world.spill(1, 16, slots_at(0, 16)) == [True]
    assert world.tier.lookups.find("s", path_of(1, 16), 0) == 4


def test_a_weight_update_leaves_completed_spills_to_be_popped(make_world):
    """Each holds a lock in SGLang's tree, which only its completion releases."""
    world = make_world()
    world.write(1, slots_at(0, 16))
    world.tier.spills.submit(path_of(1, 16), slots_at(0, 16), own_slots=16)
    world.tier.weights_changed("new")
    assert world.tier.spills.num_completed() == 1
    assert world.tier.spills.pop_completed()


def test_pages_of_a_former_weight_update_do_not_stay_in_memory(make_world):
    world = make_world()
    for update in "123":
        world.tier.weights_changed(update)
        world.connected()
        assert world.spill(1, 16, slots_at(0, 16)) == [True]
    assert world.tier.state()["memory"]["pages_ready"] == 4


def test_a_prompt_longer_than_the_waiting_limit_is_spilled(make_world):
    world = make_world()
    assert world.spill(1, SLOTS * 3 // 4, slots_at(0, SLOTS * 3 // 4)) == [True]


def test_a_worker_on_cuda_shows_how_fast_it_copies(make_world, monkeypatch):
    rates = CopyRates(20.0, 10.0)
    on_cuda = property(lambda pool: torch.device("cuda"), lambda pool, device: None)
    monkeypatch.setattr(DevicePool, "device", on_cuda, raising=False)
    monkeypatch.setattr(host_tier, "measure_copies", lambda pool: rates)
    monkeypatch.setattr(host_tier, "make_mover", lambda pool, **_more: CpuMover(pool))
    assert make_world().tier.state()["copies"] == rates.state()


def test_a_worker_on_a_cpu_has_nothing_to_measure(make_world):
    assert make_world().tier.state()["copies"] is None


def test_without_a_server_everything_is_a_miss_and_nothing_raises(make_world):
    world = make_world()
    world.spill(1, 16, slots_at(0, 16))
    world.server.stop()
    until(lambda: world.tier.connections._pair.scheduler.connection() is None)
    assert world.tier.lookups.find("r", path_of(1, 16), 0) == 0
    assert world.spill(2, 16, slots_at(0, 16)) == [False]
    assert not world.tier.spills.spill_now(path_of(2, 16), slots_at(0, 16))
    world.tier.flush()
    state = world.tier.state()
    assert not state["memory_connected"]
    assert world.tier.read_metrics()["smg:dropped_pages"]["unavailable"] == 8
    world.server = RunningServer(world.directory)
    world.connected()
    assert world.spill(2, 16, slots_at(0, 16)) == [True]


def test_a_lease_of_a_dead_server_is_refused_alone_and_good_among_ranks(make_world):
    """Alone we take the cautious way. Ranks must agree, and the mapping outlives the server."""
    for size, loaded in ((1, False), (2, True)):
        world = make_world(ranks=Ranks(size=size))
        world.spill(1, 16, slots_at(0, 16))
        world.tier.lookups.find("r", path_of(1, 16), 0)
        world.restart()
        assert world.load("r", slots_at(100, 16)) is loaded
        if loaded:
            assert torch.equal(world.read(slots_at(100, 16)), world.read(slots_at(0, 16)))


def test_a_load_that_is_refused_is_computed_alone_and_fails_among_ranks(make_world, monkeypatch):
    """Alone it was never queued. The others among ranks have queued theirs: it has to fail later."""
    for size in (1, 2):
        world = make_world(ranks=Ranks(size=size))
        world.spill(1, 16, slots_at(0, 16))
        world.tier.lookups.find("r", path_of(1, 16), 0)
        monkeypatch.setattr(world.tier._mover, "prepare", refuse)
        queued = world.tier.load_backs.load("r", slots_at(100, 16))
        assert queued is (size > 1)
        index = world.tier.load_backs.start()
        assert (index >= 0) is queued
        if queued:
            assert not world.tier.load_backs.finish(index)
        assert world.tier.state()["leases_held"] == 0
        assert leases(world) == 0


def refuse(*args):
    raise ValueError("pages outside the arena")


def test_write_back_copies_before_it_returns(make_world):
    world = make_world()
    world.write(1, slots_at(0, 16))
    kept = world.read(slots_at(0, 16))
    assert world.tier.spills.spill_now(path_of(1, 16), slots_at(0, 16))
    world.write(2, slots_at(0, 16))
    assert world.tier.lookups.find("r", path_of(1, 16), 0) == 4
    assert world.load("r", slots_at(100, 16))
    assert torch.equal(world.read(slots_at(100, 16)), kept)
    assert world.tier.read_metrics()["smg:spilled_bytes"] == 4 * PAGE * LAYERS * 2 * 2 * 8 * 4


def test_a_copy_that_fails_is_a_dropped_page_not_an_exception(make_world):
    world = make_world()
    beyond = slots_at(SLOTS, 16)
    assert not world.tier.spills.spill_now(path_of(1, 16), beyond)
    assert world.tier.counters.dropped_pages["error"] == 4
    world.spill(2, 16, slots_at(0, 16))
    assert world.tier.lookups.find("r", path_of(2, 16), 0) == 4
    assert not world.tier.load_backs.load("r", beyond)
    assert world.tier.state()["memory"]["pages_writing"] == 0
    assert leases(world) == 0


def test_delayed_copies_give_the_same_bytes_whatever_happens_between(make_world):
    """Spills, loads, cancels and flushes in random order, every copy late by a random time."""
    world = make_world(before_copy=random_delay(0.003))
    rng = random.Random(7)
    kept = {}
    for step in range(60):
        seed = rng.randrange(6)
        if rng.random() < 0.5:
            slots = slots_at(seed * 16, 16)
            world.write(seed, slots)
            kept[seed] = world.read(slots)
            world.tier.spills.submit(path_of(seed, 16), slots, own_slots=16)
            if rng.random() < 0.3:
                world.completed()
        elif world.tier.lookups.find(f"r{step}", path_of(seed, 16), 0) == 4:
            slots = slots_at(128 + 16 * (step % 8), 16)
            assert world.tier.load_backs.load(f"r{step}", slots)
            if rng.random() < 0.2:
                assert world.tier.load_backs.cancel(f"r{step}")
                continue
            index = world.tier.load_backs.start()
            world.tier.load_backs.loads.counter.set_consumer(index)
            for layer in range(LAYERS):
                world.tier.load_backs.loads.counter.wait_until(layer)
                assert torch.equal(world.k[layer][slots], kept[seed][layer])
                assert torch.equal(world.v[layer][slots], kept[seed][LAYERS + layer])
            assert world.tier.load_backs.finish(index)
        if rng.random() < 0.05:
            world.tier.flush()
    world.completed()
    assert leases(world) == 0


def test_a_memory_server_that_is_not_there_is_told_once(tmp_path, caplog):
    pool = DevicePool.mha(*[[torch.zeros(32, 2, 8)] * LAYERS for _ in "kv"], PAGE, torch.float32)
    tier = HostTier(SmgConfig(), str(tmp_path / "later"), namespace_of(pool.layout), pool)
    until(lambda: all(link.last_error for link in vars(tier.connections._pair).values()))
    tier.close()
    (told,) = [r for r in caplog.records if "no memory server for now" in r.getMessage()]
    assert told.levelname == "WARNING"
    assert "later" in told.getMessage() and "until it appears" in told.getMessage()


def test_what_a_full_memory_has_no_room_for_is_counted(make_world):
    world = make_world(host_bytes=1 << 20)
    pages = (1 << 20) // world.tier.layout.page_bytes + 10
    slots = torch.arange(PAGE).repeat(pages)
    assert not world.tier.spills.spill_now(path_of(1, pages * PAGE), slots)
    kept = world.tier.state()["memory"]["pages_ready"]
    assert 0 < kept < pages
    assert world.tier.counters.dropped_pages["memory_full"] == pages - kept


def test_every_series_has_a_reading_from_the_start(make_world):
    reading = make_world().tier.read_metrics()
    assert set(reading) == set(_SERIES)
    for name, (_, _, label) in _SERIES.items():
        assert not label or reading[name], name
