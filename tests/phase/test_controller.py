"""One event after another: what the controller wants done."""

import pytest

from smg_sglang.phase.actions import AbortAt, SendCopy, SendOriginal, TellAborted, TellFailed
from smg_sglang.phase.requests import Route, Stage
from tests.phase.factories import BIG, SMALL, arrival, chat, make_controller, prompt

P, D = 0, 1


def send(rid, worker=D):
    return SendOriginal(f"payload of {rid}", rid, worker)


def kinds(actions):
    return [type(action) for action in actions]


def copy_of(actions):
    (action,) = actions
    assert isinstance(action, SendCopy)
    return action.copy_rid


def test_a_big_prompt_goes_to_prefill_first_and_then_to_decode():
    controller = make_controller()
    actions = controller.arrived(arrival("a"), now=1)
    assert kinds(actions) == [SendCopy] and actions[0].worker == P
    assert actions[0].copy_rid.startswith("a#")
    assert controller.prefilled(copy_of(actions), P, now=2) == [send("a")]
    assert controller.workers[D].queued_tokens == 0, "it finds the prompt in memory"
    controller.answered("a", D, now=3)
    controller.answered("a", D, now=4, finished=True)
    assert not controller.requests and not any(w.work for w in controller.workers)


def test_a_small_prompt_goes_straight_to_decode():
    assert make_controller().arrived(arrival("a", SMALL), now=1) == [send("a")]


def test_what_cannot_be_split_goes_straight_to_decode():
    assert make_controller().arrived(arrival("a", splittable=False), now=1) == [send("a")]


def test_without_prefill_workers_all_goes_straight():
    controller = make_controller(num_prefill=0)
    assert controller.arrived(arrival("a"), now=1) == [send("a", worker=0)]


def test_where_splitting_is_switched_off_all_goes_straight():
    controller = make_controller()
    controller.split_enabled = False
    assert controller.arrived(arrival("a"), now=1) == [send("a")]


def test_a_prompt_that_a_prefill_worker_cannot_hold_goes_straight():
    controller = make_controller()
    controller.worker_ready(P, now=0, max_prompt=500)
    assert controller.arrived(arrival("a"), now=1) == [send("a")]


def test_a_known_prefix_makes_a_prompt_small():
    controller = make_controller()
    tokens = prompt(1, 640)
    copy = copy_of(controller.arrived(chat("a", tokens), now=1))
    controller.prefilled(copy, P, now=2)
    controller.answered("a", D, now=3, finished=True, generated=300)
    longer = tokens + prompt(2, 350)  # the answer, and 50 tokens more
    assert controller.arrived(chat("b", longer), now=4) == [send("b")]
    controller.flushed()
    assert kinds(controller.arrived(chat("c", longer), now=5)) == [SendCopy]


def test_a_chat_returns_to_the_decode_worker_that_knows_it():
    controller = make_controller(num_prefill=0, num_decode=3)
    for worker in range(3):
        tokens = prompt(worker, 640)
        (action,) = controller.arrived(chat(f"first {worker}", tokens), now=1)
        assert action.worker == worker
        controller.answered(f"first {worker}", worker, now=2)
    (action,) = controller.arrived(chat("second", prompt(2, 700)), now=3)
    assert action.worker == 2


def test_a_chat_leaves_its_worker_when_that_is_much_busier():
    controller = make_controller(num_prefill=0, num_decode=2, spread_slack=1)
    tokens = prompt(1, 640)
    controller.arrived(chat("a", tokens), now=1)
    controller.answered("a", 0, now=1)
    assert controller.arrived(chat("b", tokens), now=2)[0].worker == 0
    assert controller.arrived(chat("c", tokens), now=2)[0].worker == 1


def test_a_dead_prefill_worker_costs_no_request():
    controller = make_controller()
    controller.arrived(arrival("a"), now=1)
    controller.arrived(arrival("b"), now=1)
    assert controller.worker_died(P, now=2) == [send("a"), send("b")]
    assert controller.requests["a"].route is Route.REPAIRED
    assert controller.arrived(arrival("c"), now=3) == [send("c")], "it is still down"
    controller.worker_ready(P, now=4)
    assert kinds(controller.arrived(arrival("d"), now=5)) == [SendCopy]


def test_a_copy_that_fails_is_repaired():
    controller = make_controller()
    copy = copy_of(controller.arrived(arrival("a"), now=1))
    assert controller.prefilled(copy, P, now=2, ok=False) == [send("a")]
    assert controller.requests["a"].route is Route.REPAIRED
    assert controller.workers[D].queued_tokens == BIG, "nobody has computed any of it"
    assert controller.workers[P].speed is None, "nor is it a measure of speed"


def test_a_prefill_worker_that_hangs_is_repaired_and_avoided_until_it_speaks():
    controller = make_controller(unmeasured_speed=1000.0)
    copy = copy_of(controller.arrived(arrival("a"), now=1))
    assert controller.next_tick(1) == 1 + 5 + 4
    assert controller.tick(9.9) == []
    assert controller.tick(10) == [AbortAt(copy, P), send("a")]
    assert controller.next_tick(10) is None or controller.next_tick(10) > 10
    assert controller.arrived(arrival("b"), now=11) == [send("b")]
    assert controller.prefilled(copy, P, now=12, ok=False) == []
    assert kinds(controller.arrived(arrival("c"), now=13)) == [SendCopy]


def test_a_worker_that_says_something_is_not_suspected():
    controller = make_controller(unmeasured_speed=1000.0)
    first = copy_of(controller.arrived(arrival("a"), now=1))
    controller.arrived(arrival("b"), now=1)
    controller.prefilled(first, P, now=9, ok=False)
    assert controller.next_tick(9) == 9 + 5 + 4
    assert controller.tick(17) == []


def test_the_speed_of_a_prefill_worker_is_learned_from_its_prompts():
    controller = make_controller()
    for began, ended, speed in [(1, 3, 500), (10, 11, 500 + 0.3 * 500)]:
        copy = copy_of(controller.arrived(arrival("a"), now=began))
        controller.prefilled(copy, P, now=ended)
        controller.answered("a", D, now=ended, finished=True)
        assert controller.workers[P].speed == pytest.approx(speed)


def test_a_decode_worker_that_hangs_is_avoided():
    controller = make_controller(num_prefill=0, num_decode=2)
    controller.arrived(arrival("a", SMALL), now=1)
    controller.tick(1000)
    for rid in "bc":
        assert controller.arrived(arrival(rid, SMALL), now=1001)[0].worker == 1


def test_only_streams_of_a_dead_decode_worker_fail():
    controller = make_controller(num_decode=2)
    for rid in "abcd":
        controller.arrived(arrival(rid, SMALL), now=1)
    controller.answered("a", 1, now=2)
    actions = controller.worker_died(1, now=3)
    assert kinds(actions) == [TellFailed, SendOriginal]
    assert actions[0].rid == "a" and "died" in actions[0].message
    assert actions[1] == send("c", worker=2)
    assert set(controller.requests) == {"b", "c", "d"}


def test_what_a_worker_says_of_a_request_that_is_anothers_does_not_count():
    controller = make_controller(num_prefill=0, num_decode=2)
    assert controller.arrived(arrival("a", SMALL), now=1) == [send("a", worker=0)]
    controller.answered("a", 1, now=2, finished=True)
    controller.ended("a", 1, now=3)
    assert controller.requests["a"].stage is Stage.QUEUED
    assert controller.workers[0].work == {"a": SMALL}


def test_requests_are_held_while_no_decode_worker_is_up():
    controller = make_controller()
    controller.worker_died(D, now=1)
    assert controller.arrived(arrival("a", SMALL), now=2) == []
    copy = copy_of(controller.arrived(arrival("b"), now=2))
    assert controller.prefilled(copy, P, now=3) == []
    assert controller.requests["b"].stage is Stage.HELD
    assert controller.worker_ready(D, now=4) == [send("a"), send("b")]


def test_a_request_that_kills_workers_is_given_up():
    controller = make_controller(num_prefill=0, num_decode=1)
    controller.arrived(arrival("a", SMALL), now=1)
    assert controller.worker_died(0, now=2) == []
    assert controller.worker_ready(0, now=3) == [send("a", worker=0)]
    assert kinds(controller.worker_died(0, now=4)) == [TellFailed]
    assert not controller.requests


def test_an_abort_while_prefilling_is_answered_at_once():
    controller = make_controller()
    copy = copy_of(controller.arrived(arrival("a"), now=1))
    assert controller.aborted("a", now=2) == [AbortAt(copy, P), TellAborted("a")]
    assert not controller.requests
    assert controller.arrived(arrival("a"), now=3)[0].copy_rid != copy, "the rid may come again"
    assert controller.prefilled(copy, P, now=4, ok=False) == []


def test_an_abort_at_a_decode_worker_ends_with_its_answer():
    controller = make_controller()
    controller.arrived(arrival("a", SMALL), now=1)
    assert controller.aborted("a", now=2) == [AbortAt("a", D)]
    controller.ended("a", D, now=3)
    assert not controller.requests and not controller.workers[D].work


def test_an_abort_is_not_forgotten_when_the_decode_worker_dies():
    controller = make_controller()
    controller.arrived(arrival("a", SMALL), now=1)
    controller.aborted("a", now=2)
    assert controller.worker_died(D, now=3) == [TellAborted("a")]


def test_an_abort_ends_all_whose_rid_begins_so():
    controller = make_controller()
    controller.worker_died(D, now=0)
    for rid in ("ab", "abc", "b"):
        controller.arrived(arrival(rid, SMALL), now=1)
    assert controller.aborted("ab", now=2) == [TellAborted("ab"), TellAborted("abc")]
    assert controller.aborted("", now=3) == [TellAborted("b")]


def test_a_rid_that_has_not_ended_is_refused():
    controller = make_controller()
    controller.arrived(arrival("a"), now=1)
    with pytest.raises(ValueError, match="not ended"):
        controller.arrived(arrival("a"), now=1)


def test_a_session_waits_for_its_worker():
    controller = make_controller(num_prefill=0, num_decode=2)
    controller.worker_died(1, now=1)
    assert controller.arrived(arrival("a", SMALL, home=1), now=2) == []
    assert controller.worker_ready(0, now=3) == []
    assert controller.worker_ready(1, now=4) == [send("a")]


def test_stages_are_timed():
    seen = []
    controller = make_controller()
    controller.observe = lambda stage, seconds: seen.append((stage, seconds))
    copy = copy_of(controller.arrived(arrival("a"), now=1))
    controller.prefilled(copy, P, now=3)
    controller.answered("a", D, now=3.5)
    controller.arrived(arrival("b", SMALL), now=4)
    controller.answered("b", D, now=4.25)
    assert seen == [("prefill", 2), ("first_decode", 0.5), ("direct", 0.25)]


def test_what_becomes_of_requests_is_counted():
    controller = make_controller()
    controller.arrived(arrival("a"), now=1)
    controller.arrived(arrival("b", SMALL), now=1)
    controller.answered("b", D, now=2)
    controller.worker_died(P, now=3)
    controller.worker_died(D, now=4)
    controller.aborted("a", now=5)
    controller.worker_ready(D, now=6)
    controller.arrived(arrival("c", SMALL), now=7)
    controller.tick(1000)
    assert controller.counters == {
        "split": 1,
        "direct": 2,
        "repaired": 1,
        "retried": 1,
        "failed": 1,
        "aborted": 1,
        "suspected": 1,
        "died:prefill": 1,
        "died:decode": 1,
    }
