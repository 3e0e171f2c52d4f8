"""Small pools and arenas, and a naive twin that copies with nested loops."""

from __future__ import annotations

import numpy as np
import torch

from smg_sglang.transfer.layout import DevicePool


def make_pool(kind="mha", *, layers=3, heads=2, dim=8, v_dim=None, slots=64, page_size=4,
              dtype=torch.bfloat16, device="cpu", seed=0):  # fmt: skip
    """A pool full of random bytes."""
    rng = np.random.default_rng(seed)

    def tensor(heads, dim):
        itemsize = torch.empty(0, dtype=dtype).element_size()
        raw = rng.integers(0, 256, (slots, heads, dim * itemsize), dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype).to(device)

    if kind == "states":
        return make_states(layers=layers, slots=slots, device=device, seed=seed)
    if kind == "mla":
        return DevicePool.mla([tensor(1, dim) for _ in range(layers)], page_size)
    keys = [tensor(heads, dim) for _ in range(layers)]
    values = [tensor(heads, v_dim or dim) for _ in range(layers)]
    return DevicePool.mha(keys, values, page_size)


def make_states(*, layers=2, slots=8, temporal=(2, 48, 64), device="cpu", seed=0):
    """States as SGLang's MambaPool has them: a convolution in bfloat16, an SSM in float32, and a
    part of no bytes."""
    torch.manual_seed(seed)
    conv = torch.randn(layers, slots, 24, 3).to(torch.bfloat16).to(device)
    ssm = torch.randn(layers, slots, *temporal).to(device)
    empty = torch.zeros(layers, slots, 0, 4)
    return DevicePool.states({"conv0": conv, "temporal": ssm, "none": empty})


def make_arena(pool, pages, *, gap=0, start=0, seed=1):
    """(arena bytes, byte offset of each page): pages shuffled, ``gap`` bytes between them."""
    stride = pool.layout.page_bytes + gap
    offsets = start + np.random.default_rng(seed).permutation(pages).astype(np.int64) * stride
    return np.full(start + pages * stride, 0xEE, dtype=np.uint8), offsets


def page_slots(pool, pages, *, seed=2, scattered=False):
    """Slots of ``pages`` random aligned pages, or of random single tokens."""
    size = pool.layout.page_size
    rng = np.random.default_rng(seed)
    if scattered:
        return torch.from_numpy(rng.permutation(pool.num_slots)[: pages * size].astype(np.int64))
    numbers = rng.permutation(pool.num_slots // size)[:pages].astype(np.int64)
    return torch.from_numpy((numbers[:, None] * size + np.arange(size)).reshape(-1))


def expected_pages(pool, slots):
    """uint8 [n, page_bytes]: the pages as the layout's definition says, by nested loops."""
    layout = pool.layout
    pages = []
    for page in slots.cpu().view(-1, layout.page_size):
        chunks = [
            pool.rows[layer][part][slot].cpu().numpy()
            for layer in range(layout.num_layers)
            for part in range(len(layout.parts))
            for slot in page.tolist()
        ]
        pages.append(np.concatenate(chunks))
    return np.stack(pages)


def pages_in(pool, arena, offsets):
    """uint8 [n, page_bytes] as they lie in the arena."""
    return np.stack([arena[o : o + pool.layout.page_bytes] for o in offsets.tolist()])


def clear(pool):
    for layer in pool.rows:
        for rows in layer:
            rows.fill_(0)


def gathered(pool, slots):
    """All bytes of the slots, one array per layer and part."""
    return [rows[slots].cpu().numpy().copy() for layer in pool.rows for rows in layer]


def round_trip(pool, mover, slots, back_to, arena, offsets):  # noqa: PLR0917
    """Spill ``slots``, compare with the twin, load into ``back_to``, compare with before."""
    before = gathered(pool, slots)
    untouched = arena.copy()
    mover.spill(mover.prepare(slots, arena, offsets))
    pages = pages_in(pool, arena, offsets)
    np.testing.assert_array_equal(pages, expected_pages(pool, slots))
    for offset in offsets.tolist():
        untouched[offset : offset + pool.layout.page_bytes] = 0
        arena[offset : offset + pool.layout.page_bytes] = 0
    np.testing.assert_array_equal(arena, untouched)
    for offset, page in zip(offsets.tolist(), pages, strict=True):
        arena[offset : offset + pool.layout.page_bytes] = page
    clear(pool)
    load(mover, mover.prepare(back_to, arena, offsets))
    for have, want in zip(gathered(pool, back_to), before, strict=True):
        np.testing.assert_array_equal(have, want)
    # Nothing but the target slots was written.
    others = np.setdiff1d(np.arange(pool.num_slots), back_to.cpu().numpy())
    assert not any(rows.any() for rows in gathered(pool, torch.from_numpy(others)))


def load(mover, move):
    """All layers, as `LayerLoads` does it."""
    with mover.loading([move], mover.fence()) as moves:
        for layers in mover.load_groups(moves):
            mover.load_layers(layers, moves[0])
        mover.mark().synchronize()


def random_world(seed, device="cpu"):
    """(pool, slots, slots to load into, arena, offsets) of any shape, at any alignment."""
    rng = np.random.default_rng(seed)
    page_size = int(rng.choice([1, 2, 3, 16, 64, 128]))
    pages = int(rng.integers(1, 3 + 24 // page_size))
    dims = rng.choice([[8, 8], [8, 24], [16, 16], [64, 64], [5, 5], [5, 3], [1, 9], [72, 32]])
    pool = make_pool(
        rng.choice(["mha", "mla"]), heads=int(rng.integers(1, 4)), dim=int(dims[0]),
        v_dim=int(dims[1]), layers=int(rng.integers(1, 5)), page_size=page_size,
        slots=(2 * pages + 1) * page_size, device=device, seed=seed,
        dtype=[torch.uint8, torch.bfloat16, torch.float32][rng.integers(3)],
    )  # fmt: skip
    gap, start = (int(rng.choice([0, 0, 16, 7, 2])) for _ in range(2))
    arena, offsets = make_arena(pool, pages, gap=gap, start=start, seed=seed)
    slots, back_to = (
        page_slots(pool, pages, seed=seed + again, scattered=bool(rng.integers(2))).to(device)
        for again in range(2)
    )
    return pool, slots, back_to, arena, offsets
