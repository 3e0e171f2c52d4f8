"""What is copied by one launch: its bytes, how many launches there are, and whose marks they have.

Without a GPU, on tests/fake_cuda and in Triton's interpreter.
"""

import threading

import numpy as np
import pytest
import torch

from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.launches import buffer_tables, layer_groups
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.mover import REACHED
from tests.transfer import worlds

MIB = 1 << 20


@pytest.mark.parametrize(
    ("layers", "layer_bytes", "sizes"),
    [
        (1, MIB, [1]),
        (2, 1, [1, 1]),
        (6, 4 * MIB, [1] * 6),
        (6, 4 * MIB - 1, [1, 2, 2, 1]),
        (10, MIB, [1, 4, 4, 1]),
        (32, 64 << 10, [1, 31]),  # a page of an 8B model
        (32, 0, [1, 31]),
    ],
)
def test_launches_move_some_mib_each_and_the_first_layer_is_alone(layers, layer_bytes, sizes):
    groups = layer_groups(layers, layer_bytes, 4 * MIB)
    assert [len(group) for group in groups] == sizes
    assert [layer for group in groups for layer in group] == list(range(layers))


@pytest.mark.parametrize(
    ("shape", "tables"),
    [({}, 1), ({"kind": "mla"}, 1), ({"dim": 8, "v_dim": 16}, 2)],
    ids=["mha", "mla", "k_is_not_v"],
)
def test_buffers_with_rows_of_one_length_share_a_table(shape, tables):
    pool = worlds.make_pool(**shape, layers=3)
    made = buffer_tables(pool)
    assert len(made) == tables
    found = [tuple(row) for table in made for row in table.of(range(1, 3)).tolist()]
    assert sorted(found) == sorted(
        (rows.data_ptr(), pool.layout.part_offset(layer, part))
        for layer in (1, 2)
        for part, rows in enumerate(pool.rows[layer])
    )


def test_a_buffer_that_begins_between_words_is_copied_by_smaller_ones():
    rows = torch.zeros(4 * 16 * 2 + 2, dtype=torch.uint8)[2:].view(2, 4, 16)
    (table,) = buffer_tables(worlds.DevicePool.mla([rows], 1))
    assert table.unit == 2


class Counted(CudaMover):
    """Says how many layers each launch copies."""

    def __init__(self, *args, **options):
        self.launched = []
        super().__init__(*args, **options)
        self.launched.clear()  # those that compiled

    def _launch(self, table, layers, *args, to_arena):
        self.launched.append(len(layers))
        super()._launch(table, layers, *args, to_arena=to_arena)


@pytest.fixture
def make_mover(cuda):
    made = []

    def make(pool, arena, mover=Counted, **options):
        made.append(mover(pool, programs=3, **options))
        made[-1].pin(arena)
        assert made[-1].wait_pinned(arena)
        return made[-1]

    yield make
    for mover in made:
        mover.close()


@pytest.mark.parametrize("seed", range(40))
def test_pages_of_any_shape_at_any_alignment_come_back(make_mover, seed):
    pool, slots, back_to, arena, offsets = worlds.random_world(seed)
    mover = make_mover(pool, arena)
    worlds.round_trip(pool, mover, slots, back_to, arena, offsets)
    assert len(mover.launched) <= 2 * 3  # of at most two lengths: a spill, and a load of two groups


def test_rows_longer_than_a_tile_come_back(make_mover):
    pool = worlds.make_pool(heads=129, dim=64, layers=1, dtype=torch.float32, slots=5, page_size=1)
    arena, offsets = worlds.make_arena(pool, 2)
    slots, back_to = worlds.page_slots(pool, 2), worlds.page_slots(pool, 2, seed=4)
    worlds.round_trip(pool, make_mover(pool, arena), slots, back_to, arena, offsets)


@pytest.mark.parametrize(("v_dim", "lengths"), [(8, 1), (16, 2)])
def test_a_spill_is_one_launch_and_a_load_of_few_pages_two(make_mover, v_dim, lengths):
    pool = worlds.make_pool(layers=5, dim=8, v_dim=v_dim)
    arena, offsets = worlds.make_arena(pool, 3)
    mover = make_mover(pool, arena)
    move = mover.prepare(worlds.page_slots(pool, 3), arena, offsets)
    mover.spill(move)
    assert mover.launched == [5] * lengths
    mover.launched.clear()
    worlds.load(mover, move)
    assert mover.launched == [1] * lengths + [4] * lengths


def test_a_layer_of_many_pages_is_a_launch(make_mover, monkeypatch):
    pool = worlds.make_pool(layers=5)
    arena, offsets = worlds.make_arena(pool, 3)
    monkeypatch.setattr("smg_sglang.transfer.cuda.layer_groups", lambda layers, nbytes:
                        layer_groups(layers, nbytes, 3 * pool.layout.layer_bytes))  # fmt: skip
    mover = make_mover(pool, arena)
    worlds.load(mover, mover.prepare(worlds.page_slots(pool, 3), arena, offsets))
    assert mover.launched == [1] * 5


def test_layers_land_one_by_one_where_a_launch_saves_nothing(cuda):
    pool = worlds.make_pool(layers=5)
    arena, offsets = worlds.make_arena(pool, 3)
    mover = CudaMover(pool, pins=False)
    move = mover.prepare(worlds.page_slots(pool, 3), arena, offsets)
    with mover.loading([move], mover.fence()) as moves:
        assert [len(group) for group in mover.load_groups(moves)] == [1] * 5
    mover.close()


def load_and_read(cuda, make_mover, *, mover):
    """A batch loads, and a forward on a stream of its own reads layer after layer."""
    pool = worlds.make_pool(layers=5)
    arena, offsets = worlds.make_arena(pool, 3)
    slots = worlds.page_slots(pool, 3)
    forward = cuda.stream("forward")
    mover = make_mover(pool, arena, type("Mover", (mover,), {"cuda": cuda}), order_after=[forward])
    mover.spill(mover.prepare(slots, arena, offsets))
    want = worlds.gathered(pool, slots)
    worlds.clear(pool)
    loads = LayerLoads(mover)
    loads.queue("a", slots, arena, offsets)
    index = loads.start()
    assert threading.current_thread() is mover.loaded_by
    loads.counter.set_consumer(index)
    with cuda.on(forward):
        for layer in range(5):
            loads.counter.wait_until(layer)
            cuda.read(("layer", layer))
    waits = cuda.waits
    assert loads.finish(index)
    loads.close()
    for have, expected in zip(worlds.gathered(pool, slots), want, strict=True):
        np.testing.assert_array_equal(have, expected)
    return waits


class Reported(Counted):
    """Says which layers its loads write, on which stream."""

    def load_layers(self, layers, move):
        self.loaded_by = threading.current_thread()
        for layer in layers:
            self.cuda.write(("layer", layer))
        super().load_layers(layers, move)


def test_a_forward_reads_each_layer_after_the_group_that_brings_it(cuda, make_mover):
    waits = load_and_read(cuda, make_mover, mover=Reported)
    assert not cuda.races
    assert waits == 1, "the spill's; none of the forward's"


def test_a_forgotten_mark_of_a_group_would_be_seen(cuda, make_mover):
    class Careless(Reported):
        def mark(self):
            return super().mark() if len(self.launched) < 3 else REACHED

    load_and_read(cuda, make_mover, mover=Careless)
    assert {race[1] for race in cuda.races} == {("layer", layer) for layer in range(1, 5)}
