"""Whether the box has memory left for more of the arena: a full box kills the largest process."""

import logging
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from smg_sglang.box import BoxMemory, box_memory

log = logging.getLogger(__name__)

_MARGIN_BYTES = 512 << 20
_READING_LASTS_S = 0.5


class _Reading(NamedTuple):
    taken_at: float
    box: BoxMemory
    resident: int


class Growth:
    """Watches the box for one arena. Any thread may call; a reading serves half a second.

    What was promised but is not written yet is in nobody's figures: so promises are counted
    against what the arena's file held when the box was looked at.
    """

    def __init__(
        self,
        fd: int,
        read: Callable[[], BoxMemory] = box_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fd` is the arena's, and the caller's."""
        self._fd = fd
        self._read = read
        self._clock = clock
        self._reading: _Reading | None = None
        self._short = False

    def may_grow(self, end_bytes: int) -> bool:
        """Whether the arena may be used up to `end_bytes`; memory that it holds already may.

        Logs once per shortage.
        """
        if end_bytes <= self._resident():
            return True
        try:
            reading = self._fresh_reading()
        except OSError:  # out of file descriptors: as good as short
            return False
        growth = max(0, end_bytes - reading.resident)
        short = reading.box.available - growth < margin_bytes(reading.box.total)
        if short != self._short:
            self._short = short
            self._tell(short, reading)
        return not short

    def _resident(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def _fresh_reading(self) -> _Reading:
        now = self._clock()
        reading = self._reading
        if reading is None or now - reading.taken_at >= _READING_LASTS_S:
            reading = self._reading = _Reading(now, self._read(), self._resident())
        return reading

    def _tell(self, short: bool, reading: _Reading) -> None:
        if not short:
            log.info("there is memory again: host memory for pages grows on")
            return
        log.warning(
            "this machine (or container) has only %d MiB of memory left: host memory for pages "
            "stays at %d MiB for now",
            reading.box.available >> 20,
            reading.resident >> 20,
        )


def margin_bytes(total: int) -> int:
    """What the arena leaves to others: 512 MiB or 2 %, an eighth of a small box."""
    return min(max(_MARGIN_BYTES, total // 50), total // 8)
