"""The rates that a worker measures at its start, on a real device. Skipped without one."""

import time

import numpy as np
import pytest

from smg_sglang.transfer.copy_rates import BUDGET_S, measure_copies
from tests.transfer import worlds

pytestmark = pytest.mark.gpu

SHAPES = [
    {"heads": 8, "dim": 128, "page_size": 16},
    {"heads": 1, "dim": 128, "page_size": 16},
    {"heads": 8, "dim": 128, "page_size": 128},
    {"heads": 3, "dim": 64, "page_size": 1},
    {"kind": "mla", "dim": 576, "page_size": 64},
]
IDS = ["8B", "8B tp8", "page128", "page1", "mla"]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_rates_are_measured_soon_and_touch_no_kv(shape):
    pool = worlds.make_pool(**shape, slots=16 * shape["page_size"], device="cuda")
    measure_copies(pool)  # the first compiles the kernels
    before = worlds.gathered(pool, slice(None))
    began = time.perf_counter()
    rates = measure_copies(pool)
    seconds = time.perf_counter() - began
    print(f"\n{rates}: {1e3 * seconds:.0f} ms")
    assert rates.why_not is None
    assert rates.load_gbps > 0 and rates.spill_gbps > 0
    assert seconds < 10 * BUDGET_S, "a start is held up"
    for have, want in zip(worlds.gathered(pool, slice(None)), before, strict=True):
        np.testing.assert_array_equal(have, want)
