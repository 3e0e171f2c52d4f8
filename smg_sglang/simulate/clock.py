"""Simulated time: what is to happen, in its order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

_Event = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class Clock:
    """Seconds since the trace began; events of one time happen in the order they were asked for."""

    def __init__(self) -> None:
        self._now = 0.0
        self._events: list[_Event] = []
        self._order = count()

    def now(self) -> float:
        """The time of the event that is happening."""
        return self._now

    def at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Have something called at `time_s`, or now if that has passed."""
        event = (max(time_s, self._now), next(self._order), call, arguments)
        heapq.heappush(self._events, event)

    def step(self) -> bool:
        """Let the next thing happen; False where there is none."""
        if not self._events:
            return False
        self._now, _, call, arguments = heapq.heappop(self._events)
        call(*arguments)
        return True
