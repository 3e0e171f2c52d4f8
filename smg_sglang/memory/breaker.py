"""When to stop asking a server that does not answer, and when to ask again."""

import time
from collections.abc import Callable

_PING_EVERY_S = 2.0
_LONGEST_PAUSE_S = 5.0


class Breaker:
    """Circuit breaker of one channel.

    A timeout opens it. It closes when the server has been heard again (the late reply will do)
    and a pause is over; the pause is 0 after the first timeout, so a server that merely
    hiccuped is used again at once, and doubles with every timeout in a row. So nobody pays the
    timeout twice for one silence. For one thread at a time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._timeouts = 0
        self._heard = True
        self._pause_until = 0.0
        self._ping_at = 0.0
        self.stalled = False

    def timed_out(self) -> None:
        """A question got no answer in time."""
        now = self._clock()
        self._timeouts += 1
        pause = 0.0 if self._timeouts == 1 else 0.05 * 2 ** min(self._timeouts, 10)
        self._pause_until = now + min(pause, _LONGEST_PAUSE_S)
        self._ping_at = now + _PING_EVERY_S
        self._heard = False
        self.stalled = True

    def heard(self) -> None:
        """The server said anything at all."""
        self._heard = True

    def answered(self) -> None:
        """A question was answered in time."""
        self._timeouts = 0

    def try_close(self) -> bool:
        """Close if the server was heard and the pause is over; True if questions may pass."""
        if self.stalled and self._heard and self._clock() >= self._pause_until:
            self.stalled = False
        return not self.stalled

    def take_ping(self) -> bool:
        """Whether to send a ping now, in case the late reply was lost; at most every 2 s."""
        if self._clock() < self._ping_at:
            return False
        self._ping_at = self._clock() + _PING_EVERY_S
        return True
