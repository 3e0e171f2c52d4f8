"""0014: hints without a request reach the cache, and its words come back."""

from __future__ import annotations

from collections import defaultdict
from unittest.mock import MagicMock

import pytest

from smg_sglang.engine.cache import hint_messages

SCHEDULER = "sglang.srt.managers.scheduler"
TARGET = "managers.scheduler.Scheduler.init_request_dispatcher"


class Ours:
    """A cache that takes hints."""

    def take_kv_hints(self, message):
        return [f"{action} of {message.input_ids}" for action in message.kv_hints]


class Theirs:
    """A cache that knows nothing of them."""


def answer(source, wrap, tree_cache, messages):
    """What a scheduler answers to two actions about three tokens."""
    from sglang.utils import TypeBasedDispatcher

    scheduler = MagicMock(tree_cache=tree_cache)
    known = {"KvHintsReqInput", "KvHintsReqOutput"}
    names = {name: getattr(messages, name) for name in known}
    others = defaultdict(lambda: type("Other", (), {}))
    types = {
        name: others[name]
        for name in source.function(
            SCHEDULER, "Scheduler.init_request_dispatcher"
        ).__code__.co_names
        if name.endswith(("Input", "Req", "Reqs")) and name not in known
    }
    given = {"TypeBasedDispatcher": TypeBasedDispatcher, **names, **types}
    if source.path(SCHEDULER).read_text().count("def take_kv_hints"):
        take = source.function(SCHEDULER, "Scheduler.take_kv_hints", **names)
        scheduler.take_kv_hints = lambda message: take(scheduler, message)
    init = source.function(SCHEDULER, "Scheduler.init_request_dispatcher", **given)
    wrap(init)(scheduler)
    message = messages.KvHintsReqInput(input_ids=[1, 2, 3], kv_hints=["a", "b"])
    return scheduler._request_dispatcher(message)


@pytest.mark.parametrize(
    ("cache", "expected"), [(Ours, ["a of [1, 2, 3]", "b of [1, 2, 3]"]), (Theirs, [])]
)
def test_hook_and_patch_hand_hints_to_the_cache(hooks, stock, patched, cache, expected):
    base = patched.module("sglang.srt.mem_cache.base_prefix_cache").BasePrefixCache
    inherits = type("Inherits", (cache,), {})
    if cache is Theirs:
        inherits.take_kv_hints = base.take_kv_hints
    theirs = patched.module("sglang.srt.managers.io_struct")
    with_hook = answer(stock, lambda f: hooks.wrap(TARGET, f), cache(), hint_messages)
    with_patch = answer(patched, lambda f: f, inherits(), theirs)
    assert with_hook.outcomes == with_patch.outcomes == expected


def test_the_messages_are_those_of_the_patch(patched):
    theirs = patched.module("sglang.srt.managers.io_struct")
    for name in ("KvHintsReqInput", "KvHintsReqOutput"):
        ours, other = getattr(hint_messages, name), getattr(theirs, name)
        assert ours.__struct_fields__ == other.__struct_fields__
        assert ours.__struct_config__.tag == other.__struct_config__.tag
