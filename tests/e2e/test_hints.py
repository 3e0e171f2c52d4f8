"""Hints on a real server whose host memory is smaller than what passes through it."""

import requests

from tests.e2e.conftest import NEW_TOKENS, details, eventually, in_host_memory, metric, token_ids

SERVER_ARGS = ("--smg-host-gb", "0.0625", "--smg-prefetch", "--enable-cache-report")
LENGTH = 800
#: Tokens of prompts that nobody hints at: more than host memory holds.
FLOOD = 40_000


def envelope(kind, **payload):
    action = {
        "action_id": "1",
        "action_type": kind,
        "action_version": "1",
        "payload": payload,
    }
    return {"protocol_version": "1", "message_id": "m", "actions": [action]}


def generate(server, prompt, hints=None, **more):
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0},
        "kv_hints": hints,
        **more,
    }
    response = requests.post(f"{server.url}/generate", json=body, timeout=120)
    response.raise_for_status()
    return response.json()


def tell(server, hints, **prompt):
    """The outcome of one hint without a request."""
    response = requests.post(
        f"{server.url}/kv_hints", json={"kv_hints": hints, **prompt}, timeout=60
    )
    assert response.status_code == 200, response.text
    ((outcome,),) = response.json()["outcomes"]
    return outcome


def hints(server, kind, outcome):
    return metric(server, "smg:hints_total", kind=kind, outcome=outcome)


def flood(server, seed):
    """As many new tokens as make all that nobody retains leave host memory."""
    for number in range(FLOOD // 1000):
        server.generate(token_ids(seed + number, 1000), 1)


def test_a_retained_prefix_outlives_a_flood_and_another_does_not(server):
    kept, other = token_ids(1, LENGTH), token_ids(2, LENGTH)
    first = generate(server, kept, envelope("retain", seconds=600))
    generate(server, other)
    eventually(lambda: metric(server, "smg:retained_pages") >= 50, "nothing was retained")
    flood(server, 1000)
    again, gone = generate(server, kept), generate(server, other)
    assert again["output_ids"] == first["output_ids"]
    assert details(again)["host"] >= 784
    assert details(gone) == {"device": 0, "host": 0}
    eventually(lambda: hints(server, "retain", "met") == 1, "the hint was not counted")


def test_a_session_is_retained_by_its_messages_and_ends_when_it_is_demoted(server):
    text = " ".join(f"word{number}" for number in range(200))
    messages = [{"role": "user", "content": text}]
    chat = {"model": "m", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).raise_for_status()
    in_host_memory(server)
    retain = envelope("retain", session="agent 7", seconds=600)
    eventually(lambda: tell(server, retain, messages=messages) == "met", "not all of it came")
    flood(server, 2000)
    chat["messages"] = [*messages, {"role": "assistant", "content": "Yes"}, messages[0]]
    answer = requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 400
    assert tell(server, envelope("demote", session="agent 7")) in ("met", "pending")
    assert tell(server, envelope("demote", session="agent 7")) == "absent"


def test_a_prefix_is_on_the_device_before_its_request(server):
    prompt = token_ids(3, 400)  # less than a quarter of the pool
    first = generate(server, prompt, envelope("retain", seconds=600))
    in_host_memory(server, 25)
    for number in range(3):
        server.generate(token_ids(3000 + number, 1000), 1)
    assert tell(server, envelope("prefetch"), input_ids=prompt) == "pending"

    def landed():
        server.generate(token_ids(3, 2), 1)  # a step
        return hints(server, "prefetch", "met") == 1

    eventually(landed, "the prefix did not come")
    again = generate(server, prompt)
    assert again["output_ids"] == first["output_ids"]
    assert details(again) == {"device": 384, "host": 0}


def test_hints_that_are_none_never_fail_a_request(server):
    prompt = token_ids(4, 100)
    plain = generate(server, prompt)["output_ids"]
    for envelope_ in (
        envelope("retain"),
        envelope("retain", seconds="long"),
        envelope("teleport"),
        {**envelope("retain", seconds=1), "protocol_version": "9"},
        envelope("demote", session="nobody"),
    ):
        assert generate(server, prompt, envelope_)["output_ids"] == plain
    eventually(lambda: hints(server, "retain", "malformed") == 2, "not counted")
    assert hints(server, "other", "unsupported") == 1
    assert hints(server, "retain", "unsupported") == 1
    assert hints(server, "demote", "absent") >= 1


def test_a_body_that_is_no_hint_is_refused_in_a_sentence(server):
    for body, says in (
        ({}, "kv_hints"),
        ({"kv_hints": {}}, "Malformed kv_hints envelope"),
        ({"kv_hints": envelope("demote"), "text": "a", "input_ids": [1]}, "not both"),
        ({"kv_hints": envelope("demote"), "messages": [{"role": "user"}]}, "make no prompt"),
        ({"kv_hints": envelope("demote"), "input_ids": [1 << 80]}, "is no hint"),
        ({"kv_hints": envelope("demote"), "cache": 1}, "is no hint"),
    ):
        response = requests.post(f"{server.url}/kv_hints", json=body, timeout=60)
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]
