"""Which way of copying a worker on CUDA takes: from figures, and how it comes by them (without a
GPU, on streams of tests/fake_cuda whose time the test lets pass)."""

import json
import logging

import numpy as np
import pytest

from smg_sglang.transfer import copy_measure
from smg_sglang.transfer.copy_choice import VARIABLE, CopyChoice, CopyMethods, CopyRates, ordered
from smg_sglang.transfer.copy_measure import choose_copies, measure, num_pages
from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.layout import PageLayout, Part
from tests.transfer import worlds


@pytest.mark.parametrize(
    ("kernel", "copies", "load", "spill"),
    [
        (20, 5, "kernel", "kernel"),
        (20, 17.9, "kernel", "kernel"),
        (20, 18, "kernel", "copies"),
        (5, 20, "copies", "copies"),
    ],
)
def test_the_faster_one_but_spills_by_copy_engines_where_they_are_nearly_as_fast(
    kernel, copies, load, spill
):
    rates = CopyRates(kernel, copies)
    assert CopyChoice.measured(rates, rates).methods == CopyMethods(load, spill)


def test_a_rate_that_is_no_number_is_never_chosen_over_the_default():
    assert CopyRates(20, float("nan")).better() == "kernel"
    assert CopyRates(float("nan"), 20).better() == "kernel"


def test_each_direction_has_a_method_of_its_own():
    choice = CopyChoice.measured(load=CopyRates(20, 5), spill=CopyRates(10, 25))
    assert choice.methods == CopyMethods(load="kernel", spill="copies")
    assert str(choice) == (
        "loads by kernel (kernel 20.0, copies 5.0 GB/s), "
        "spills by copies (kernel 10.0, copies 25.0 GB/s)"
    )


def test_what_is_shown_is_plain_json():
    choice = CopyChoice.measured(load=CopyRates(20, 5), spill=CopyRates(10, 25))
    assert json.loads(json.dumps(choice.state())) == {
        "methods": {"load": "kernel", "spill": "copies"},
        "why": "measured",
        "load_gbps": {"kernel": 20, "copies": 5},
        "spill_gbps": {"kernel": 10, "copies": 25},
    }


def test_the_environment_names_a_method_for_both_directions():
    assert ordered({}) is None
    assert ordered({VARIABLE: "copies"}).methods == CopyMethods("copies", "copies")
    with pytest.raises(ValueError, match="must be kernel or copies, not 'fast'"):
        ordered({VARIABLE: "fast"})


@pytest.mark.parametrize(
    ("page_size", "row_bytes", "pages"),
    [(16, 2048, 128), (16, 256, 256), (1, 1152, 256), (1024, 16384, 1)],
)
def test_a_few_mib_are_copied_or_fewer_where_pages_are_small(page_size, row_bytes, pages):
    parts = tuple(Part(name, 1, row_bytes, 1) for name in "kv")
    assert num_pages(PageLayout(parts, 32, page_size, "uint8")) == pages


@pytest.fixture(autouse=True)
def no_order(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def pool():
    return worlds.make_pool(page_size=4)


@pytest.fixture
def let_copies_take(cuda, monkeypatch):
    """Give each launch, and the copies of each part of a layer, their milliseconds: (to the device,
    to the arena)."""

    def let(*, kernel, copies):
        monkeypatch.setattr(CudaMover, "_launch", slowed(CudaMover._launch, kernel))
        monkeypatch.setattr(CudaMover, "_copy_runs", slowed(CudaMover._copy_runs, copies))

    def slowed(copy, ms):
        def slow(self, *args, to_arena):
            cuda.ms += ms[to_arena]
            copy(self, *args, to_arena=to_arena)

        return slow

    return let


def test_figures_are_bytes_by_the_devices_time(cuda, pool, let_copies_take):
    let_copies_take(kernel=(2, 4), copies=(8, 1))
    load, spill = measure(pool)
    megabytes, parts = num_pages(pool.layout) * pool.layout.layer_bytes / 1e6, 2
    assert (load.kernel, load.copies) == pytest.approx((megabytes / 2, megabytes / 8 / parts))
    assert (spill.kernel, spill.copies) == pytest.approx((megabytes / 4, megabytes / 1 / parts))


def test_the_faster_one_is_chosen_and_said_in_one_line(cuda, pool, let_copies_take, caplog):
    let_copies_take(kernel=(2, 4), copies=(8, 1))
    caplog.set_level(logging.INFO)
    choice = choose_copies(pool)
    assert (choice.methods, choice.why) == (CopyMethods("kernel", "copies"), "measured")
    (line,) = caplog.messages
    assert str(choice) in line


def test_measuring_touches_no_slot_of_the_pool_and_leaves_nothing_locked(
    cuda, pool, let_copies_take
):
    let_copies_take(kernel=(1, 1), copies=(1, 1))
    before = worlds.gathered(pool, slice(None))
    measure(pool)
    for have, want in zip(worlds.gathered(pool, slice(None)), before, strict=True):
        np.testing.assert_array_equal(have, want)
    assert not cuda.driver.registered


def test_no_round_begins_when_the_time_is_up(cuda, pool, let_copies_take, monkeypatch):
    let_copies_take(kernel=(1, 1), copies=(1, 1))
    monkeypatch.setattr(copy_measure, "BUDGET_S", -1)
    cuda.ms = 0
    measure(pool)
    compiled, launch, copies_of_parts, directions, rounds = 2, 1, 2, 2, 2
    assert cuda.ms == compiled + (launch + copies_of_parts) * directions * rounds


def test_where_the_driver_locks_no_memory_the_default_stays(cuda, pool, caplog):
    cuda.driver.limit = 0
    choice = choose_copies(pool)
    assert choice.methods == CopyMethods()
    assert choice.why == "not measured: RuntimeError: the driver does not page-lock memory"
    assert choice.why in caplog.messages[-1]


def test_an_error_on_the_way_is_one_sentence_and_the_default(cuda, pool, monkeypatch, caplog):
    def broken(*_args, **_more):
        raise RuntimeError("CUDA error: out of memory\nfor debugging consider ...")

    monkeypatch.setattr(CudaMover, "_copy_runs", broken)
    choice = choose_copies(pool)
    assert choice.methods == CopyMethods()
    assert choice.load_gbps is None
    (line,) = caplog.messages
    assert "out of memory" in line and "debugging" not in line
    assert not cuda.driver.registered


def test_an_order_is_followed_without_measuring(cuda, pool, monkeypatch, let_copies_take):
    let_copies_take(kernel=(1, 1), copies=(1, 1))
    monkeypatch.setenv(VARIABLE, "copies")
    choice = choose_copies(pool)
    assert (choice.methods, choice.why) == (CopyMethods("copies", "copies"), f"{VARIABLE}=copies")
    assert cuda.ms == 0


def test_an_order_that_names_no_method_is_no_reason_not_to_start(cuda, pool, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    choice = choose_copies(pool)
    assert choice.methods == CopyMethods()
    assert VARIABLE in choice.why


def test_a_mover_may_load_by_one_method_and_spill_by_the_other(cuda, pool, let_copies_take):
    let_copies_take(kernel=(1, 10), copies=(100, 1000))
    arena, offsets = worlds.make_arena(pool, 3)
    slots = worlds.page_slots(pool, 3)
    mover = CudaMover(pool, methods=CopyMethods(load="copies", spill="kernel"), programs=2)
    mover.pin(arena)
    assert mover.wait_pinned(arena)
    cuda.ms = 0
    move = mover.prepare(slots, arena, offsets)
    mover.spill(move)
    assert cuda.ms == 10
    before = worlds.gathered(pool, slots)
    worlds.clear(pool)
    worlds.load(mover, move)
    assert cuda.ms == 10 + 100 * 6
    for have, want in zip(worlds.gathered(pool, slots), before, strict=True):
        np.testing.assert_array_equal(have, want)
    assert not mover.enqueues([move])
    mover.close()
