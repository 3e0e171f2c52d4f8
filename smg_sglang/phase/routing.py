"""Which worker gets a request: the same code in the server and in the simulation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from smg_sglang.config import DEFAULT_SPLIT_TOKENS
from smg_sglang.phase.prefixes import Known
from smg_sglang.phase.requests import Arrival, Worker


class RoutingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """
    Attributes:
        split_tokens: new prompt tokens from which a request goes through a prefill worker.
        spread: a chat leaves its decode worker when that has this many times the requests of the
            least busy one, and `spread_slack` more.
        patience_s: a worker with work that says nothing for longer than this, plus
            `patience_factor` times what its work should take, is suspect.
        unmeasured_speed: prompt tokens a second that a worker is thought to do before it was
            measured; low, so that a slow machine is not called dead.
    """

    split_tokens: int = DEFAULT_SPLIT_TOKENS["cpu"]
    spread: float = 2.0
    spread_slack: int = 8
    patience_s: float = 5.0
    patience_factor: float = 4.0
    unmeasured_speed: float = 100.0


class Router:
    """Chooses; changes nothing."""

    def __init__(self, config: RoutingConfig) -> None:
        self.config = config

    def prefill(
        self, arrival: Arrival, new_tokens: int, workers: Sequence[Worker]
    ) -> Worker | None:
        """The prefill worker with the fewest tokens ahead, or None: straight to decode."""
        if not arrival.splittable or new_tokens < self.config.split_tokens:
            return None
        able = [w for w in workers if w.up and not w.suspect and _takes(w, arrival)]
        return min(able, key=lambda w: (w.queued_tokens, len(w.work), w.index), default=None)

    def decode(self, arrival: Arrival, known: Known, workers: Sequence[Worker]) -> Worker | None:
        """A decode worker that is up, or None: hold the request.

        The one that knows the prefix, unless it is much busier than the least busy: any worker can
        load the prefix from host memory.
        """
        if arrival.home is not None:
            return next((w for w in workers if w.index == arrival.home and w.up), None)
        able = _unless_none([w for w in workers if w.up and not w.suspect], workers)
        if not able:
            return None
        least = min(able, key=lambda w: (len(w.work), w.queued_tokens, w.index))
        knows = next((w for w in able if w.index == known.worker), None)
        return knows if knows is not None and self._near(knows, least) else least

    def _near(self, worker: Worker, least: Worker) -> bool:
        limit = self.config.spread * len(least.work) + self.config.spread_slack
        return len(worker.work) <= limit

    def patience_s(self, worker: Worker) -> float:
        """How long a worker with work may say nothing, in seconds."""
        speed = worker.speed or self.config.unmeasured_speed
        return self.config.patience_s + self.config.patience_factor * worker.queued_tokens / speed


def _takes(worker: Worker, arrival: Arrival) -> bool:
    return worker.max_prompt is None or arrival.prompt_tokens <= worker.max_prompt


def _unless_none(chosen: list[Worker], workers: Iterable[Worker]) -> list[Worker]:
    """Where all are suspect, a suspect one is better than none."""
    return chosen or [w for w in workers if w.up]
