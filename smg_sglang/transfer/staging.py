"""A small pinned buffer that pages pass through while their arena is not page-locked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

RING_BYTES = 64 << 20


class StagingRing:
    """Two halves of pinned memory: the CPU works on one while the device works on the other.

    For one thread and one stream. Addressed like an arena: a uint8 array and byte offsets.
    """

    def __init__(self, nbytes: int = RING_BYTES) -> None:
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.buffer: np.ndarray = pinned.numpy()
        self._half_bytes = nbytes // 2
        self._released: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def chunks(self, count: int, item_bytes: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Cut ``count`` items into chunks that fit a half.

        Gives (first item, end item, int64 byte offset of each in `buffer`); the half is free to
        be overwritten when it is given, and is released when the next chunk is asked for: what
        the device does with it must have been enqueued on the current stream by then.
        """
        per_half = self._half_bytes // item_bytes
        if per_half == 0:
            raise ValueError(f"{item_bytes} bytes do not fit half a ring of {self._half_bytes}")
        for first in range(0, count, per_half):
            end = min(count, first + per_half)
            half, self._turn = self._turn, 1 - self._turn
            released = self._released[half]
            if released is not None:
                released.synchronize()
            start = half * self._half_bytes
            yield first, end, start + np.arange(end - first, dtype=np.int64) * item_bytes
            used = torch.cuda.Event(blocking=True)
            used.record()
            self._released[half] = used
