"""How fast a worker on CUDA copies, and how it comes by the figures (without a GPU, on streams of
tests/fake_cuda whose time the test lets pass)."""

import json
import logging

import numpy as np
import pytest

from smg_sglang.transfer import copy_rates
from smg_sglang.transfer.copy_rates import SMALL_SHARE, CopyRates, measure_copies, num_pages
from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.layout import PageLayout, Part
from tests.transfer import worlds


def test_what_is_shown_is_plain_json():
    assert json.loads(json.dumps(CopyRates(20.0, 10.0).state())) == {
        "load_gbps": 20,
        "spill_gbps": 10,
        "why_not": None,
    }


@pytest.mark.parametrize(
    ("page_size", "row_bytes", "pages"),
    [(16, 2048, 1024), (16, 256, 8192), (1, 1152, 29120), (1024, 1 << 20, 8)],
)
def test_some_mib_are_copied_and_an_eighth_of_them(page_size, row_bytes, pages):
    parts = tuple(Part(name, 1, row_bytes, 1) for name in "kv")
    assert num_pages(PageLayout(parts, 32, page_size, "uint8")) == pages


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(copy_rates, "SCRATCH_BYTES", 1 << 16)
    return worlds.make_pool(page_size=4)


@pytest.fixture
def let_launches_take(cuda, monkeypatch):
    """Give each launch its milliseconds, and those of each page: (to the device, to the arena)."""
    launch = CudaMover._launch

    def let(each, a_page):
        def slow(self, table, layers, slots, pages, *args, to_arena):
            cuda.ms += each[to_arena] + a_page[to_arena] * len(pages)
            launch(self, table, layers, slots, pages, *args, to_arena=to_arena)

        monkeypatch.setattr(CudaMover, "_launch", slow)

    return let


def test_rates_are_those_of_large_moves_whatever_a_launch_costs(cuda, pool, let_launches_take):
    let_launches_take(each=(50, 100), a_page=(2, 4))
    rates = measure_copies(pool)
    gigabytes = pool.layout.layer_bytes / 1e9
    assert rates.load_gbps == pytest.approx(gigabytes / 2e-3)
    assert rates.spill_gbps == pytest.approx(gigabytes / 4e-3)
    assert rates.why_not is None


def test_the_log_says_them_in_one_line(cuda, pool, let_launches_take, caplog):
    let_launches_take(each=(0, 0), a_page=(2, 4))
    caplog.set_level(logging.INFO)
    rates = measure_copies(pool)
    (line,) = caplog.messages
    assert str(rates) in line


def test_measuring_touches_no_slot_of_the_pool_and_leaves_nothing_locked(
    cuda, pool, let_launches_take
):
    let_launches_take(each=(0, 0), a_page=(1, 1))
    before = worlds.gathered(pool, slice(None))
    measure_copies(pool)
    for have, want in zip(worlds.gathered(pool, slice(None)), before, strict=True):
        np.testing.assert_array_equal(have, want)
    assert not cuda.driver.registered


def test_no_round_begins_when_the_time_is_up(cuda, pool, let_launches_take, monkeypatch):
    let_launches_take(each=(0, 0), a_page=(1, 1))
    monkeypatch.setattr(copy_rates, "BUDGET_S", -1)
    cuda.ms = 0
    measure_copies(pool)
    pages, directions, rounds = num_pages(pool.layout), 2, 2
    assert cuda.ms == (pages + pages // SMALL_SHARE) * directions * rounds


def test_where_the_driver_locks_no_memory_nothing_is_measured(cuda, pool, caplog):
    cuda.driver.limit = 0
    rates = measure_copies(pool)
    assert rates == CopyRates(
        why_not="not measured: RuntimeError: the driver does not page-lock memory"
    )
    assert rates.why_not in caplog.messages[-1]


def test_an_error_on_the_way_is_one_sentence(cuda, pool, monkeypatch, caplog):
    def broken(*_args, **_more):
        raise RuntimeError("CUDA error: out of memory\nfor debugging consider ...")

    monkeypatch.setattr(CudaMover, "_launch", broken)
    assert measure_copies(pool).load_gbps is None
    (line,) = caplog.messages
    assert "out of memory" in line and "debugging" not in line
    assert not cuda.driver.registered
