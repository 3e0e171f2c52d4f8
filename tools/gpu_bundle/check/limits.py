"""Work that ends in time: of this process and of others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Overrun(Exception):
    """A step used up its seconds."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Overrun in the block when they are over. Main thread only."""

    def over(*_: object) -> None:
        raise Overrun(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(command: Sequence[str], seconds: float, log: Path) -> int:
    """The exit status of a command whose output goes to `log`.

    Raises:
        Overrun: it was stopped, with all that it had started.
    """
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Overrun(f"not done within {seconds:.0f} s: {log.name}") from None
        finally:
            if child.poll() is None:
                _end(child)


def _end(child: subprocess.Popen[bytes], grace_s: float = 5.0) -> None:
    """The whole group. SIGTERM first: a benchmark stops its servers on it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace_s
        is_left = _signalled(child.pid, number)
        while is_left and time.monotonic() < deadline:
            child.poll()
            time.sleep(0.02)
            is_left = _signalled(child.pid, 0)
    child.wait()


def _signalled(group: int, number: int) -> bool:
    """False where nobody is left of it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
