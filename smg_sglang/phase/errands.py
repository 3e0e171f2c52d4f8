"""Control messages: which workers still owe an answer, and who answers for the dead.

SGLang's tokenizer process waits for as many answers as there are workers, so each worker must
answer each message once, be it down, dead or back again.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple


class Errand(NamedTuple):
    """A message that wants an answer.

    Attributes:
        message: what to send again to a worker that died before it answered; opaque.
        answer: the name of the answer's type.
    """

    message: object
    answer: str


class Errands:
    """What each worker was sent and has not answered, oldest first."""

    def __init__(self) -> None:
        self._owed: dict[int, list[Errand]] = defaultdict(list)

    def owed(self, worker: int) -> list[Errand]:
        """What the worker has to be sent (again) when it is up."""
        return list(self._owed[worker])

    def add(self, worker: int, errand: Errand) -> None:
        """The worker was sent this, or will be."""
        self._owed[worker].append(errand)

    def answered(self, worker: int, answer: str) -> bool:
        """An answer came; False where none of that type was owed."""
        for errand in self._owed[worker]:
            if errand.answer == answer:
                self._owed[worker].remove(errand)
                return True
        return False

    def excuse(self, worker: int, answers: frozenset[str]) -> list[Errand]:
        """The worker is down: take off its list what others can answer for it."""
        excused = [errand for errand in self._owed[worker] if errand.answer in answers]
        self._owed[worker] = [e for e in self._owed[worker] if e.answer not in answers]
        return excused
