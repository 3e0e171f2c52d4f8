"""What is copied by one launch: its bytes, how many launches there are, and whose marks they have.

Without a GPU, on tests/fake_cuda and in Triton's interpreter.
"""

import pytest
import torch

from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.launches import buffer_tables
from tests.transfer import worlds


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
    # Of at most two lengths: a spill, and a load of each layer.
    assert len(mover.launched) <= 2 * (1 + pool.layout.num_layers)


def test_rows_longer_than_a_tile_come_back(make_mover):
    pool = worlds.make_pool(heads=129, dim=64, layers=1, dtype=torch.float32, slots=5, page_size=1)
    arena, offsets = worlds.make_arena(pool, 2)
    slots, back_to = worlds.page_slots(pool, 2), worlds.page_slots(pool, 2, seed=4)
    worlds.round_trip(pool, make_mover(pool, arena), slots, back_to, arena, offsets)


@pytest.mark.parametrize(("v_dim", "lengths"), [(8, 1), (16, 2)])
def test_a_spill_is_one_launch_and_a_load_one_a_layer(make_mover, v_dim, lengths):
    pool = worlds.make_pool(layers=5, dim=8, v_dim=v_dim)
    arena, offsets = worlds.make_arena(pool, 3)
    mover = make_mover(pool, arena)
    move = mover.prepare(worlds.page_slots(pool, 3), arena, offsets)
    mover.spill(move)
    assert mover.launched == [5] * lengths
    mover.launched.clear()
    worlds.load(mover, move)
    assert mover.launched == [1] * 5 * lengths
