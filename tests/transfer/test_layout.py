import pytest
import torch

from smg_sglang.errors import ConfigError
from smg_sglang.transfer.layout import DevicePool
from tests.transfer import worlds


def tensors(*shape, layers=2, dtype=torch.bfloat16):
    return [torch.zeros(shape, dtype=dtype) for _ in range(layers)]


def test_a_page_holds_all_layers_and_parts():
    layout = worlds.make_pool(layers=3, heads=2, dim=8, v_dim=4, page_size=4).layout
    assert [part.row_bytes for part in layout.parts] == [32, 16]
    assert layout.layer_bytes == 4 * 48
    assert layout.page_bytes == 3 * 4 * 48
    assert layout.part_offset(0, 1) == 4 * 32
    assert layout.part_offset(2, 0) == 2 * 4 * 48


def test_smollm2_has_22_5_kib_a_token():
    layout = worlds.make_pool(layers=30, heads=3, dim=64, slots=16, page_size=16).layout
    assert layout.page_bytes == 16 * 22.5 * 1024


def test_the_description_tells_layouts_apart():
    shapes = [
        {},
        {"layers": 4},
        {"heads": 1, "dim": 16},
        {"v_dim": 4},
        {"page_size": 8},
        {"dtype": torch.float16},
        {"kind": "mla"},
    ]
    described = [worlds.make_pool(**shape).layout.describe() for shape in shapes]
    assert len(set(described)) == len(shapes)


def test_rows_are_views_of_the_pool():
    keys, values = tensors(8, 2, 4), tensors(8, 2, 4)
    pool = DevicePool.mha(keys, values, page_size=4)
    pool.rows[1][0][3] = 0xFF
    assert keys[1][3].view(torch.uint8).eq(0xFF).all()
    assert not keys[0].any()


def test_bytes_may_be_named_as_the_dtype_they_mean():
    pool = DevicePool.mla(tensors(8, 1, 4, dtype=torch.uint8), 4, dtype=torch.float8_e4m3fn)
    assert pool.layout.dtype == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("parts", "page_size", "message"),
    [
        ({"k": tensors(4, 2, 4, 8)}, 4, r"\[slots, heads, dim\] only"),
        ({"k": [t.transpose(0, 1) for t in tensors(8, 2, 4)]}, 4, "rows must be contiguous"),
        ({"k": tensors(8, 2, 4), "v": tensors(9, 2, 4)}, 4, "differ in slots"),
        ({"k": tensors(8, 2, 4), "v": tensors(8, 2, 4, dtype=torch.float32)}, 4, "differ in dtype"),
        ({"k": [*tensors(8, 2, 4), *tensors(8, 1, 4)]}, 4, "layers of different shapes"),
        ({"k": tensors(8, 2, 4), "v": tensors(8, 2, 4, layers=3)}, 4, "as many tensors"),
        ({"k": []}, 4, "as many tensors"),
        ({"k": tensors(8, 2, 4, dtype=torch.float64)}, 4, "supported: bfloat16"),
        ({"k": tensors(8, 2, 4)}, 0, "page size 0"),
    ],
)
def test_a_pool_it_cannot_copy_is_refused(parts, page_size, message):
    with pytest.raises(ConfigError, match=message):
        DevicePool(parts, page_size)


def test_a_state_is_a_page_of_its_own_of_all_its_parts():
    conv = torch.zeros(3, 5, 24, 3, dtype=torch.bfloat16)
    temporal = torch.zeros(3, 5, 2, 8, 4)
    pool = DevicePool.states({"conv0": conv, "temporal": temporal, "none": torch.zeros(3, 5, 0)})
    assert (pool.num_slots, pool.layout.page_size, pool.layout.num_layers) == (5, 1, 3)
    assert pool.layout.page_bytes == 3 * (24 * 3 * 2 + 2 * 8 * 4 * 4)
    assert "conv0:bfloat16" in pool.layout.describe()
    assert "temporal:float32" in pool.layout.describe()
    pool.rows[1][1][4] = 255
    assert temporal[1, 4].view(torch.uint8).min() == 255, "rows are views of the pool"
    assert not temporal[1, 3].any()


def test_strided_states_are_refused():
    with pytest.raises(ConfigError, match="strided"):
        DevicePool.states({"conv0": torch.zeros(3, 5, 24, 3).transpose(2, 3)})
