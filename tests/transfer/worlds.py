"""Small pools and arenas, and a naive twin that copies with nested loops."""

from __future__ import annotations

import numpy as np
import torch

from smg_sglang.transfer import DevicePool


def make_pool(kind="mha", *, layers=3, heads=2, dim=8, v_dim=None, slots=64, page_size=4,
              dtype=torch.bfloat16, device="cpu", seed=0):  # fmt: skip
    """A pool full of random bytes."""
    rng = np.random.default_rng(seed)

    def tensor(heads, dim):
        itemsize = torch.empty(0, dtype=dtype).element_size()
        raw = rng.integers(0, 256, (slots, heads, dim * itemsize), dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype).to(device)

    if kind == "mla":
        return DevicePool.mla([tensor(1, dim) for _ in range(layers)], page_size)
    keys = [tensor(heads, dim) for _ in range(layers)]
    values = [tensor(heads, v_dim or dim) for _ in range(layers)]
    return DevicePool.mha(keys, values, page_size)


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
