"""What is read of an envelope, and what is not."""

from types import SimpleNamespace

import pytest

from smg_sglang.tier import hint_actions
from smg_sglang.tier.hint_actions import SESSION_S, Hint, HintRefused, read_envelope

NOW = 1_000_000.0


def read(kind, payload, version="1", protocol="1"):
    action = SimpleNamespace(action_type=kind, action_version=version, payload=payload)
    (hint,) = read_envelope(protocol, [action], lambda: NOW)
    return hint


@pytest.mark.parametrize(
    ("kind", "payload", "hint"),
    [
        ("retain", {"seconds": 30}, Hint("retain", seconds=30.0)),
        ("retain", {"seconds": 0}, Hint("retain", seconds=0.0)),
        ("retain", {"until": NOW + 5}, Hint("retain", seconds=5.0)),
        ("retain", {"until": NOW - 5}, Hint("retain", seconds=0.0)),
        ("retain", {"until": float("nan")}, Hint("retain", seconds=0.0)),
        ("retain", {"until": 1e300}, Hint("retain", seconds=86_400.0)),
        ("retain", {"session": "s"}, Hint("retain", seconds=SESSION_S, session="s")),
        ("retain", {"session": "s", "seconds": 9}, Hint("retain", seconds=9.0, session="s")),
        ("retain", {"seconds": 1, "tokens": 64}, Hint("retain", 64, seconds=1.0)),
        ("demote", {}, Hint("demote")),
        ("demote", {"session": "s"}, Hint("demote", session="s")),
        ("prefetch", {"input_ids": [1, 2]}, Hint("prefetch", input_ids=(1, 2))),
    ],
)
def test_payloads_that_are_known(kind, payload, hint):
    assert read(kind, payload) == hint
    assert read(kind, payload, version="1.3", protocol="1.0") == hint


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("retain", {}),
        ("retain", {"seconds": -1}),
        ("retain", {"seconds": 86_401}),
        ("retain", {"seconds": float("nan")}),
        ("retain", {"seconds": "30"}),
        ("retain", {"seconds": 3, "until": NOW}),
        ("retain", {"seconds": 3, "session": ""}),
        ("retain", {"seconds": 3, "session": "s" * 257}),
        ("retain", {"seconds": 3, "for": "ever"}),
        ("retain", {"seconds": 3, "tokens": 0}),
        ("demote", {"seconds": 3}),
        ("prefetch", {"session": "s"}),
        ("prefetch", {"input_ids": []}),
        ("prefetch", {"input_ids": [-1]}),
        ("prefetch", {"input_ids": [1 << 63]}),
        ("prefetch", {"input_ids": ["1"]}),
    ],
)
def test_payloads_that_are_none(kind, payload):
    refused = read(kind, payload)
    assert isinstance(refused, HintRefused)
    assert (refused.kind, refused.outcome) == (kind, "malformed")


@pytest.mark.parametrize(
    ("kind", "version", "protocol", "counted"),
    [
        ("retain", "2", "1", "retain"),
        ("retain", "", "1", "retain"),
        ("retain", "1", "2.0", "retain"),
        ("pin", "1", "1", "other"),
        ("other", "1", "1", "other"),
    ],
)
def test_other_types_and_versions_are_not_ours(kind, version, protocol, counted):
    refused = read(kind, {"seconds": 3}, version, protocol)
    assert (refused.kind, refused.outcome) == (counted, "unsupported")


def test_an_envelope_names_so_many_tokens_and_no_more(monkeypatch):
    monkeypatch.setattr(hint_actions, "MOST_IDS", 5)
    actions = [
        SimpleNamespace(action_type="demote", action_version="1", payload={"input_ids": [1] * n})
        for n in (3, 3, 2)
    ]
    hints = list(read_envelope("1", actions))
    assert [isinstance(hint, HintRefused) for hint in hints] == [False, True, False]


def test_actions_beyond_the_most_are_not_read():
    action = SimpleNamespace(action_type="demote", action_version="1", payload={})
    hints = list(read_envelope("1", [action] * 20))
    assert [isinstance(hint, HintRefused) for hint in hints] == [False] * 16 + [True] * 4
