"""Two pools whose layers together are a model's, loaded in one batch."""

import numpy as np
import pytest

from smg_sglang.transfer.joint import JointMover
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.mover import random_delay
from smg_sglang.transfer.movers import make_mover
from tests.transfer import worlds

#: Layers of the model: 0 and 3 attend all, 1, 2 and 4 a window.
LAYERS = [[0, 3], [1, 2, 4]]


class World:
    def __init__(self):
        shapes = [{"layers": 2, "heads": 2, "dim": 8}, {"layers": 3, "heads": 1, "dim": 16}]
        self.pools = [worlds.make_pool(**shape, page_size=4) for shape in shapes]
        self.movers = [make_mover(pool) for pool in self.pools]
        self.joint = JointMover(self.movers, LAYERS)
        self.slots = [worlds.page_slots(pool, 3, seed=i) for i, pool in enumerate(self.pools)]
        self.host = [worlds.make_arena(pool, 3) for pool in self.pools]
        self.want = [worlds.gathered(p, s) for p, s in zip(self.pools, self.slots, strict=True)]
        for mover, slots, (arena, offsets) in zip(self.movers, self.slots, self.host, strict=True):
            mover.spill(mover.prepare(slots, arena, offsets))
        for pool in self.pools:
            worlds.clear(pool)

    def moves(self):
        return [
            self.joint.prepare_in(number, self.slots[number], *self.host[number])
            for number in range(2)
        ]

    def assert_loaded(self):
        for pool, slots, want in zip(self.pools, self.slots, self.want, strict=True):
            for have, expected in zip(worlds.gathered(pool, slots), want, strict=True):
                np.testing.assert_array_equal(have, expected)


def test_pages_of_both_pools_come_back_layer_by_layer():
    world = World()
    loads = LayerLoads(world.joint, random_delay(0.002))
    loads.queue_moves("a", world.moves())
    index = loads.start()
    assert loads.counter.num_layers == 5
    loads.counter.set_consumer(index)
    for layer in range(5):
        loads.counter.wait_until(layer)
        pool, at = next((p, mine.index(layer)) for p, mine in enumerate(LAYERS) if layer in mine)
        rows = world.pools[pool].rows[at][0][world.slots[pool]].numpy()
        assert rows.any(), "a forward would read what is not there"
    assert loads.finish(index)
    world.assert_loaded()
    assert loads.counters.bytes == sum(3 * pool.layout.page_bytes for pool in world.pools)
    loads.close()


def test_requests_of_one_batch_are_joined_by_pool():
    world = World()
    loads = LayerLoads(world.joint)
    for number, move in enumerate(world.moves()):
        loads.queue_moves(str(number), [move])
    assert loads.finish(loads.start())
    world.assert_loaded()
    loads.close()


def test_a_pool_that_is_not_there_is_refused():
    world = World()
    with pytest.raises(ValueError, match="no pool 1"):
        world.movers[0].prepare_in(1, world.slots[0], *world.host[0])


def test_a_layer_may_have_two_pools_or_none():
    """Attention beside a state in layer 1, an MLP alone in layer 2."""
    pools = [worlds.make_pool(layers=2, heads=2, dim=8, page_size=4) for _ in range(2)]
    joint = JointMover([make_mover(pool) for pool in pools], [[0, 1], [1, 3]])
    assert joint.num_layers == 4
    slots = worlds.page_slots(pools[0], 2)
    moves = []
    for number, pool in enumerate(pools):
        arena, offsets = worlds.make_arena(pool, 2)
        move = joint.prepare_in(number, slots, arena, offsets)
        joint.spill(move)
        worlds.clear(pool)
        moves.append(move)

    def loaded(number, at):
        return bool(pools[number].rows[at][0][slots].any())

    joint.load_layers(range(0, 1), moves[0])
    assert (loaded(0, 0), loaded(0, 1)) == (True, False)
    for move in moves:
        joint.load_layers(range(1, 3), move)
    assert (loaded(0, 1), loaded(1, 0), loaded(1, 1)) == (True, True, False)


def test_a_pool_has_a_layer_once():
    pools = [worlds.make_pool(layers=2, heads=2, dim=8, page_size=4) for _ in range(2)]
    with pytest.raises(ValueError, match="twice"):
        JointMover([make_mover(pool) for pool in pools], [[0, 0], [1, 2]])
