"""What one launch of the copy kernel copies: layers, buffers (a part of a layer each), pages."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch

from smg_sglang.transfer.layout import DevicePool

LEAST_BYTES = 4 << 20
"""What a launch of a load moves at least, of as many layers as that takes. An estimate: at 50 GB/s
they take 80 us, and a launch with its event 20 to 50 us of CPU time, so that the device does not
wait for the CPU. With more the forward would wait longer for the first layer of a group."""
WIDEST = 16
"""Bytes of the widest access of a thread."""


def layer_groups(num_layers: int, layer_bytes: int, least_bytes: int = LEAST_BYTES) -> list[range]:
    """Cut the layers of a load into launches, in order.

    The first layer stays alone, so that the forward can begin; each launch after it, but the last,
    has as few layers as move ``least_bytes``. ``layer_bytes``: of all pages loaded.
    """
    size = max(1, -(-least_bytes // max(1, layer_bytes)))
    firsts = [0, *range(1, num_layers, size)]
    return [range(a, b) for a, b in zip(firsts, [*firsts[1:], num_layers], strict=True)]


@dataclass(frozen=True, eq=False)
class BufferTable:
    """The buffers of a pool whose rows are equally long: what one launch can copy.

    Attributes:
        row_bytes: of each.
        unit: bytes, 16 at most, that divide every address in the buffers and every place in a page.
    """

    row_bytes: int
    unit: int
    _rows: torch.Tensor
    """int64 [layers * parts, 2] on the device, layer after layer: the address of slot 0, and the
    byte in a page where the rows begin."""
    _parts: int

    def of(self, layers: range) -> torch.Tensor:
        """The rows of some following layers, as `triton_rows.move_rows` takes them."""
        return self._rows[layers.start * self._parts : layers.stop * self._parts]


def buffer_tables(pool: DevicePool) -> list[BufferTable]:
    """One for each length of rows: K and V share theirs in most models, a latent is alone.

    Tables hold addresses, not tensors: the pool has to outlive what is launched with them.
    """
    parts = pool.layout.parts
    lengths = dict.fromkeys(part.row_bytes for part in parts)
    return [
        _table(pool, row_bytes, [i for i, part in enumerate(parts) if part.row_bytes == row_bytes])
        for row_bytes in lengths
    ]


def _table(pool: DevicePool, row_bytes: int, parts: list[int]) -> BufferTable:
    rows = [
        (pool.rows[layer][part].data_ptr(), pool.layout.part_offset(layer, part))
        for layer in range(pool.layout.num_layers)
        for part in parts
    ]
    unit = gcd(WIDEST, row_bytes, *(number for row in rows for number in row))
    table = torch.tensor(rows, dtype=torch.int64, device=pool.device)
    return BufferTable(row_bytes, unit, table, len(parts))


@dataclass(frozen=True, eq=False)
class LockedPages:
    """Where pages are in page-locked memory: an arena's, or for the time being a ring's.

    Attributes:
        addresses: int64 [n] on the device, of each page; may lie outside of the memory where that
            holds one layer of the pages only.
        unit: bytes that divide every address.
    """

    addresses: torch.Tensor
    unit: int

    @classmethod
    def at(cls, host: np.ndarray, starts: np.ndarray, device: torch.device) -> LockedPages:
        """Pages that begin at bytes ``starts`` of ``host``, for kernels on the current stream."""
        addresses = host.ctypes.data + starts
        return cls(_upload(addresses, device), int(np.gcd.reduce(addresses)))


def _upload(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """To the device without the CPU waiting (a pageable source would make it wait)."""
    return torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)
