"""KV events of host memory in SGLang's own stream: what joins it, and in which order."""

from types import SimpleNamespace

import pytest
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from smg_sglang.engine.cache import kv_events
from smg_sglang.engine.cache.kv_events import HostEvents
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory.protocol import Changes
from tests.e2e.conftest import eventually
from tests.tier.test_host_picture import keys

PAGE = 2


class Connection:
    """A memory server that says what it is told to; None: it does not answer."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def changes(self, since, timeout_s):
        self.asked.append(since)
        answer = self.answers.pop(0) if self.answers else (since, False, [])
        if answer is None:
            raise MemoryUnavailable("silent")
        return Changes(0, *answer)


@pytest.fixture
def world(monkeypatch):
    """(events, connections): what the thread asks is in `connections.now`."""
    monkeypatch.setattr(kv_events, "ASK_EVERY_S", 0.001)
    connections = SimpleNamespace(now=None)
    connections.background = lambda: connections.now
    events = HostEvents(SimpleNamespace(connections=connections), PAGE)
    yield events, connections
    events.close()


def on_device(*names, parent=None, **more):
    tokens = [token for name in names for token in (name, -name)]
    return BlockStored(list(names), parent, tokens, PAGE, None, medium="GPU", **more)


def host(events):
    return [event for event in events if getattr(event, "medium", None) == "CPU_PINNED"]


def heard(events, count=1):
    """Events of host memory, once there are so many."""
    found = []

    def enough():
        found.extend(host(events.take([])))
        return len(found) >= count

    eventually(enough, "nothing was told")
    return found


def test_pages_that_come_are_stored_with_the_tokens_and_the_parent_of_the_device(world):
    events, connections = world
    device = on_device(1, 2, parent=9)
    assert events.take([device]) == [device]
    connections.now = Connection((7, True, [(True, keys(1, 2))]))
    (stored,) = heard(events)
    assert (stored.block_hashes, stored.parent_block_hash) == ([1, 2], 9)
    assert (stored.token_ids, stored.block_size) == ([1, -1, 2, -2], PAGE)
    eventually(lambda: len(connections.now.asked) > 2, "it is asked again")
    assert connections.now.asked[:3] == [-1, 7, 7]


def test_pages_that_went_are_removed_and_a_server_that_is_gone_has_none(world):
    events, connections = world
    events.take([on_device(1, 2, 3)])
    connections.now = Connection((1, True, [(True, keys(1, 2, 3))]), (2, False, [(False, keys(3))]))
    removed = [event for event in heard(events, 2) if isinstance(event, BlockRemoved)]
    assert [event.block_hashes for event in removed] == [[3]]
    connections.now = None
    (removed,) = heard(events)
    assert sorted(removed.block_hashes) == [1, 2]


def test_after_silence_all_is_asked_for(world):
    events, connections = world
    connections.now = Connection((1, True, []), None, (5, True, []))
    eventually(lambda: len(connections.now.asked) > 3, "it is asked again")
    assert connections.now.asked[:4] == [-1, 1, -1, 5]
    assert events.take([]) == []


def test_a_flush_is_told_once_and_what_was_asked_before_it_is_void(world):
    events, connections = world
    events.take([on_device(1)])
    connections.now = Connection((1, True, [(True, keys(1))]))
    eventually(lambda: len(connections.now.asked) > 1, "it is asked")
    assert events.take([AllBlocksCleared()]) == [AllBlocksCleared()]
    asked = len(connections.now.asked)
    eventually(lambda: -1 in connections.now.asked[asked:], "all is asked for again")
    assert host(events.take([on_device(1)])) == []


@pytest.mark.parametrize("of", [{"cache_salt": "tenant"}, {"lora_name": "adapter"}])
def test_blocks_with_hashes_of_their_own_are_told_for_the_device_only(world, of):
    events, connections = world
    device = on_device(1, **of)
    connections.now = Connection((1, True, [(True, keys(1))]))
    eventually(lambda: len(connections.now.asked) > 1, "it is asked")
    assert events.take([device]) == [device]
    assert host(events.take([])) == []


def test_events_of_the_device_stay_in_their_order(world):
    events, _ = world
    given = [on_device(1), BlockRemoved([1], medium="GPU"), on_device(2)]
    assert events.take(given) == given
