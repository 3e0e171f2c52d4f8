"""Memory between host pages and storage."""

import mmap

import numpy as np

from smg_sglang.storage.sealed import SEAL_BYTES

_STAGING_BYTES = 16 << 20
_MOST_PAGES = 64


class Staging:
    """Sealed pages of one call at a time; grows to what one call needs, and stays."""

    def __init__(self, staging_bytes: int = _STAGING_BYTES) -> None:
        self._bytes = staging_bytes
        self._buffer = np.empty(0, np.uint8)

    def batch(self, page_bytes: int) -> int:
        """How many pages a call should have: one at least."""
        return min(_MOST_PAGES, max(1, self._bytes // (page_bytes + SEAL_BYTES)))

    def rows(self, pages: int, page_bytes: int) -> np.ndarray:
        """uint8[pages, page_bytes + SEAL_BYTES], the same memory each time."""
        size = page_bytes + SEAL_BYTES
        if self._buffer.size < pages * size:
            whole = -(-pages * size // mmap.PAGESIZE) * mmap.PAGESIZE
            self._buffer = np.frombuffer(mmap.mmap(-1, whole), np.uint8)
        return self._buffer[: pages * size].reshape(pages, size)
