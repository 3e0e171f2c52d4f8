"""Gets the arena's memory from the kernel before it is needed, in the background.

The first touch of a memory page is slow (the kernel clears it; on some virtual machines it takes
the hypervisor's help: 50 MB/s were seen), so the first spills would be.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

from smg_sglang.memory.slabs import grow_freely

log = logging.getLogger(__name__)

_STEP_BYTES = 4 << 20
_AHEAD_BYTES = 1 << 30
_SHORTAGE_PAUSE_S = 2.0


class Pretouch:
    """Keeps 1 GiB (or an eighth of the arena) beyond what was ever used ready to write.

    So memory in use grows with the pages held, not with the size asked for. At lowest priority,
    and half of the time at most; sleeps when it is ahead or the box is short of memory.
    """

    def __init__(
        self, fd: int, arena_bytes: int, may_grow: Callable[[int], bool] = grow_freely
    ) -> None:
        """`may_grow` (on this thread) is asked before each step, with the byte it goes to."""
        self._fd = fd
        self._may_grow = may_grow
        self._arena_bytes = arena_bytes
        self._ahead = max(_AHEAD_BYTES, arena_bytes // 8)
        self._goal = min(arena_bytes, self._ahead)
        self._stopping = False
        self._changed = threading.Condition()
        self.touched = 0
        self._thread = threading.Thread(target=self._run, name="smg-pretouch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def advance(self, used_bytes: int) -> None:
        """The arena is used up to `used_bytes` now. Cheap when that is not news."""
        goal = min(self._arena_bytes, used_bytes + self._ahead)
        if goal > self._goal:
            with self._changed:
                self._goal = goal
                self._changed.notify()

    def stop(self) -> None:
        """End the thread; it no longer uses the file descriptor then."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while self._wait_for_work():
            started = time.monotonic()
            step = min(_STEP_BYTES, self._goal - self.touched)
            if not self._may_grow(self.touched + step):
                self._rest(_SHORTAGE_PAUSE_S)
                continue
            try:
                os.posix_fallocate(self._fd, self.touched, step)
            except OSError as error:
                log.warning("stopped preparing host memory at %d bytes: %s", self.touched, error)
                return
            self.touched += step
            self._rest(time.monotonic() - started)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self.touched < self._goal)
            return not self._stopping

    def _rest(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, timeout=seconds)
