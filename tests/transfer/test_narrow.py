"""Pages of fp8 behind pools of more: each number as near as e4m3 has one, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.errors import ConfigError
from smg_sglang.transfer import fp8_rows, narrow
from smg_sglang.transfer.compiling import fp8_kernels
from smg_sglang.transfer.fp8_rows import FP8, narrow_rows, widen_rows
from smg_sglang.transfer.joint import JointMover
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.movers import make_mover
from tests.transfer import worlds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["compiled", "torch"])
def kernel(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(fp8_rows, "_compiled", lambda rows: None)
        elif not fp8_kernels.wait():
            pytest.skip("no numba here")
        yield request.param


def rounded(rows):
    """The rows as host memory has them."""
    slots = torch.arange(len(rows))
    values = torch.empty(rows.shape, dtype=torch.uint8)
    scales = torch.empty(*rows.shape[:2], 1, dtype=torch.uint8)
    narrow_rows(rows, slots, values, scales)
    back = torch.full_like(rows, 7)
    widen_rows(values, scales, back, slots)
    return back, values, scales


def naive(rows):
    """By the definition, in float64: the power of two that brings the largest number nearest to
    448 from below, then e4m3 to the nearest."""
    wide = rows.double()
    largest = wide.abs().amax(-1, keepdim=True)
    power = torch.full_like(largest, 2.0**-100)
    while (too_small := largest / power > 448).any():
        power = torch.where(too_small, power * 2, power)
    return ((wide / power).to(FP8).double() * power).to(rows.dtype)


def random_rows(seed, dtype, spread):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 3, 24, generator=generator)
    rows *= 2.0 ** (torch.randn(9, 3, 1, generator=generator) * spread).round()
    rows[0, 0], rows[1, 0, ::2], rows[2, 0, 1:] = 0, 0, 0
    rows[3] *= torch.logspace(-9, 0, 24)
    return rows.clamp(-3e38, 3e38).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1 << 20), spread=st.sampled_from([0, 2, 12, 40]))
def test_numbers_are_as_near_as_e4m3_has_them(kernel, dtype, seed, spread):
    if dtype == torch.float16:
        spread = min(spread, 2)
    rows = random_rows(seed, dtype, spread)
    back, _, _ = rounded(rows)
    assert torch.equal(back, naive(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_rounded_once_stays(kernel, dtype):
    once, _, _ = rounded(random_rows(0, dtype, 2))
    twice, _, _ = rounded(once)
    assert torch.equal(once, twice)


def test_both_ways_of_computing_give_the_same_bytes(monkeypatch):
    if not fp8_kernels.wait():
        pytest.skip("no numba here")
    rows = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    rows = rows[torch.isfinite(rows)].view(-1, 1, 2)
    compiled = rounded(rows)
    monkeypatch.setattr(fp8_rows, "_compiled", lambda rows: None)
    for have, want in zip(compiled, rounded(rows), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_hidden(kernel, dtype, wrong):
    rows = random_rows(0, dtype, 0)
    rows[4, 1, 5] = wrong
    back, _, _ = rounded(rows)
    assert not torch.isfinite(back[4, 1]).any()
    back[4, 1] = 0
    assert torch.isfinite(back).all()


def float_pool(kind="mha", *, dtype=torch.bfloat16, seed=0, **shape):
    """A pool of ordinary numbers."""
    pool = worlds.make_pool(kind, dtype=dtype, **shape)
    generator = torch.Generator().manual_seed(seed)
    for layer in pool.rows:
        for rows in layer:
            rows.view(dtype).copy_(torch.randn(rows.view(dtype).shape, generator=generator))
    return pool


def numbers(pool, slots, dtype):
    return [
        rows.view(dtype)[slots].view(len(slots), part.heads, part.dim)
        for layer in pool.rows
        for rows, part in zip(layer, pool.layout.parts, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("staged_pages", [1, 2, 100])
def test_pages_come_back_rounded(  # noqa: PLR0917
    kernel, monkeypatch, dtype, kind, page_size, staged_pages
):
    """In pieces, too, where the staging rows are few."""
    pool = float_pool(kind, dtype=dtype, slots=12 * page_size, page_size=page_size, dim=24)
    layout = narrow.host_layout(pool.layout, narrow=True)
    monkeypatch.setattr(narrow, "STAGED_BYTES", staged_pages * layout.layer_bytes)
    mover = make_mover(pool, narrow=True)
    slots = worlds.page_slots(pool, 5, seed=3, scattered=True)
    back_to = worlds.page_slots(pool, 5, seed=4)
    arena = np.zeros(7 * layout.page_bytes + 3, np.uint8)
    offsets = 3 + np.array([6, 0, 2, 5, 3]) * layout.page_bytes
    want = [naive(rows) for rows in numbers(pool, slots, dtype)]
    mover.spill(mover.prepare(slots, arena, offsets))
    worlds.clear(pool)
    worlds.load(mover, mover.prepare(back_to, arena, offsets))
    for have, rows in zip(numbers(pool, back_to, dtype), want, strict=True):
        assert torch.equal(have, rows)
    others = np.setdiff1d(np.arange(pool.num_slots), back_to.numpy())
    assert not any(rows.any() for rows in worlds.gathered(pool, torch.from_numpy(others)))
    mover.close()


def test_pages_have_half_the_bytes_and_one_for_each_scale():
    pool = float_pool(heads=8, dim=128, page_size=16)
    layout = make_mover(pool, narrow=True).layout
    assert pool.layout.page_bytes == 3 * 2 * 16 * 8 * 128 * 2
    assert layout.page_bytes == 3 * 2 * 16 * 8 * (128 + 1)
    assert layout.describe() != pool.layout.describe()


def test_a_narrow_pool_is_refused():
    pool = worlds.make_pool(dtype=torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match="stored as float8_e4m3fn; leave it out"):
        make_mover(pool, narrow=True)


def test_slots_and_pages_outside_their_memory_are_refused():
    pool = float_pool(slots=64, page_size=4)
    mover = make_mover(pool, narrow=True)
    arena = np.zeros(2 * mover.layout.page_bytes, np.uint8)
    with pytest.raises(ValueError, match="not in a pool of 64"):
        mover.prepare(torch.arange(61, 65), arena, np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="do not fit an arena"):
        mover.prepare(torch.arange(4), arena, np.array([mover.layout.page_bytes + 1]))


def test_windows_beside_full_layers_come_back_rounded_too():
    full, window = float_pool(layers=2), float_pool(layers=1, heads=1, seed=1)
    movers = [make_mover(pool, narrow=True) for pool in (full, window)]
    joint = JointMover(movers, [[0, 2], [1]])
    slots, want, moves = worlds.page_slots(full, 2), [], []
    for number, (pool, mover) in enumerate(zip((full, window), movers, strict=True)):
        arena = np.zeros(2 * mover.layout.page_bytes, np.uint8)
        moves.append(joint.prepare_in(number, slots, arena, np.arange(2) * mover.layout.page_bytes))
        want.append([naive(rows) for rows in numbers(pool, slots, torch.bfloat16)])
        joint.spill(moves[-1])
        worlds.clear(pool)
    with joint.loading(moves, joint.fence()) as begun:
        for layers in joint.load_groups(begun):
            for move in begun:
                joint.load_layers(layers, move)
    for pool, rows in zip((full, window), want, strict=True):
        for have, each in zip(numbers(pool, slots, torch.bfloat16), rows, strict=True):
            assert torch.equal(have, each)
    joint.close()


def test_a_pool_of_floats_as_bytes_is_read_as_what_it_holds():
    """SGLang may store a dtype as another of the same size."""
    rows = torch.randn(8, 2, 4).bfloat16()
    pool = DevicePool.mla([rows.view(torch.float16)], 4, torch.bfloat16)
    mover = make_mover(pool, narrow=True)
    arena = np.zeros(mover.layout.page_bytes, np.uint8)
    want = naive(rows[:4])
    mover.spill(mover.prepare(torch.arange(4), arena, np.zeros(1, np.int64)))
    worlds.load(mover, mover.prepare(torch.arange(4, 8), arena, np.zeros(1, np.int64)))
    assert torch.equal(rows[4:], want)
