"""Every order of events: no request is lost, doubled, or left somewhere."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from smg_sglang.phase.actions import AbortAt, SendCopy, SendOriginal, TellAborted, TellFailed
from smg_sglang.phase.prefixes import path_of
from smg_sglang.phase.requests import Role, Stage
from tests.phase.factories import BIG, SMALL, arrival, make_controller, prompt

indices = st.integers(0, 1 << 16)


class Machine(RuleBasedStateMachine):
    """The twin: what each worker has been sent and not ended, and what each client was told."""

    def __init__(self):
        super().__init__()
        self.controller = make_controller(num_prefill=2, num_decode=2, unmeasured_speed=1000.0)
        self.now = 0.0
        self.sent = {worker.index: [] for worker in self.controller.workers}
        self.spoken = set()  # rids whose worker has answered
        self.open = set()
        self.ends = Counter()
        self.number = 0

    # ---- carrying out actions ----

    def do(self, actions):
        for action in actions:
            match action:
                case SendCopy(payload, copy_rid, worker):
                    self.receive(worker, copy_rid, payload, Role.PREFILL)
                case SendOriginal(payload, rid, worker):
                    self.receive(worker, rid, payload, Role.DECODE)
                case AbortAt(rid, worker):
                    assert self.controller.workers[worker].up
                case TellAborted(rid) | TellFailed(rid):
                    self.end(rid)
                    assert all(rid not in sent for sent in self.sent.values())

    def receive(self, worker, rid, payload, role):
        state = self.controller.workers[worker]
        assert state.up and state.role is role
        assert payload == f"payload of {rid.split('#')[0]}"
        assert all(rid not in sent for sent in self.sent.values())
        self.sent[worker].append(rid)

    def end(self, rid):
        assert rid in self.open
        self.open.discard(rid)
        self.spoken.discard(rid)
        self.ends[rid] += 1

    def pick(self, index, role):
        """Something that a worker of this role has, or None."""
        have = [
            (worker.index, rid)
            for worker in self.controller.workers
            if worker.role is role
            for rid in self.sent[worker.index]
        ]
        return have[index % len(have)] if have else None

    # ---- events ----

    @rule(tokens=st.sampled_from([SMALL, BIG]), family=st.integers(0, 2), again=st.booleans())
    def arrive(self, tokens, family, again):
        self.number += not again
        rid = f"r{self.number}"
        if rid in self.open:
            return
        self.open.add(rid)
        self.ends.pop(rid, None)
        path = path_of(prompt(family, tokens))
        self.do(self.controller.arrived(arrival(rid, tokens, path=path), self.now))

    @rule(index=indices, ok=st.booleans())
    def copy_ends(self, index, ok):
        if (found := self.pick(index, Role.PREFILL)) is None:
            return
        worker, rid = found
        self.sent[worker].remove(rid)
        self.do(self.controller.prefilled(rid, worker, self.now, ok))

    @rule(index=indices, finished=st.booleans())
    def answer(self, index, finished):
        if (found := self.pick(index, Role.DECODE)) is None:
            return
        worker, rid = found
        if finished:
            self.sent[worker].remove(rid)
            self.end(rid)
        else:
            self.spoken.add(rid)
        self.controller.answered(rid, worker, self.now, finished, generated=5)

    @rule(index=indices)
    def decode_worker_aborts_before_running(self, index):
        if (found := self.pick(index, Role.DECODE)) is None or found[1] in self.spoken:
            return
        worker, rid = found
        self.sent[worker].remove(rid)
        self.end(rid)
        self.controller.ended(rid, worker, self.now)

    @rule(index=indices)
    def late_words_about_ended_things_do_nothing(self, index):
        worker = index % 4
        if worker < 2:
            assert self.controller.prefilled("gone#p0", worker, self.now) == []
        else:
            self.controller.answered("gone", worker, self.now, finished=True)
            self.controller.ended("gone", worker, self.now)

    @rule(number=st.integers(0, 30))
    def client_aborts(self, number):
        self.do(self.controller.aborted(f"r{number}", self.now))

    @rule()
    def all_are_aborted(self):
        self.do(self.controller.aborted("", self.now))

    @rule(worker=st.integers(0, 3))
    def worker_dies(self, worker):
        if not self.controller.workers[worker].up:
            return
        self.sent[worker] = []
        self.do(self.controller.worker_died(worker, self.now))

    @rule(worker=st.integers(0, 3))
    def worker_returns(self, worker):
        if not self.controller.workers[worker].up:
            self.do(self.controller.worker_ready(worker, self.now))

    @rule(seconds=st.sampled_from([0.1, 3.0, 20.0]))
    def time_passes(self, seconds):
        self.now += seconds
        due = self.controller.next_tick(self.now)
        self.do(self.controller.tick(self.now))
        if due == self.now:
            after = self.controller.next_tick(self.now)
            assert after is None or after > self.now, "tick left something due"

    @rule()
    def flush(self):
        self.controller.flushed()

    @rule(enabled=st.booleans())
    def split_is_switched(self, enabled):
        self.controller.split_enabled = enabled

    # ---- what holds ----

    @invariant()
    def every_request_is_open_at_exactly_one_place(self):
        requests = self.controller.requests
        assert set(requests) == self.open
        assert all(count == 1 for count in self.ends.values())
        for rid, request in requests.items():
            name = request.copy_rid if request.stage is Stage.PREFILLING else rid
            places = [index for index, sent in self.sent.items() if name in sent]
            assert places == ([] if request.stage is Stage.HELD else [request.worker])
            assert (request.stage is Stage.STREAMING) == (rid in self.spoken)
            assert (request.arrival.payload is None) == (request.stage is Stage.STREAMING)

    @invariant()
    def workers_books_say_what_they_have(self):
        for worker in self.controller.workers:
            assert list(worker.work) == self.sent[worker.index]
            assert worker.queued_tokens == sum(worker.work.values()) >= 0
        assert sum(self.controller.in_stage().values()) == len(self.controller.requests)

    @invariant()
    def nothing_is_held_while_a_decode_worker_is_up(self):
        if any(worker.up for worker in self.controller.decode_workers):
            assert self.controller.in_stage()[Stage.HELD] == 0

    @precondition(lambda self: not self.open)
    @invariant()
    def what_has_ended_leaves_nothing(self):
        assert not self.controller._held and not self.controller._copies


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestEveryOrderOfEvents = Machine.TestCase
