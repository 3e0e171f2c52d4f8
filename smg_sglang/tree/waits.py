"""Requests that let others compute what they share, and how long they do so.

The prefix of a request may be on its way: another one is computing it. To compute it twice takes
the device's time from all; to wait costs the request the steps until it is there, of which it would
have taken part in the first. (Strata, arXiv:2508.18572, calls such prefixes delay hits.)
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

#: Tokens that are worth a step: about what a forward costs beside its tokens (an estimate).
LEAST_SAVED = 64


@dataclass(slots=True)
class _Wait:
    """known: tokens of the prefix that were there, at first and at the best since. steps: passed
    over in a row since then."""

    first: int
    known: int
    steps: int = 0


class Waits:
    """Who waits, by request. One thread.

    Attributes:
        requests: that waited, of those that have gone on; steps: that they were passed over;
            saved_tokens: that they did not compute since.
    """

    def __init__(self, most_steps: int) -> None:
        """most_steps: in which nothing more of its prefix comes, and a request goes on; 0: none
        waits."""
        self.most_steps = most_steps
        self._waiting: dict[str, _Wait] = {}
        self.requests = self.steps = self.saved_tokens = 0

    def passes_over(self, rid: str, known: int, coming: int) -> bool:
        """Whether a request is to wait one step more. It goes on where this is False.

        known: tokens of its prefix that it would find now. coming: tokens of it that will be there
        when those that compute it have done so.
        """
        wait = self._waiting.get(rid)
        if wait is not None and known > wait.known:
            wait.known, wait.steps = known, 0
        if coming - known < LEAST_SAVED or (wait.steps if wait else 0) >= self.most_steps:
            self._go_on(rid, known)
            return False
        if wait is None:
            wait = self._waiting[rid] = _Wait(known, known)
        wait.steps += 1
        self.steps += 1
        return True

    def forget(self, rid: str) -> None:
        """The request has left, whatever it waited for."""
        self._waiting.pop(rid, None)

    def __len__(self) -> int:
        return len(self._waiting)

    def _go_on(self, rid: str, known: int) -> None:
        if (wait := self._waiting.pop(rid, None)) is not None:
            self.requests += 1
            self.saved_tokens += max(0, known - wait.first)


def shared_tokens(mine: array[int], theirs: array[int], known: int) -> int:
    """How many tokens both begin with; 0 where these are not worth a step beyond the `known` first.

    Most prompts differ in what comes next, so that is looked at first. mine, theirs: int64.
    """
    end, next_ones = min(len(mine), len(theirs)), slice(known, known + LEAST_SAVED)
    if end < next_ones.stop or mine[next_ones] != theirs[next_ones]:
        return 0
    differ = np.flatnonzero(
        np.frombuffer(mine, np.int64, end) != np.frombuffer(theirs, np.int64, end)
    )
    return int(differ[0]) if len(differ) else end
