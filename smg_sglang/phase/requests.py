"""The nouns of the split: a request, the stage it is in, the way it took, a worker."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum


class Role(StrEnum):
    """What a worker is for."""

    PREFILL = "prefill"
    DECODE = "decode"


class Stage(StrEnum):
    """Where a request is; it moves downwards, or back to HELD when its decode worker dies.

    PREFILLING: a prefill worker has its copy, the controller has the original.
    HELD: no decode worker is up; the controller has it.
    QUEUED: a decode worker has it and has said nothing yet.
    STREAMING: the decode worker has answered, so that it cannot be started again elsewhere.
    """

    PREFILLING = "prefilling"
    HELD = "held"
    QUEUED = "queued"
    STREAMING = "streaming"


class Route(StrEnum):
    """The way a request took to its decode worker.

    split: through a prefill worker. direct: straight. repaired: its prefill worker died, hung or
    failed, and the decode worker computed the prompt.
    """

    SPLIT = "split"
    DIRECT = "direct"
    REPAIRED = "repaired"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it comes in.

    Attributes:
        rid: unique among the requests that have not ended.
        prompt_tokens: its length in tokens.
        splittable: whether a prefill worker can do its prompt.
        path: the keys of its prompt's blocks (`prefixes.path_of`), empty where no other request
            shares its pages.
        home: the decode worker that must have it (sessions), or None.
        payload: what is sent to workers; opaque here.
    """

    rid: str
    prompt_tokens: int
    splittable: bool = True
    path: bytes = b""
    home: int | None = None
    payload: object = None


@dataclass(slots=True)
class Request:
    """A request that has not ended. Times in seconds of the caller's clock.

    Attributes:
        new_tokens: prompt tokens that nobody had computed, as far as was known when it came.
        worker: who has it: the prefill worker of its copy while PREFILLING, then a decode worker.
        copy_rid: the copy's name while PREFILLING.
        sent_at: when it went, or was to go, to a decode worker.
        deaths: decode workers that died while they had it.
        aborting: its worker was told to abort it and has not answered.
    """

    arrival: Arrival
    arrived_at: float
    new_tokens: int
    route: Route = Route.DIRECT
    stage: Stage = Stage.HELD
    worker: int | None = None
    copy_rid: str | None = None
    sent_at: float = 0.0
    deaths: int = 0
    aborting: bool = False

    @property
    def rid(self) -> str:
        return self.arrival.rid

    def forget_payload(self) -> None:
        """It cannot be sent again: let its prompt go."""
        self.arrival = replace(self.arrival, payload=None)


@dataclass(slots=True)
class Worker:
    """What the controller knows of a worker.

    Attributes:
        work: what it was sent and has not ended: copies at a prefill worker, requests at a decode
            worker, with the prompt tokens it has to compute for each until it has answered.
        max_prompt: longest prompt it takes, in tokens; None while unknown.
        alive_at: when it last said something, or was last given something while idle.
        suspect: it has said nothing for too long, so nothing more is sent to it where another
            can do it.
        speed: prompt tokens a second, measured; None before the first.
    """

    index: int
    role: Role
    up: bool = False
    suspect: bool = False
    max_prompt: int | None = None
    alive_at: float = 0.0
    speed: float | None = None
    work: dict[str, int] = field(default_factory=dict)
    queued_tokens: int = 0

    def give(self, rid: str, tokens: int, now: float) -> None:
        """It was sent `rid`, with so many prompt tokens to compute."""
        if not self.work:
            self.alive_at = now
        self.work[rid] = tokens
        self.queued_tokens += tokens

    def computed(self, rid: str) -> int:
        """The prompt of `rid` is done; the tokens that were owed for it."""
        tokens = self.work.get(rid, 0)
        if tokens:
            self.work[rid] = 0
            self.queued_tokens -= tokens
        return tokens

    def take(self, rid: str) -> None:
        """`rid` is no longer its work; nothing happens where it was not."""
        self.queued_tokens -= self.work.pop(rid, 0)

    def lose_all(self) -> list[str]:
        """It died: what it had, oldest first."""
        lost = list(self.work)
        self.work.clear()
        self.queued_tokens = 0
        self.up = self.suspect = False
        return lost
