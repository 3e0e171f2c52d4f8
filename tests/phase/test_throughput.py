"""Null work: what the controller itself costs a request."""

import time
from array import array

from smg_sglang.phase.actions import SendCopy
from smg_sglang.phase.prefixes import path_of
from tests.phase.factories import arrival, make_controller


def test_a_request_costs_less_than_a_millisecond_with_a_thousand_in_flight():
    controller = make_controller(num_prefill=2, num_decode=2)
    prompts = [array("q", range(n, n + 1500)) for n in range(1000)]
    began = time.process_time()
    actions = [
        action
        for n, tokens in enumerate(prompts)
        for action in controller.arrived(
            arrival(f"r{n}", len(tokens), path=path_of(tokens)), now=n / 1000
        )
    ]
    sent = [
        sent
        for action in actions
        for sent in (
            controller.prefilled(action.copy_rid, action.worker, 2.0)
            if isinstance(action, SendCopy)
            else [action]
        )
    ]
    for token in range(10):
        for action in sent:
            controller.answered(action.rid, action.worker, 3.0 + token, finished=token == 9)
        controller.tick(3.0 + token)
    spent = time.process_time() - began
    assert not controller.requests
    assert spent / len(prompts) < 0.001, f"{1e3 * spent / len(prompts):.3f} ms a request"
