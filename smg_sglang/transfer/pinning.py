"""Page-locking an arena for CUDA, in the background. Has not run on a GPU yet."""

from __future__ import annotations

import logging
import threading

import numpy as np
import torch

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
"""Registered at once. Small: the driver holds other CUDA calls up meanwhile."""
_PORTABLE_AND_MAPPED = 3


class PinnedArena:
    """An arena that becomes page-locked from its start on, piece by piece.

    A server serves before 100 GB are pinned; pages above `pinned_bytes` are copied through a
    pinned staging ring until then, and for good when the driver refuses (e.g. RLIMIT_MEMLOCK).
    Holds the mapping: memory must not be unmapped while it is registered.
    """

    def __init__(self, arena: np.ndarray, device: torch.device) -> None:
        self.pinned_bytes = 0
        self._arena = arena
        self._device = device
        self._pieces: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="smg-pin", daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Block until no more will be pinned; whether all of the arena is."""
        self._thread.join()
        return self.pinned_bytes == len(self._arena)

    def close(self) -> None:
        """Stop, and unregister what is registered. No copy from or to the arena may run."""
        self._stop.set()
        self._thread.join()
        self.pinned_bytes = 0
        while self._pieces:
            torch.cuda.cudart().cudaHostUnregister(self._pieces.pop())

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while self.pinned_bytes < len(self._arena) and not self._stop.is_set():
            piece = self._arena[self.pinned_bytes : self.pinned_bytes + PIECE_BYTES]
            address = piece.ctypes.data
            # Releases the GIL.
            error = torch.cuda.cudart().cudaHostRegister(address, len(piece), _PORTABLE_AND_MAPPED)
            if int(error) != 0:
                logger.warning(
                    "the driver page-locks %.1f of %.1f GB only (CUDA error %d); the rest is "
                    "copied through a staging buffer. `ulimit -l unlimited` may help",
                    self.pinned_bytes / 1e9,
                    len(self._arena) / 1e9,
                    int(error),
                )
                return
            self._pieces.append(address)
            self.pinned_bytes += len(piece)
