"""When a dead worker is started again."""

from __future__ import annotations

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0
#: A worker that was up this long has proved that it can run: its earlier deaths are forgotten.
STEADY_S = 60.0
#: Starts that may fail one after the other before a worker counts as broken.
MAX_FAILURES = 5


class Restarts:
    """The delays of one worker: at once after a good life, later and later after bad ones."""

    def __init__(self) -> None:
        self.failures = 0
        self.due_at: float | None = None
        self._up_since: float | None = None

    @property
    def hopeless(self) -> bool:
        """It never comes up any more."""
        return self.failures >= MAX_FAILURES

    def came_up(self, now: float) -> None:
        self._up_since = now

    def died(self, now: float) -> None:
        """Sets `due_at`."""
        steady = self._up_since is not None and now - self._up_since >= STEADY_S
        self.failures = 1 if steady else self.failures + 1
        self._up_since = None
        self.due_at = now + min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self.failures - 1))

    def started(self) -> None:
        self.due_at = None
