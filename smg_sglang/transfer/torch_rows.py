"""The copy kernel in torch operations: slower than the compiled one, needs nothing."""

from __future__ import annotations

from math import gcd

import numpy as np
import torch

from smg_sglang.transfer.mover import PageMove


def copy_rows(rows: torch.Tensor, move: PageMove, offsets: np.ndarray, *, to_arena: bool) -> None:
    """Copy one part of one layer of all pages.

    Args:
        rows: uint8 [num_slots, row_bytes], the part in the device pool.
        offsets: int64 [n], byte offset of the part of each page in the arena.
    """
    if not move.num_pages:
        return
    row_bytes = rows.shape[1]
    slots = move.slots.view(move.num_pages, -1)
    # Whole pages at a time where their slots are one aligned run, else token by token.
    page_size = slots.shape[1]
    first = slots[:, :1]
    runs = bool((slots - first == torch.arange(page_size)).all())
    per_copy = page_size * row_bytes if runs else row_bytes
    per_page = 1 if runs else page_size
    # The largest unit in which every address on both sides can be counted.
    starts = (first if runs else slots).reshape(-1) * row_bytes
    unit = gcd(per_copy, int(np.gcd.reduce(offsets)), int(np.gcd.reduce(starts.numpy())))
    host = torch.from_numpy(offsets)[:, None] + torch.arange(per_page) * per_copy
    device_units = _unit_index(starts, per_copy, unit)
    host_units = _unit_index(host.reshape(-1), per_copy, unit)
    device = _units(rows.view(-1), unit)
    arena = _units(torch.from_numpy(move.arena), unit)
    if to_arena:
        arena.index_copy_(0, host_units, device.index_select(0, device_units))
    else:
        device.index_copy_(0, device_units, arena.index_select(0, host_units))


def _unit_index(starts: torch.Tensor, per_copy: int, unit: int) -> torch.Tensor:
    """int64: every unit of copies of ``per_copy`` bytes that start at byte ``starts``."""
    steps = torch.arange(per_copy // unit)
    return ((starts // unit)[:, None] + steps).reshape(-1)


def _units(flat: torch.Tensor, unit: int) -> torch.Tensor:
    """The bytes as rows of ``unit`` bytes, in the widest type that divides them."""
    whole = flat[: flat.numel() // unit * unit].view(-1, unit)
    for dtype in (torch.int64, torch.int32, torch.int16):
        size = dtype.itemsize
        if unit % size == flat.data_ptr() % size == flat.storage_offset() % size == 0:
            return whole.view(dtype)
    return whole
