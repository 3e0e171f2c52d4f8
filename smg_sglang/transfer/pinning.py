"""Page-locking an arena for CUDA, in the background."""

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
        # The pinning thread makes it current, and torch takes no device without its number there.
        self._device = device if device.index is not None else _current(device)
        self._pieces: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="smg-pin", daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Block until no more will be pinned; whether all of the arena is."""
        self._thread.join()
        return self.pinned_bytes == len(self._arena)

    def close(self) -> None:
        """Stop, and unregister what is registered, once the device has done all it was asked for.

        Nobody may enqueue a copy from or to the arena any more.
        """
        self._stop.set()
        self._thread.join()
        self.pinned_bytes = 0
        # Rare (a memory server has gone), so the device may stop for it: what a forward still
        # reads for requests that have ended is waited for by nobody else.
        torch.cuda.synchronize(self._device)
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


def _current(device: torch.device) -> torch.device:
    return torch.device(device.type, torch.cuda.current_device())


class ArenaPins:
    """What is page-locked, by address: once for all movers of a process that are given these.

    The driver refuses to register memory twice. Whoever made them closes them, and says with
    `unpin` when an arena goes; movers only ask for what they copy. Any thread.
    """

    def __init__(self) -> None:
        self._pinned: dict[int, PinnedArena] = {}
        self._lock = threading.Lock()

    def pin(self, arena: np.ndarray, device: torch.device) -> None:
        """Begin to page-lock an arena, where nobody has."""
        with self._lock:
            if arena.ctypes.data not in self._pinned:
                self._pinned[arena.ctypes.data] = PinnedArena(arena, device)

    def unpin(self, arena: np.ndarray) -> None:
        """Undo `pin` for all, and let go of the mapping; nothing where it is not pinned."""
        with self._lock:
            pinned = self._pinned.pop(arena.ctypes.data, None)
        if pinned is not None:
            pinned.close()

    def pinned_bytes(self, arena: np.ndarray) -> int:
        """Bytes from the arena's start on that are page-locked by now."""
        pinned = self._pinned.get(arena.ctypes.data)
        return 0 if pinned is None else pinned.pinned_bytes

    def wait(self, arena: np.ndarray) -> bool:
        """Block until no more of a pinned arena will be locked; whether all of it is."""
        return self._pinned[arena.ctypes.data].wait()

    def close(self) -> None:
        """`unpin` everything."""
        with self._lock:
            pinned, self._pinned = list(self._pinned.values()), {}
        for arena in pinned:
            arena.close()
