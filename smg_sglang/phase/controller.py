"""The phase controller: a state machine of requests and workers.

Each public method is an event and returns the actions it calls for. Every request that arrived
ends exactly once: by its decode worker's last output or abort, by `TellAborted` or by `TellFailed`.
One thread; no method blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count

from smg_sglang.phase.actions import (
    AbortAt,
    Action,
    SendCopy,
    SendOriginal,
    TellAborted,
    TellFailed,
)
from smg_sglang.phase.prefixes import Prefixes
from smg_sglang.phase.requests import Arrival, Request, Role, Route, Stage, Worker
from smg_sglang.phase.routing import Router, RoutingConfig

#: A request whose decode worker died this often before it said anything is not tried again: it may
#: be what kills them.
MAX_DEATHS = 2
#: Weight of the newest measurement of a worker's speed.
SPEED_WEIGHT = 0.3

DIED = (
    "the decode worker that was generating this answer died; it is being restarted, and what it "
    "had computed of the prompt is still in memory: send the request again"
)
POISON = f"{MAX_DEATHS} decode workers died one after the other with this request; it was given up"


class PhaseController:
    """Which request is where, and what is next for it.

    Attributes:
        workers: by index; prefill workers first. All are down until `worker_ready`.
        requests: those that have not ended, by rid.
        counters: `split`, `direct`, `repaired` (also counted as split), `retried`, `failed`,
            `aborted`, `suspected`, and `died:prefill`, `died:decode`.
        observe: called with a stage's name and its seconds: `prefill` (arrival until the pages are
            in memory), `first_decode` (from there until the first token), `direct` (arrival until
            the first token, without a prefill worker).
        split_enabled: False sends everything straight to decode workers.
    """

    def __init__(
        self,
        num_prefill: int,
        num_decode: int,
        config: RoutingConfig | None = None,
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
        self.workers = [Worker(index, role) for index, role in enumerate(roles)]
        self.prefill_workers = self.workers[:num_prefill]
        self.decode_workers = self.workers[num_prefill:]
        self.router = Router(config or RoutingConfig())
        self.prefixes = Prefixes()
        self.requests: dict[str, Request] = {}
        self.counters: Counter[str] = Counter()
        self.observe = observe
        self.split_enabled = True
        self._held: dict[str, Request] = {}
        self._copies: dict[str, Request] = {}
        self._numbers = count()

    # ---- from clients ----

    def arrived(self, arrival: Arrival, now: float) -> list[Action]:
        """A request came in.

        Raises:
            ValueError: one with its rid has not ended.
        """
        if arrival.rid in self.requests:
            raise ValueError(f"request {arrival.rid!r} has not ended")
        known = self.prefixes.find(arrival.path)
        request = Request(arrival, now, max(1, arrival.prompt_tokens - known.tokens))
        self.requests[arrival.rid] = request
        worker = None
        if self.split_enabled:
            worker = self.router.prefill(arrival, request.new_tokens, self.prefill_workers)
        if worker is None:
            self.counters["direct"] += 1
            return self._to_decode(request, now)
        self.counters["split"] += 1
        return self._to_prefill(request, worker, now)

    def aborted(self, prefix: str, now: float) -> list[Action]:
        """A client gave up all requests whose rid begins so (SGLang's rule; "" is all of them).

        What a decode worker has ends with the worker's own answer.
        """
        actions: list[Action] = []
        for request in [r for rid, r in self.requests.items() if rid.startswith(prefix)]:
            actions += self._abort(request)
        return actions

    def flushed(self) -> None:
        """The cache is empty."""
        self.prefixes.clear()

    # ---- from workers ----

    def prefilled(self, copy_rid: str, worker: int, now: float, ok: bool = True) -> list[Action]:
        """A copy has ended: with its pages in memory, or (not ok) with an error or abort."""
        tokens = self._heard(worker, now, copy_rid)
        request = self._copies.pop(copy_rid, None)
        self.workers[worker].take(copy_rid)
        if request is None:
            return []
        if not ok:
            return self._repair(request, now)
        self._measure(self.workers[worker], request, tokens, now)
        self.observe("prefill", now - request.arrived_at)
        return self._to_decode(request, now)

    def answered(
        self, rid: str, worker: int, now: float, finished: bool = False, generated: int = 0
    ) -> None:
        """A decode worker sent output for a request; `generated` tokens so far."""
        self._heard(worker, now, rid)
        request = self.requests.get(rid)
        if request is None or request.worker != worker:
            return
        if request.stage is Stage.QUEUED:
            self._first_answer(request, now)
        if finished:
            self.prefixes.grew(request.arrival.path, worker, generated)
            self._end(request)

    def ended(self, rid: str, worker: int, now: float) -> None:
        """A decode worker said that it aborted a request before it ran."""
        self._heard(worker, now, rid)
        request = self.requests.get(rid)
        if request is not None and request.worker == worker:
            self._end(request)

    def worker_ready(self, worker: int, now: float, max_prompt: int | None = None) -> list[Action]:
        """A worker has loaded its model, for the first time or again."""
        state = self.workers[worker]
        state.up, state.max_prompt = True, max_prompt
        if state.role is Role.PREFILL:
            return []
        held, self._held = self._held, {}
        return [action for request in held.values() for action in self._to_decode(request, now)]

    def worker_died(self, worker: int, now: float) -> list[Action]:
        """A worker is gone, and all that it said has been heard."""
        state = self.workers[worker]
        self.counters[f"died:{state.role}"] += 1
        lost = state.lose_all()
        if state.role is Role.PREFILL:
            return self._repair_all(lost, now)
        actions: list[Action] = []
        for rid in lost:
            actions += self._bereave(self.requests[rid], now)
        return actions

    # ---- from the clock ----

    def tick(self, now: float) -> list[Action]:
        """Time has passed: repair what waits for a prefill worker that says nothing."""
        actions: list[Action] = []
        for worker in self.workers:
            if not self._overdue(worker, now):
                continue
            worker.suspect = True
            self.counters["suspected"] += 1
            if worker.role is Role.PREFILL:
                copies = [rid for rid in worker.work if rid in self._copies]
                actions += [AbortAt(copy_rid, worker.index) for copy_rid in copies]
                actions += self._repair_all(copies, now)
        return actions

    def next_tick(self, now: float) -> float | None:
        """When `tick` can have something to do, if nothing happens before; None for never."""
        due = [
            w.alive_at + self.router.patience_s(w)
            for w in self.workers
            if w.up and w.work and not w.suspect
        ]
        return max(now, min(due)) if due else None

    # ---- to be seen ----

    def in_stage(self) -> Counter[Stage]:
        """How many requests are in each stage."""
        return Counter(request.stage for request in self.requests.values())

    # ---- steps ----

    def _to_prefill(self, request: Request, worker: Worker, now: float) -> list[Action]:
        # A copy may outlive its request, whose rid may come again: hence the number.
        copy_rid = f"{request.rid}#p{next(self._numbers)}"
        request.route, request.stage = Route.SPLIT, Stage.PREFILLING
        request.worker, request.copy_rid = worker.index, copy_rid
        self._copies[copy_rid] = request
        worker.give(copy_rid, request.new_tokens, now)
        return [SendCopy(request.arrival.payload, copy_rid, worker.index)]

    def _to_decode(self, request: Request, now: float) -> list[Action]:
        known = self.prefixes.find(request.arrival.path)
        worker = self.router.decode(request.arrival, known, self.decode_workers)
        request.copy_rid, request.sent_at = None, now
        if worker is None:
            request.stage, request.worker = Stage.HELD, None
            self._held[request.rid] = request
            return []
        request.stage, request.worker = Stage.QUEUED, worker.index
        worker.give(request.rid, 0 if request.route is Route.SPLIT else request.new_tokens, now)
        return [SendOriginal(request.arrival.payload, request.rid, worker.index)]

    def _first_answer(self, request: Request, now: float) -> None:
        assert request.worker is not None
        request.stage = Stage.STREAMING
        request.forget_payload()
        self.prefixes.learn(request.arrival.path, request.worker)
        if request.route is Route.DIRECT:
            self.observe("direct", now - request.arrived_at)
        else:
            self.observe("first_decode", now - request.sent_at)

    def _abort(self, request: Request) -> list[Action]:
        match request.stage:
            case Stage.QUEUED | Stage.STREAMING:
                assert request.worker is not None
                request.aborting = True
                return [AbortAt(request.rid, request.worker)]
            case Stage.PREFILLING:
                assert request.worker is not None and request.copy_rid is not None
                # The copy stays the worker's work until the worker says that it has ended.
                del self._copies[request.copy_rid]
                actions: list[Action] = [AbortAt(request.copy_rid, request.worker)]
            case Stage.HELD:
                actions = []
        return actions + self._tell_aborted(request)

    def _tell_aborted(self, request: Request) -> list[Action]:
        self.counters["aborted"] += 1
        self._end(request)
        return [TellAborted(request.rid)]

    def _repair_all(self, copies: list[str], now: float) -> list[Action]:
        requests = [self._copies.pop(rid) for rid in copies if rid in self._copies]
        return [action for request in requests for action in self._repair(request, now)]

    def _repair(self, request: Request, now: float) -> list[Action]:
        self.counters["repaired"] += 1
        request.route = Route.REPAIRED
        return self._to_decode(request, now)

    def _bereave(self, request: Request, now: float) -> list[Action]:
        """Its decode worker died."""
        if request.aborting:
            return self._tell_aborted(request)
        request.deaths += 1
        if request.stage is Stage.QUEUED and request.deaths < MAX_DEATHS:
            self.counters["retried"] += 1
            return self._to_decode(request, now)
        self.counters["failed"] += 1
        self._end(request)
        return [TellFailed(request.rid, DIED if request.stage is Stage.STREAMING else POISON)]

    def _end(self, request: Request) -> None:
        del self.requests[request.rid]
        self._held.pop(request.rid, None)
        if request.worker is not None:
            # Of a copy this is a no-op: it has another name.
            self.workers[request.worker].take(request.rid)

    # ---- signs of life ----

    def _heard(self, worker: int, now: float, rid: str) -> int:
        """A worker said something; the prompt tokens it owed for `rid`."""
        state = self.workers[worker]
        state.suspect = False
        state.alive_at = now
        return state.computed(rid)

    def _overdue(self, worker: Worker, now: float) -> bool:
        waits = worker.up and not worker.suspect and bool(worker.work)
        return waits and now - worker.alive_at >= self.router.patience_s(worker)

    def _measure(self, worker: Worker, request: Request, tokens: int, now: float) -> None:
        """Learn a worker's speed from prompts; queueing makes it look slower, which is safe."""
        seconds = now - request.arrived_at
        if tokens < self.router.config.split_tokens or seconds <= 0:
            return
        speed = tokens / seconds
        worker.speed = speed if worker.speed is None else _mix(worker.speed, speed)


def _mix(old: float, new: float) -> float:
    return old + SPEED_WEIGHT * (new - old)
